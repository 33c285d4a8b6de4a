//! A chain's buffers as host memory. What is in a [`Buffers`] lies in guest RAM with both ends; the bytes
//! may still change under our feet, so they are copied once and only then believed.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::memory::GuestMemory;

/// A buffer that does not lie in guest RAM as a whole.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a buffer of {len} bytes at {address:#x} is not in guest memory")]
pub struct BadBuffer {
    pub address: u64,
    pub len: u32,
}

/// Consecutive pieces of guest RAM, none empty.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Translates descriptors, which are at most as many as a queue has entries. Empty ones are skipped.
    pub fn new<'d>(
        memory: &'m GuestMemory,
        descriptors: impl Iterator<Item = &'d Descriptor>,
    ) -> Result<Self, BadBuffer> {
        let mut buffers = Self { slices: Vec::new(), len: 0 };
        for descriptor in descriptors {
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let bad = BadBuffer { address: descriptor.addr().0, len: descriptor.len() };
                buffers.slices.push(slice.map_err(|_| bad)?);
            }
            buffers.len += descriptor.len() as usize;
        }
        Ok(buffers)
    }

    /// Puts the pieces of `next` behind these.
    pub fn append(&mut self, next: Self) {
        self.len += next.len;
        self.slices.extend(next.slices);
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `count` bytes (or all there are), and the rest.
    pub fn split_at(&self, count: usize) -> (Self, Self) {
        let (mut head, mut tail) = (Vec::with_capacity(self.slices.len()), Vec::new());
        let mut left = count;
        for slice in &self.slices {
            match slice.split_at(left) {
                Ok((front, back)) => {
                    left = 0;
                    head.extend((!front.is_empty()).then_some(front));
                    tail.extend((!back.is_empty()).then_some(back));
                }
                // The slice ends before `left` bytes.
                Err(_) => {
                    left -= slice.len();
                    head.push(*slice);
                }
            }
        }
        let count = count.min(self.len);
        (Self { slices: head, len: count }, Self { slices: tail, len: self.len - count })
    }

    /// Copies bytes out of guest memory, as many as fit; says how many.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(&mut bytes[done..]);
        }
        done
    }

    /// Copies bytes into guest memory, as many as fit; says how many.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let count = slice.len().min(bytes.len() - done);
            slice.copy_from(&bytes[done..done + count]);
            done += count;
        }
        done
    }

    /// For vectored system calls; valid as long as this borrow of guest memory.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.slices
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect()
    }
}
