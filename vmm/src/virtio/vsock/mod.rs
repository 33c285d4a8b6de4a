//! The vsock device (virtio 1.2, 5.10).

use std::{io, os::fd::OwnedFd, sync::Arc};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{
    Active, Drained, VirtioDevice, Wake, copy_config, fault::DeviceFault, interrupt::Interrupt,
};

/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Why a stream was not taken.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("there are already {0} streams")]
    TooMany(usize),
    #[error("the stream cannot be watched")]
    Watch(#[source] io::Error),
}

/// The host's end of the guest's vsock.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u32,
    interrupt: Arc<Interrupt>,
    active: Option<Active>,
}

impl Vsock {
    /// `cid` is the guest's context id.
    pub fn new(cid: u32) -> io::Result<Self> {
        Ok(Self { guest_cid: cid, interrupt: Arc::new(Interrupt::new()?), active: None })
    }

    /// The guest's next connection to host port `port` is spliced to `stream`.
    pub fn listen(&mut self, _port: u32, _stream: OwnedFd) -> Result<(), StreamError> {
        Ok(())
    }

    /// Connects to guest port `port`; a refusal closes `stream`.
    pub fn connect(&mut self, _port: u32, _stream: OwnedFd) -> Result<(), StreamError> {
        Ok(())
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
        self.active = None;
    }

    fn process(&mut self, _wake: Wake) -> Result<Drained, DeviceFault> {
        Ok(Drained::Empty)
    }
}
