//! The A rows that concern rings, on the entropy device: the simplest there is.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::virtio::{rng::Rng, testing::*};

fn rng() -> Guest {
    Guest::new(Arc::new(Mutex::new(Rng::new().unwrap())))
}

fn rng_with(features: u64) -> Guest {
    Guest::with_features(Arc::new(Mutex::new(Rng::new().unwrap())), features)
}

/// Offers one chain that starts at descriptor 0.
fn offer(guest: &mut Guest) {
    guest.publish(0, 0);
    guest.kick(0);
    guest.run();
}

#[test]
fn a_request_is_answered_and_the_driver_interrupted_once() {
    let mut guest = rng();
    for first in 0..4 {
        guest.chain(guest.queues[0].descriptors, first, &[into(BUFFERS, 64)]);
        guest.publish(0, first);
    }
    guest.kick(0);
    guest.run();
    for head in 0..4 {
        assert_eq!(guest.used(0), Some((head, 64)));
    }
    assert_eq!(guest.used(0), None);
    assert_eq!(guest.interrupts(), 1, "one for the batch");
    assert_ne!(guest.get_bytes(BUFFERS, 64), [0; 64]);
    guest.assert_works();
}

#[test]
fn a01_chains_that_loop() {
    for cycle in [&[0u16][..], &[1, 0], &[1, 2, 1], &[1, 2, 3, 3]] {
        let mut guest = rng();
        for (index, &next) in (0..).zip(cycle) {
            guest.descriptor(guest.queues[0].descriptors, index, BUFFERS, 8, NEXT | WRITE, next);
        }
        offer(&mut guest);
        guest.assert_broken("has more entries than its queue");
    }
}

#[test]
fn a02_indices_beyond_the_table() {
    for next in [16, 17, 255, 0xffff] {
        let mut guest = rng();
        guest.descriptor(guest.queues[0].descriptors, 0, BUFFERS, 8, NEXT | WRITE, next);
        offer(&mut guest);
        guest.assert_broken("beyond the end of its table");
    }
    for head in [16, 17, 0x7fff, 0xffff] {
        let mut guest = rng();
        guest.publish(0, head);
        guest.kick(0);
        guest.run();
        guest.assert_broken("beyond the end of its table");
    }
}

#[test]
fn a03_chains_that_are_too_long() {
    let mut guest = rng();
    guest.chain(guest.queues[0].descriptors, 0, &[into(BUFFERS, 4); 16]);
    offer(&mut guest);
    assert_eq!(guest.used(0), Some((0, 64)), "as long as the queue is fine");
    guest.descriptor(guest.queues[0].descriptors, 15, BUFFERS, 4, NEXT | WRITE, 0);
    offer(&mut guest);
    guest.assert_broken("more entries than its queue");

    let mut guest = rng_with(u64::MAX);
    guest.chain(guest.queues[0].descriptors, 0, &[into(BUFFERS, u32::MAX), into(BUFFERS, 2)]);
    offer(&mut guest);
    guest.assert_broken("longer than 2^32 bytes");
}

#[test]
fn a04_buffers_that_are_not_all_in_ram() {
    let bad = [
        (END, 8),
        (HOLE, 8),
        (HOLE + 4096, 8),
        (u64::MAX - 7, 8),
        (u64::MAX - 3, 8),
        (HOLE - 4, 8),
        (END - 4, 8),
        (AFTER_HOLE - 4, 8),
        (TOUCH - 4, u32::MAX - 8),
    ];
    let mut guest = rng();
    for (address, len) in bad {
        guest.chain(guest.queues[0].descriptors, 0, &[into(BUFFERS, 8), into(address, len)]);
        offer(&mut guest);
        assert_eq!(guest.used(0), Some((0, 0)), "{address:#x}+{len:#x}");
    }
    guest.chain(guest.queues[0].descriptors, 0, &[into(TOUCH - 4, 8)]);
    offer(&mut guest);
    assert_eq!(guest.used(0), Some((0, 8)), "regions that touch are one");
    guest.assert_works();
}

#[test]
fn a05_empty_and_huge_lengths() {
    let mut guest = rng();
    for pieces in [&[into(BUFFERS, 0)][..], &[into(0, 0), into(u64::MAX, 0)]] {
        guest.chain(guest.queues[0].descriptors, 0, pieces);
        offer(&mut guest);
        assert_eq!(guest.used(0), Some((0, 0)));
    }
    guest.chain(guest.queues[0].descriptors, 0, &[into(BUFFERS, u32::MAX)]);
    offer(&mut guest);
    assert_eq!(guest.used(0), Some((0, 0)));
    guest.chain(guest.queues[0].descriptors, 0, &[into(END, 0), into(BUFFERS, 3), into(0, 0)]);
    offer(&mut guest);
    assert_eq!(guest.used(0), Some((0, 3)));
    guest.assert_works();
}

/// Puts `pieces` into an indirect table and offers it.
fn offer_indirect(guest: &mut Guest, table: u64, len: u32, flags: u16) {
    guest.descriptor(guest.queues[0].descriptors, 0, table, len, INDIRECT_FLAG | flags, 1);
    offer(guest);
}

#[test]
fn a07_indirect_tables() {
    let table = BUFFERS;
    let mut guest = rng();
    guest.chain(table, 0, &[into(BUFFERS + 4096, 5), into(BUFFERS + 8192, 6)]);
    offer_indirect(&mut guest, table, 32, 0);
    assert_eq!(guest.used(0), Some((0, 11)), "a good one");
    offer_indirect(&mut guest, table, 32, WRITE);
    assert_eq!(guest.used(0), Some((0, 11)), "its write flag means nothing (2.7.5.3.2)");
    guest.assert_works();

    for len in [0, 8, 15, 17, 24, 33, 16 * 17, 16 * 65_536, u32::MAX] {
        offer_indirect(&mut guest, table, len, 0);
        guest.assert_broken("an indirect table of");
    }
    offer_indirect(&mut guest, table, 32, NEXT);
    guest.assert_broken("in an indirect table, or one with a next");
    guest.descriptor(table, 0, table, 32, INDIRECT_FLAG, 0);
    offer_indirect(&mut guest, table, 32, 0);
    guest.assert_broken("in an indirect table, or one with a next");
    let mut guest = rng();
    for outside in [END, END - 8, HOLE, u64::MAX - 8] {
        offer_indirect(&mut guest, outside, 32, 0);
        guest.assert_broken("cannot be read");
    }
    guest.descriptor(table, 0, BUFFERS, 4, NEXT | WRITE, 2);
    offer_indirect(&mut guest, table, 32, 0);
    guest.assert_broken("beyond the end of its table");
    guest.descriptor(table, 0, BUFFERS, 4, NEXT | WRITE, 0);
    offer_indirect(&mut guest, table, 32, 0);
    guest.assert_broken("more entries than its queue");
}

#[test]
fn a07_indirect_that_was_not_negotiated() {
    let mut guest = rng_with(!INDIRECT);
    guest.chain(BUFFERS, 0, &[into(BUFFERS + 4096, 5)]);
    offer_indirect(&mut guest, BUFFERS, 16, 0);
    guest.assert_broken("not negotiated");
}

#[test]
fn a07_indirect_table_over_the_rings_and_over_its_own_buffers() {
    let mut guest = rng();
    let (rings, avail) = (guest.queues[0].descriptors, guest.queues[0].available);
    guest.descriptor(rings, 1, BUFFERS, 7, WRITE, 0);
    offer_indirect(&mut guest, rings + 16, 16, 0);
    assert_eq!(guest.used(0), Some((0, 7)), "the ring as a table is read like any");
    guest.assert_works();
    // The buffer is the table: it is overwritten after it was copied.
    guest.descriptor(BUFFERS, 0, BUFFERS, 32, WRITE, 0);
    offer_indirect(&mut guest, BUFFERS, 32, 0);
    assert_eq!(guest.used(0), Some((0, 32)));
    guest.assert_works();
    offer_indirect(&mut guest, avail, 32, 0);
    let _ = guest.used(0);
}

#[test]
fn a07_a_table_that_changes_while_it_is_read() {
    let mut guest = rng();
    let memory = guest.memory.clone();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let rewriter = std::thread::spawn(move || {
        let mut turn = 0u32;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            turn = turn.wrapping_add(1);
            let (address, len) =
                if turn.is_multiple_of(2) { (BUFFERS + 4096, 8) } else { (u64::MAX - 9, u32::MAX) };
            memory.write_obj(address, GuestAddress(BUFFERS)).unwrap();
            memory.write_obj(len, GuestAddress(BUFFERS + 8)).unwrap();
            memory.write_obj((turn % 8) as u16, GuestAddress(BUFFERS + 12)).unwrap();
            memory.write_obj((turn % 3) as u16, GuestAddress(BUFFERS + 14)).unwrap();
        }
    });
    for _ in 0..2000 {
        offer_indirect(&mut guest, BUFFERS, 32, 0);
        while guest.used(0).is_some() {}
        if guest.status() != DRIVER_OK {
            guest.faults.lock().unwrap().clear();
            guest.reset();
            guest.start(u64::MAX);
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    rewriter.join().unwrap();
    assert_eq!(guest.status(), DRIVER_OK);
}

#[test]
fn a09_available_index_that_jumps() {
    for idx in [17u16, 0x8000, 0xffff] {
        let mut guest = rng();
        guest.put(guest.queues[0].available + 2, idx);
        guest.kick(0);
        guest.run();
        guest.assert_broken("available ring cannot be followed");
    }
    let mut guest = rng();
    for first in 0..8 {
        guest.submit(0, first, &[into(BUFFERS, 1)]);
    }
    guest.run();
    guest.put(guest.queues[0].available + 2, 7u16);
    guest.kick(0);
    guest.run();
    guest.assert_broken("available ring cannot be followed");
}

#[test]
fn a09_a_ring_that_never_ends_leaves_the_others_their_turn() {
    let mut guest = rng();
    guest.chain(guest.queues[0].descriptors, 0, &[into(BUFFERS, 1)]);
    for head in 1..16 {
        guest.chain(guest.queues[0].descriptors, head, &[into(BUFFERS, 1)]);
    }
    for round in 0..100 {
        for head in 0..16 {
            guest.publish(0, head);
        }
        if round == 0 {
            guest.kick(0);
        }
        assert!(guest.step(), "the device comes back by itself");
        let mut count = 0;
        while guest.used(0).is_some() {
            count += 1;
        }
        assert_eq!(count, 16, "one turn is at most a queue");
    }
    guest.assert_works();
}

#[test]
fn a10_the_same_head_twice_in_flight() {
    let mut guest = rng();
    guest.chain(guest.queues[0].descriptors, 3, &[into(BUFFERS, 1)]);
    guest.publish(0, 3);
    guest.publish(0, 3);
    guest.kick(0);
    guest.run();
    guest.assert_broken("descriptor chain 3 was made available twice");
    guest.chain(guest.queues[0].descriptors, 3, &[into(BUFFERS, 1)]);
    for _ in 0..3 {
        guest.publish(0, 3);
        guest.kick(0);
        guest.run();
        assert_eq!(guest.used(0), Some((3, 1)), "one after the other is fine");
    }
    guest.assert_works();
}

#[test]
fn a11_random_event_indices_lose_no_more_than_an_interrupt() {
    let mut guest = rng();
    let event = guest.queues[0].available + 4 + 2 * 16;
    for turn in 0..1000u16 {
        guest.put(event, turn.wrapping_mul(40_503));
        guest.submit(0, turn % 16, &[into(BUFFERS, 1)]);
        guest.run();
        assert_eq!(guest.used(0), Some((u32::from(turn % 16), 1)));
    }
    guest.interrupts();
    guest.arm_interrupt(0);
    guest.submit(0, 0, &[into(BUFFERS, 1)]);
    guest.run();
    assert_eq!(guest.interrupts(), 1, "an honest driver gets its interrupt again");
    guest.assert_works();
}

#[test]
fn event_idx_suppresses_kicks_and_interrupts() {
    let mut guest = rng();
    guest.submit(0, 0, &[into(BUFFERS, 1)]);
    guest.run();
    assert_eq!(guest.interrupts(), 1);
    guest.publish(0, 0);
    assert!(guest.wants_kick(0), "the ring was left armed");
    guest.kick(0);
    guest.run();
    assert_eq!(guest.interrupts(), 0, "used_event was not moved: the driver is not waiting");
}

#[test]
fn without_event_idx_every_drain_interrupts() {
    let mut guest = rng_with(!EVENT_IDX);
    for _ in 0..3 {
        guest.submit(0, 0, &[into(BUFFERS, 1)]);
        guest.run();
        assert_eq!(guest.interrupts(), 1);
        guest.kick(0);
        guest.run();
        assert_eq!(guest.interrupts(), 0, "nothing used, nothing told");
    }
}

proptest! {
    /// Any bytes as descriptor table, rings and indirect tables: R0 or R1, and never more work than asked.
    #[test]
    fn any_rings_end_in_an_answer_or_a_fault(
        descriptors in proptest::collection::vec(
            (
                prop_oneof![Just(BUFFERS), Just(0x1_0000), Just(HOLE - 8), any::<u64>()],
                prop_oneof![0..64u32, Just(16), Just(u32::MAX), any::<u32>()],
                0..8u16,
                prop_oneof![0..16u16, any::<u16>()],
            ),
            16,
        ),
        heads in proptest::collection::vec(prop_oneof![9 => 0..16u16, 1 => any::<u16>()], 0..20),
        features in any::<u64>(),
    ) {
        let mut guest = rng_with(features | VERSION_1);
        let table = guest.queues[0].descriptors;
        for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
            guest.descriptor(table, index, address, len, flags, next);
            guest.descriptor(BUFFERS, index, address, len, flags, next);
        }
        for &head in &heads {
            guest.publish(0, head);
        }
        guest.kick(0);
        guest.run();
        let status = guest.status();
        prop_assert!(status == DRIVER_OK || status == DRIVER_OK | NEEDS_RESET);
        prop_assert_eq!(guest.faults.lock().unwrap().len(), usize::from(status != DRIVER_OK));
        let used = std::iter::from_fn(|| guest.used(0)).take(100).count();
        prop_assert!(used <= heads.len());
    }
}
