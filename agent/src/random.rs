//! The random numbers of a container that was given a seed.
//!
//! Each of its threads has a sequence of its own, by the thread's id in the container's PID namespace: byte i of it is
//! byte i mod 32 of SHA-256(seed, id, i / 32). So what a thread draws does not depend on what others draw meanwhile.
//!
//! - [`calls`][]: getrandom(2), by a seccomp listener
//! - [`device`][]: what lies at /dev/random and /dev/urandom, by FUSE
//!
//! The guest's kernel has no deterministic generator: interrupt times always go into its own. What it draws for itself
//! stays random (AT_RANDOM, ports, /proc/sys/kernel/random); addresses are not randomized at all.

pub mod calls;
pub mod device;

use std::{
    arch::is_x86_feature_detected,
    collections::HashMap,
    fs, io,
    sync::{Arc, Mutex, PoisonError},
};

use sha2::{Digest, Sha256};

use crate::plan::{StepError, at, refuse};

const STEP: &str = "seed";
const SEED: usize = 32;
/// Bytes of one hash.
const BLOCK: u64 = 32;

/// The sequences of a container's threads.
pub struct Random {
    seed: [u8; SEED],
    /// Bytes drawn so far. An id that is used again goes on where it was.
    drawn: Mutex<HashMap<u32, u64>>,
}

impl Random {
    /// Of the seed in a request, for which the guest must have been booted.
    pub fn new(seed: &[u8]) -> Result<Arc<Self>, StepError> {
        let seed = seed.try_into().map_err(|_| refuse(STEP, "request", "not 32 bytes"))?;
        prepare_guest()?;
        Ok(Arc::new(Self { seed, drawn: Mutex::default() }))
    }

    /// The next bytes of a thread, which is known by its id in the guest.
    pub fn draw(&self, thread: u32, bytes: &mut [u8]) -> io::Result<()> {
        let id = id_in_container(thread)?;
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        let position = drawn.entry(id).or_default();
        fill(&self.seed, id, *position, bytes);
        *position += bytes.len() as u64;
        Ok(())
    }
}

/// Everything random that a program reaches without a system call is off, or the seed cannot be honoured.
fn prepare_guest() -> Result<(), StepError> {
    // SAFETY: getauxval(3) takes a number.
    if unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } != 0 {
        return Err(refuse(STEP, "guest", "booted with a vDSO, which has random numbers"));
    }
    if is_x86_feature_detected!("rdrand") || is_x86_feature_detected!("rdseed") {
        return Err(refuse(STEP, "guest", "its processor offers random numbers"));
    }
    let file = "/proc/sys/kernel/randomize_va_space";
    fs::write(file, "0").map_err(at(STEP, file))
}

/// A thread's id in the container's PID namespace, which is the one below the guest's (proc(5), NSpid).
fn id_in_container(thread: u32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let id = ids.split_whitespace().nth(1).and_then(|id| id.parse().ok());
    id.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The bytes of sequence `id` from `position` on.
fn fill(seed: &[u8; SEED], id: u32, position: u64, bytes: &mut [u8]) {
    let (mut block, mut skip) = (position / BLOCK, (position % BLOCK) as usize);
    let mut rest = bytes;
    while !rest.is_empty() {
        let hash = Sha256::new()
            .chain_update(seed)
            .chain_update(id.to_le_bytes())
            .chain_update(block.to_le_bytes())
            .finalize();
        let hash = &hash[skip..];
        let (now, later) = rest.split_at_mut(rest.len().min(hash.len()));
        now.copy_from_slice(&hash[..now.len()]);
        (rest, block, skip) = (later, block + 1, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(seed: u8, id: u32, position: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        fill(&[seed; SEED], id, position, &mut bytes);
        bytes
    }

    #[test]
    fn a_sequence_is_the_same_however_it_is_drawn() {
        let whole = bytes(1, 2, 0, 1000);
        for cut in [0, 1, 31, 32, 33, 64, 999] {
            let (first, second) = (bytes(1, 2, 0, cut), bytes(1, 2, cut as u64, 1000 - cut));
            assert_eq!([first, second].concat(), whole, "{cut}");
        }
        assert!(bytes(1, 2, 5, 0).is_empty());
    }

    #[test]
    fn seeds_and_threads_have_their_own() {
        assert_ne!(bytes(1, 2, 0, 32), bytes(2, 2, 0, 32));
        assert_ne!(bytes(1, 2, 0, 32), bytes(1, 3, 0, 32));
        let hash =
            Sha256::digest([&[1; SEED][..], &2u32.to_le_bytes(), &1u64.to_le_bytes()].concat());
        assert_eq!(bytes(1, 2, 32, 32), hash.as_slice());
    }
}
