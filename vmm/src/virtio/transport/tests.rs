//! The registers: the A rows that a driver commits without a single buffer.

use std::sync::{Mutex, atomic::AtomicBool, atomic::Ordering};

use proptest::prelude::*;

use super::*;
use crate::virtio::{Wake, block::Block, rng::Rng, testing::*, vsock::Vsock};
use ampoule_vmm_api::DiskConfig;

fn rng() -> Arc<Mutex<Rng>> {
    Arc::new(Mutex::new(Rng::new().unwrap()))
}

fn empty_slot() -> Arc<Mutex<Block>> {
    let config = DiskConfig { id: String::new(), read_only: false };
    Arc::new(Mutex::new(Block::new(&config, None).unwrap()))
}

#[test]
fn a_driver_finds_the_device_and_its_features() {
    let mut guest = Guest::cold(Arc::new(Mutex::new(Vsock::new(7).unwrap())));
    assert_eq!(guest.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(guest.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_ID), 19);
    guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), 1);
    guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!(guest.config::<8>(0), 7u64.to_le_bytes());
    assert_eq!(guest.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 2);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 16);
    guest.start(u64::MAX);
    guest.assert_works();
}

#[test]
fn a08_queues_that_cannot_be_used_are_not_activated() {
    type Spoil = fn(&mut Rings);
    let cases: [(Spoil, &str); 11] = [
        (|q| q.size = 0, "size 0 is not"),
        (|q| q.size = 3, "size 3 is not"),
        (|q| q.size = 257, "size 257 is not"),
        (|q| q.size = 512, "size 512 is not"),
        (|q| q.size = 65_535, "size 65535 is not"),
        (|q| q.descriptors += 8, "descriptor table at 0x10008 is misaligned"),
        (|q| q.available += 1, "available ring at 0x18001 is misaligned"),
        (|q| q.used += 2, "used ring at 0x20002 is misaligned"),
        (|q| q.descriptors = END - 16, "descriptor table at 0x3fffff0 is not in guest memory"),
        (|q| q.available = HOLE - 4, "available ring at 0x1fffffc is not in guest memory"),
        (|q| q.used = u64::MAX - 3, "is not in guest memory"),
    ];
    for (spoil, cause) in cases {
        assert_refused(spoil, cause);
    }
}

#[test]
fn a11_a_used_ring_over_the_other_rings() {
    assert_refused(|q| q.used = q.available + 4, "overlap");
    assert_refused(|q| q.used = q.descriptors, "overlap");
    assert_refused(|q| (q.available, q.used) = (q.descriptors, q.descriptors), "overlap");
}

fn assert_refused(spoil: fn(&mut Rings), cause: &str) {
    let mut guest = Guest::cold(rng());
    let good = Rings::new(0, guest.queues[0].size);
    spoil(&mut guest.queues[0]);
    guest.start(u64::MAX);
    guest.queues[0] = good;
    guest.assert_broken(cause);
}

#[test]
fn a08_a_size_is_not_cut_to_16_bits() {
    let mut guest = Guest::cold(rng());
    guest.negotiate(u64::MAX);
    guest.configure(0);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    guest.write(VIRTIO_MMIO_QUEUE_NUM, 0x1_0008);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
    guest.write(VIRTIO_MMIO_STATUS, DRIVER_OK);
    guest.assert_broken("size 65544 is not");
}

#[test]
fn a08_registers_are_deaf_once_the_queue_is_ready_and_once_the_driver_is() {
    let mut guest = Guest::cold(rng());
    guest.negotiate(u64::MAX);
    guest.configure(0);
    let before = guest.transport.ignored();
    guest.write(VIRTIO_MMIO_QUEUE_NUM, 3);
    guest.write(VIRTIO_MMIO_QUEUE_USED_LOW, 1);
    assert_eq!(guest.transport.ignored(), before + 2);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
    guest.write(VIRTIO_MMIO_STATUS, DRIVER_OK);
    let before = guest.transport.ignored();
    for register in [VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_DESC_HIGH] {
        guest.write(register, 0);
    }
    assert_eq!(guest.transport.ignored(), before + 3);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 1);
    guest.submit(0, 0, &[into(BUFFERS, 9)]);
    guest.run();
    assert_eq!(guest.used(0), Some((0, 9)));
    guest.assert_works();
}

#[test]
fn a12_widths_alignment_and_registers_that_are_not() {
    let mut guest = Guest::new(rng());
    let before = guest.transport.ignored();
    let mut count = 0;
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 2), (0x70, 1), (0x50, 2), (0xfe, 4)] {
        let mut data = vec![0xff; len];
        guest.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; len]);
        guest.transport.write(offset, &data);
        count += 2;
    }
    for register in [VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_VERSION, VIRTIO_MMIO_QUEUE_NUM_MAX, 0xf0]
    {
        guest.write(register, u32::MAX);
        count += 1;
    }
    for register in [VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_DRIVER_FEATURES, 0xf0] {
        assert_eq!(guest.read(register), 0);
        count += 1;
    }
    assert_eq!(guest.transport.ignored(), before + count);
    guest.assert_works();
}

#[test]
fn a12_queue_numbers_that_are_not() {
    let mut guest = Guest::cold(rng());
    guest.negotiate(u64::MAX);
    for select in [1, 2, 0xffff, u32::MAX] {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, select);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
        let before = guest.transport.ignored();
        guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
        guest.write(VIRTIO_MMIO_QUEUE_NUM, 8);
        guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, select);
        assert_eq!(guest.transport.ignored(), before + 3);
    }
}

#[test]
fn a12_status_goes_one_way_and_in_order() {
    let mut guest = Guest::cold(rng());
    for value in [2, 4, 8, 3, 11, 15, 0x10, 0xff, 0x1_0001] {
        guest.write(VIRTIO_MMIO_STATUS, value);
        assert_eq!(guest.status(), 0, "{value:#x} from nothing");
    }
    guest.write(VIRTIO_MMIO_STATUS, 1);
    guest.write(VIRTIO_MMIO_STATUS, 2);
    assert_eq!(guest.status(), 1, "bits are not taken back");
    guest.write(VIRTIO_MMIO_STATUS, 3);
    guest.write(VIRTIO_MMIO_STATUS, 7);
    assert_eq!(guest.status(), 3, "DRIVER_OK before FEATURES_OK");
    guest.write(VIRTIO_MMIO_STATUS, 0x83);
    assert_eq!(guest.status(), 0x83);
    guest.write(VIRTIO_MMIO_STATUS, 0x8b);
    assert_eq!(guest.status(), 0x83, "nothing after FAILED");
    guest.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.status(), 0);
    guest.start(u64::MAX);
    guest.assert_works();
    guest.write(VIRTIO_MMIO_STATUS, DRIVER_OK | NEEDS_RESET);
    guest.assert_works();
}

#[test]
fn a12_features_nobody_offered() {
    for (word, bits) in [(0, 1 << 5), (1, 1 | 1 << 2), (1, 0), (2, 1), (u32::MAX, 1)] {
        let mut guest = Guest::cold(rng());
        for status in [1, 3] {
            guest.write(VIRTIO_MMIO_STATUS, status);
        }
        if word != 1 {
            guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
            guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
        }
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, word);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, bits);
        guest.write(VIRTIO_MMIO_STATUS, 11);
        assert_eq!(guest.status(), 3, "word {word} bits {bits:#x}");
        guest.write(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(guest.status(), 3);
    }
}

#[test]
fn a12_features_cannot_change_after_they_were_accepted() {
    let mut guest = Guest::new(rng());
    let before = guest.transport.ignored();
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 0);
    assert_eq!(guest.transport.ignored(), before + 1);
}

#[test]
fn a12_driver_ok_without_queues() {
    let mut guest = Guest::cold(rng());
    guest.negotiate(u64::MAX);
    guest.write(VIRTIO_MMIO_STATUS, DRIVER_OK);
    guest.assert_broken("the queue was not made ready");
}

#[test]
fn a13_config_space_ends_where_it_ends() {
    let mut guest = Guest::cold(Arc::new(Mutex::new(Vsock::new(0x0102_0304).unwrap())));
    assert_eq!(guest.config::<1>(1), [3]);
    assert_eq!(guest.config::<2>(2), [2, 1]);
    assert_eq!(guest.config::<4>(2), [2, 1, 0, 0]);
    assert_eq!(guest.config::<8>(4), [0; 8]);
    for offset in [8, 9, 0xeff, u64::MAX - 0x100] {
        assert_eq!(guest.config::<8>(offset), [0; 8]);
    }
    let before = guest.transport.ignored();
    for offset in [0x100, 0x101, 0x108, u64::MAX] {
        guest.transport.write(offset, &[0xff; 4]);
        guest.transport.write(offset, &[0xff; 8]);
    }
    assert_eq!(guest.transport.ignored(), before + 8);
    assert_eq!(guest.config::<4>(0), [4, 3, 2, 1]);
}

#[test]
fn a13_a_changing_config_is_read_whole_by_its_generation() {
    let slot = empty_slot();
    let mut guest = Guest::cold(slot.clone());
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x5_0000_0005 * 512).unwrap();
    let host = std::thread::spawn(move || {
        let config = DiskConfig { id: String::new(), read_only: false };
        while !stopped.load(Ordering::Relaxed) {
            lock(&*slot).attach(&config, file.try_clone().unwrap().into()).unwrap();
            lock(&*slot).detach().unwrap();
        }
    });
    let (mut whole, mut tries) = (0, 0);
    while whole < 1000 && tries < 1_000_000 {
        tries += 1;
        let before = guest.read(VIRTIO_MMIO_CONFIG_GENERATION);
        let low = u64::from(u32::from_le_bytes(guest.config(0)));
        let high = u64::from(u32::from_le_bytes(guest.config(4)));
        if guest.read(VIRTIO_MMIO_CONFIG_GENERATION) == before {
            whole += 1;
            assert!([0, 0x5_0000_0005].contains(&(high << 32 | low)), "{high:#x} {low:#x}");
        }
    }
    stop.store(true, Ordering::Relaxed);
    host.join().unwrap();
    assert_ne!(whole, 0);
    assert_eq!(guest.interrupts(), 0, "no interrupt before DRIVER_OK");
}

#[test]
fn a15_a_million_resets() {
    let mut guest = Guest::new(rng());
    for _ in 0..1_000_000 {
        guest.write(VIRTIO_MMIO_STATUS, 0);
    }
    guest.reset();
    guest.start(u64::MAX);
    guest.assert_works();
}

#[test]
fn a15_kick_after_reset() {
    let mut guest = Guest::new(rng());
    guest.submit(0, 0, &[into(BUFFERS, 9)]);
    guest.write(VIRTIO_MMIO_STATUS, 0);
    guest.kick(0);
    guest.run();
    assert_eq!(guest.used(0), None, "the queue was taken away before it was served");
    assert_eq!(guest.status(), 0);
}

#[test]
fn a15_reset_while_the_device_works() {
    let mut guest = Guest::new(rng());
    let worker = guest.transport.worker();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let device = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            worker.run(Wake::Queue(0));
        }
    });
    for _ in 0..300 {
        for first in 0..16 {
            guest.submit(0, first, &[into(BUFFERS, 4096)]);
        }
        guest.write(VIRTIO_MMIO_STATUS, 0);
        let used: u16 = guest.get(guest.queues[0].used + 2);
        guest.put_bytes(BUFFERS, &[0; 4096]);
        std::thread::yield_now();
        assert_eq!(guest.get::<u16>(guest.queues[0].used + 2), used, "the rings are let go");
        assert_eq!(guest.get_bytes(BUFFERS, 4096), [0; 4096], "and the buffers");
        guest.reset();
        guest.start(u64::MAX);
    }
    stop.store(true, Ordering::Relaxed);
    device.join().unwrap();
    guest.assert_works();
}

#[test]
fn a16_notify_storm_before_and_after_activation() {
    let mut guest = Guest::cold(Arc::new(Mutex::new(Vsock::new(3).unwrap())));
    for queue in (0..3).cycle().take(10_000) {
        guest.kick(queue);
    }
    guest.run();
    guest.start(u64::MAX);
    for queue in (0..3).cycle().take(10_000) {
        guest.kick(queue);
    }
    assert!(guest.step());
    assert!(!guest.step(), "however many kicks, one look");
    assert_eq!(guest.interrupts(), 0);
    guest.assert_works();
}

#[test]
fn the_event_loop_drives_a_device() {
    let mut guest = Guest::new(rng());
    let mut events = event_manager::EventManager::<Worker>::new().unwrap();
    event_manager::SubscriberOps::add_subscriber(&mut events, guest.transport.worker());
    assert_eq!(events.run_with_timeout(0), Ok(0));
    guest.submit(0, 0, &[into(BUFFERS, 9)]);
    assert_eq!(events.run_with_timeout(1000), Ok(1));
    assert_eq!(guest.used(0), Some((0, 9)));
    assert_eq!(events.run_with_timeout(0), Ok(0), "the kick is drained");
}

/// One access of a driver that has lost its mind.
fn access() -> impl Strategy<Value = (u64, usize, [u8; 8], bool)> {
    let register = prop_oneof![
        4 => (0..64u64).prop_map(|r| 4 * r),
        1 => 0..0x1000u64,
    ];
    let value =
        prop_oneof![Just(0u64), Just(1), Just(3), Just(11), Just(15), 0..300u64, any::<u64>()];
    let width = prop_oneof![6 => Just(4usize), 1 => 1..=8usize];
    (register, width, value.prop_map(u64::to_le_bytes), any::<bool>())
}

proptest! {
    #[test]
    fn any_accesses_are_survived(accesses in proptest::collection::vec(access(), 1..300)) {
        let mut guest = Guest::cold(empty_slot());
        guest.negotiate(u64::MAX);
        for (offset, width, value, write) in accesses {
            if write {
                guest.transport.write(offset, &value[..width]);
            } else {
                guest.transport.read(offset, &mut [0; 8][..width]);
            }
            guest.step();
        }
        guest.faults.lock().unwrap().clear();
        guest.reset();
        guest.start(u64::MAX);
        guest.assert_works();
    }
}
