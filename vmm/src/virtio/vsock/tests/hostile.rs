//! The V rows: packets that make no sense, and sense in excess.

use proptest::prelude::*;

use super::*;

#[test]
fn v01_packets_that_contradict_themselves() {
    type Change = fn(&mut Header);
    let changes: [(Change, usize); 14] = [
        (|h| h.len = 11, 10),
        (|h| h.len = 9, 10),
        (|h| h.len = 0, 10),
        (|h| h.len = 10, 0),
        (|h| h.len = u32::MAX, 10),
        (|h| h.len = 65_537, 65_537),
        (|h| h.flags = 1, 0),
        (|h| h.flags = u32::MAX, 0),
        (|h| h.op = 0, 0),
        (|h| h.op = 8, 0),
        (|h| h.op = 0xffff, 0),
        (|h| (h.op, h.flags) = (OP_SHUTDOWN, 4), 0),
        (|h| (h.op, h.len) = (OP_CREDIT_UPDATE, 10), 10),
        (|h| (h.op, h.len) = (OP_SHUTDOWN, 10), 10),
    ];
    for (change, payload) in changes {
        let mut bench = Bench::new();
        let mut host = bench.connected();
        let mut header = bench.header(OP_RW);
        change(&mut header);
        bench.send(header, &vec![0; payload]);
        bench.expect(&[OP_RST]);
        assert_eq!(read_all(&mut host), b"", "{header:?}");
        bench.guest.assert_works();
    }
}

#[test]
fn v01_headers_that_are_none() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    for len in [0, 1, 43] {
        let header = bench.header(OP_RST).to_bytes();
        bench.send_bytes(&header[..len], &[]);
    }
    bench.guest.submit(1, 0, &[out(END - 10, 44)]);
    bench.guest.submit(1, 4, &[into(TX_AT, 44)]);
    bench.guest.run();
    bench.guest.used(1);
    bench.guest.used(1);
    bench.expect(&[]);
    bench.send_data(b"fine");
    assert_eq!(read_some(&mut host), b"fine");
    bench.guest.assert_works();
}

#[test]
fn v01_types_that_are_not_streams() {
    let mut bench = Bench::new();
    let _waiting = bench.listen(HOST_PORT);
    for socket_type in [0, 2, 3, 0xffff] {
        bench.send(Header { socket_type, ..bench.header(OP_REQUEST) }, &[]);
        let reset = bench.expect(&[OP_RST])[0].0;
        assert_eq!(reset.socket_type, socket_type);
    }
    bench.connected();
}

#[test]
fn v02_addresses_that_are_not_ours() {
    let mut bench = Bench::new();
    let _waiting = bench.listen(HOST_PORT);
    for src_cid in [0, 1, 2, 4, u64::MAX, GUEST_CID | 1 << 32] {
        bench.send(Header { src_cid, ..bench.header(OP_REQUEST) }, &[]);
        bench.expect(&[]);
    }
    for dst_cid in [0, 1, GUEST_CID, 4, u64::MAX, HOST_CID | 1 << 32] {
        let request = Header { dst_cid, ..bench.header(OP_REQUEST) };
        bench.send(request, &[]);
        let reset = bench.expect(&[OP_RST])[0].0;
        assert_eq!((reset.op, reset.src_cid), (OP_RST, dst_cid));
    }
    for dst_port in [0, 1, 22, 1023, HOST_PORT + 1, u32::MAX] {
        bench.send(Header { dst_port, ..bench.header(OP_REQUEST) }, &[]);
        bench.expect(&[OP_RST]);
    }
    for op in [OP_RESPONSE, OP_SHUTDOWN, OP_RW, OP_CREDIT_UPDATE, OP_CREDIT_REQUEST] {
        bench.send(bench.header(op), &[]);
        bench.expect(&[OP_RST]);
    }
    bench.connected();
}

#[test]
fn v03_sending_beyond_the_credit() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    // The socket takes some of it, so that the window holds out longer than its size.
    let mut resets = 0;
    for _ in 0..16 {
        bench.send_data(&[0; 65_536]);
        resets += bench.receive().iter().filter(|p| p.0.op == OP_RST).count();
    }
    assert!(resets > 0, "1 MiB into 256 KiB and a socket");
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() <= 1 << 20);
    bench.guest.assert_works();
}

#[test]
fn v03_forwarded_counts_ahead_of_the_truth() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    host.write_all(&[0; 100]).unwrap();
    bench.expect(&[OP_RW]);
    bench.fwd_cnt = 101;
    bench.send_op(OP_CREDIT_UPDATE);
    bench.expect(&[OP_RST]);
    assert_eq!(read_all(&mut host), b"");
    bench.fwd_cnt = 1;
    bench.listen(HOST_PORT);
    bench.send_op(OP_REQUEST);
    bench.expect(&[OP_RST]);
}

#[test]
fn v03_a_buffer_that_shrinks_and_a_guest_that_never_reads() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    host.write_all(&[0; 5000]).unwrap();
    let got: usize = bench.receive().iter().map(|p| p.1.len()).sum();
    assert_eq!(got, 5000);
    for size in [0, 1, 4999, 5000] {
        bench.buf_alloc = size;
        bench.send_op(OP_CREDIT_UPDATE);
        host.write_all(&[0; 10]).unwrap();
        bench.expect(&[]);
    }
    bench.buf_alloc = 5001;
    bench.send_op(OP_CREDIT_UPDATE);
    assert_eq!(bench.expect(&[OP_RW])[0].1.len(), 1);
    bench.guest.assert_works();
}

#[test]
fn v04_a_hundred_thousand_requests_leave_nothing_behind() {
    let mut bench = Bench::without_buffers();
    for i in 0..100_000u32 {
        let request = Header { src_port: i, dst_port: i % 1000, ..bench.header(OP_REQUEST) };
        bench.guest.put_bytes(TX_AT, &request.to_bytes());
        bench.guest.submit(1, 0, &[out(TX_AT, HEADER_LEN as u32)]);
        bench.guest.step();
        assert_eq!(bench.guest.used(1), Some((0, 0)));
    }
    bench.post(256);
    let resets = bench.take();
    assert_eq!(resets.len(), 128, "the others would not have been heard");
    bench.post(256);
    bench.connected();
    bench.guest.assert_works();
}

#[test]
fn v04_the_same_ports_twice() {
    let mut bench = Bench::new();
    let mut first = bench.connected();
    let mut second = bench.listen(HOST_PORT);
    bench.send_op(OP_REQUEST);
    bench.expect(&[OP_RST]);
    assert_eq!(read_all(&mut first), b"");
    bench.send_op(OP_REQUEST);
    bench.expect(&[OP_RESPONSE]);
    bench.send_data(b"hello");
    assert_eq!(read_some(&mut second), b"hello");
}

#[test]
fn v04_half_open_connections() {
    let mut bench = Bench::new();
    let mut host = bench.dial(GUEST_PORT);
    let request = bench.expect(&[OP_REQUEST])[0].0;
    bench.send(Header { dst_port: request.src_port, len: 1, ..bench.header(OP_RW) }, b"x");
    bench.expect(&[OP_RST]);
    assert_eq!(read_all(&mut host), b"");

    let mut host = bench.listen(HOST_PORT);
    let _ = bench.take();
    bench.spare.clear();
    let mut starved = Bench::without_buffers();
    let mut other = starved.listen(HOST_PORT);
    starved.send_op(OP_REQUEST);
    starved.send_data(b"too early");
    starved.post(256);
    starved.expect(&[OP_RST]);
    assert_eq!(read_all(&mut other), b"");
    assert_eq!(read_some(&mut host), b"");
}

#[test]
fn v04_storms_of_rst_and_shutdown() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    for _ in 0..1000 {
        bench.send(Header { src_port: 1, ..bench.header(OP_RST) }, &[]);
        bench.send_shutdown(SHUTDOWN_RCV);
        bench.send_shutdown(0);
    }
    bench.expect(&[]);
    for _ in 0..1000 {
        bench.send_op(OP_CREDIT_REQUEST);
    }
    assert_eq!(bench.receive().len(), 256, "as many as there were buffers");
    bench.expect(&[OP_CREDIT_UPDATE]);
    bench.send_data(b"alive");
    assert_eq!(read_some(&mut host), b"alive");
    for _ in 0..100 {
        bench.send_shutdown(SHUTDOWN_BOTH);
    }
    assert_eq!(read_all(&mut host), b"");
    let packets = bench.receive();
    assert!(packets.iter().all(|p| p.0.op == OP_RST) && packets.len() <= 100);
    for _ in 0..1000 {
        bench.send_op(OP_RST);
    }
    bench.expect(&[]);
    bench.guest.assert_works();
}

fn header() -> impl Strategy<Value = Header> {
    let ports = (
        prop_oneof![8 => Just(GUEST_PORT), 1 => any::<u32>()],
        prop_oneof![8 => Just(HOST_PORT), 2 => Just((1 << 30) + 1), 1 => any::<u32>()],
    );
    let cids = (
        prop_oneof![20 => Just(GUEST_CID), 1 => any::<u64>()],
        prop_oneof![20 => Just(HOST_CID), 1 => any::<u64>()],
    );
    let op = prop_oneof![20 => 1..=7u16, 1 => any::<u16>()];
    let flags = prop_oneof![6 => Just(0), 2 => 0..4u32, 1 => any::<u32>()];
    let small = || prop_oneof![4 => 0..3000u32, 1 => any::<u32>()];
    (ports, cids, op, flags, small(), small(), prop_oneof![9 => Just(1u16), 1 => any::<u16>()])
        .prop_map(|(ports, cids, op, flags, buf_alloc, fwd_cnt, socket_type)| Header {
            src_cid: cids.0,
            dst_cid: cids.1,
            src_port: ports.0,
            dst_port: ports.1,
            len: 0,
            socket_type,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        })
}

proptest! {
    #[test]
    fn a_header_is_its_bytes(bytes in proptest::array::uniform32(any::<u8>()), tail in any::<[u8; 12]>()) {
        let bytes: [u8; HEADER_LEN] = [&bytes[..], &tail].concat().try_into().unwrap();
        prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
    }

    /// Any talk: the device works on, rests, and never says more than it owes.
    #[test]
    fn any_packets_are_survived(
        steps in proptest::collection::vec((header(), 0..3000usize, any::<bool>(), 0..4u8), 1..60)
    ) {
        let mut bench = Bench::new();
        let mut hosts = vec![bench.listen(HOST_PORT), bench.listen(HOST_PORT), bench.dial(GUEST_PORT)];
        for host in &hosts {
            host.set_nonblocking(true).unwrap();
        }
        for (mut header, payload, honest, host_does) in steps {
            let payload = if header.op == OP_RW { payload } else { 0 };
            header.len = if honest { payload as u32 } else { header.buf_alloc };
            bench.send(header, &vec![7; payload]);
            let host = payload % hosts.len().max(1);
            match host_does {
                0 => drop(hosts.get_mut(host).map(|h| h.write(&[1; 5000]))),
                1 => drop(hosts.get_mut(host).map(|h| h.read(&mut [0; 50_000]))),
                2 if payload % 5 == 0 && host < hosts.len() => drop(hosts.remove(host)),
                _ => {}
            }
            bench.take();
            bench.post(payload % 7);
        }
        bench.guest.assert_works();
    }

    /// Bytes that are no header at all.
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let mut bench = Bench::new();
        let mut host = bench.connected();
        bench.send_bytes(&bytes, &[]);
        bench.send_data(b"alive");
        prop_assert_eq!(read_some(&mut host), b"alive");
        bench.guest.assert_works();
    }
}
