//! From the guest to the tap. What the checks look at is copied first, and the copy is what is written; the
//! rest goes straight from guest memory. A full tap stops the ring: the frame stays where it is.

use super::{
    frame::{ETHERNET_LEN, HEAD_LEN, HEADER_LEN, Rules},
    tap::{Sent, Tap},
};
use crate::{
    memory::GuestMemory,
    virtio::{
        Drained,
        chain::{Chain, RingError},
        queue::VirtQueue,
    },
};

/// Frames in one turn.
const TURN: usize = 64;

/// Sends what is in the ring, one turn of it. Counts in `dropped` what was not sent.
pub fn pump(
    memory: &GuestMemory,
    queue: &mut VirtQueue,
    tap: &mut Tap,
    rules: &Rules,
    dropped: &mut u64,
) -> Result<Drained, RingError> {
    for _ in 0..TURN {
        let Some(chain) = queue.pop(memory)? else { return Ok(Drained::Empty) };
        match send(memory, &chain, tap, rules) {
            Sent::Done => {}
            Sent::Refused => *dropped += 1,
            Sent::Full => {
                queue.put_back(&chain);
                return Ok(Drained::Empty);
            }
        }
        queue.complete(memory, &chain, 0)?;
    }
    Ok(Drained::More)
}

fn send(memory: &GuestMemory, chain: &Chain, tap: &mut Tap, rules: &Rules) -> Sent {
    let Ok(packet) = chain.readable(memory) else { return Sent::Refused };
    if packet.len() < HEADER_LEN + ETHERNET_LEN {
        return Sent::Refused;
    }
    let (front, rest) = packet.split_at(HEAD_LEN);
    let mut head = [0; HEAD_LEN];
    front.copy_to(&mut head);
    if rules.allow(&head, packet.len() - HEADER_LEN) {
        tap.write(&head, &rest)
    } else {
        Sent::Refused
    }
}
