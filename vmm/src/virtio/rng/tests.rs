//! What a request gets, and row S2.

use std::sync::Mutex;

use super::*;
use crate::virtio::testing::*;

fn rng() -> Guest {
    Guest::new(Arc::new(Mutex::new(Rng::new().unwrap())))
}

#[test]
fn bytes_are_random_and_only_where_they_were_asked_for() {
    let mut guest = rng();
    guest.put_bytes(BUFFERS, &[0; 8192]);
    guest.submit(0, 0, &[out(BUFFERS, 100), into(BUFFERS + 100, 900), into(BUFFERS + 2000, 100)]);
    guest.run();
    assert_eq!(guest.used(0), Some((0, 1000)));
    let bytes = guest.get_bytes(BUFFERS, 8192);
    assert!(bytes[..100].iter().chain(&bytes[1000..2000]).chain(&bytes[2100..]).all(|&b| b == 0));
    let zeroes = bytes[100..1000].iter().filter(|&&b| b == 0).count();
    assert!(zeroes < 50, "{zeroes} of 900 bytes are 0");
}

#[test]
fn s02_huge_overlapping_requests_get_64_kib_each() {
    let mut guest = rng();
    for first in 0..16 {
        guest.submit(0, first, &[into(BUFFERS, 8 << 20)]);
    }
    guest.run();
    for head in 0..16 {
        assert_eq!(guest.used(0), Some((head, 64 * 1024)));
    }
    assert_eq!(guest.get_bytes(BUFFERS + 64 * 1024, 4096), [0; 4096]);
    for first in 0..16 {
        guest.submit(0, first, &[into(BUFFERS, u32::MAX)]);
    }
    guest.run();
    for head in 0..16 {
        assert_eq!(guest.used(0), Some((head, 0)), "4 GiB are not all in RAM");
    }
    guest.assert_works();
}

#[test]
fn s02_a_request_storm_takes_turns() {
    let mut guest = rng();
    for round in 0..50 {
        for first in 0..16 {
            guest.chain(guest.queues[0].descriptors, first, &[into(BUFFERS, 64 * 1024)]);
            guest.publish(0, first);
        }
        if round == 0 {
            guest.kick(0);
        }
        guest.step();
        assert_eq!(std::iter::from_fn(|| guest.used(0)).count(), 16);
    }
    guest.assert_works();
}
