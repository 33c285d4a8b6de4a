//! `ampoule version`.

use crate::paths::Paths;

/// Prints our version and where the parts are.
pub fn version(paths: &Paths) -> u8 {
    println!("ampoule      {}", env!("CARGO_PKG_VERSION"));
    for (what, path) in [
        ("ampoule-vmm", &paths.vmm),
        ("guest kernel", &paths.kernel),
        ("guest image", &paths.guest),
    ] {
        let missing = if path.is_file() { "" } else { " (missing)" };
        println!("{what:12} {}{missing}", path.display());
    }
    0
}
