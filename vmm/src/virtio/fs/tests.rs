//! The device between a driver and an `ampoule-fsd`, of which neither need be honest.

use std::sync::Mutex;

use proptest::prelude::*;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
        sockopt::set_socket_send_buffer_size,
    },
};

use super::*;
use crate::virtio::testing::*;

const HIPRIO: usize = 0;
const REQUESTS: usize = 1;
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const REQUEST_AT: u64 = BUFFERS;
const REPLY_AT: u64 = BUFFERS + (8 << 20);
/// Of what every request here has.
const SPACING: u64 = 256 << 10;

struct Bench {
    guest: Guest,
    fs: Arc<Mutex<Fs>>,
    /// `None` once it has ended.
    fsd: Option<OwnedFd>,
}

/// A request, or a reply, as `ampoule-fsd` sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    unique: u64,
    bytes: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (fsd, socket) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        for end in [&fsd, &socket] {
            set_socket_send_buffer_size(end, MAX_MESSAGE).unwrap();
        }
        let fs = Arc::new(Mutex::new(Fs::new(socket).unwrap()));
        Self { guest: Guest::new(fs.clone()), fs, fsd: Some(fsd) }
    }

    fn under_way(&self) -> usize {
        crate::virtio::lock(&self.fs).traffic.under_way.len()
    }

    /// Puts a message with room for its reply into a ring; `slot` says where, and which descriptors.
    fn publish(&mut self, queue: usize, slot: u16, message: &[u8], room: u32) -> u16 {
        let (at, reply) = places(slot);
        self.guest.put_bytes(at, message);
        let half = message.len() as u32 / 2;
        let mut pieces =
            vec![out(at, half), out(at + u64::from(half), message.len() as u32 - half)];
        if room > 0 {
            pieces.push(into(reply, room));
        }
        let head = slot * 4;
        self.guest.chain(self.guest.queues[queue].descriptors, head, &pieces);
        self.guest.publish(queue, head);
        head
    }

    fn submit(&mut self, slot: u16, message: &[u8], room: u32) {
        self.publish(REQUESTS, slot, message, room);
        self.guest.kick(REQUESTS);
        self.guest.run();
    }

    /// What `ampoule-fsd` is asked next.
    fn asked(&self) -> Option<Seen> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let (len, _) = recv(self.fsd.as_ref()?, &mut bytes, RecvFlags::DONTWAIT).ok()?;
        bytes.truncate(len);
        Some(Seen { unique: Request(bytes[..40].try_into().unwrap()).unique(), bytes })
    }

    fn says(&self, reply: &[u8]) -> Result<usize, Errno> {
        send(self.fsd.as_ref().unwrap(), reply, SendFlags::DONTWAIT)
    }

    /// The next answer the guest gets: slot and message.
    fn answered(&mut self) -> Option<(u16, Vec<u8>)> {
        let (head, len) = self.guest.used(REQUESTS)?;
        let slot = head as u16 / 4;
        Some((slot, self.guest.get_bytes(places(slot).1, len as usize)))
    }

    fn ends(&mut self) {
        self.fsd = None;
        self.guest.run();
    }
}

fn places(slot: u16) -> (u64, u64) {
    let offset = u64::from(slot) * SPACING;
    (REQUEST_AT + offset, REPLY_AT + offset)
}

fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut message = vec![0; REQUEST_HEADER];
    message[..4].copy_from_slice(&((REQUEST_HEADER + body.len()) as u32).to_le_bytes());
    message[4..8].copy_from_slice(&opcode.to_le_bytes());
    message[8..16].copy_from_slice(&unique.to_le_bytes());
    message[16..40].fill(0x77);
    message.extend(body);
    message
}

fn reply(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut message = ((REPLY_HEADER + body.len()) as u32).to_le_bytes().to_vec();
    message.extend(error.to_le_bytes());
    message.extend(unique.to_le_bytes());
    message.extend(body);
    message
}

fn io_error(unique: u64) -> Vec<u8> {
    reply(unique, -libc::EIO, &[])
}

#[test]
fn the_driver_reads_tag_and_number_of_queues() {
    let mut guest = Bench::new().guest;
    assert_eq!(guest.read(8), VIRTIO_ID_FS);
    let config: [u8; 44] = guest.config(0);
    assert_eq!(&config[..8], b"ampoule\0");
    assert!(config[8..36].iter().all(|&byte| byte == 0));
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(1000), [0u8; 4]);
}

#[test]
fn a_request_is_forwarded_and_its_reply_comes_back_under_its_own_number() {
    let mut bench = Bench::new();
    bench.submit(0, &request(LOOKUP, 7, b"name\0"), 200);
    let asked = bench.asked().unwrap();
    assert_eq!(asked.bytes, request(LOOKUP, asked.unique, b"name\0"));
    assert_eq!(bench.answered(), None);
    bench.says(&reply(asked.unique, 0, &[9; 100])).unwrap();
    bench.guest.run();
    assert_eq!(bench.answered(), Some((0, reply(7, 0, &[9; 100]))));
    bench.submit(1, &request(LOOKUP, 7, b"other\0"), 16);
    let asked = bench.asked().unwrap();
    bench.says(&reply(asked.unique, -libc::ENOENT, &[])).unwrap();
    bench.guest.run();
    assert_eq!(bench.answered(), Some((1, reply(7, -libc::ENOENT, &[]))));
    assert_eq!(bench.under_way(), 0);
    bench.guest.assert_works();
}

#[test]
fn the_largest_messages_pass_in_both_directions() {
    let mut bench = Bench::new();
    let body: Vec<u8> = (0..MAX_MESSAGE - REQUEST_HEADER).map(|at| (at % 251) as u8).collect();
    bench.submit(0, &request(LOOKUP, 1, &body), MAX_MESSAGE as u32);
    let asked = bench.asked().unwrap();
    assert!(asked.bytes == request(LOOKUP, asked.unique, &body));
    let data = &body[..MAX_MESSAGE - REPLY_HEADER - 24];
    bench.says(&reply(asked.unique, 0, data)).unwrap();
    bench.guest.run();
    assert!(bench.answered().unwrap().1 == reply(1, 0, data));
    bench.submit(1, &request(LOOKUP, 1, &[0; MAX_MESSAGE - REQUEST_HEADER + 1]), 16);
    assert_eq!(bench.asked(), None, "one byte too long");
    assert_eq!(bench.answered(), Some((1, io_error(1))));
    bench.guest.assert_works();
}

#[test]
fn what_has_no_reply_is_used_at_once() {
    let mut bench = Bench::new();
    let head = bench.publish(HIPRIO, 0, &request(FORGET, 0, &[1; 8]), 0);
    bench.guest.kick(HIPRIO);
    bench.guest.run();
    assert_eq!(bench.guest.used(HIPRIO), Some((head.into(), 0)));
    let asked = bench.asked().unwrap();
    assert_eq!(asked.bytes, request(FORGET, asked.unique, &[1; 8]));
    bench.submit(1, &request(INTERRUPT, 3, &[1; 8]), 0);
    assert_eq!(bench.answered(), Some((1, vec![])));
    assert_eq!((bench.asked(), bench.under_way()), (None, 0), "it names a number of the driver's");
    bench.guest.assert_works();
}

#[test]
fn requests_on_both_rings_are_told_apart() {
    let mut bench = Bench::new();
    let first = bench.publish(HIPRIO, 0, &request(LOOKUP, 5, b"a"), 16);
    bench.guest.kick(HIPRIO);
    bench.submit(1, &request(LOOKUP, 5, b"b"), 16);
    let asked = [bench.asked().unwrap(), bench.asked().unwrap()];
    assert_ne!(asked[0].unique, asked[1].unique);
    let b = asked.iter().find(|seen| seen.bytes.ends_with(b"b")).unwrap();
    bench.says(&io_error(b.unique)).unwrap();
    bench.guest.run();
    assert_eq!((bench.answered(), bench.guest.used(HIPRIO)), (Some((1, io_error(5))), None));
    let a = asked.iter().find(|seen| seen.bytes.ends_with(b"a")).unwrap();
    bench.says(&io_error(a.unique)).unwrap();
    bench.guest.run();
    assert_eq!(bench.guest.used(HIPRIO), Some((first.into(), 16)));
    bench.guest.assert_works();
}

/// Rows A4, A5 and A6 for this device, and headers that lie.
#[test]
fn a04_a05_a06_requests_that_are_none_get_nowhere() {
    let mut bench = Bench::new();
    for (message, room, answer) in [
        (vec![], 100, vec![]),
        (request(LOOKUP, 1, &[])[..39].to_vec(), 100, vec![]),
        (request(LOOKUP, 1, b"x"), 15, vec![]),
        (request(LOOKUP, 1, b"x"), 0, vec![]),
        ([request(LOOKUP, 1, b"x"), vec![0]].concat(), 100, io_error(1)),
        (request(LOOKUP, 1, b"xyz")[..42].to_vec(), 100, io_error(1)),
    ] {
        bench.submit(0, &message, room);
        assert_eq!(bench.answered(), Some((0, answer)), "{message:?}");
    }
    let header = request(LOOKUP, 1, &[0; 8]);
    bench.guest.put_bytes(REQUEST_AT, &header);
    for pieces in [
        [out(REQUEST_AT, 40), out(HOLE - 4, 8), into(REPLY_AT, 100)],
        [out(REQUEST_AT, 40), out(u64::MAX - 3, 8), into(REPLY_AT, 100)],
        [out(REQUEST_AT, 48), into(REPLY_AT, 100), into(END - 50, 100)],
        [out(REQUEST_AT, 48), out(REQUEST_AT, 1 << 31), into(REPLY_AT, 100)],
    ] {
        bench.guest.submit(REQUESTS, 0, &pieces);
        bench.guest.run();
        assert_eq!(bench.guest.used(REQUESTS), Some((0, 0)), "{pieces:?}");
    }
    assert_eq!((bench.asked(), bench.under_way()), (None, 0));
    // One byte each, and the reply before the request: unusual, and right.
    let mut pieces = vec![into(REPLY_AT, 16)];
    pieces.extend((0..48).map(|at| out(REQUEST_AT + at, 1)));
    bench.guest.submit(REQUESTS, 0, &pieces);
    bench.guest.run();
    assert_eq!(bench.asked().unwrap().bytes.len(), 48);
    bench.guest.assert_works();
}

#[test]
fn a10_a_chain_under_way_cannot_be_published_again() {
    let mut bench = Bench::new();
    bench.submit(0, &request(LOOKUP, 1, b"x"), 16);
    bench.guest.publish(REQUESTS, 0);
    bench.guest.kick(REQUESTS);
    bench.guest.run();
    bench.guest.assert_broken("made available twice");
    assert_eq!(bench.under_way(), 0);
}

#[test]
fn a15_replies_from_before_a_reset_are_to_nobody() {
    let mut bench = Bench::new();
    bench.submit(0, &request(LOOKUP, 1, b"before"), 64);
    let before = bench.asked().unwrap();
    bench.guest.reset();
    bench.guest.start(u64::MAX);
    bench.submit(0, &request(LOOKUP, 1, b"after"), 64);
    let after = bench.asked().unwrap();
    bench.says(&reply(before.unique, 0, b"old")).unwrap();
    bench.says(&reply(after.unique, 0, b"new")).unwrap();
    bench.guest.run();
    assert_eq!(bench.answered(), Some((0, reply(1, 0, b"new"))));
    assert_eq!(bench.answered(), None);
    bench.guest.assert_works();
}

#[test]
fn replies_that_nobody_asked_for_are_dropped_and_broken_ones_are_io_errors() {
    let mut bench = Bench::new();
    bench.submit(0, &request(LOOKUP, 1, b"x"), 64);
    let unique = bench.asked().unwrap().unique;
    for noise in [&[0; 3][..], &reply(unique + 2, 0, b"?"), &reply(1, 0, b"?"), &[0xff; 70_000]] {
        bench.says(noise).unwrap();
    }
    bench.guest.run();
    assert_eq!(bench.answered(), None);
    bench.says(&reply(unique, 0, &[1; 49])).unwrap();
    bench.says(&reply(unique, 0, b"too late")).unwrap();
    bench.guest.run();
    assert_eq!(bench.answered(), Some((0, io_error(1))), "one byte more than there is room for");
    assert_eq!(bench.answered(), None);
    for broken in [&reply(0, 0, b"abc")[..18], &reply(0, -2, b"abc"), &reply(0, 2, &[])] {
        bench.submit(1, &request(LOOKUP, 4, b"x"), 64);
        let mut broken = broken.to_vec();
        broken[8..16].copy_from_slice(&bench.asked().unwrap().unique.to_le_bytes());
        bench.says(&broken).unwrap();
        bench.guest.run();
        assert_eq!(bench.answered(), Some((1, io_error(4))), "{broken:?}");
    }
    bench.guest.assert_works();
}

#[test]
fn a_full_socket_stops_the_ring_and_loses_nothing() {
    let mut bench = Bench::new();
    let body = vec![5; 100_000];
    for slot in 0..16 {
        bench.publish(REQUESTS, slot, &request(LOOKUP, slot.into(), &body), 16);
    }
    bench.guest.kick(REQUESTS);
    bench.guest.run();
    assert!((1..16).contains(&bench.under_way()), "{} in the socket", bench.under_way());
    for slot in 0..16 {
        let asked = bench.asked().unwrap();
        assert!(asked.bytes[REQUEST_HEADER..] == body);
        bench.says(&io_error(asked.unique)).unwrap();
        bench.guest.run();
        assert_eq!(bench.answered(), Some((slot, io_error(slot.into()))));
    }
    assert_eq!((bench.asked(), bench.under_way()), (None, 0));
    bench.guest.assert_works();
}

#[test]
fn all_that_waits_and_all_that_comes_is_an_io_error_once_fsd_has_ended() {
    let mut bench = Bench::new();
    for slot in 0..4 {
        bench.publish(REQUESTS, slot, &request(LOOKUP, 10 + u64::from(slot), &[1; 100_000]), 64);
    }
    bench.guest.kick(REQUESTS);
    bench.guest.run();
    assert!(bench.under_way() < 4, "some are still in the ring");
    bench.ends();
    let mut answers: Vec<_> = std::iter::from_fn(|| bench.answered()).collect();
    answers.sort();
    assert_eq!(answers, [0, 1, 2, 3].map(|slot| (slot, io_error(10 + u64::from(slot)))));
    bench.submit(0, &request(LOOKUP, 1, b"x"), 64);
    assert_eq!(bench.answered(), Some((0, io_error(1))));
    bench.submit(0, &request(FORGET, 0, &[0; 8]), 0);
    assert_eq!(bench.answered(), Some((0, vec![])));
    bench.guest.reset();
    bench.guest.start(u64::MAX);
    bench.submit(0, &request(LOOKUP, 1, b"x"), 64);
    assert_eq!(bench.answered(), Some((0, io_error(1))));
    bench.guest.assert_works();
}

#[test]
fn an_fsd_that_ends_before_the_driver_comes_is_noticed() {
    let (fsd, socket) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let fs = Arc::new(Mutex::new(Fs::new(socket).unwrap()));
    drop(fsd);
    let mut bench = Bench { guest: Guest::new(fs.clone()), fs, fsd: None };
    bench.submit(0, &request(LOOKUP, 1, b"x"), 64);
    assert_eq!(bench.answered(), Some((0, io_error(1))));
}

#[test]
fn a16_a_storm_of_requests_takes_turns() {
    let mut bench = Bench::new();
    let message = request(FORGET, 0, &[0; 8]);
    bench.guest.put_bytes(REQUEST_AT, &message);
    for round in 0..50 {
        for head in 0..128 {
            let table = bench.guest.queues[REQUESTS].descriptors;
            bench.guest.chain(table, head, &[out(REQUEST_AT, message.len() as u32)]);
            bench.guest.publish(REQUESTS, head);
        }
        bench.guest.worker.run(Wake::Queue(REQUESTS));
        let used = std::iter::from_fn(|| bench.guest.used(REQUESTS)).count();
        assert!(used <= TURN, "{used} in round {round}");
        while bench.asked().is_some() || bench.guest.step() {}
        assert_eq!(std::iter::from_fn(|| bench.guest.used(REQUESTS)).count(), 128 - used);
    }
    bench.guest.assert_works();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the guest puts into its rings: each chain is used once, forwarded or not, and what is forwarded
    /// is a message as long as it says.
    #[test]
    fn any_request_is_used_once(
        messages in proptest::collection::vec(
            (
                prop_oneof![0usize..60, 40usize..5000, 100_000usize..140_000],
                prop_oneof![Just(0i64), -3i64..3, any::<i32>().prop_map(i64::from)],
                prop_oneof![Just(LOOKUP), Just(FORGET), Just(INTERRUPT), any::<u32>()],
                prop_oneof![0u32..40, Just(200u32)],
            ),
            1..16,
        ),
    ) {
        let mut bench = Bench::new();
        for (slot, (len, lie, opcode, room)) in (0u16..).zip(&messages) {
            let mut message = request(*opcode, 9, &vec![3; len.saturating_sub(REQUEST_HEADER)]);
            message.truncate(*len);
            if *len >= REQUEST_HEADER {
                let said = (*len as i64 + lie) as u32;
                message[..4].copy_from_slice(&said.to_le_bytes());
            }
            bench.publish(REQUESTS, slot, &message, *room);
        }
        bench.guest.kick(REQUESTS);
        bench.guest.run();
        while let Some(asked) = bench.asked() {
            let header = Request(asked.bytes[..REQUEST_HEADER].try_into().unwrap());
            prop_assert_eq!(header.said_len(), asked.bytes.len());
            prop_assert!(asked.bytes.len() <= MAX_MESSAGE);
            if header.kind() == Kind::Answered {
                bench.says(&reply(asked.unique, 0, &[])).unwrap();
            }
            bench.guest.run();
        }
        let mut slots: Vec<_> = std::iter::from_fn(|| bench.answered()).collect();
        slots.sort();
        prop_assert_eq!(slots.len(), messages.len());
        for (slot, (expected, answer)) in (0u16..).zip(&slots) {
            prop_assert_eq!(slot, *expected);
            prop_assert!(answer.is_empty() || *answer == io_error(9) || *answer == reply(9, 0, &[]));
        }
        prop_assert_eq!(bench.under_way(), 0);
        bench.guest.assert_works();
    }

    /// Whatever an `ampoule-fsd` says: a request is answered at most once, with what agrees with itself and has
    /// room.
    #[test]
    fn any_reply_is_bounded(
        replies in proptest::collection::vec(
            (
                0u64..6,
                prop_oneof![0usize..40, 0usize..3000],
                prop_oneof![Just(0i32), -600i32..5, any::<i32>()],
                prop_oneof![3 => Just(0i64), 1 => -20i64..20],
            ),
            0..20,
        ),
    ) {
        let mut bench = Bench::new();
        let mut uniques = Vec::new();
        for slot in 0..4 {
            bench.guest.put_bytes(places(slot).1, &[0xaa; 4096]);
            bench.submit(slot, &request(LOOKUP, slot.into(), b"x"), 1000);
            uniques.push(bench.asked().unwrap().unique);
        }
        for (which, len, error, lie) in replies {
            let unique = uniques.get(which as usize).copied().unwrap_or(which);
            let mut message = reply(unique, error, &vec![4; len.saturating_sub(REPLY_HEADER)]);
            let said = (message.len() as i64 + lie) as u32;
            message[..4].copy_from_slice(&said.to_le_bytes());
            message.truncate(len.max(1));
            bench.says(&message).unwrap();
            bench.guest.run();
        }
        bench.ends();
        let mut seen = Vec::new();
        while let Some((slot, answer)) = bench.answered() {
            prop_assert!(!seen.contains(&slot));
            seen.push(slot);
            prop_assert!((REPLY_HEADER..=1000).contains(&answer.len()));
            let header = Reply(answer[..REPLY_HEADER].try_into().unwrap());
            prop_assert!(header.is_sound(answer.len()) && header.unique() == u64::from(slot));
            let behind = bench.guest.get_bytes(places(slot).1 + 1000, 3000);
            prop_assert!(behind.iter().all(|&byte| byte == 0xaa));
        }
        prop_assert_eq!(seen.len(), 4);
        bench.guest.assert_works();
    }
}
