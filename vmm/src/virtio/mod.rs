//! The virtio 1.2 devices and their MMIO transport: split rings, no legacy. In reading order:
//!
//! - [`queue`]: a split virtqueue; every index the guest writes is checked here
//! - [`chain`]: a descriptor chain, copied and checked
//! - [`buffers`]: a chain's buffers as host memory, checked at both ends
//! - [`interrupt`]: what a device tells the guest: interrupts, generation, `DEVICE_NEEDS_RESET`
//! - [`fault`]: what the guest broke, and who is told
//! - [`transport`]: registers, status, features; builds the queues and hands them over
//! - [`worker`]: the device's seat in the event loop
//! - [`block`], [`vsock`], [`rng`], [`net`], [`fs`]: the devices
//!
//! # Threads
//! vCPU threads enter through [`transport::MmioTransport`] (a [`crate::bus::BusDevice`]); everything else
//! happens in [`worker::Worker`] on the thread of the event loop. Both lock the device, so that a reset
//! returns when the work in flight is done. A network device's further pairs of queues have a lock and a thread each,
//! whose event loop serves nothing else; a reset takes their locks one after the other, the event loop's thread none of
//! them but after a fault, and when the shim plugs or unplugs the device. A kick that comes before activation, or after a
//! fault, is drained and ignored, but for that of a control queue, which is answered.
//!
//! # Wiring
//! ```ignore
//! let block = Arc::new(Mutex::new(Block::new(&disk, Some(fd))?));
//! let faults: FaultSink = Arc::new(move |device, error| report(device, error));
//! let transport = MmioTransport::new("vda", block.clone(), memory.clone(), faults)?;
//! for (index, kick) in (0u32..).zip(transport.kicks()) {
//!     vm.register_ioevent(kick, &IoEventAddress::Mmio(base + NOTIFY_OFFSET), index)?;
//! }
//! vm.register_irqfd(transport.irq(), gsi)?; // edge-triggered
//! event_manager.add_subscriber(Box::new(transport.worker()));
//! mmio_bus.insert(base, MMIO_SIZE, Arc::new(Mutex::new(transport)));
//! block.lock()?.detach()?; // at run time, from the thread of the event loop
//! ```
//!
//! # System calls
//! - vCPU threads (register accesses, activation, reset): `read`, `write`, `futex`; `epoll_ctl`, `close`;
//!   net: `ioctl(TUNSETOFFLOAD)`.
//! - The event loop's thread: `read`, `write`, `futex`; block: `preadv`, `pwritev`, `fdatasync`,
//!   `fallocate`, and to attach and detach `fstat`, `lseek`, `close`; vsock: `epoll_wait`, `epoll_ctl`,
//!   `recvmsg`, `sendmsg`, `shutdown`, `close`; rng: `getrandom`; net: `epoll_wait`, `readv`, `writev`,
//!   `timerfd_settime`; fs: `epoll_wait`, `recvmsg`, `sendmsg`.
//! - Threads of further pairs of queues: `read`, `write`, `futex`, `epoll_wait`, `readv`, `writev`, `timerfd_settime`,
//!   `ioctl(TUNSETQUEUE)`.
//! - To make a device and its transport: `eventfd2`, `epoll_create1`; net: `fcntl`, the taps' `ioctl`s,
//!   `timerfd_create`.
//!
//! Besides those: the heap's, and `fcntl(F_GETFD)` before each `close` in debug builds. `SIGXFSZ` must be
//! ignored by the process: a file size limit is then an error of the write.

pub mod block;
pub mod buffers;
pub mod chain;
pub mod fault;
pub mod fs;
pub mod interrupt;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;
pub mod worker;

use std::{
    io,
    os::fd::RawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::memory::GuestMemory;
use fault::DeviceFault;
use interrupt::Interrupt;
use queue::VirtQueue;

/// A device as the transport and the event loop see it.
pub trait VirtioDevice: Send {
    /// The device id (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// The largest size of each queue, in entries, powers of 2.
    fn queue_max_sizes(&self) -> &'static [u16];
    /// The feature bits of this device type (0-23, 50-63); the transport adds those of the rings.
    fn features(&self) -> u64;
    /// The line to the guest that this device was made with.
    fn interrupt(&self) -> &Arc<Interrupt>;
    /// Copies configuration space from `offset`; bytes past its end stay zero. No device here has a
    /// writable field.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// How many of them a driver sets up that has accepted these features, from the first one on. `None`: these do not go
    /// together.
    fn queues_with(&self, _features: u64) -> Option<usize> {
        Some(self.queue_max_sizes().len())
    }
    /// Those that it serves itself, and not by a [`Seat`](worker::Seat) for a part of it.
    fn own_queues(&self) -> Vec<usize> {
        (0..self.queue_max_sizes().len()).collect()
    }
    /// `DRIVER_OK`: takes over as many queues as [`queues_with`](Self::queues_with) says.
    fn activate(&mut self, active: Active);
    /// Gives up the queues and whatever the guest had in flight. May be called at any time.
    fn reset(&mut self);
    /// How it falls quiet after a fault, until it is reset.
    fn quiet(&mut self) {
        self.reset();
    }
    /// A bounded amount of work. Without queues there is nothing to do.
    fn process(&mut self, wake: Wake) -> Result<Drained, DeviceFault>;
    /// What besides the queues wakes this device when readable.
    fn backend(&self) -> Option<RawFd> {
        None
    }
}

/// What an activated device works with.
#[derive(Debug)]
pub struct Active {
    pub memory: GuestMemory,
    /// What the driver accepted of [`VirtioDevice::features`], and of the rings'.
    pub features: u64,
    pub queues: Vec<VirtQueue>,
}

/// Why a device is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The driver kicked this queue.
    Queue(usize),
    /// [`VirtioDevice::backend`] is readable.
    Backend,
}

/// Whether a device stopped because it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Nothing is left, and the next kick will come.
    Empty,
    /// It stopped to give the other devices their turn: call it again.
    More,
}

/// A device shared by its transport, its worker and the owner of its run-time operations.
pub type SharedDevice = Arc<Mutex<dyn VirtioDevice>>;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Copies what `config` has from `offset` on into `data`.
fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or(&[]);
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

/// Repeats a system call of the libc kind while signals interrupt it.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}
