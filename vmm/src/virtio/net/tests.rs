//! The network device as a driver and a host see it, a socket of packets standing for the tap; and the N
//! rows.

use std::{
    fs::OpenOptions,
    os::fd::{AsFd, AsRawFd},
    sync::Mutex,
    time::{Duration, Instant},
};

use ampoule_vmm_api::{Rate, RateLimit};
use proptest::prelude::*;
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair},
};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;

use super::{frame::*, *};
use crate::virtio::testing::*;

mod busy;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MTU: u16 = 1500;
const RX_AT: u64 = BUFFERS;
const TX_AT: u64 = BUFFERS + (4 << 20);
const MERGED: u64 = u64::MAX;
const UNMERGED: u64 = !(1 << VIRTIO_NET_F_MRG_RXBUF);

struct Bench {
    guest: Guest,
    net: Arc<Mutex<Net>>,
    /// For the tap's first queue, and for its others.
    host: OwnedFd,
    further: Vec<OwnedFd>,
}

/// The host's end of what stands for a tap's queue, and that; of a further one with `usage`.
fn ends(limits: &Limits, usage: Option<&Usage>) -> (OwnedFd, Tap) {
    let (host, tap) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    (host, Tap::stand_in(tap, limits.clone(), usage))
}

impl Bench {
    fn new(features: u64) -> Self {
        Self::limited(features, RateLimit::default())
    }

    /// With the same limit for both directions.
    fn limited(features: u64, limit: RateLimit) -> Self {
        Self::several(1, features, limit)
    }

    /// With so many pairs of queues.
    fn several(pairs: usize, features: u64, limit: RateLimit) -> Self {
        let config = config(limit);
        let limits = Limits::new(&config).unwrap();
        let usage = Arc::new(Usage::new().unwrap());
        let (host, first) = ends(&limits, None);
        let (further, others) = (1..pairs).map(|_| ends(&limits, Some(&usage))).unzip();
        let net = Arc::new(Mutex::new(Net::with(&config, first, others, usage).unwrap()));
        let mut guest = Guest::with_features(net.clone(), features);
        guest.lasting = guest.queues.len().checked_sub(1).filter(|_| pairs > 1);
        for (pair, queues) in lock(&net).further() {
            let worker = guest.transport.worker_of(pair, queues);
            guest.add(worker);
        }
        Self { guest, net, host, further }
    }

    /// What the tap was given since the last call.
    fn sent(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.next_sent()).collect()
    }

    fn next_sent(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 70_000];
        let (len, _) = recv(&self.host, &mut packet, RecvFlags::DONTWAIT).ok()?;
        packet.truncate(len);
        Some(packet)
    }

    /// The guest sends a packet in one piece.
    fn transmit(&mut self, packet: &[u8]) {
        self.guest.put_bytes(TX_AT, packet);
        self.transmit_pieces(&[out(TX_AT, packet.len() as u32)]);
    }

    fn transmit_pieces(&mut self, pieces: &[Piece]) {
        self.guest.submit(1, 0, pieces);
        self.guest.run();
        assert_eq!(self.guest.used(1), Some((0, 0)));
    }

    /// A packet comes to the tap.
    fn arrives(&self, packet: &[u8]) -> Result<usize, Errno> {
        send(&self.host, packet, SendFlags::DONTWAIT)
    }

    /// The guest gives receive buffers of `len` bytes, heads from `first` on, 64 KiB apart.
    fn give(&mut self, first: u16, count: u16, len: u32) {
        for head in first..first + count {
            let at = RX_AT + u64::from(head) * 0x2000;
            self.guest.chain(self.guest.queues[0].descriptors, head, &[into(at, len)]);
            self.guest.publish(0, head);
        }
        self.guest.kick(0);
        self.guest.run();
    }

    /// The next packet that the guest has received, with the number of its buffers.
    fn received(&mut self) -> Option<(Vec<u8>, u16)> {
        let (head, len) = self.guest.used(0)?;
        let mut packet = self.guest.get_bytes(RX_AT + u64::from(head) * 0x2000, len as usize);
        let buffers = u16::from_le_bytes(packet.get(NUM_BUFFERS..HEADER_LEN)?.try_into().unwrap());
        for _ in 1..buffers {
            let (head, len) = self.guest.used(0).expect("all buffers of a frame at once");
            packet.extend(self.guest.get_bytes(RX_AT + u64::from(head) * 0x2000, len as usize));
        }
        Some((packet, buffers))
    }

    fn dropped(&self) -> [u64; 2] {
        lock(&self.net).dropped()
    }
}

pub fn config(limit: RateLimit) -> NetConfig {
    NetConfig { mac: MAC, mtu: MTU, plugged: true, pairs: 1, from_guest: limit, to_guest: limit }
}

/// A header without offloads, and a frame of `len` bytes from the guest.
fn packet(len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..HEADER_LEN + len).map(|at| (at % 251) as u8).collect();
    packet[..HEADER_LEN].fill(0);
    let ethernet = [&[0xff; 6][..], &MAC, &[8, 0]].concat();
    let end = packet.len().min(HEAD_LEN);
    packet[HEADER_LEN..end].copy_from_slice(&ethernet[..end - HEADER_LEN]);
    packet
}

/// A frame with a header of flags, gso type, and then header length, segment size, checksum start, offset.
fn offloaded(len: usize, flags: u32, gso: u32, fields: [u16; 4]) -> Vec<u8> {
    let mut packet = packet(len);
    (packet[0], packet[1]) = (flags as u8, gso as u8);
    for (at, field) in [2, 4, 6, 8].into_iter().zip(fields) {
        packet[at..at + 2].copy_from_slice(&field.to_le_bytes());
    }
    packet
}

fn tcp(len: usize, gso: u32) -> Vec<u8> {
    offloaded(len, VIRTIO_NET_HDR_F_NEEDS_CSUM, gso, [54, 1448, 34, 16])
}

#[test]
fn the_driver_reads_address_link_and_mtu() {
    let mut bench = Bench::new(MERGED);
    let config: [u8; 16] = bench.guest.config(0);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0, 1, 0, 0xdc, 5, 0, 0, 0, 0]);
}

#[test]
fn frames_go_out_whole_wherever_their_pieces_lie() {
    let mut bench = Bench::new(MERGED);
    let whole = packet(1514);
    bench.transmit(&whole);
    bench.guest.put_bytes(TX_AT, &whole);
    let cuts = [0u32, 1, 5, 12, 13, 26, 700, whole.len() as u32];
    let pieces: Vec<_> =
        cuts.windows(2).map(|cut| out(TX_AT + u64::from(cut[0]), cut[1] - cut[0])).collect();
    bench.transmit_pieces(&pieces);
    bench.transmit(&tcp(60_000, VIRTIO_NET_HDR_GSO_TCPV4));
    let sent = bench.sent();
    assert_eq!(sent[..2], [whole.clone(), whole]);
    assert_eq!(sent[2..], [tcp(60_000, VIRTIO_NET_HDR_GSO_TCPV4)]);
    bench.guest.assert_works();
}

#[test]
fn a_device_goes_and_comes_again_with_another_address_and_mtu() {
    let mut bench = Bench::new(MERGED);
    bench.transmit(&packet(100));
    assert_eq!(bench.sent().len(), 1);
    lock(&bench.net).unplug();
    assert_eq!(lock(&bench.net).device_type(), 0);
    lock(&bench.net).plug([6; 6], 100);
    let mut config = [0; 12];
    lock(&bench.net).read_config(0, &mut config);
    assert_eq!((lock(&bench.net).device_type(), &config[..6], config[10]), (1, &[6; 6][..], 100));
}

#[test]
fn frames_come_in_by_as_many_buffers_as_they_need() {
    let mut bench = Bench::new(MERGED);
    bench.give(0, 60, 1526);
    // The first long one needs the spill, the second goes straight into its buffers.
    for (len, buffers) in [(60, 1), (1514, 1), (5000, 4), (5000, 4), (1515, 2)] {
        let packet = packet(len);
        bench.guest.arm_interrupt(0);
        bench.guest.interrupts();
        bench.arrives(&packet).unwrap();
        bench.guest.run();
        assert_eq!(bench.guest.interrupts(), 1, "for a frame of {len} bytes");
        let (mut got, count) = bench.received().unwrap();
        got[NUM_BUFFERS..HEADER_LEN].fill(0);
        assert_eq!((got == packet, count), (true, buffers), "a frame of {len} bytes");
    }
    assert_eq!(bench.dropped(), [0, 0]);
    bench.guest.assert_works();
}

#[test]
fn the_used_ring_goes_round_in_the_middle_of_a_frame() {
    let mut bench = Bench::new(MERGED);
    bench.guest.queues[0].size = 8;
    bench.guest.reset();
    bench.guest.start(MERGED);
    bench.give(0, 8, 500);
    for round in 0..40 {
        bench.arrives(&packet(1400 + round)).unwrap();
        bench.guest.run();
        let (got, buffers) = bench.received().unwrap();
        assert_eq!((got.len(), buffers), (HEADER_LEN + 1400 + round, 3));
        assert!(!bench.guest.peek_used(0));
        for again in 0..3 {
            bench.give(((3 * round + again) % 8) as u16, 1, 500);
        }
    }
    assert_eq!(bench.dropped(), [0, 0]);
    bench.guest.assert_works();
}

#[test]
fn n01_frames_that_must_not_leave_are_dropped_and_counted() {
    let csum = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    let (tcp4, udp) = (VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_UDP_L4);
    let with = |at: usize, bytes: &[u8]| {
        let mut packet = packet(100);
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        packet
    };
    let mut hostile: Vec<_> = (0..=13).map(packet).collect();
    hostile.extend((1..HEADER_LEN).map(|len| vec![0; len]));
    hostile.extend([
        packet(usize::from(MTU) + 15),
        tcp(MAX_FRAME + 1, tcp4),
        with(HEADER_LEN + 6, &[2, 0, 0, 0, 0, 9]),
        with(HEADER_LEN + 12, &[0x81, 0]),
        with(HEADER_LEN + 12, &[0x88, 0xa8]),
        offloaded(100, VIRTIO_NET_HDR_F_DATA_VALID, 0, [0; 4]),
        offloaded(100, csum | VIRTIO_NET_HDR_F_RSC_INFO, 0, [0; 4]),
        offloaded(100, 0xff, 0, [0; 4]),
        offloaded(100, csum, 0, [0, 0, 83, 16]),
        offloaded(100, csum, 0, [0, 0, u16::MAX, u16::MAX]),
        offloaded(100, csum, 0, [0, 0, 13, 16]),
        offloaded(3000, csum, 2, [54, 1448, 34, 16]),
        offloaded(3000, csum, VIRTIO_NET_HDR_GSO_UDP, [42, 1448, 34, 6]),
        offloaded(3000, csum, VIRTIO_NET_HDR_GSO_ECN, [54, 1448, 34, 16]),
        offloaded(3000, csum, udp | VIRTIO_NET_HDR_GSO_ECN, [42, 1448, 34, 6]),
        offloaded(3000, csum, udp, [42, 1448, 34, 16]),
        offloaded(3000, 0, tcp4, [54, 1448, 34, 16]),
        offloaded(3000, csum, tcp4, [54, 0, 34, 16]),
        offloaded(3000, csum, tcp4, [54, 1481, 34, 16]),
        offloaded(3000, csum, tcp4, [3001, 1448, 34, 16]),
        offloaded(3000, csum, tcp4, [54, 1448, 34, 6]),
    ]);
    let mut bench = Bench::new(MERGED);
    for (count, packet) in (1..).zip(&hostile) {
        bench.transmit(packet);
        assert_eq!(bench.dropped(), [count, 0], "{:?}", &packet[..packet.len().min(HEAD_LEN)]);
    }
    let counted = hostile.len() as u64;
    // Empty, of the wrong direction, and outside of memory.
    for piece in [out(TX_AT, 0), into(TX_AT, 1000), out(HOLE - 10, 100), out(u64::MAX - 5, 100)] {
        bench.transmit_pieces(&[piece]);
    }
    bench.transmit_pieces(&[out(TX_AT, u32::MAX)]);
    assert_eq!((bench.dropped(), bench.sent().len()), ([counted + 5, 0], 0));
    let good = [
        packet(usize::from(MTU) + 14),
        tcp(MAX_FRAME, tcp4 | VIRTIO_NET_HDR_GSO_ECN),
        offloaded(100, csum, 0, [0, 0, 82, 16]),
        offloaded(3000, csum, udp, [42, 1400, 34, 6]),
    ];
    good.iter().for_each(|packet| bench.transmit(packet));
    assert_eq!(bench.sent(), good);
    bench.guest.assert_works();
}

#[test]
fn n01_offloads_that_were_not_negotiated_are_refused() {
    let mut bench = Bench::new(VERSION_1);
    bench.transmit(&offloaded(100, VIRTIO_NET_HDR_F_NEEDS_CSUM, 0, [0, 0, 34, 16]));
    bench.transmit(&tcp(3000, VIRTIO_NET_HDR_GSO_TCPV4));
    assert_eq!((bench.dropped(), bench.sent().len()), ([2, 0], 0));
}

#[test]
fn n01_a_frame_of_256_fragments_is_a_frame() {
    let mut bench = Bench::new(MERGED);
    let whole = packet(244);
    bench.guest.put_bytes(TX_AT, &whole);
    let pieces: Vec<_> = (0..256).map(|at| out(TX_AT + at, 1)).collect();
    bench.transmit_pieces(&pieces);
    assert_eq!(bench.sent(), [whole]);
}

#[test]
fn a_full_tap_stops_the_ring_and_loses_nothing() {
    let mut bench = Bench::new(MERGED);
    let frames: Vec<_> = (0..250u8).map(|n| [packet(1400), vec![n]].concat()).collect();
    for (head, frame) in (0u16..).zip(&frames) {
        let at = TX_AT + u64::from(head) * 0x1000;
        bench.guest.put_bytes(at, frame);
        let piece = [out(at, frame.len() as u32)];
        bench.guest.chain(bench.guest.queues[1].descriptors, head, &piece);
        bench.guest.publish(1, head);
    }
    bench.guest.kick(1);
    bench.guest.run();
    let before = std::iter::from_fn(|| bench.guest.used(1)).count();
    assert!(before > 0 && before < frames.len(), "{before} fit into the socket");
    let mut sent = Vec::new();
    while sent.len() < frames.len() {
        let more = bench.sent();
        assert!(!more.is_empty(), "stuck after {} frames", sent.len());
        sent.extend(more);
        bench.guest.run();
    }
    assert!(sent == frames, "in order");
    assert_eq!(bench.dropped(), [0, 0]);
    bench.guest.assert_works();
}

#[test]
fn a_limit_makes_frames_wait_in_both_directions_and_loses_none() {
    let rate = Rate { per_second: 200, burst: 2 };
    let limit = RateLimit { packets: Some(rate), bytes: None };
    let mut bench = Bench::limited(MERGED, limit);
    let began = Instant::now();
    bench.guest.put_bytes(TX_AT, &packet(60));
    for head in 0..12 {
        bench.arrives(&packet(60)).unwrap();
        bench.guest.chain(bench.guest.queues[1].descriptors, head, &[out(TX_AT, 72)]);
        bench.guest.publish(1, head);
    }
    bench.guest.kick(1);
    bench.give(0, 20, 1526);
    let (mut sent, mut received) = (bench.sent().len(), 0);
    while (sent, received) != (12, 12) {
        assert!(began.elapsed() < Duration::from_secs(10), "{sent} and {received} of 12");
        bench.guest.run();
        sent += bench.sent().len();
        received += std::iter::from_fn(|| bench.received()).count();
    }
    assert!(began.elapsed() >= Duration::from_millis(45), "{:?}", began.elapsed());
    assert_eq!(bench.dropped(), [0, 0]);
    bench.guest.assert_works();
}

#[test]
fn n02_a_flood_without_buffers_waits_and_goes_on_when_they_come() {
    let mut bench = Bench::new(MERGED);
    let mut count = 0u64;
    while bench.arrives(&[packet(1000), count.to_le_bytes().to_vec()].concat()).is_ok() {
        bench.guest.run();
        count += 1;
    }
    assert!(count > 10, "{count}");
    for number in 0..count {
        bench.give((number % 256) as u16, 1, 1526);
        let (got, _) = bench.received().expect("a frame for each buffer");
        assert_eq!(got[got.len() - 8..], number.to_le_bytes());
    }
    assert_eq!((bench.received(), bench.dropped()), (None, [0, 0]));
    bench.guest.assert_works();
}

#[test]
fn n02_half_a_frame_waits_for_the_other_buffers() {
    let mut bench = Bench::new(MERGED);
    bench.give(0, 2, 1526);
    bench.arrives(&packet(60_000)).unwrap();
    bench.arrives(&packet(60)).unwrap();
    bench.guest.run();
    assert_eq!(bench.guest.used(0), None);
    bench.give(2, 40, 1526);
    let (mut got, buffers) = bench.received().unwrap();
    got[NUM_BUFFERS..HEADER_LEN].fill(0);
    assert!(got == packet(60_000) && buffers == 40, "{buffers} buffers");
    assert_eq!(bench.received().unwrap().0.len(), HEADER_LEN + 60);
}

#[test]
fn n02_buffers_too_small_for_anything_end_in_a_drop_and_not_in_a_freeze() {
    let mut bench = Bench::new(MERGED);
    for len in [0, 1, 11] {
        bench.give(0, 256, len);
        bench.arrives(&packet(60)).unwrap();
        bench.guest.run();
        for head in 0..256 {
            assert_eq!(bench.guest.used(0), Some((head, 0)), "buffers of {len} bytes");
        }
    }
    bench.give(0, 256, 12);
    for _ in 0..3 {
        assert_eq!(bench.received().unwrap().1, 6, "those that had waited");
    }
    bench.give(0, 18, 12);
    bench.arrives(&packet(60_000)).unwrap();
    bench.arrives(&packet(24)).unwrap();
    bench.guest.run();
    assert_eq!(bench.dropped(), [0, 1], "no more buffers can come");
    assert_eq!(bench.received().unwrap().1, 3);
    bench.guest.assert_works();
}

#[test]
fn n02_without_merging_a_frame_has_one_buffer_or_none() {
    let mut bench = Bench::new(UNMERGED);
    bench.give(0, 3, 1526);
    for len in [1514, 1515, 60] {
        bench.arrives(&packet(len)).unwrap();
    }
    bench.guest.run();
    assert_eq!(bench.dropped(), [0, 1]);
    for len in [1514, 60] {
        let (got, buffers) = bench.received().unwrap();
        assert_eq!((got.len(), buffers), (HEADER_LEN + len, 1));
    }
    bench.guest.assert_works();
}

#[test]
fn a_tap_that_is_gone_is_a_fault_and_a_link_that_is_down() {
    let mut bench = Bench::new(MERGED);
    bench.give(0, 1, 1526);
    bench.host = tempfile::tempfile().unwrap().into();
    bench.guest.run();
    assert_eq!(bench.guest.config::<2>(6), [0, 0]);
    bench.guest.assert_broken("what the host put behind the device is gone");
}

#[test]
fn a_reset_forgets_what_was_held() {
    let mut bench = Bench::new(MERGED);
    bench.give(0, 1, 100);
    bench.arrives(&packet(1000)).unwrap();
    bench.guest.run();
    bench.guest.reset();
    bench.guest.start(MERGED);
    bench.give(0, 4, 1526);
    assert_eq!(bench.received(), None);
    bench.arrives(&packet(200)).unwrap();
    bench.guest.run();
    assert_eq!(bench.received().unwrap().0.len(), HEADER_LEN + 200);
    bench.guest.assert_works();
}

const CONTROL_AT: u64 = BUFFERS + (8 << 20);
const SET: [u8; 2] = [VIRTIO_NET_CTRL_MQ as u8, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8];
const OK: Option<u8> = Some(VIRTIO_NET_OK as u8);
const ERR: Option<u8> = Some(VIRTIO_NET_ERR as u8);

/// With several pairs.
impl Bench {
    fn control_queue(&self) -> usize {
        2 * (1 + self.further.len())
    }

    /// The answer to a command in these pieces, the last of which is for that.
    fn command_pieces(&mut self, pieces: &[Piece]) -> Option<u8> {
        let (queue, answer) = (self.control_queue(), CONTROL_AT + 0x1000);
        self.guest.put_bytes(answer, &[0xee]);
        self.guest.submit(queue, 0, pieces);
        self.guest.run();
        let (_, written) = self.guest.used(queue).expect("every command is used");
        (written > 0).then(|| self.guest.get_bytes(answer, 1)[0])
    }

    fn command(&mut self, bytes: &[u8]) -> Option<u8> {
        self.guest.put_bytes(CONTROL_AT, bytes);
        self.command_pieces(&[out(CONTROL_AT, bytes.len() as u32), into(CONTROL_AT + 0x1000, 1)])
    }

    fn set_pairs(&mut self, pairs: u16) -> Option<u8> {
        self.command(&[&SET[..], &pairs.to_le_bytes()].concat())
    }

    /// What the tap has as the frame's queue; the first one is not among them.
    fn sent_by(&self, pair: usize) -> usize {
        let host = &self.further[pair - 1];
        std::iter::from_fn(|| recv(host, &mut [0; 2000], RecvFlags::DONTWAIT).ok()).count()
    }

    fn transmit_by(&mut self, pair: usize, packet: &[u8]) {
        self.guest.put_bytes(TX_AT, packet);
        self.guest.submit(2 * pair + 1, 0, &[out(TX_AT, packet.len() as u32)]);
        self.guest.run();
    }

    /// Gives a further pair a buffer.
    fn give_to(&mut self, pair: usize, head: u16) {
        let at = RX_AT + (2 << 20) + u64::from(head) * 0x1000;
        self.guest.submit(2 * pair, head, &[into(at, 1526)]);
        self.guest.run();
    }

    fn arrives_at(&self, pair: usize, packet: &[u8]) {
        send(&self.further[pair - 1], packet, SendFlags::DONTWAIT).unwrap();
    }
}

#[test]
fn one_pair_has_no_control_queue_and_several_come_with_one() {
    let mut single = Bench::new(MERGED);
    let mut several = Bench::several(3, MERGED, RateLimit::default());
    let offered = |bench: &Bench| lock(&bench.net).features() & MULTIQUEUE;
    assert_eq!((offered(&single), offered(&several)), (0, MULTIQUEUE));
    assert_eq!((single.guest.queues.len(), several.guest.queues.len()), (2, 7));
    assert_eq!((single.guest.config(8), several.guest.config(8)), ([1, 0], [3, 0]));
    several.guest.assert_works();
}

#[test]
fn without_both_features_there_is_one_pair_and_one_of_them_is_refused() {
    let mut bench = Bench::several(2, MERGED & !MULTIQUEUE, RateLimit::default());
    bench.transmit(&packet(100));
    bench.give(0, 1, 1526);
    bench.arrives(&packet(100)).unwrap();
    bench.guest.run();
    assert!(bench.sent().len() == 1 && bench.received().is_some());
    for one in [VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ] {
        bench.guest.reset();
        bench.guest.negotiate(MERGED & !(1 << one));
        assert_eq!(bench.guest.status() & VIRTIO_CONFIG_S_FEATURES_OK, 0);
    }
}

#[test]
fn n02_the_control_queue_sets_the_pairs_and_refuses_all_else() {
    let mut bench = Bench::several(3, MERGED, RateLimit::default());
    for pairs in [2, 3, 1, 1] {
        assert_eq!(bench.set_pairs(pairs), OK, "{pairs}");
    }
    for pairs in [0, 4, 0x100, 0x8000, u16::MAX] {
        assert_eq!(bench.set_pairs(pairs), ERR, "{pairs}");
    }
    let [class, command] = SET;
    for (class, command) in [(class, 1), (class, 2), (0, 0), (1, 0), (3, 0), (5, 0), (255, 255)] {
        assert_eq!(bench.command(&[class, command, 1, 0]), ERR, "{class} {command}");
    }
    for bytes in [&[][..], &[class], &SET, &[class, command, 1], &[class, command, 1, 0, 0]] {
        assert_eq!(bench.command(bytes), ERR, "{bytes:?}");
    }
    assert_eq!(bench.command(&[1; 0x1000]), ERR);
    // In as many pieces as there are bytes, as is any driver's right.
    bench.guest.put_bytes(CONTROL_AT, &[class, command, 2, 0]);
    let answer = into(CONTROL_AT + 0x1000, 1);
    let bytes = [0, 1, 2, 3].map(|at| out(CONTROL_AT + at, 1));
    assert_eq!(bench.command_pieces(&[&bytes[..], &[answer]].concat()), OK);
    let whole = out(CONTROL_AT, 4);
    // Without room for an answer nothing is done; more than enough of it is no harm.
    assert_eq!(bench.command_pieces(&[whole]), None);
    assert_eq!(bench.command_pieces(&[whole, into(CONTROL_AT + 0x1000, 0x1000)]), OK);
    assert_eq!(bench.command_pieces(&[answer, whole]), ERR);
    assert_eq!(bench.command_pieces(&[answer]), ERR);
    assert_eq!(bench.command_pieces(&[out(HOLE - 2, 4), answer]), ERR);
    assert_eq!(bench.command_pieces(&[out(u64::MAX - 1, 4), answer]), ERR);
    assert_eq!(bench.command_pieces(&[whole, into(HOLE, 1)]), None);
    assert_eq!(bench.command_pieces(&[out(CONTROL_AT, u32::MAX), answer]), ERR);
    bench.guest.assert_works();
}

#[test]
fn frames_go_by_the_pairs_in_use_and_no_others() {
    let mut bench = Bench::several(3, MERGED, RateLimit::default());
    bench.give_to(1, 0);
    bench.arrives_at(1, &packet(100));
    bench.transmit_by(1, &packet(100));
    assert_eq!((bench.guest.used(2), bench.guest.used(3)), (None, Some((0, 0))));
    assert_eq!((bench.sent_by(1), bench.dropped()), (0, [1, 0]));
    assert_eq!(bench.set_pairs(2), OK);
    bench.give_to(1, 1);
    assert_eq!(bench.guest.used(2), Some((0, (HEADER_LEN + 100) as u32)));
    bench.transmit_by(1, &packet(100));
    bench.transmit_by(2, &packet(100));
    assert_eq!((bench.sent_by(1), bench.sent_by(2), bench.dropped()), (1, 0, [2, 0]));
    bench.transmit(&packet(100));
    assert_eq!(bench.sent().len(), 1);
    // An interrupt of any pair is the device's.
    bench.guest.arm_interrupt(2);
    bench.guest.interrupts();
    bench.arrives_at(1, &packet(60));
    bench.guest.run();
    assert_eq!(bench.guest.interrupts(), 1);
    bench.guest.assert_works();
}

#[test]
fn a_reset_leaves_one_pair_in_use() {
    let mut bench = Bench::several(2, MERGED, RateLimit::default());
    assert_eq!(bench.set_pairs(2), OK);
    bench.guest.reset();
    bench.guest.start(MERGED);
    bench.transmit_by(1, &packet(100));
    assert_eq!((bench.sent_by(1), bench.dropped()), (0, [1, 0]));
    assert_eq!(bench.set_pairs(2), OK);
    bench.transmit_by(1, &packet(100));
    assert_eq!(bench.sent_by(1), 1);
    lock(&bench.net).unplug();
    bench.transmit_by(1, &packet(100));
    assert_eq!(bench.sent_by(1), 0);
}

#[test]
fn n02_whoever_changes_the_pairs_all_the_time_is_refused() {
    let mut bench = Bench::several(2, MERGED, RateLimit::default());
    let answers: Vec<_> = (0..100).map(|n| bench.set_pairs(1 + n % 2)).collect();
    let changed = answers[1..].iter().take_while(|answer| **answer == OK).count();
    assert!((15..40).contains(&changed), "{changed}");
    assert!(answers.ends_with(&[ERR]) || answers.ends_with(&[ERR, OK]), "{answers:?}");
    bench.guest.assert_works();
}

/// Linux waits for the answer and does nothing else.
#[test]
fn n02_commands_are_answered_whatever_has_become_of_the_device() {
    let mut corrupt = Bench::several(2, MERGED, RateLimit::default());
    corrupt.guest.publish(3, 300);
    corrupt.guest.kick(3);
    let mut gone = Bench::several(2, MERGED, RateLimit::default());
    gone.give(0, 1, 1526);
    gone.host = ends(&Limits::new(&config(RateLimit::default())).unwrap(), None).0;
    let unplugged = Bench::several(2, MERGED, RateLimit::default());
    lock(&unplugged.net).unplug();
    for (mut bench, fails) in [(corrupt, true), (gone, true), (unplugged, false)] {
        bench.guest.run();
        assert_eq!(bench.guest.status() & NEEDS_RESET != 0, fails);
        for pairs in [1, 2, 1] {
            assert_eq!(bench.set_pairs(pairs), ERR);
        }
        bench.transmit_by(1, &packet(100));
        assert_eq!(bench.guest.used(3), None);
    }
}

#[test]
fn n02_a_corrupt_ring_of_any_pair_is_the_end_of_them_all() {
    for queue in [2, 3, 4] {
        let mut bench = Bench::several(2, MERGED, RateLimit::default());
        assert_eq!(bench.set_pairs(2), OK);
        bench.guest.publish(queue, 300);
        bench.guest.kick(queue);
        bench.guest.run();
        bench.transmit_by(1, &packet(100));
        bench.guest.submit(1, 0, &[out(TX_AT, 112)]);
        bench.guest.run();
        assert_eq!(
            (bench.sent().len(), bench.sent_by(1)),
            (0, 0),
            "after a fault of queue {queue}"
        );
        bench.guest.assert_broken(&format!("queue {queue} is corrupt"));
        // A reset brings all of them back.
        assert_eq!(bench.set_pairs(2), OK);
        bench.transmit_by(1, &packet(100));
        assert_eq!(bench.sent_by(1), 1);
    }
}

#[test]
fn a_limit_is_one_of_all_pairs_together() {
    let rate = Rate { per_second: 200, burst: 2 };
    let limit = RateLimit { packets: Some(rate), bytes: None };
    let mut bench = Bench::several(3, MERGED, limit);
    assert_eq!(bench.set_pairs(3), OK);
    let began = Instant::now();
    bench.guest.put_bytes(TX_AT, &packet(60));
    for head in 0..8 {
        for queue in [1, 3, 5] {
            bench.guest.chain(bench.guest.queues[queue].descriptors, head, &[out(TX_AT, 72)]);
            bench.guest.publish(queue, head);
        }
    }
    [1, 3, 5].into_iter().for_each(|queue| bench.guest.kick(queue));
    let mut sent = 0;
    while sent < 24 {
        assert!(began.elapsed() < Duration::from_secs(10), "{sent} of 24");
        bench.guest.run();
        sent += bench.sent().len() + bench.sent_by(1) + bench.sent_by(2);
    }
    // Besides the burst, each pair may have one on its way.
    assert!(began.elapsed() >= Duration::from_millis(90), "{:?}", began.elapsed());
    assert_eq!(bench.dropped(), [0, 0]);
    bench.guest.assert_works();
}

/// Each pair with a thread, as it is in a VMM, while the driver changes how many it uses.
#[test]
fn pairs_change_under_traffic() {
    let mut bench = Bench::several(2, MERGED, RateLimit::default());
    let (pair, queues) = lock(&bench.net).further().next().unwrap();
    let mut threads = threads::Threads::default();
    let worker = bench.guest.transport.worker_of(pair, queues);
    threads.add([worker].into_iter()).unwrap();
    // One that forbids nothing that a test does.
    let latch = crate::stop::StopLatch::new().unwrap();
    threads.start(&Arc::new(crate::seccomp::pairs().unwrap()), &latch).unwrap();
    bench.guest.put_bytes(TX_AT, &packet(100));
    let (mut sent, mut came, mut used) = (0, 0, 0);
    let end = Instant::now() + Duration::from_secs(20);
    for change in 0u16..12 {
        // In the middle of what the thread does.
        for head in 0..8 {
            bench.guest.chain(bench.guest.queues[3].descriptors, head, &[out(TX_AT, 112)]);
            bench.guest.publish(3, head);
            bench.guest.kick(3);
            let _ = send(&bench.further[0], &packet(60), SendFlags::DONTWAIT);
            let at = RX_AT + (2 << 20) + u64::from(head) * 0x1000;
            bench.guest.chain(bench.guest.queues[2].descriptors, head, &[into(at, 1526)]);
        }
        if change == 0 {
            (0..8).for_each(|head| bench.guest.publish(2, head));
        }
        bench.guest.put_bytes(CONTROL_AT, &[SET[0], SET[1], 2 - (change % 2) as u8, 0]);
        let pieces = [out(CONTROL_AT, 4), into(CONTROL_AT + 0x1000, 1)];
        bench.guest.submit(4, 0, &pieces);
        bench.guest.kick(2);
        used += 8;
        while bench.guest.used(4).is_none() {
            assert!(bench.guest.step() || Instant::now() < end, "no answer");
        }
        assert_eq!(bench.guest.get_bytes(CONTROL_AT + 0x1000, 1), [0]);
        let mut left = 8;
        while left > 0 {
            assert!(Instant::now() < end, "{left} frames are not used");
            left -= std::iter::from_fn(|| bench.guest.used(3)).count();
        }
        while let Some((head, _)) = bench.guest.used(2) {
            came += 1;
            bench.guest.publish(2, head as u16);
        }
        sent += bench.sent_by(1);
    }
    assert_eq!(sent as u64 + bench.dropped()[0], used);
    assert!(sent > 0 && came > 0, "{sent} {came}");
    assert!(latch.raised().is_none());
    bench.guest.assert_works();
}

/// A real tap, where the test may make one: in a network namespace of its own.
#[test]
fn a_real_tap_is_set_up_and_a_wrong_one_refused() {
    let outcome = std::thread::spawn(|| {
        // SAFETY: CLONE_FILES, the flag that is not safe, is not given; this thread ends with the test.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.ok()?;
        let right = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let limits = Limits::new(&config(RateLimit::default())).unwrap();
        let tap = Tap::new(make_tap(right)?, limits.clone()).unwrap();
        assert_ne!(tap.features() & 1 << VIRTIO_NET_F_GUEST_TSO4, 0);
        frames_pass(tap);
        queues_are_attached(limits.clone())?;
        for wrong in [libc::IFF_TAP | libc::IFF_NO_PI, libc::IFF_TUN | libc::IFF_NO_PI] {
            let refused = Tap::new(make_tap(wrong)?, limits.clone());
            assert!(matches!(refused, Err(NetError::Flags(_))));
        }
        Some(())
    });
    if outcome.join().unwrap().is_none() {
        eprintln!("skipped: no tap can be made here (root and /dev/net/tun are needed)");
    }
}

/// While the interface is down the host refuses frames; then it takes them, cut or not, and sends its own.
fn frames_pass(tap: Tap) {
    let mut bench = Bench::new(MERGED);
    let usage = Arc::new(Usage::new().unwrap());
    let net = Net::with(&config(RateLimit::default()), tap, Vec::new(), usage).unwrap();
    bench.net = Arc::new(Mutex::new(net));
    bench.guest = Guest::with_features(bench.net.clone(), MERGED);
    bench.transmit(&packet(60));
    assert_eq!(bench.dropped(), [1, 0]);
    set_up("tap0");
    bench.transmit(&packet(60));
    bench.transmit(&tcp(60_000, VIRTIO_NET_HDR_GSO_TCPV4));
    assert_eq!(bench.dropped(), [1, 0]);
    let counters = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = counters.lines().find_map(|line| line.trim().strip_prefix("tap0:")).unwrap();
    let fields: Vec<_> = line.split_whitespace().collect();
    assert_eq!(fields[..2], ["60060", "2"], "bytes and packets that came from the guest");
    if !std::path::Path::new("/proc/thread-self/net/if_inet6").exists() {
        eprintln!("skipped in part: without IPv6 the host has nothing to say");
        return;
    }
    bench.give(0, 8, 1526);
    let end = Instant::now() + Duration::from_secs(10);
    // IPv6 looks for its neighbours as soon as the interface is up.
    let frame = loop {
        bench.guest.run();
        match bench.received() {
            Some((frame, 1)) => break frame,
            _ => assert!(Instant::now() < end, "nothing from the host"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(frame[HEADER_LEN + 12..HEAD_LEN], [0x86, 0xdd]);
    bench.guest.assert_works();
}

/// A tap's queues, of which the host uses as many as the driver.
fn queues_are_attached(limits: Limits) -> Option<()> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let first = Tap::new(make_named("several", flags)?, limits.clone()).unwrap();
    let usage = Usage::new().unwrap();
    let named = make_named("several", flags)?;
    let mut further = Tap::further(named, limits.clone(), &usage).unwrap();
    let attached = |tap: &Tap| tap.real_queue();
    assert!(attached(&first) && !attached(&further));
    for attach in [true, true, false, false, true] {
        further.attach(attach);
        assert_eq!(attached(&further), attach);
    }
    drop(first);
    let single = make_tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    let alone = Tap::further(single, limits, &usage);
    assert!(matches!(alone, Err(NetError::Setup { .. })), "{alone:?}");
    Some(())
}

/// `ip link set NAME up`
fn set_up(name: &str) {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    // SAFETY: reads the request, which outlives the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    assert_eq!(done, 0);
}

fn make_tap(flags: i32) -> Option<OwnedFd> {
    make_named("", flags)
}

/// Or a further queue of one that has this name.
fn make_named(name: &str, flags: i32) -> Option<OwnedFd> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun").ok()?;
    // SAFETY: plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: reads and writes the request, which outlives the call.
    let made = unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    (made == 0).then(|| tun.into())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the header, the length and the cuts: what leaves keeps to the rules, the device works on.
    #[test]
    fn n01_no_header_gets_a_bad_frame_out(
        header in proptest::array::uniform10(prop_oneof![0u8..6, any::<u8>()]),
        len in prop_oneof![0usize..200, 1400usize..1600, 60_000usize..70_000],
        cuts in proptest::collection::vec(0u32..70_000, 0..6),
    ) {
        let mut bench = Bench::new(MERGED);
        let mut packet = packet(len);
        packet[..10].copy_from_slice(&header);
        bench.guest.put_bytes(TX_AT, &packet);
        let end = packet.len() as u32;
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % end).chain([0, end]).collect();
        cuts.sort_unstable();
        let pieces: Vec<_> =
            cuts.windows(2).map(|cut| out(TX_AT + u64::from(cut[0]), cut[1] - cut[0])).collect();
        bench.transmit_pieces(&pieces);
        let sent = bench.sent();
        prop_assert_eq!(sent.len() as u64 + bench.dropped()[0], 1);
        for frame in sent {
            prop_assert_eq!(&frame, &packet);
            let field = |at: usize| usize::from(u16::from_le_bytes([frame[at], frame[at + 1]]));
            let len = frame.len() - HEADER_LEN;
            prop_assert!(frame[0] <= 1 && len <= MAX_FRAME);
            prop_assert!(frame[0] == 0 || field(6) + field(8) + 2 <= len);
            prop_assert!(frame[1] != 0 || len <= 1514);
            prop_assert!(frame[1] == 0 || frame[0] == 1 && (1..=1480).contains(&field(4)));
        }
        bench.guest.assert_works();
    }

    /// Whatever the buffers: a frame arrives whole or not at all, and the next one finds its way.
    #[test]
    fn n02_any_buffers_get_whole_frames(
        sizes in proptest::collection::vec(prop_oneof![0u32..40, 0u32..8000], 1..64),
        frames in proptest::collection::vec(prop_oneof![14usize..2000, 2000usize..65_000], 1..8),
    ) {
        let mut bench = Bench::new(MERGED);
        for (head, len) in (0u16..).zip(&sizes) {
            bench.give(head, 1, *len);
        }
        let mut frames: Vec<_> = frames.into_iter().map(packet).collect();
        frames.retain(|frame| bench.arrives(frame).is_ok());
        bench.guest.run();
        bench.give(64, 192, 8000);
        let mut got = Vec::new();
        loop {
            match bench.received() {
                Some((mut frame, _)) => {
                    frame[NUM_BUFFERS..HEADER_LEN].fill(0);
                    got.push(frame);
                }
                // Those given back empty have no header to be read.
                None if bench.guest.peek_used(0) => {}
                None => break,
            }
        }
        prop_assert!(got == frames);
        bench.guest.assert_works();
    }
}
