//! The entropy device (virtio 1.2, 5.4): one queue of writable buffers, filled by getrandom(2).

use std::{io, sync::Arc};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{
    Active, Drained, VirtioDevice, Wake,
    buffers::Buffers,
    chain::{Chain, RingError},
    fault::DeviceFault,
    interrupt::Interrupt,
    queue::VirtQueue,
};
use crate::memory::GuestMemory;

/// Most bytes given for one request; the used length tells the driver (5.4.6.1 allows less than asked).
const MAX_REQUEST: usize = 64 * 1024;
/// With [`MAX_REQUEST`] also the limit of one turn: 1 MiB of random bytes.
const QUEUE_SIZE: u16 = 16;
/// Bytes of entropy made at a time.
const CHUNK: usize = 4096;

/// An entropy device. The kernel's generator is its only source.
#[derive(Debug)]
pub struct Rng {
    interrupt: Arc<Interrupt>,
    active: Option<Active>,
}

impl Rng {
    pub fn new() -> io::Result<Self> {
        Ok(Self { interrupt: Arc::new(Interrupt::new()?), active: None })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn process(&mut self, _wake: Wake) -> Result<Drained, DeviceFault> {
        let Some(Active { memory, queues, .. }) = &mut self.active else {
            return Ok(Drained::Empty);
        };
        drain(memory, &mut queues[0], &self.interrupt)
            .map_err(|source| DeviceFault::Ring { queue: 0, source })
    }
}

/// Answers at most one queue's worth of requests.
fn drain(
    memory: &GuestMemory,
    queue: &mut VirtQueue,
    interrupt: &Interrupt,
) -> Result<Drained, RingError> {
    for _ in 0..QUEUE_SIZE {
        let Some(chain) = queue.pop(memory)? else {
            queue.notify(memory, interrupt)?;
            return Ok(Drained::Empty);
        };
        queue.complete(memory, &chain, answer(memory, &chain))?;
    }
    queue.notify(memory, interrupt)?;
    Ok(Drained::More)
}

/// Fills a request; says how many bytes it got. A buffer outside RAM gets none.
fn answer(memory: &GuestMemory, chain: &Chain) -> u32 {
    chain.writable(memory).map_or(0, |buffers| fill(buffers) as u32)
}

fn fill(buffers: Buffers<'_>) -> usize {
    let (mut rest, _) = buffers.split_at(MAX_REQUEST);
    let (mut done, mut chunk) = (0, [0; CHUNK]);
    while !rest.is_empty() {
        let (next, later) = rest.split_at(CHUNK);
        let bytes = &mut chunk[..next.len()];
        if random(bytes).is_err() {
            break;
        }
        done += next.copy_from(bytes);
        rest = later;
    }
    done
}

/// Up to 256 bytes at once, getrandom(2) gives all that is asked for; more may be cut short by a signal.
fn random(bytes: &mut [u8]) -> io::Result<()> {
    for part in bytes.chunks_mut(256) {
        rustix::rand::getrandom(part, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
