//! The network device (virtio 1.2, 5.1): pairs of queues over a tap, which has as many.
//!
//! - [`frame`]: what the driver says about a frame, checked
//! - [`tap`]: the tap and the I/O on it
//! - [`limit`]: how fast frames may pass
//! - [`transmit`], [`receive`]: the two directions
//! - [`pair`]: a queue of each, and what is behind them
//! - [`threads`]: who serves those besides the first
//! - [`control`]: how many of them the driver uses
//! - [`usage`]: how those who serve them know
//!
//! Nothing is dropped because somebody is slow: a full tap or a limit stops the transmit ring, a guest without buffers or a limit
//! stops the reading of the tap, where the host's queue fills up as before any slow link. What is dropped,
//! and counted, is what the guest may not send and what it can never receive.
//!
//! The first pair is served with all other devices, each further one by a thread of its own ([`threads`]): what the host's
//! network stack does for a frame it does on the thread that hands it over, or takes it. With a single pair there is no
//! control queue: the tap belongs to this guest alone, and gives it all there is.

pub mod control;
pub mod frame;
pub mod limit;
pub mod pair;
pub mod receive;
pub mod tap;
pub mod threads;
pub mod transmit;
pub mod usage;

use std::{
    os::fd::{OwnedFd, RawFd},
    sync::{Arc, Mutex},
};

use ampoule_vmm_api::{NetConfig, config::MAX_QUEUE_PAIRS};
use virtio_bindings::{virtio_ids::VIRTIO_ID_NET, virtio_net::*};

use super::{
    Active, Drained, VirtioDevice, Wake, copy_config, fault::DeviceFault, interrupt::Interrupt,
    lock, worker::Seat,
};
use control::{CHANGES, Control};
use frame::Rules;
use limit::Limits;
use pair::Pair;
use receive::Receiver;
pub use tap::NetError;
use tap::Tap;
use usage::Usage;

/// Of each pair receive and transmit, then control (5.1.2).
const QUEUE_SIZES: [u16; 2 * MAX_QUEUE_PAIRS as usize + 1] = [256; _];

/// A window whose device is not there (4.2.2), which drivers pass by.
const NO_DEVICE: u32 = 0;

/// Besides the offloads.
const ALWAYS: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// What a driver takes together or not at all: without both there is one pair.
const MULTIQUEUE: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

/// The guest's interface, and the tap behind it.
#[derive(Debug)]
pub struct Net {
    interrupt: Arc<Interrupt>,
    mac: [u8; 6],
    mtu: u16,
    plugged: bool,
    first: Pair,
    further: Vec<Arc<Mutex<Pair>>>,
    control: Control,
    usage: Arc<Usage>,
}

impl Net {
    /// With as many pairs as the tap has queues.
    pub fn new(config: &NetConfig, queues: Vec<OwnedFd>) -> Result<Self, NetError> {
        let limits = Limits::new(config).map_err(NetError::Limits)?;
        let mut queues = queues.into_iter();
        let first = Tap::new(queues.next().ok_or(NetError::NoTap)?, limits.clone())?;
        let usage = Arc::new(Usage::new().map_err(NetError::Usage)?);
        let further = queues.map(|queue| Tap::further(queue, limits.clone(), &usage));
        let further = further.collect::<Result<_, _>>()?;
        Self::with(config, first, further, usage)
    }

    fn with(
        config: &NetConfig,
        first: Tap,
        further: Vec<Tap>,
        usage: Arc<Usage>,
    ) -> Result<Self, NetError> {
        let interrupt = Arc::new(Interrupt::new().map_err(NetError::Interrupt)?);
        let pair = |number, tap| Pair::new(number, tap, interrupt.clone(), usage.clone());
        let shared = |(number, tap)| Arc::new(Mutex::new(pair(number, tap)));
        let further: Vec<_> = (1..).zip(further).map(shared).collect();
        Ok(Self {
            mac: config.mac,
            mtu: config.mtu,
            plugged: config.plugged,
            first: pair(0, first),
            control: Control::new(1 + further.len() as u16, CHANGES),
            further,
            interrupt,
            usage,
        })
    }

    /// Pairs that others are to serve, from the second on, each with its queues.
    pub fn further(&self) -> impl Iterator<Item = (Arc<Mutex<Pair>>, Vec<usize>)> {
        (1..).zip(&self.further).map(|(number, pair)| (pair.clone(), pair::queues(number).into()))
    }

    /// The queue of that.
    fn control_queue(&self) -> usize {
        2 * (1 + self.further.len())
    }

    /// The guest finds it from now on, with this address and MTU.
    pub fn plug(&mut self, mac: [u8; 6], mtu: u16) {
        self.unplug();
        (self.mac, self.mtu, self.plugged) = (mac, mtu, true);
    }

    /// The guest finds it no more. A driver that still has it is not served.
    pub fn unplug(&mut self) {
        self.plugged = false;
        self.quiet();
    }

    /// Frames dropped since the last reset, from the guest and to it.
    pub fn dropped(&self) -> [u64; 2] {
        let further = self.further.iter().map(|pair| lock(pair).dropped());
        further.fold(self.first.dropped(), |all, more| [all[0] + more[0], all[1] + more[1]])
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        if self.plugged { VIRTIO_ID_NET } else { NO_DEVICE }
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        match self.further.len() {
            0 => &QUEUE_SIZES[..2],
            _ => &QUEUE_SIZES[..=self.control_queue()],
        }
    }

    fn features(&self) -> u64 {
        let several = if self.further.is_empty() { 0 } else { MULTIQUEUE };
        ALWAYS | several | self.first.tap.features()
    }

    fn queues_with(&self, features: u64) -> Option<usize> {
        match features & MULTIQUEUE {
            0 => Some(2),
            MULTIQUEUE => Some(self.control_queue() + 1),
            _ => None,
        }
    }

    fn own_queues(&self) -> Vec<usize> {
        let control = Some(self.control_queue()).filter(|_| !self.further.is_empty());
        pair::queues(0).into_iter().chain(control).collect()
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// `struct virtio_net_config` (5.1.4) up to `mtu`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.first.tap.is_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let pairs = 1 + self.further.len() as u16;
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn activate(&mut self, active: Active) {
        if !self.plugged {
            return;
        }
        let Active { memory, features, queues } = active;
        self.first.tap.negotiated(features);
        let rules = Rules { mac: self.mac, mtu: self.mtu, features };
        let receiver = || Receiver::new(features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0);
        let mut queues = queues.into_iter();
        let mut two = || Some([queues.next()?, queues.next()?]);
        if let Some(queues) = two() {
            self.first.activate(memory.clone(), rules, receiver(), queues);
        }
        if features & MULTIQUEUE == 0 {
            return;
        }
        for pair in &self.further {
            if let Some(queues) = two() {
                lock(pair).activate(memory.clone(), rules, receiver(), queues);
            }
        }
        if let Some(queue) = queues.next() {
            self.control.activate(memory, queue);
        }
    }

    fn reset(&mut self) {
        self.control.reset();
        self.quiet();
    }

    /// Linux waits for the answer to a command with all of its networks locked, whatever has become of the device.
    fn quiet(&mut self) {
        self.first.reset();
        self.further.iter().for_each(|pair| lock(pair).reset());
        self.usage.set(1);
    }

    fn process(&mut self, wake: Wake) -> Result<Drained, DeviceFault> {
        let queue = self.control_queue();
        if wake != Wake::Queue(queue) {
            return self.first.process(wake);
        }
        let works = self.plugged && !self.interrupt.needs_reset();
        let done = self.control.pump(&self.interrupt, works.then_some(&*self.usage));
        done.map_err(|source| DeviceFault::Ring { queue, source })
    }

    fn backend(&self) -> Option<RawFd> {
        self.first.backend()
    }
}

#[cfg(test)]
mod tests;
