//! The ports that are ampoule's own ([`ampoule_vmm_api::guest`]), and the one command of a keyboard controller
//! that Linux uses to reset a PC.

use std::sync::Arc;

use ampoule_vmm_api::{
    Event, StopCause,
    guest::{MAX_MARKS, Mark, POWER_PORT, STAGE_PORT},
};

use crate::{
    bus::BusDevice,
    counters::ExitCounters,
    events::{Events, now_ns},
    stop::StopLatch,
};

/// Command port of a PC's keyboard controller, and the command to pulse the reset line.
pub const RESET_PORT: u64 = 0x64;
const RESET_COMMAND: u8 = 0xfe;

/// Stage marks and power-off: [`STAGE_PORT`] and [`POWER_PORT`], which are neighbours.
pub struct StagePort {
    events: Events,
    counters: Arc<ExitCounters>,
    latch: StopLatch,
    marks: u32,
}

impl StagePort {
    pub const START: u64 = STAGE_PORT as u64;
    pub const LEN: u64 = 2;
    const POWER: u64 = (POWER_PORT - STAGE_PORT) as u64;

    pub fn new(events: Events, counters: Arc<ExitCounters>, latch: StopLatch) -> Self {
        Self { events, counters, latch, marks: 0 }
    }

    fn mark(&mut self, mark: u8) {
        if self.marks < MAX_MARKS {
            self.marks += 1;
            if mark == Mark::Hello as u8 {
                self.counters.mark_hello();
            }
            self.events.send(&Event::Stage { mark, at_ns: now_ns() });
        }
    }
}

impl BusDevice for StagePort {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[mark]) => self.mark(mark),
            (Self::POWER, [_]) => self.latch.raise(StopCause::PowerOff, ""),
            _ => {}
        }
    }
}

/// [`RESET_PORT`]: always ready, knows one command.
pub struct ResetPort(pub StopLatch);

impl BusDevice for ResetPort {
    /// Zero: no key waits, and the next command may be written.
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        if data == [RESET_COMMAND] {
            self.0.raise(StopCause::Reset, "");
        }
    }
}

#[cfg(test)]
mod tests {
    use ampoule_vmm_api::Channel;

    use super::*;
    use crate::counters::count;

    fn ports() -> (Channel, StagePort, Arc<ExitCounters>, StopLatch) {
        let (shim, vmm) = Channel::pair().unwrap();
        let counters = Arc::new(ExitCounters::default());
        let latch = StopLatch::new().unwrap();
        let port = StagePort::new(Events::new(Arc::new(vmm)), counters.clone(), latch.clone());
        (shim, port, counters, latch)
    }

    #[test]
    fn marks_are_forwarded_up_to_the_limit() {
        let (shim, mut port, _, latch) = ports();
        for mark in 0..=255 {
            port.write(0, &[mark]);
        }
        let marks: Vec<u8> = std::iter::from_fn(|| shim.recv::<Event>().ok())
            .map(|(event, _)| match event {
                Event::Stage { mark, .. } => mark,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(marks, (0..MAX_MARKS as u8).collect::<Vec<_>>());
        assert_eq!(latch.raised(), None);
    }

    #[test]
    fn hello_marks_the_exits_until_then() {
        let (_shim, mut port, counters, _) = ports();
        count(&counters.mmio_write);
        port.write(0, &[Mark::Hello as u8]);
        count(&counters.mmio_write);
        assert_eq!(counters.snapshot().until_hello, 1);
    }

    #[test]
    fn the_power_port_ends_the_vm() {
        let (_shim, mut port, _, latch) = ports();
        port.write(StagePort::POWER, &[0]);
        assert_eq!(latch.raised().unwrap().cause, StopCause::PowerOff);
    }

    #[test]
    fn only_the_reset_command_resets() {
        let latch = StopLatch::new().unwrap();
        let mut port = ResetPort(latch.clone());
        let mut status = [0xaa];
        port.read(0, &mut status);
        assert_eq!(status, [0]);
        for other in (0..=255).filter(|command| *command != RESET_COMMAND) {
            port.write(0, &[other]);
        }
        assert_eq!(latch.raised(), None);
        port.write(0, &[RESET_COMMAND]);
        assert_eq!(latch.raised().unwrap().cause, StopCause::Reset);
    }

    /// Row A14: other widths do nothing.
    #[test]
    fn a14_odd_widths_are_ignored() {
        let (shim, mut port, _, latch) = ports();
        for offset in 0..2 {
            port.write(offset, &[]);
            port.write(offset, &[0xfe, 0xfe]);
            port.write(offset, &[0xfe; 4]);
        }
        ResetPort(latch.clone()).write(0, &[RESET_COMMAND; 2]);
        assert!(shim.recv::<Event>().unwrap_err().would_block());
        assert_eq!(latch.raised(), None);
    }
}
