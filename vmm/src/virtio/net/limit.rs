//! How fast frames may pass, for each direction: token buckets, and the timer that says when to go on. A
//! frame over the limit waits where it is; none is dropped for it. All pairs of queues of a device share them: at most one
//! frame of each passes at the same time.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::{Arc, Mutex},
};

use ampoule_vmm_api::{NetConfig, Rate, RateLimit};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::{events::now_ns, virtio::lock};

const SECOND: i128 = 1_000_000_000;

/// Those of a device.
#[derive(Clone, Debug)]
pub struct Limits {
    pub to_guest: Arc<Limiter>,
    pub from_guest: Arc<Limiter>,
}

impl Limits {
    pub fn new(config: &NetConfig) -> io::Result<Self> {
        Ok(Self {
            to_guest: Arc::new(Limiter::new(&config.to_guest)?),
            from_guest: Arc::new(Limiter::new(&config.from_guest)?),
        })
    }

    /// Those that there are.
    pub fn timers(&self) -> impl Iterator<Item = RawFd> {
        [&self.to_guest, &self.from_guest].into_iter().filter_map(|limiter| limiter.timer())
    }
}

/// One direction's limits. Without any, it costs nothing.
#[derive(Debug)]
pub struct Limiter {
    /// Of bytes and of packets.
    buckets: Mutex<[Option<Bucket>; 2]>,
    timer: Option<OwnedFd>,
}

impl Limiter {
    pub fn new(limit: &RateLimit) -> io::Result<Self> {
        let now = now_ns();
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        let buckets = [bucket(limit.bytes), bucket(limit.packets)];
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = match &buckets {
            [None, None] => None,
            _ => Some(timerfd_create(TimerfdClockId::Monotonic, flags)?),
        };
        Ok(Self { buckets: Mutex::new(buckets), timer })
    }

    /// Becomes readable when there is a point in trying again; only a change counts.
    pub fn timer(&self) -> Option<RawFd> {
        self.timer.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether a frame may pass now. If not, the timer is set.
    pub fn may_pass(&self) -> bool {
        let Some(timer) = &self.timer else { return true };
        // Until the timer is set: the last one to set it knows of the longest wait.
        let mut buckets = lock(&self.buckets);
        let now = now_ns();
        let buckets = buckets.iter_mut().flatten();
        let wait = buckets.map(|bucket| bucket.wait(now)).max().unwrap_or(0);
        if wait == 0 {
            return true;
        }
        let time = |ns: u64| Timespec {
            tv_sec: (ns / SECOND as u64) as i64,
            tv_nsec: (ns % SECOND as u64) as i64,
        };
        let value = Itimerspec { it_interval: time(0), it_value: time(wait) };
        // Fails for no time that is made here; a frame too early is better than one never.
        timerfd_settime(timer, TimerfdTimerFlags::empty(), &value).is_err()
    }

    /// A frame of so many bytes has passed.
    pub fn charge(&self, bytes: usize) {
        if self.timer.is_none() {
            return;
        }
        let [of_bytes, of_packets] = &mut *lock(&self.buckets);
        of_bytes.iter_mut().for_each(|bucket| bucket.take(bytes as u64));
        of_packets.iter_mut().for_each(|bucket| bucket.take(1));
    }
}

/// A token bucket that goes into debt for the last frame, and is closed until that is paid back.
#[derive(Debug)]
pub struct Bucket {
    rate: Rate,
    /// Billionths of tokens, below 0 in debt.
    level: i128,
    updated_ns: u64,
}

impl Bucket {
    pub fn new(rate: Rate, now_ns: u64) -> Self {
        Self { rate, level: full(rate), updated_ns: now_ns }
    }

    /// Nanoseconds until a frame may pass; 0: now.
    pub fn wait(&mut self, now_ns: u64) -> u64 {
        let (passed, rate) = (now_ns.saturating_sub(self.updated_ns), self.per_second());
        self.level = full(self.rate).min(self.level + i128::from(passed) * rate);
        self.updated_ns = now_ns;
        if self.level > 0 {
            return 0;
        }
        u64::try_from(-self.level / rate + 1).unwrap_or(u64::MAX).min(SECOND as u64)
    }

    pub fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * SECOND;
    }

    fn per_second(&self) -> i128 {
        i128::from(self.rate.per_second.max(1))
    }
}

fn full(rate: Rate) -> i128 {
    i128::from(rate.burst.max(1)) * SECOND
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let mut bucket = Bucket::new(Rate { per_second: 1000, burst: 500 }, 0);
        bucket.take(499);
        assert_eq!(bucket.wait(0), 0);
        bucket.take(101);
        assert_eq!(bucket.wait(0), 100_000_001, "100 in debt");
        assert_eq!(bucket.wait(50_000_000), 50_000_001);
        assert_eq!(bucket.wait(100_000_001), 0);
        assert_eq!(bucket.wait(u64::MAX), 0);
        assert_eq!(bucket.level, 500 * SECOND, "never more than a burst");
    }

    #[test]
    fn no_limit_is_no_timer() {
        let limiter = Limiter::new(&RateLimit::default()).unwrap();
        limiter.charge(usize::MAX);
        assert!(limiter.may_pass() && limiter.timer().is_none());
    }

    proptest! {
        /// Over any time, no more passes than the burst, the rate and one frame; and a wait that is kept is
        /// enough, a second at most.
        #[test]
        fn no_more_passes_than_was_said(
            per_second in 1u64..=u64::from(u32::MAX),
            burst in 1u64..=u64::from(u32::MAX),
            frames in proptest::collection::vec(1u64..70_000, 1..200),
        ) {
            let mut bucket = Bucket::new(Rate { per_second, burst }, 0);
            let (mut now, mut passed) = (0, 0u128);
            for frame in frames {
                let wait = bucket.wait(now);
                prop_assert!(wait <= SECOND as u64);
                now += wait;
                if bucket.wait(now) == 0 {
                    bucket.take(frame);
                    passed += u128::from(frame);
                    let most = u128::from(now) * u128::from(per_second) / SECOND as u128;
                    prop_assert!(passed <= most + u128::from(burst) + u128::from(frame));
                }
            }
        }
    }
}
