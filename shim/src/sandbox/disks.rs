//! The slots of disks, and those that come and go at run time, which belong to the owner task.

use std::collections::HashMap;

use ampoule_vmm_api::config::{MAX_DISKS, MAX_SLOTS};

use super::{Refused, Reply, SandboxError, answer};
use crate::vm::{Disk, Vm};

/// How many disks may be attached to a sandbox after its boot that has so many disks and networks, and shares or not.
pub fn spare_disks(disks: usize, nets: usize, shares: bool) -> u8 {
    let most = MAX_DISKS.min((MAX_SLOTS - usize::from(shares)).saturating_sub(nets));
    u8::try_from(most.saturating_sub(usize::from(FIRST_DISK) + disks)).unwrap_or_default()
}

/// The slot of the guest image.
pub const GUEST_IMAGE: u8 = 0;
/// The slot of [`SandboxConfig::disks`]' first one.
pub const FIRST_DISK: u8 = 1;

/// A disk on its way in or out, and who waits for it.
enum Moving {
    In(Reply<u8>),
    Out(Reply<()>),
}

pub(super) struct Disks {
    /// Free slots; the next one is at the end.
    spare: Vec<u8>,
    moving: HashMap<u8, (Turn, Moving)>,
    turn: Turn,
}

/// Tells a movement of a slot's disk from those before and after it.
pub(super) type Turn = u64;

impl Disks {
    /// `spare` in ascending order.
    pub fn new(mut spare: Vec<u8>) -> Self {
        spare.reverse();
        Self { spare, moving: HashMap::new(), turn: 0 }
    }

    /// Asks the VMM; returns what is to be called overdue after a while, unless it has been answered already.
    pub fn attach(&mut self, vm: &Vm, disk: &Disk, reply: Reply<u8>) -> Option<(u8, Turn)> {
        let Some(slot) = self.spare.pop() else {
            answer(reply, Err(Refused::NoSlot.into()));
            return None;
        };
        match vm.attach(slot, disk) {
            Ok(()) => Some(self.moves(slot, Moving::In(reply))),
            Err(error) => {
                self.spare.push(slot);
                answer(reply, Err(SandboxError::Vm(error)));
                None
            }
        }
    }

    /// Likewise.
    pub fn detach(&mut self, vm: &Vm, slot: u8, reply: Reply<()>) -> Option<(u8, Turn)> {
        match vm.detach(slot) {
            Ok(()) => Some(self.moves(slot, Moving::Out(reply))),
            Err(error) => {
                answer(reply, Err(SandboxError::Vm(error)));
                None
            }
        }
    }

    fn moves(&mut self, slot: u8, moving: Moving) -> (u8, Turn) {
        self.turn += 1;
        self.moving.insert(slot, (self.turn, moving));
        (slot, self.turn)
    }

    /// The VMM says that a disk is in.
    pub fn attached(&mut self, slot: u8) {
        match self.moving.remove(&slot) {
            Some((_, Moving::In(reply))) => answer(reply, Ok(slot)),
            Some(other) => drop(self.moving.insert(slot, other)),
            None => {}
        }
    }

    /// The VMM says that a disk is out.
    pub fn detached(&mut self, slot: u8) {
        match self.moving.remove(&slot) {
            Some((_, Moving::Out(reply))) => {
                self.spare.push(slot);
                answer(reply, Ok(()));
            }
            Some(other) => drop(self.moving.insert(slot, other)),
            None => {}
        }
    }

    /// A movement takes too long.
    pub fn overdue(&mut self, slot: u8, turn: Turn) {
        if self.moving.get(&slot).is_some_and(|(current, _)| *current == turn) {
            self.failed(slot);
        }
    }

    /// The VMM refused something, and does not say what.
    pub fn refused(&mut self) {
        let slots: Vec<u8> = self.moving.keys().copied().collect();
        slots.into_iter().for_each(|slot| self.failed(slot));
    }

    /// The VM is gone; who waits hears why elsewhere.
    pub fn forget(&mut self) {
        self.moving.clear();
    }

    /// The slot is not used again: nobody knows what is under it.
    fn failed(&mut self, slot: u8) {
        match self.moving.remove(&slot) {
            Some((_, Moving::In(reply))) => answer(reply, Err(SandboxError::Disk(slot))),
            Some((_, Moving::Out(reply))) => answer(reply, Err(SandboxError::Disk(slot))),
            None => {}
        }
    }
}
