//! Bulk data, credit, starvation, fairness.

use super::*;

/// The sender's side of the guest's flow control.
struct Sender {
    sent: u32,
    window: u32,
    acknowledged: u32,
}

impl Sender {
    fn room(&self) -> usize {
        (self.window - self.sent.wrapping_sub(self.acknowledged)) as usize
    }
}

/// 64 MiB to a host that echoes them, and back, with checks of every byte on both sides.
#[test]
fn echoes_64_mib() {
    const TOTAL: u64 = 64 << 20;
    let mut bench = Bench::new();
    let host = bench.connected();
    let echo = std::thread::spawn(move || {
        let (mut host, mut seen) = (host, 0);
        let mut buffer = vec![0; 100_000];
        loop {
            let count = host.read(&mut buffer).unwrap();
            if count == 0 {
                return seen;
            }
            assert!(buffer[..count] == pattern(1, seen, count), "wrong bytes after {seen}");
            seen += count as u64;
            host.write_all(&buffer[..count]).unwrap();
        }
    });
    let mut sender = Sender { sent: 0, window: 256 * 1024, acknowledged: 0 };
    let (mut sent, mut received, mut ended) = (0, 0, false);
    while received < TOTAL || !ended {
        let len = sender.room().min(65_536).min((TOTAL - sent) as usize);
        if len > 0 {
            bench.send_data(&pattern(1, sent, len));
            sent += len as u64;
            sender.sent = sender.sent.wrapping_add(len as u32);
            if sent == TOTAL {
                bench.send_shutdown(SHUTDOWN_SEND);
            }
        }
        for (header, payload) in bench.receive() {
            sender.acknowledged = header.fwd_cnt;
            bench.fwd_cnt = bench.fwd_cnt.wrapping_add(header.len);
            assert!(payload == pattern(1, received, payload.len()), "wrong after {received}");
            received += payload.len() as u64;
            ended |= header.op == OP_SHUTDOWN;
        }
        bench.send_op(OP_CREDIT_UPDATE);
    }
    assert_eq!((echo.join().unwrap(), received), (TOTAL, TOTAL));
    bench.guest.assert_works();
}

#[test]
fn the_host_never_sends_beyond_the_guests_credit() {
    let mut bench = Bench::new();
    bench.buf_alloc = 1000;
    let mut host = bench.connected();
    host.write_all(&pattern(2, 0, 10_000)).unwrap();
    let mut got = Vec::new();
    for (_, payload) in bench.receive() {
        got.extend(payload);
    }
    assert_eq!(got.len(), 1000);
    bench.expect(&[]);
    bench.fwd_cnt = 300;
    bench.send_op(OP_CREDIT_UPDATE);
    got.extend(bench.expect(&[OP_RW])[0].1.clone());
    assert_eq!(got.len(), 1300);
    bench.buf_alloc = 100;
    bench.send_op(OP_CREDIT_UPDATE);
    bench.expect(&[]);
    (bench.buf_alloc, bench.fwd_cnt) = (1 << 20, 1300);
    bench.send_op(OP_CREDIT_UPDATE);
    for (_, payload) in bench.receive() {
        got.extend(payload);
    }
    assert!(got == pattern(2, 0, 10_000));
}

#[test]
fn a_slow_host_stops_the_guest_at_its_window_and_no_byte_is_lost() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    // The socket itself takes some; the guest sees credit for that.
    let (mut sent, mut acknowledged) = (0u64, 0u64);
    while sent - acknowledged < 256 * 1024 {
        let len = (256 * 1024 - (sent - acknowledged)).min(50_000) as usize;
        bench.send_data(&pattern(3, sent, len));
        sent += len as u64;
        for (header, _) in bench.receive() {
            assert_eq!(header.op, OP_CREDIT_UPDATE);
            acknowledged = header.fwd_cnt.into();
        }
        assert!(sent < 10 << 20, "the host does not read");
    }
    bench.expect(&[]);
    let mut got = read_some(&mut host);
    let updates = bench.receive();
    assert!(!updates.is_empty(), "room is told of as it comes");
    assert!(u64::from(updates[0].0.fwd_cnt) > acknowledged);
    while (got.len() as u64) < sent {
        got.extend(read_some(&mut host));
        bench.receive();
    }
    assert!(got == pattern(3, 0, sent as usize));
    let end = bench.header(OP_CREDIT_REQUEST);
    bench.send(end, &[]);
    assert_eq!(u64::from(bench.expect(&[OP_CREDIT_UPDATE])[0].0.fwd_cnt), sent);
    bench.guest.assert_works();
}

#[test]
fn a_credit_request_is_answered_at_once() {
    let mut bench = Bench::new();
    let _host = bench.connected();
    bench.send_data(b"12345");
    bench.expect(&[]);
    bench.send_op(OP_CREDIT_REQUEST);
    let update = bench.expect(&[OP_CREDIT_UPDATE])[0].0;
    assert_eq!((update.buf_alloc, update.fwd_cnt), (256 * 1024, 5));
}

/// N2 and the like: no buffers, no spin; buffers again, everything again.
#[test]
fn without_receive_buffers_the_device_rests_and_then_goes_on() {
    let mut bench = Bench::new();
    bench.buf_alloc = 16 << 20;
    let mut host = bench.connected();
    host.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(count) = host.write(&pattern(4, written, 10_000)) {
        written += count as u64;
        bench.guest.run();
    }
    assert!(written > 800_000, "the buffers, then the socket: {written}");
    assert!(!bench.guest.step(), "at rest");
    let mut got = Vec::new();
    while (got.len() as u64) < written {
        let packets = bench.take();
        assert!(!packets.is_empty(), "stuck at {}", got.len());
        packets.into_iter().for_each(|(_, payload)| got.extend(payload));
        bench.post(3);
    }
    assert!(got == pattern(4, 0, written as usize));
    bench.guest.assert_works();
}

#[test]
fn useless_receive_buffers_are_given_back() {
    let mut bench = Bench::without_buffers();
    let mut host = bench.listen(HOST_PORT);
    for (index, buffer) in [into(RX_AT, 44), into(RX_AT, 1), into(END - 8, 4096), out(RX_AT, 4096)]
        .into_iter()
        .enumerate()
    {
        let index = index as u16;
        bench.guest.submit(0, index, &[buffer]);
        if index == 0 {
            bench.send_op(OP_REQUEST);
        }
        bench.guest.run();
        assert_eq!(bench.guest.used(0), Some((index.into(), 0)));
    }
    bench.post(2);
    bench.expect(&[OP_RESPONSE]);
    bench.send_data(b"works");
    assert_eq!(read_some(&mut host), b"works");
    bench.guest.assert_works();
}

#[test]
fn a_payload_is_split_over_the_pieces_of_a_receive_buffer() {
    let mut bench = Bench::without_buffers();
    let mut host = bench.listen(HOST_PORT);
    bench.guest.submit(0, 200, &[into(RX_AT, 100)]);
    bench.send_op(OP_REQUEST);
    assert_eq!(bench.guest.used(0), Some((200, 44)));
    host.write_all(b"0123456789").unwrap();
    let pieces =
        [into(RX_AT, 40), into(RX_AT + 100, 6), into(RX_AT + 200, 3), into(RX_AT + 300, 9)];
    bench.guest.submit(0, 100, &pieces);
    bench.guest.run();
    assert_eq!(bench.guest.used(0), Some((100, 54)));
    assert_eq!(bench.guest.get_bytes(RX_AT + 104, 2), b"01");
    assert_eq!(bench.guest.get_bytes(RX_AT + 200, 3), b"234");
    assert_eq!(bench.guest.get_bytes(RX_AT + 300, 5), b"56789");
}

#[test]
fn connections_take_turns() {
    let mut bench = Bench::new();
    let mut hosts = Vec::new();
    for port in 0..4 {
        let host = bench.listen(HOST_PORT);
        bench.send(Header { src_port: port, ..bench.header(OP_REQUEST) }, &[]);
        hosts.push(host);
    }
    bench.receive();
    let _ = bench.take();
    for host in &mut hosts {
        host.write_all(&[1; 100_000]).unwrap();
    }
    let mut counts = [0; 4];
    for (header, _) in bench.take() {
        counts[header.dst_port as usize] += 1;
    }
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    assert!(*least > 20 && most - least <= 2, "{counts:?}");
}

#[test]
fn the_33rd_connection_gets_a_small_window() {
    let mut bench = Bench::new();
    let mut sizes = Vec::new();
    let mut hosts = Vec::new();
    for port in 0..34 {
        hosts.push(bench.listen(HOST_PORT));
        bench.send(Header { src_port: port, ..bench.header(OP_REQUEST) }, &[]);
        sizes.push(bench.expect(&[OP_RESPONSE])[0].0.buf_alloc);
    }
    assert_eq!(sizes[..32], [256 * 1024; 32]);
    assert_eq!(sizes[32..], [8 * 1024; 2]);
}
