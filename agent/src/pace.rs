//! How much slower than usual this guest's host is, as that says when it says hello.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

static TIMES: AtomicU32 = AtomicU32::new(1);

/// Things may take so many times as long as usual. 0 is 1.
pub fn set(times: u32) {
    TIMES.store(times.max(1), Ordering::Relaxed);
}

/// For what usually has this limit.
pub fn limit(usual: Duration) -> Duration {
    usual.saturating_mul(TIMES.load(Ordering::Relaxed))
}
