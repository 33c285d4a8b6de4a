//! The file system device (virtio 1.2, 5.11): FUSE messages between the guest's driver and `ampoule-fsd`, the
//! process that has the shared files. Nothing here knows a file.
//!
//! - [`message`]: the headers, checked
//! - [`link`]: the socket to `ampoule-fsd` and the I/O on it
//!
//! ```text
//!  request in a ring --its header is sound--> forwarded --its reply comes--> in the used ring
//!         '--a broken one: used at once           '--ampoule-fsd ends: used with EIO
//! ```
//!
//! While a request is under way it has a number of ours: neither a driver that gives two the same nor an
//! `ampoule-fsd` that invents one leads to anything but a message dropped. What is behind the headers goes
//! straight between guest memory and the socket. A full socket stops the rings; there are never more requests
//! under way than the rings have entries.

pub mod link;
pub mod message;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{OwnedFd, RawFd},
    sync::Arc,
};

use ampoule_vmm_api::guest::SHARE_TAG;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::{
    Active, Drained, VirtioDevice, Wake,
    chain::{Chain, RingError},
    copy_config,
    fault::DeviceFault,
    interrupt::Interrupt,
    queue::VirtQueue,
};
use crate::memory::GuestMemory;
use link::{Link, Sent};
use message::{Kind, MAX_MESSAGE, REPLY_HEADER, REQUEST_HEADER, Reply, Request};

/// High priority, requests (5.11.2). A request of 128 KiB has up to 33 data pages and four more entries in each
/// direction.
const QUEUE_SIZES: [u16; 2] = [32, 128];
/// Requests, or replies, in one turn.
const TURN: usize = 64;
/// Bytes of the tag in the configuration space (5.11.4).
const TAG_LEN: usize = 36;

/// The guest's one shared file system.
#[derive(Debug)]
pub struct Fs {
    interrupt: Arc<Interrupt>,
    traffic: Traffic,
    active: Option<Active>,
}

impl Fs {
    /// `socket` is of packets, `ampoule-fsd`'s or waiting for one to be started.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            interrupt: Arc::new(Interrupt::new()?),
            traffic: Traffic { link: Link::new(socket)?, under_way: BTreeMap::new(), next: 2 },
            active: None,
        })
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
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

    /// `struct virtio_fs_config` (5.11.4) up to `num_request_queues`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_LEN + 4];
        config[..SHARE_TAG.len()].copy_from_slice(SHARE_TAG.as_bytes());
        config[TAG_LEN] = 1;
        copy_config(&config, offset, data);
    }

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    /// Replies that come later are to nobody.
    fn reset(&mut self) {
        self.active = None;
        self.traffic.under_way.clear();
    }

    /// Both directions at each wake: the rings and the socket say what there is to do.
    fn process(&mut self, wake: Wake) -> Result<Drained, DeviceFault> {
        let traffic = &mut self.traffic;
        if wake == Wake::Backend {
            traffic.link.poll();
        }
        let Some(Active { memory, queues, .. }) = &mut self.active else {
            return Ok(Drained::Empty);
        };
        let fault = |queue| move |source| DeviceFault::Ring { queue, source };
        let mut drained = vec![traffic.answer(memory, queues)?];
        for (index, queue) in queues.iter_mut().enumerate() {
            drained.push(traffic.forward(memory, index, queue).map_err(fault(index))?);
        }
        if traffic.link.is_gone() {
            traffic.give_up(memory, queues)?;
        }
        for (index, queue) in queues.iter_mut().enumerate() {
            queue.notify(memory, &self.interrupt).map_err(fault(index))?;
        }
        Ok(if drained.contains(&Drained::More) { Drained::More } else { Drained::Empty })
    }

    fn backend(&self) -> Option<RawFd> {
        Some(self.traffic.link.event())
    }
}

/// A request that was forwarded.
#[derive(Debug)]
struct UnderWay {
    queue: usize,
    chain: Chain,
    /// The driver's number for it.
    unique: u64,
}

/// What becomes of a chain.
enum Fate {
    /// It is used, with so many bytes written.
    Used(u32),
    /// It waits for the reply of this number.
    Waits(u64),
    /// It stays in the ring.
    Stays,
}

/// The messages between rings and socket.
#[derive(Debug)]
struct Traffic {
    link: Link,
    /// By our number.
    under_way: BTreeMap<u64, UnderWay>,
    /// Our next number: even, since odd ones are those of interrupts (FUSE_INT_REQ_BIT), and never used again.
    next: u64,
}

impl Traffic {
    /// Forwards what is in a ring, one turn of it.
    fn forward(
        &mut self,
        memory: &GuestMemory,
        index: usize,
        queue: &mut VirtQueue,
    ) -> Result<Drained, RingError> {
        for _ in 0..TURN {
            let Some(chain) = queue.pop(memory)? else { return Ok(Drained::Empty) };
            match self.send(memory, &chain) {
                Fate::Used(written) => queue.complete(memory, &chain, written)?,
                Fate::Waits(unique) => {
                    let under_way = UnderWay { queue: index, chain, unique };
                    self.under_way.insert(self.next, under_way);
                    self.next += 2;
                }
                Fate::Stays => {
                    queue.put_back(&chain);
                    return Ok(Drained::Empty);
                }
            }
        }
        Ok(Drained::More)
    }

    /// Checks and sends one request. One that is no FUSE message is used unanswered.
    fn send(&mut self, memory: &GuestMemory, chain: &Chain) -> Fate {
        let (Ok(message), Ok(room)) = (chain.readable(memory), chain.writable(memory)) else {
            return Fate::Used(0);
        };
        let mut header = Request([0; REQUEST_HEADER]);
        if message.split_at(REQUEST_HEADER).0.copy_to(&mut header.0) < REQUEST_HEADER {
            return Fate::Used(0);
        }
        let (kind, unique) = (header.kind(), header.unique());
        let has_room = kind == Kind::Unanswered || room.len() >= REPLY_HEADER;
        if kind == Kind::Dropped || !has_room {
            return Fate::Used(0);
        }
        let sound = header.said_len() == message.len() && message.len() <= MAX_MESSAGE;
        let (_, rest) = message.split_at(REQUEST_HEADER);
        let sent = match sound {
            true => self.link.send(&header.with_unique(self.next), &rest),
            false => Sent::Refused,
        };
        match (sent, kind) {
            (Sent::Full, _) => Fate::Stays,
            (Sent::Done, Kind::Answered) => Fate::Waits(unique),
            (Sent::Refused, Kind::Answered) => Fate::Used(refuse(memory, chain, unique)),
            _ => Fate::Used(0),
        }
    }

    /// Gives the guest its replies, one turn of them. One that nobody waits for is dropped; one that does not
    /// agree with itself or has no room is an I/O error.
    fn answer(
        &mut self,
        memory: &GuestMemory,
        queues: &mut [VirtQueue],
    ) -> Result<Drained, DeviceFault> {
        for _ in 0..TURN {
            let Some(reply) = self.link.peek() else { return Ok(Drained::Empty) };
            let asked = match reply.len {
                0..REPLY_HEADER => None,
                _ => self.under_way.remove(&reply.header.unique()),
            };
            let Some(UnderWay { queue, chain, unique }) = asked else {
                self.link.take(&Default::default());
                continue;
            };
            // It was in RAM when it was taken, and RAM stays.
            let room = chain.writable(memory).unwrap_or_default();
            let fits = reply.len <= room.len().min(MAX_MESSAGE);
            let written = if fits && reply.header.is_sound(reply.len) {
                let (head, body) = room.split_at(REPLY_HEADER);
                self.link.take(&body);
                head.copy_from(&reply.header.with_unique(unique).0);
                reply.len as u32
            } else {
                self.link.take(&Default::default());
                refuse(memory, &chain, unique)
            };
            queues[queue]
                .complete(memory, &chain, written)
                .map_err(|source| DeviceFault::Ring { queue, source })?;
        }
        Ok(Drained::More)
    }

    /// Nobody will answer any more.
    fn give_up(
        &mut self,
        memory: &GuestMemory,
        queues: &mut [VirtQueue],
    ) -> Result<(), DeviceFault> {
        for UnderWay { queue, chain, unique } in std::mem::take(&mut self.under_way).into_values() {
            let written = refuse(memory, &chain, unique);
            queues[queue]
                .complete(memory, &chain, written)
                .map_err(|source| DeviceFault::Ring { queue, source })?;
        }
        Ok(())
    }
}

/// Writes an I/O error for an answer; says how many bytes that are.
fn refuse(memory: &GuestMemory, chain: &Chain, unique: u64) -> u32 {
    let room = chain.writable(memory).unwrap_or_default();
    room.copy_from(&Reply::io_error(unique).0) as u32
}

#[cfg(test)]
mod tests;
