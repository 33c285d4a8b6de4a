//! A device's seat in an event loop: turns readable descriptors into calls of the device, and an error
//! of the device into `DEVICE_NEEDS_RESET`. Owns nothing but its share of the device, which may be a part of it that has
//! a lock, and an event loop, of its own.

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Drained, VirtioDevice, Wake,
    fault::{DeviceFault, FaultReporter},
    interrupt::Interrupt,
    lock,
};

/// Event data that stands for the backend; smaller numbers are queues.
const BACKEND: u32 = u32::MAX;

/// What a worker serves. See [`VirtioDevice`] for what it does.
pub trait Seat: Send {
    fn process(&mut self, wake: Wake) -> Result<Drained, DeviceFault>;
    /// After a fault: it falls quiet.
    fn quiet(&mut self);
    fn backend(&self) -> Option<RawFd>;
}

impl Seat for dyn VirtioDevice {
    fn process(&mut self, wake: Wake) -> Result<Drained, DeviceFault> {
        VirtioDevice::process(self, wake)
    }

    fn quiet(&mut self) {
        VirtioDevice::quiet(self);
    }

    fn backend(&self) -> Option<RawFd> {
        VirtioDevice::backend(self)
    }
}

/// Made by [`MmioTransport::worker`](super::transport::MmioTransport::worker) and its neighbour.
pub struct Worker<S: Seat + ?Sized = dyn VirtioDevice> {
    pub(super) seat: Arc<Mutex<S>>,
    /// Those that it serves.
    pub(super) queues: Vec<usize>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) kicks: Arc<[EventFd]>,
    pub(super) faults: Arc<FaultReporter>,
}

impl<S: Seat + ?Sized> Worker<S> {
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
        let mut seat = lock(&self.seat);
        match seat.process(wake) {
            Ok(Drained::Empty) => {}
            Ok(Drained::More) => self.again(wake),
            Err(fault) => {
                seat.quiet();
                self.interrupt.fail();
                self.faults.report(&fault);
            }
        }
    }

    /// Comes back after the other devices had their turn.
    fn again(&self, wake: Wake) {
        let index =
            if let Wake::Queue(index) = wake { Some(index) } else { self.queues.first().copied() };
        if let Some(kick) = index.and_then(|index| self.kicks.get(index)) {
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

impl<S: Seat + ?Sized> MutEventSubscriber for Worker<S> {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if let Some(wake) = self.wake(events.data()) {
            self.run(wake);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for &index in &self.queues {
            if let Some(kick) = self.kicks.get(index) {
                self.watch(ops, kick.as_raw_fd(), index as u32);
            }
        }
        let backend = lock(&self.seat).backend();
        if let Some(fd) = backend {
            self.watch(ops, fd, BACKEND);
        }
    }
}
