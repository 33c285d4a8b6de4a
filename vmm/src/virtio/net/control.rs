//! The control queue (virtio 1.2, 5.1.6.5): a driver says how many pairs of queues it uses, and nothing else. It is answered
//! at once and as long as it can be read: a driver may do nothing else before it has the answer.

use ampoule_vmm_api::Rate;
use virtio_bindings::virtio_net::*;

use super::{limit::Bucket, usage::Usage};
use crate::{
    events::now_ns,
    memory::GuestMemory,
    virtio::{
        Drained,
        chain::{Chain, RingError},
        interrupt::Interrupt,
        queue::VirtQueue,
    },
};

/// Commands in one turn.
const TURN: usize = 16;
/// For each change the host's kernel waits until nobody uses what was before, under a lock of all of its networks: a driver
/// that makes a habit of it is refused.
pub const CHANGES: Rate = Rate { per_second: 2, burst: 16 };
/// A class, a command, a number of pairs, as long as that is all.
const COMMAND: usize = 4;

/// See the top of this file.
#[derive(Debug)]
pub struct Control {
    pairs: Pairs,
    active: Option<(GuestMemory, VirtQueue)>,
}

/// How many there are, and how many are in use.
#[derive(Debug)]
struct Pairs {
    max: u16,
    used: u16,
    changes: Bucket,
}

impl Control {
    pub fn new(max: u16, changes: Rate) -> Self {
        let changes = Bucket::new(changes, now_ns());
        Self { pairs: Pairs { max, used: 1, changes }, active: None }
    }

    pub fn activate(&mut self, memory: GuestMemory, queue: VirtQueue) {
        self.active = Some((memory, queue));
    }

    pub fn reset(&mut self) {
        (self.active, self.pairs.used) = (None, 1);
    }

    /// Answers what is asked, one turn of it. A device that does not work, without `usage`, refuses everything.
    pub fn pump(
        &mut self,
        interrupt: &Interrupt,
        usage: Option<&Usage>,
    ) -> Result<Drained, RingError> {
        let done = self.answer(interrupt, usage);
        if done.is_err() {
            self.active = None;
        }
        done
    }

    fn answer(
        &mut self,
        interrupt: &Interrupt,
        usage: Option<&Usage>,
    ) -> Result<Drained, RingError> {
        let Some((memory, queue)) = &mut self.active else { return Ok(Drained::Empty) };
        let mut drained = Drained::More;
        for _ in 0..TURN {
            let Some(chain) = queue.pop(memory)? else {
                drained = Drained::Empty;
                break;
            };
            let wanted = wanted(memory, &chain).zip(usage);
            let status = match wanted.filter(|(pairs, _)| self.pairs.may_be(*pairs)) {
                Some((pairs, usage)) => {
                    usage.set(pairs);
                    VIRTIO_NET_OK
                }
                None => VIRTIO_NET_ERR,
            };
            let written = chain.writable(memory).unwrap_or_default().copy_from(&[status as u8]);
            queue.complete(memory, &chain, written as u32)?;
        }
        queue.notify(memory, interrupt)?;
        Ok(drained)
    }
}

impl Pairs {
    /// Whether so many are in use from now on.
    fn may_be(&mut self, wanted: u16) -> bool {
        if wanted == self.used {
            return true;
        }
        let min = VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN as u16;
        if !(min..=self.max).contains(&wanted) || self.changes.wait(now_ns()) > 0 {
            return false;
        }
        self.changes.take(1);
        self.used = wanted;
        true
    }
}

/// The pairs that a command asks for, if it is that and nothing else, with room for the answer behind it.
fn wanted(memory: &GuestMemory, chain: &Chain) -> Option<u16> {
    let mut bytes = [0; COMMAND + 1];
    let len = chain.readable(memory).ok()?.copy_to(&mut bytes);
    let answered = chain.is_ordered() && !chain.writable(memory).ok()?.is_empty();
    let [class, command, pairs @ ..] = <[u8; COMMAND]>::try_from(&bytes[..len]).ok()?;
    let set = [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET];
    (answered && [class, command].map(u32::from) == set).then(|| u16::from_le_bytes(pairs))
}
