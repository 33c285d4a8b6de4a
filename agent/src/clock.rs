//! The guest's clock, where the host says what it is to show.

use rustix::{
    io::Result,
    time::{ClockId, Timespec, clock_settime},
};

const SECOND: u64 = 1_000_000_000;

/// Sets CLOCK_REALTIME, in nanoseconds. The kernel refuses a time at which the guest would have booted before 1970.
pub fn set(realtime_ns: u64) -> Result<()> {
    let now =
        Timespec { tv_sec: (realtime_ns / SECOND) as i64, tv_nsec: (realtime_ns % SECOND) as i64 };
    clock_settime(ClockId::Realtime, now)
}
