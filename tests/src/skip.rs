//! Tests that cannot run here.

use std::{env, fs::OpenOptions, io::Write, path::Path};

/// Writes down why a test is skipped, for the count at the end of `make test`.
pub fn skip(test: &str, why: &str) {
    eprintln!("{test}: skipped: {why}");
    if let Some(out) = env::var_os("AMPOULE_TEST_OUT") {
        let file =
            OpenOptions::new().append(true).create(true).open(Path::new(&out).join("skipped"));
        if let Ok(mut file) = file {
            let _ = writeln!(file, "{test}: {why}");
        }
    }
}
