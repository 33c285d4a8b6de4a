//! How a VM ends: any thread raises a cause, the first one wins, the main thread wakes up and takes the one
//! way out (`builder::Vm::finish`).

use std::{
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use ampoule_vmm_api::StopCause;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the VM ends, and what more there is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    pub cause: StopCause,
    pub detail: String,
}

/// Holds the first cause. Cheap to clone; shared by all threads.
#[derive(Clone, Debug)]
pub struct StopLatch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    first: Mutex<Option<Stop>>,
    panic: OnceLock<String>,
    wake: EventFd,
}

impl StopLatch {
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Shared { first: Mutex::default(), panic: OnceLock::new(), wake })))
    }

    /// The VM has to end. Only the first call counts.
    ///
    /// A panicking kernel ends in a reset; one whose console said that it panics is reported as such.
    pub fn raise(&self, cause: StopCause, detail: impl Into<String>) {
        let mut stop = Stop { cause, detail: detail.into() };
        if let (StopCause::Reset | StopCause::TripleFault, Some(line)) = (cause, self.0.panic.get())
        {
            stop = Stop { cause: StopCause::Panic, detail: line.clone() };
        }
        self.first().get_or_insert(stop);
        let _ = self.0.wake.write(1);
    }

    /// The console said that the kernel panics; `line` is what it said.
    pub fn note_panic(&self, line: &str) {
        let _ = self.0.panic.set(line.to_owned());
    }

    pub fn raised(&self) -> Option<Stop> {
        self.first().clone()
    }

    fn first(&self) -> MutexGuard<'_, Option<Stop>> {
        self.0.first.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// In the event loop, a raised cause does no more than wake it: the loop looks at [`StopLatch::raised`].
impl MutEventSubscriber for StopLatch {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.wake.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new_raw(self.0.wake.as_raw_fd(), EventSet::IN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raised(latch: &StopLatch) -> (StopCause, String) {
        let stop = latch.raised().unwrap();
        (stop.cause, stop.detail)
    }

    #[test]
    fn the_first_cause_wins() {
        let latch = StopLatch::new().unwrap();
        assert_eq!(latch.raised(), None);
        latch.clone().raise(StopCause::PowerOff, "first");
        latch.raise(StopCause::Requested, "second");
        assert_eq!(raised(&latch), (StopCause::PowerOff, "first".into()));
    }

    #[test]
    fn a_reset_after_a_panic_is_the_panic() {
        for (cause, reported) in [
            (StopCause::Reset, StopCause::Panic),
            (StopCause::TripleFault, StopCause::Panic),
            (StopCause::PowerOff, StopCause::PowerOff),
        ] {
            let latch = StopLatch::new().unwrap();
            latch.note_panic("Kernel panic - not syncing: why");
            latch.note_panic("later");
            latch.raise(cause, "");
            assert_eq!(raised(&latch).0, reported);
            if reported == StopCause::Panic {
                assert_eq!(raised(&latch).1, "Kernel panic - not syncing: why");
            }
        }
    }
}
