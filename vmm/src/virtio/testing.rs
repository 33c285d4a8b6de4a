//! A guest driver for tests, made of raw bytes: it can do everything a driver does through registers and
//! rings, and everything it must not.

use std::{
    error::Error,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, Mutex},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::{virtio_config::*, virtio_mmio::*, virtio_ring::*};
use vm_memory::{Bytes, GuestAddress};

use super::{
    VirtioDevice, Wake,
    fault::FaultSink,
    lock,
    transport::MmioTransport,
    worker::{Seat, Worker},
};
use crate::{bus::BusDevice, memory::GuestMemory};

pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
pub const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const INDIRECT_FLAG: u16 = VRING_DESC_F_INDIRECT as u16;
pub const DRIVER_OK: u32 = 15;
pub const NEEDS_RESET: u32 = 0x40;

/// Two regions that touch, a hole, and one more region.
pub const TOUCH: u64 = 16 << 20;
pub const HOLE: u64 = 32 << 20;
pub const AFTER_HOLE: u64 = 48 << 20;
pub const END: u64 = 64 << 20;
/// Where buffers may be put; below are the rings.
pub const BUFFERS: u64 = 1 << 20;
/// Bytes from one queue's rings to the next's.
const RINGS: u64 = 0x2_0000;

pub fn memory() -> GuestMemory {
    let ranges = [
        (GuestAddress(0), TOUCH as usize),
        (GuestAddress(TOUCH), (HOLE - TOUCH) as usize),
        (GuestAddress(AFTER_HOLE), (END - AFTER_HOLE) as usize),
    ];
    GuestMemory::from_ranges(&ranges).unwrap()
}

/// One queue as its driver sees it.
pub struct Rings {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    published: u16,
    seen: u16,
}

impl Rings {
    pub fn new(index: u64, size: u16) -> Self {
        let descriptors = 0x1_0000 + index * RINGS;
        Self {
            size,
            descriptors,
            available: descriptors + 0x8000,
            used: descriptors + 0x1_0000,
            published: 0,
            seen: 0,
        }
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub address: u64,
    pub len: u32,
    pub write: bool,
}

pub fn out(address: u64, len: u32) -> Piece {
    Piece { address, len, write: false }
}

pub fn into(address: u64, len: u32) -> Piece {
    Piece { address, len, write: true }
}

/// A guest with one device.
pub struct Guest {
    pub memory: GuestMemory,
    pub transport: MmioTransport,
    pub worker: Worker,
    pub queues: Vec<Rings>,
    pub faults: Arc<Mutex<Vec<String>>>,
    /// A queue that is served after a fault too.
    pub lasting: Option<usize>,
    others: Vec<Box<dyn Fn() -> bool>>,
}

impl Guest {
    /// A device that no driver has touched yet.
    pub fn cold(device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let faults = Arc::new(Mutex::new(Vec::new()));
        let reports = faults.clone();
        let sink: FaultSink =
            Arc::new(move |_, fault| reports.lock().unwrap().push(chain_of_causes(fault)));
        let memory = memory();
        let sizes = lock(&*device).queue_max_sizes();
        let transport = MmioTransport::new("test", device, memory.clone(), sink).unwrap();
        let queues = (0..).zip(sizes).map(|(i, &size)| Rings::new(i, size)).collect();
        let worker = transport.worker();
        Self { memory, transport, worker, queues, faults, lasting: None, others: Vec::new() }
    }

    /// A device in operation, with every feature.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        Self::with_features(device, u64::MAX)
    }

    /// A device in operation, with those of `wanted` that it offers.
    pub fn with_features(device: Arc<Mutex<dyn VirtioDevice>>, wanted: u64) -> Self {
        let mut guest = Self::cold(device);
        guest.start(wanted);
        assert_eq!(guest.status(), DRIVER_OK);
        guest
    }

    pub fn read(&mut self, register: u32) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    pub fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    /// The initialization of 3.1.1, with the queues as `self.queues` says.
    pub fn start(&mut self, wanted: u64) {
        self.negotiate(wanted);
        for index in 0..self.queues.len() {
            self.configure(index);
        }
        self.write(VIRTIO_MMIO_STATUS, DRIVER_OK);
    }

    /// Up to `FEATURES_OK`.
    pub fn negotiate(&mut self, wanted: u64) {
        for status in [0, 1, 3] {
            self.write(VIRTIO_MMIO_STATUS, status);
        }
        for word in [0, 1] {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, word);
            let offered = self.read(VIRTIO_MMIO_DEVICE_FEATURES);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, word);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, offered & (wanted >> (32 * word)) as u32);
        }
        self.write(VIRTIO_MMIO_STATUS, 11);
    }

    /// Writes one queue's registers.
    pub fn configure(&mut self, index: usize) {
        let q = &self.queues[index];
        let (size, desc, avail, used) = (q.size, q.descriptors, q.available, q.used);
        for (register, value) in [
            (VIRTIO_MMIO_QUEUE_SEL, index as u64),
            (VIRTIO_MMIO_QUEUE_NUM, size.into()),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, desc),
            (VIRTIO_MMIO_QUEUE_DESC_HIGH, desc >> 32),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail),
            (VIRTIO_MMIO_QUEUE_AVAIL_HIGH, avail >> 32),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
            (VIRTIO_MMIO_QUEUE_USED_HIGH, used >> 32),
            (VIRTIO_MMIO_QUEUE_READY, 1),
        ] {
            self.write(register, value as u32);
        }
    }

    pub fn reset(&mut self) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        for queue in 0..self.queues.len() {
            let (descriptors, size) = (self.queues[queue].descriptors, self.queues[queue].size);
            self.memory.write_slice(&[0; 0x1_8000], GuestAddress(descriptors)).unwrap();
            self.queues[queue] = Rings::new(queue as u64, size);
        }
    }

    pub fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn get<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn put_bytes(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get_bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes one descriptor into any table.
    pub fn descriptor(
        &self,
        table: u64,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = table + 16 * u64::from(index);
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Writes a chain into consecutive descriptors.
    pub fn chain(&self, table: u64, first: u16, pieces: &[Piece]) {
        for (index, piece) in (first..).zip(pieces) {
            let last = usize::from(index - first) + 1 == pieces.len();
            let flags = if last { 0 } else { NEXT } | if piece.write { WRITE } else { 0 };
            self.descriptor(table, index, piece.address, piece.len, flags, index + 1);
        }
    }

    /// Puts a head into the available ring.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let slot = q.available + 4 + 2 * u64::from(q.published % q.size);
        q.published = q.published.wrapping_add(1);
        let (idx, published) = (q.available + 2, q.published);
        self.put(slot, head);
        self.put(idx, published);
    }

    /// Makes a chain available and kicks.
    pub fn submit(&mut self, queue: usize, first: u16, pieces: &[Piece]) {
        self.chain(self.queues[queue].descriptors, first, pieces);
        self.publish(queue, first);
        self.kick(queue);
    }

    pub fn kick(&mut self, queue: usize) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }

    /// Whether a driver that honours EVENT_IDX would kick for what it published last.
    pub fn wants_kick(&self, queue: usize) -> bool {
        let q = &self.queues[queue];
        let event: u16 = self.get(q.used + 4 + 8 * u64::from(q.size));
        q.published.wrapping_sub(event).wrapping_sub(1) == 0
    }

    /// The next used element: head and bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let q = &self.queues[queue];
        if self.get::<u16>(q.used + 2) == q.seen {
            return None;
        }
        let slot = q.used + 4 + 8 * u64::from(q.seen % q.size);
        let element = (self.get(slot), self.get(slot + 4));
        self.queues[queue].seen = q.seen.wrapping_add(1);
        Some(element)
    }

    /// Whether there is another used element.
    pub fn peek_used(&self, queue: usize) -> bool {
        let q = &self.queues[queue];
        self.get::<u16>(q.used + 2) != q.seen
    }

    /// Asks for an interrupt after the next used buffer.
    pub fn arm_interrupt(&self, queue: usize) {
        let q = &self.queues[queue];
        self.put(q.available + 4 + 2 * u64::from(q.size), q.seen);
    }

    /// Interrupts since the last call.
    pub fn interrupts(&self) -> u64 {
        self.transport.irq().read().unwrap_or(0)
    }

    /// One round of the event loop; says whether anything happened.
    pub fn step(&mut self) -> bool {
        let busy = turn(&self.worker);
        self.others.iter().fold(busy, |busy, other| other() | busy)
    }

    /// Has a worker of a part of the device, and an event loop for it.
    pub fn add<S: Seat + ?Sized + 'static>(&mut self, worker: Worker<S>) {
        self.others.push(Box::new(move || turn(&worker)));
    }

    /// Runs the event loop until it would sleep. A loop that never does is a failure.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the device never rests");
    }

    /// R0: the device works on, nothing was reported.
    #[track_caller]
    pub fn assert_works(&mut self) {
        assert_eq!(self.faults.lock().unwrap().as_slice(), [""; 0]);
        assert_eq!(self.status(), DRIVER_OK);
    }

    /// R1: `DEVICE_NEEDS_RESET`, one configuration interrupt, one report that names the cause; kicks do
    /// nothing; a reset brings the device back.
    #[track_caller]
    pub fn assert_broken(&mut self, cause: &str) {
        let reports = std::mem::take(&mut *self.faults.lock().unwrap());
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert!(reports[0].contains(cause), "{:?} does not contain {cause:?}", reports[0]);
        assert_eq!(self.status(), DRIVER_OK | NEEDS_RESET);
        assert_ne!(self.read(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG, 0);
        assert_ne!(self.interrupts(), 0);
        for queue in 0..self.queues.len() {
            while self.used(queue).is_some() {}
            self.publish(queue, 0);
            self.kick(queue);
        }
        self.run();
        for queue in 0..self.queues.len() {
            assert!(self.used(queue).is_none() || self.lasting == Some(queue));
        }
        assert!(self.faults.lock().unwrap().is_empty());
        self.reset();
        self.start(u64::MAX);
        self.assert_works();
    }
}

/// One round of a worker's event loop; says whether anything happened.
fn turn<S: Seat + ?Sized>(worker: &Worker<S>) -> bool {
    let mut busy = false;
    for &index in &worker.queues {
        if worker.kicks[index].read().is_ok() {
            worker.run(Wake::Queue(index));
            busy = true;
        }
    }
    let backend = lock(&worker.seat).backend();
    if let Some(fd) = backend {
        // SAFETY: the seat, which lives as long as its worker, owns the descriptor.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut fds, Some(&none)).unwrap() > 0 {
            worker.run(Wake::Backend);
            busy = true;
        }
    }
    busy
}

fn chain_of_causes(fault: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(fault), |&e| e.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
