//! `ampoule version`.

use crate::{paths::Paths, text::print};

/// Prints our version and where the parts are.
pub fn version(paths: &Paths) -> u8 {
    let mut out = format!("ampoule      {}\n", env!("CARGO_PKG_VERSION"));
    for (what, path) in [
        ("ampoule-vmm", &paths.vmm),
        ("guest kernel", &paths.kernel),
        ("guest image", &paths.guest),
    ] {
        let missing = if path.is_file() { "" } else { " (missing)" };
        out += &format!("{what:12} {}{missing}\n", path.display());
    }
    print(&out);
    0
}
