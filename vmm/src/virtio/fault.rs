//! What the guest broke, and who is told. A fault ends the device, not the VM: `DEVICE_NEEDS_RESET`.

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use super::{chain::RingError, queue::SetupError};

/// Why a device went to `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    #[error("queue {queue} cannot be used")]
    Setup { queue: usize, source: SetupError },
    #[error("queue {queue} is corrupt")]
    Ring { queue: usize, source: RingError },
    #[error("what the host put behind the device is gone")]
    Backend(#[source] std::io::Error),
    #[error("the event loop cannot watch the device")]
    Watch(#[source] event_manager::Error),
}

/// Told the device's name and the fault. Called with the device locked, from a vCPU thread or the event
/// loop's: it must not block and must not touch the device.
pub type FaultSink = Arc<dyn Fn(&str, &(dyn Error + 'static)) + Send + Sync>;

/// Reports of one device in its lifetime: one for each activation, until a guest makes a habit of it.
const MAX_REPORTS: u32 = 16;

/// One device's way to the [`FaultSink`].
pub(super) struct FaultReporter {
    device: String,
    sink: FaultSink,
    left: AtomicU32,
}

impl FaultReporter {
    pub fn new(device: &str, sink: FaultSink) -> Self {
        Self { device: device.to_owned(), sink, left: AtomicU32::new(MAX_REPORTS) }
    }

    pub fn report(&self, fault: &DeviceFault) {
        let left = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if left.is_ok() {
            (self.sink)(&self.device, fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_flood_the_sink() {
        let count = Arc::new(AtomicU32::new(0));
        let counter = count.clone();
        let sink: FaultSink = Arc::new(move |device, fault| {
            assert_eq!((device, fault.to_string().as_str()), ("vda", "queue 1 cannot be used"));
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let reporter = FaultReporter::new("vda", sink);
        for _ in 0..1000 {
            reporter.report(&DeviceFault::Setup { queue: 1, source: SetupError::NotReady });
        }
        assert_eq!(count.load(Ordering::Relaxed), MAX_REPORTS);
    }
}
