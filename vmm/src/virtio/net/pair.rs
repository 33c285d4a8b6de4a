//! A receive and a transmit queue, and the tap's queue behind them. The first pair of a device is the device's own; each
//! further one has a lock, and a thread, of its own, and is in use when the driver says so.

use std::{os::fd::RawFd, sync::Arc};

use super::{frame::Rules, receive::Receiver, tap::Tap, transmit, usage::Usage};
use crate::{
    memory::GuestMemory,
    virtio::{
        Drained, Wake, chain::RingError, fault::DeviceFault, interrupt::Interrupt,
        queue::VirtQueue, worker::Seat,
    },
};

/// See the top of this file.
#[derive(Debug)]
pub struct Pair {
    number: usize,
    interrupt: Arc<Interrupt>,
    usage: Arc<Usage>,
    pub tap: Tap,
    active: Option<Active>,
    /// Frames of the guest's that were not sent.
    refused: u64,
}

#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    rules: Rules,
    receiver: Receiver,
    receive: VirtQueue,
    transmit: VirtQueue,
}

/// The indexes of a pair's two queues (5.1.2).
pub fn queues(number: usize) -> [usize; 2] {
    [2 * number, 2 * number + 1]
}

impl Pair {
    pub fn new(number: usize, tap: Tap, interrupt: Arc<Interrupt>, usage: Arc<Usage>) -> Self {
        Self { number, interrupt, usage, tap, active: None, refused: 0 }
    }

    pub fn activate(
        &mut self,
        memory: GuestMemory,
        rules: Rules,
        receiver: Receiver,
        [receive, transmit]: [VirtQueue; 2],
    ) {
        self.refused = 0;
        self.active = Some(Active { memory, rules, receiver, receive, transmit });
    }

    /// Has the host use it as the driver does. What has come of a frame when that ends is nobody's.
    fn attach(&mut self) {
        let attached = self.usage.includes(self.number);
        self.tap.attach(attached);
        if let (Some(active), false) = (&mut self.active, attached) {
            active.receiver.forget();
        }
    }

    /// Gives up the queues.
    pub fn reset(&mut self) {
        self.active = None;
    }

    /// Frames dropped since the last reset, from the guest and to it.
    pub fn dropped(&self) -> [u64; 2] {
        [self.refused, self.active.as_ref().map_or(0, |active| active.receiver.dropped())]
    }
}

impl Seat for Pair {
    /// Both directions at each wake: the rings say what there is to do. Another pair's fault is the device's.
    fn process(&mut self, wake: Wake) -> Result<Drained, DeviceFault> {
        if wake == Wake::Backend {
            self.tap.poll();
        }
        self.attach();
        let Some(active) = self.active.as_mut().filter(|_| !self.interrupt.needs_reset()) else {
            return Ok(Drained::Empty);
        };
        let Active { memory, rules, receiver, receive, transmit } = active;
        let [receives, transmits] = queues(self.number);
        let fault = |queue| move |source: RingError| DeviceFault::Ring { queue, source };
        let sent = transmit::pump(memory, transmit, &mut self.tap, rules, &mut self.refused)
            .map_err(fault(transmits))?;
        let received = receiver.pump(memory, receive, &mut self.tap).map_err(fault(receives))?;
        receive.notify(memory, &self.interrupt).map_err(fault(receives))?;
        transmit.notify(memory, &self.interrupt).map_err(fault(transmits))?;
        match self.tap.take_failure() {
            Some(error) => Err(DeviceFault::Backend(error)),
            None if sent == Drained::More => Ok(sent),
            None => Ok(received),
        }
    }

    fn quiet(&mut self) {
        self.reset();
    }

    fn backend(&self) -> Option<RawFd> {
        Some(self.tap.event())
    }
}
