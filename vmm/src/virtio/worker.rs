//! A device's seat in the event loop: turns readable descriptors into calls of the device, and an error
//! of the device into `DEVICE_NEEDS_RESET`. Owns nothing but its share of the device.

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Drained, SharedDevice, Wake,
    fault::{DeviceFault, FaultReporter},
    interrupt::Interrupt,
    lock,
};

/// Event data that stands for the backend; smaller numbers are queues.
const BACKEND: u32 = u32::MAX;

/// Made by [`MmioTransport::worker`](super::transport::MmioTransport::worker).
pub struct Worker {
    pub(super) device: SharedDevice,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) kicks: Arc<[EventFd]>,
    pub(super) faults: Arc<FaultReporter>,
}

impl Worker {
    /// What one event means; drains the kick.
    fn wake(&self, data: u32) -> Option<Wake> {
        if data == BACKEND {
            return Some(Wake::Backend);
        }
        let index = data as usize;
        // EAGAIN: somebody drained it before; the queue is looked at all the same.
        let _ = self.kicks.get(index)?.read();
        Some(Wake::Queue(index))
    }

    /// Runs the device once. A fault leaves it reset and quiet, and the driver told.
    pub(super) fn run(&self, wake: Wake) {
        let mut device = lock(&self.device);
        match device.process(wake) {
            Ok(Drained::Empty) => {}
            Ok(Drained::More) => self.again(wake),
            Err(fault) => {
                device.reset();
                self.interrupt.fail();
                self.faults.report(&fault);
            }
        }
    }

    /// Comes back after the other devices had their turn.
    fn again(&self, wake: Wake) {
        let index = if let Wake::Queue(index) = wake { index } else { 0 };
        if let Some(kick) = self.kicks.get(index) {
            // A full eventfd is a pending kick: nothing is lost.
            let _ = kick.write(1);
        }
    }

    fn watch(&self, ops: &mut EventOps, fd: RawFd, data: u32) {
        if let Err(e) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
            self.faults.report(&DeviceFault::Watch(e));
        }
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if let Some(wake) = self.wake(events.data()) {
            self.run(wake);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (index, kick) in (0..).zip(self.kicks.iter()) {
            self.watch(ops, kick.as_raw_fd(), index);
        }
        let backend = lock(&self.device).backend();
        if let Some(fd) = backend {
            self.watch(ops, fd, BACKEND);
        }
    }
}
