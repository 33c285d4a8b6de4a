//! COM1: what the guest writes goes to the console ring, which never blocks; nothing comes back. The one
//! thing read out of it is whether the kernel says that it panics.

use std::{
    io::{self, Write},
    sync::Arc,
};

use ampoule_vmm_api::console::ConsoleWriter;
use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::{bus::BusDevice, stop::StopLatch};

/// First port of COM1 and how many it has.
pub const PORT: u64 = 0x3f8;
pub const PORTS: u64 = 8;
/// Its interrupt.
pub const IRQ: u32 = 4;

const PANIC: &[u8] = b"Kernel panic - not syncing";
/// Bytes of a line looked at.
const LINE: usize = 200;

/// An 16550A whose output is a [`Console`].
pub struct SerialPort(Serial<Interrupt, NoEvents, Console>);

impl SerialPort {
    /// `interrupt` is KVM's irqfd for [`IRQ`].
    pub fn new(interrupt: Arc<EventFd>, console: ConsoleWriter, latch: StopLatch) -> Self {
        let console = Console { ring: console, latch, line: Vec::with_capacity(LINE) };
        Self(Serial::new(Interrupt(interrupt), console))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match data {
            [byte] => *byte = self.0.read(offset as u8),
            wide => wide.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            // The ring takes everything; an interrupt that cannot be raised is pending already.
            let _ = self.0.write(offset as u8, *byte);
        }
    }
}

struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The ring, and the beginning of the line being written.
struct Console {
    ring: ConsoleWriter,
    latch: StopLatch,
    line: Vec<u8>,
}

impl Console {
    fn follow(&mut self, byte: u8) {
        match byte {
            b'\n' => {
                if let Some(at) = find(&self.line, PANIC) {
                    self.latch.note_panic(String::from_utf8_lossy(&self.line[at..]).trim_end());
                }
                self.line.clear();
            }
            _ if self.line.len() < LINE => self.line.push(byte),
            _ => {}
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.ring.write(bytes);
        bytes.iter().for_each(|byte| self.follow(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn find(line: &[u8], words: &[u8]) -> Option<usize> {
    line.windows(words.len()).position(|window| window == words)
}

#[cfg(test)]
mod tests {
    use ampoule_vmm_api::{
        StopCause,
        console::{ConsoleReader, RING},
    };

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const THRE: u8 = 2;

    fn port() -> (SerialPort, ConsoleReader, StopLatch, Arc<EventFd>) {
        let (reader, fd) = ConsoleReader::new().unwrap();
        let latch = StopLatch::new().unwrap();
        let interrupt = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let writer = ConsoleWriter::new(fd).unwrap();
        (SerialPort::new(interrupt.clone(), writer, latch.clone()), reader, latch, interrupt)
    }

    fn say(port: &mut SerialPort, text: &str) {
        text.bytes().for_each(|byte| port.write(DATA, &[byte]));
    }

    #[test]
    fn a_panic_on_the_console_is_noted() {
        let (mut port, reader, latch, _) = port();
        say(&mut port, "[    0.5] Kernel panic - not syncing: VFS: no root\r\nmore\n");
        latch.raise(StopCause::Reset, "");
        let stop = latch.raised().unwrap();
        assert_eq!(stop.cause, StopCause::Panic);
        assert_eq!(stop.detail, "Kernel panic - not syncing: VFS: no root");
        assert!(reader.tail().unwrap().ends_with(b"more\n"));
    }

    #[test]
    fn other_lines_are_no_panic() {
        let (mut port, _, latch, _) = port();
        say(&mut port, &"x".repeat(LINE));
        say(&mut port, "Kernel panic - not syncing\nKernel panic -\n not syncing\n");
        latch.raise(StopCause::Reset, "");
        assert_eq!(latch.raised().unwrap().cause, StopCause::Reset);
    }

    /// Row S1: a flood costs no memory; the ring keeps the end of it. (A GB takes minutes unoptimised; the
    /// state after 64 rings is that after 65 536.)
    #[test]
    fn s1_a_flood_is_bounded() {
        let (mut port, reader, _, _) = port();
        for i in 0..64 * RING {
            port.write(DATA, &[b'a' + (i % 23) as u8]);
        }
        assert!(port.0.writer().line.capacity() <= LINE);
        assert_eq!(reader.tail().unwrap().len(), RING);
    }

    /// Row S1: toggling the transmitter's interrupt raises it a bounded number of times, reads never block.
    #[test]
    fn s1_toggling_the_transmitter_interrupt_is_harmless() {
        let (mut port, _, _, interrupt) = port();
        for _ in 0..100_000 {
            port.write(INTERRUPT_ENABLE, &[THRE]);
            port.write(INTERRUPT_ENABLE, &[0]);
            port.write(DATA, b"x");
        }
        assert!(interrupt.read().unwrap() <= 100_000);
    }

    /// Row A14: every register, all widths.
    #[test]
    fn a14_odd_widths_are_ignored() {
        let (mut port, reader, _, _) = port();
        for offset in 0..PORTS {
            for width in [0, 2, 4, 8] {
                let mut data = vec![0; width];
                port.read(offset, &mut data);
                assert!(data.iter().all(|&byte| byte == 0xff));
                port.write(offset, &data);
            }
        }
        assert_eq!(reader.tail().unwrap(), b"");
    }
}
