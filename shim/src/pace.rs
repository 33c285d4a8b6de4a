//! How much slower than usual a host may be. One setting says so, `boot_timeout`; every limit of what a sandbox and
//! its guest do after the boot goes by it.

use std::time::Duration;

/// Longest time in seconds that a VM may take to boot, unless somebody says otherwise.
pub const BOOT_TIMEOUT: u16 = 30;

/// How many times as long as usual things may take: as often as [`BOOT_TIMEOUT`] is in a sandbox's `boot_timeout`,
/// rounded up, and at least once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace(u32);

impl Pace {
    pub fn of(boot_timeout: Duration) -> Self {
        let times = boot_timeout.as_millis().div_ceil(u128::from(BOOT_TIMEOUT) * 1000);
        Self(u32::try_from(times).unwrap_or(u32::MAX).max(1))
    }

    /// For what usually has this limit.
    pub fn limit(self, usual: Duration) -> Duration {
        usual.saturating_mul(self.0)
    }

    pub fn times(self) -> u32 {
        self.0
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_grow_with_the_boot_timeout_and_never_shrink() {
        let usual = Duration::from_secs(10);
        for (boot_timeout, limit) in [(0, 10), (1, 10), (30, 10), (31, 20), (60, 20), (900, 300)] {
            let pace = Pace::of(Duration::from_secs(boot_timeout));
            assert_eq!(pace.limit(usual), Duration::from_secs(limit), "{boot_timeout}");
        }
        assert_eq!(Pace::of(Duration::MAX).times(), u32::MAX);
        assert_eq!(Pace::of(Duration::MAX).limit(Duration::MAX), Duration::MAX);
    }
}
