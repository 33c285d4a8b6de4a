//! The way out to the shim. Any thread may send; nobody ever waits: what a slow shim leaves no room for is
//! dropped, but for the last message.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ampoule_vmm_api::{Channel, ChannelError, Event};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    time::{ClockId, clock_gettime},
};

/// A cheap handle on the sending side of the control socket.
#[derive(Clone, Debug)]
pub struct Events(Arc<Channel>);

impl Events {
    pub fn new(channel: Arc<Channel>) -> Self {
        Self(channel)
    }

    /// Sends, or drops the event if the shim is gone or far behind.
    pub fn send(&self, event: &Event) {
        let _ = self.0.send(event, &[]);
    }

    /// Reports a device that the guest broke.
    pub fn device_fault(&self, device: &str, error: String) {
        self.send(&Event::DeviceFault { device: device.into(), error });
    }

    /// Sends the last message, waiting for room until `limit` has passed.
    pub fn send_last(&self, event: &Event, limit: Duration) -> Result<(), ChannelError> {
        let end = Instant::now() + limit;
        loop {
            match self.0.send(event, &[]) {
                Err(e) if e.would_block() && Instant::now() < end => self.wait_for_room(),
                done => return done,
            }
        }
    }

    fn wait_for_room(&self) {
        let mut fds = [PollFd::new(&*self.0, PollFlags::OUT)];
        let step = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        let _ = poll(&mut fds, Some(&step));
    }
}

/// CLOCK_MONOTONIC in nanoseconds: the one clock of all stamps.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use ampoule_vmm_api::{ExitCounts, StopCause};

    use super::*;

    fn stopped() -> Event {
        Event::Stopped {
            cause: StopCause::Requested,
            detail: String::new(),
            exits: ExitCounts::default(),
        }
    }

    #[test]
    fn a_full_socket_drops_events_and_blocks_nobody() {
        let (shim, vmm) = Channel::pair().unwrap();
        let events = Events::new(Arc::new(vmm));
        for i in 0..10_000 {
            events.send(&Event::Stage { mark: 1, at_ns: i });
        }
        let limit = Duration::from_millis(100);
        assert!(events.send_last(&stopped(), limit).unwrap_err().would_block());
        while let Ok((event, _)) = shim.recv::<Event>() {
            assert!(matches!(event, Event::Stage { .. }));
        }
        events.send_last(&stopped(), limit).unwrap();
        assert_eq!(shim.recv::<Event>().unwrap().0, stopped());
    }
}
