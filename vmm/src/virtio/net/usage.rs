//! How many pairs of queues the driver uses. Whoever serves a further pair looks here, and is woken when it changes: the thread
//! on which the driver says so never waits for them, nor for the host's network.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::atomic::{AtomicU16, Ordering},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// See the top of this file.
#[derive(Debug)]
pub struct Usage {
    pairs: AtomicU16,
    changed: EventFd,
}

impl Usage {
    /// Of one pair.
    pub fn new() -> io::Result<Self> {
        Ok(Self { pairs: AtomicU16::new(1), changed: EventFd::new(EFD_NONBLOCK)? })
    }

    pub fn set(&self, pairs: u16) {
        if self.pairs.swap(pairs, Ordering::AcqRel) != pairs {
            // Watched for edges and never read; it holds more of them than there can be.
            let _ = self.changed.write(1);
        }
    }

    pub fn includes(&self, number: usize) -> bool {
        number < usize::from(self.pairs.load(Ordering::Acquire))
    }

    pub fn event(&self) -> RawFd {
        self.changed.as_raw_fd()
    }
}
