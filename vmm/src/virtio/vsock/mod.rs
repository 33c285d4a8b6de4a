//! The vsock device (virtio 1.2, 5.10): the guest's streams end in socketpairs of the host.
//!
//! - [`packet`]: headers and payloads, parsed
//! - [`credit`]: flow control, the arithmetic
//! - [`stream`]: one end of a socketpair
//! - [`to_host`]: the guest's bytes on their way to the host
//! - [`connection`]: one connection and its end
//! - [`mux`]: all of them, and whose turn it is
//!
//! Bytes for the host go straight from guest memory into the stream; bytes for the guest straight from the
//! stream into receive buffers, and are read only when there is one and the guest has given credit for
//! them. Nothing is polled: every descriptor reports once per change.

pub mod connection;
pub mod credit;
pub mod mux;
pub mod packet;
pub mod stream;
pub mod to_host;

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    sync::Arc,
};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{
    Active, Drained, VirtioDevice, Wake, chain::RingError, copy_config, fault::DeviceFault,
    interrupt::Interrupt, queue::VirtQueue,
};
use crate::memory::GuestMemory;
use mux::Mux;
pub use mux::StreamError;
use packet::{HEADER_LEN, Malformed};

/// Receive, transmit, event (5.10.2). Events tell of migration: there are none.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Packets in one turn, in each direction.
const TURN: usize = 64;

/// The host's end of the guest's vsock.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u32,
    interrupt: Arc<Interrupt>,
    mux: Mux,
    active: Option<Active>,
}

impl Vsock {
    /// `cid` is the guest's context id.
    pub fn new(cid: u32) -> io::Result<Self> {
        Ok(Self {
            guest_cid: cid,
            interrupt: Arc::new(Interrupt::new()?),
            mux: Mux::new(cid)?,
            active: None,
        })
    }

    /// The guest's next connection to host port `port` is spliced to `stream`, one end of a socketpair of
    /// type `SOCK_STREAM`. Once; several for the same port are used in order. Until then, and across
    /// resets of the device, it waits.
    pub fn listen(&mut self, port: u32, stream: OwnedFd) -> Result<(), StreamError> {
        self.mux.listen(port, stream)
    }

    /// Connects to guest port `port`, as soon as there is a driver. A refusal closes `stream`, which until
    /// then can be written to.
    pub fn connect(&mut self, port: u32, stream: OwnedFd) -> Result<(), StreamError> {
        self.mux.connect(port, stream)
    }

    /// Whether everything the guest sent is with the host: a VM that ends before takes bytes with it.
    pub fn is_flushed(&self) -> bool {
        self.mux.is_flushed()
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// `struct virtio_vsock_config` (5.10.4): the guest's context id.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    fn reset(&mut self) {
        if self.active.take().is_some() {
            self.mux.reset();
        }
    }

    fn process(&mut self, wake: Wake) -> Result<Drained, DeviceFault> {
        if wake == Wake::Backend {
            self.mux.poll();
        }
        let Some(Active { memory, queues, .. }) = &mut self.active else {
            return Ok(Drained::Empty);
        };
        let fault = |queue| move |source| DeviceFault::Ring { queue, source };
        let mut drained = Drained::Empty;
        if wake == Wake::Queue(TRANSMIT) {
            drained =
                transmit(memory, &mut queues[TRANSMIT], &mut self.mux).map_err(fault(TRANSMIT))?;
        }
        let filled =
            receive(memory, &mut queues[RECEIVE], &mut self.mux).map_err(fault(RECEIVE))?;
        for index in [RECEIVE, TRANSMIT] {
            queues[index].notify(memory, &self.interrupt).map_err(fault(index))?;
        }
        Ok(if filled == Drained::More { filled } else { drained })
    }

    fn backend(&self) -> Option<RawFd> {
        Some(self.mux.fd())
    }
}

/// Takes the guest's packets.
fn transmit(
    memory: &GuestMemory,
    queue: &mut VirtQueue,
    mux: &mut Mux,
) -> Result<Drained, RingError> {
    for _ in 0..TURN {
        let Some(chain) = queue.pop(memory)? else { return Ok(Drained::Empty) };
        match packet::parse(memory, &chain) {
            Ok(packet) => mux.receive(packet),
            Err(Malformed::Bad(header)) => mux.receive_malformed(&header),
            Err(Malformed::NoHeader) => {}
        }
        queue.complete(memory, &chain, 0)?;
    }
    Ok(Drained::More)
}

/// Gives the guest its packets, while it has buffers. A buffer that is outside RAM or has no room for a
/// payload is given back empty.
fn receive(
    memory: &GuestMemory,
    queue: &mut VirtQueue,
    mux: &mut Mux,
) -> Result<Drained, RingError> {
    for _ in 0..TURN {
        if !mux.has_packets() {
            return Ok(Drained::Empty);
        }
        let Some(chain) = queue.pop(memory)? else { return Ok(Drained::Empty) };
        let Some(buffers) = chain.writable(memory).ok().filter(|b| b.len() > HEADER_LEN) else {
            queue.complete(memory, &chain, 0)?;
            continue;
        };
        let (head, room) = buffers.split_at(HEADER_LEN);
        match mux.next_packet(&room) {
            Some(header) => {
                head.copy_from(&header.to_bytes());
                queue.complete(memory, &chain, HEADER_LEN as u32 + header.len)?;
            }
            None => queue.put_back(&chain),
        }
    }
    Ok(Drained::More)
}

#[cfg(test)]
mod tests;
