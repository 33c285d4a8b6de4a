//! How much of something a test does.

use std::env;

/// One number for every day, one for `AMPOULE_SCALE=full`.
pub fn scaled(everyday: usize, full: usize) -> usize {
    if env::var("AMPOULE_SCALE").is_ok_and(|scale| scale == "full") { full } else { everyday }
}
