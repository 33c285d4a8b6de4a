//! From the tap to the guest. A frame is read when the guest has a buffer, straight into guest memory; what
//! does not fit there waits in a spill for more buffers, and meanwhile the tap is not read.
//!
//! ```text
//! no frame --read--> frame --enough buffers--> in the used ring
//!                      '---there can be no more buffers--> dropped, and counted
//! ```

use std::collections::VecDeque;

use super::{
    frame::{HEADER_LEN, MAX_FRAME, NUM_BUFFERS},
    tap::{Frame, Tap},
};
use crate::{
    memory::GuestMemory,
    virtio::{
        Drained,
        buffers::Buffers,
        chain::{Chain, RingError},
        queue::VirtQueue,
    },
};

/// Frames in one turn.
const TURN: usize = 64;
/// More than any frame, with its header and a VLAN tag: what fills it was cut off.
const SPILL: usize = HEADER_LEN + MAX_FRAME + 64;

/// The receive side of one activation.
#[derive(Debug)]
pub struct Receiver {
    /// `VIRTIO_NET_F_MRG_RXBUF`: a frame may lie in several chains.
    mergeable: bool,
    /// Taken from the ring and waiting for a frame, with their sizes.
    held: VecDeque<(Chain, usize)>,
    frame: Option<Frame>,
    spill: Vec<u8>,
    /// Room to have before a frame is read, so that it rarely needs the spill: the last one's length.
    expected: usize,
    dropped: u64,
}

impl Receiver {
    pub fn new(mergeable: bool) -> Self {
        Self {
            mergeable,
            held: VecDeque::new(),
            frame: None,
            spill: vec![0; SPILL],
            expected: HEADER_LEN,
            dropped: 0,
        }
    }

    /// Frames that the guest had no room for.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Drops the frame that waits for more buffers.
    pub fn forget(&mut self) {
        self.dropped += u64::from(self.frame.take().is_some());
    }

    /// Gives the guest its frames, one turn of them.
    pub fn pump(
        &mut self,
        memory: &GuestMemory,
        queue: &mut VirtQueue,
        tap: &mut Tap,
    ) -> Result<Drained, RingError> {
        for _ in 0..TURN {
            if self.frame.is_none() {
                let gathered = self.gather(memory, queue, self.expected)?;
                if self.held.is_empty() {
                    return Ok(gathered);
                }
                self.frame = tap.read(&self.buffers(memory), &mut self.spill);
            }
            let Some(frame) = self.frame.take() else { return Ok(Drained::Empty) };
            if frame.len < HEADER_LEN || frame.len - frame.direct == self.spill.len() {
                self.dropped += 1;
                continue;
            }
            let gathered = self.gather(memory, queue, frame.len)?;
            if self.room() >= frame.len {
                self.deliver(memory, queue, &frame)?;
            } else if self.is_exhausted(queue) {
                self.dropped += 1;
            } else {
                self.frame = Some(frame);
                return Ok(gathered);
            }
        }
        Ok(Drained::More)
    }

    /// Takes buffers from the ring until `want` bytes fit. One that is outside RAM, or too small for a
    /// header, is given back empty.
    fn gather(
        &mut self,
        memory: &GuestMemory,
        queue: &mut VirtQueue,
        want: usize,
    ) -> Result<Drained, RingError> {
        for _ in 0..queue.size() {
            if self.room() >= want || self.is_exhausted(queue) {
                break;
            }
            let Some(chain) = queue.pop(memory)? else { return Ok(Drained::Empty) };
            match chain.writable(memory).map_or(0, |buffers| buffers.len()) {
                room if room < HEADER_LEN => queue.complete(memory, &chain, 0)?,
                room => self.held.push_back((chain, room)),
            }
        }
        Ok(Drained::More)
    }

    /// Whether no further buffer can be added: without merging, one is all; else the driver has no
    /// descriptors left.
    fn is_exhausted(&self, queue: &VirtQueue) -> bool {
        let entries: usize = self.held.iter().map(|(chain, _)| chain.entries()).sum();
        if self.mergeable { entries >= usize::from(queue.size()) } else { !self.held.is_empty() }
    }

    fn room(&self) -> usize {
        self.held.iter().map(|(_, room)| room).sum()
    }

    /// All that is held, one after the other.
    fn buffers<'m>(&self, memory: &'m GuestMemory) -> Buffers<'m> {
        let mut all = Buffers::default();
        for (chain, _) in &self.held {
            // It was in RAM when it was taken, and RAM stays.
            all.append(chain.writable(memory).unwrap_or_default());
        }
        all
    }

    /// The spill into its place, the number of chains into the header, the chains into the used ring.
    fn deliver(
        &mut self,
        memory: &GuestMemory,
        queue: &mut VirtQueue,
        frame: &Frame,
    ) -> Result<(), RingError> {
        let buffers = self.buffers(memory);
        let spilt = &self.spill[..frame.len - frame.direct];
        if !spilt.is_empty() {
            buffers.split_at(frame.direct).1.copy_from(spilt);
        }
        let (mut used, mut left) = (Vec::new(), frame.len);
        while left > 0 {
            let Some((chain, room)) = self.held.pop_front() else { break };
            let written = room.min(left);
            left -= written;
            used.push((chain, written as u32));
        }
        let count = used.len() as u16;
        buffers.split_at(NUM_BUFFERS).1.copy_from(&count.to_le_bytes());
        self.expected = frame.len;
        queue.complete_together(memory, &used)
    }
}
