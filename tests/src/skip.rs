//! Tests that cannot run here.

use std::{env, fs, path::Path};

/// Writes down why a test is skipped, for the count at the end of `make test`: a file for each test, as several beds write
/// at once.
pub fn skip(test: &str, why: &str) {
    eprintln!("{test}: skipped: {why}");
    if let Some(out) = env::var_os("AMPOULE_TEST_OUT") {
        let folder = Path::new(&out).join("skipped");
        let _ = fs::create_dir_all(&folder);
        let _ = fs::write(folder.join(test), format!("{test}: {why}\n"));
    }
}
