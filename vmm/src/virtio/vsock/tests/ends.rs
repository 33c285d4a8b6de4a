//! Every way in which a connection ends; no byte before the end is lost.

use super::*;

#[test]
fn the_guest_stops_sending_and_goes_on_receiving() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    bench.send_data(b"last words");
    bench.send_shutdown(SHUTDOWN_SEND);
    assert_eq!(read_all(&mut host), b"last words");
    host.write_all(b"an answer").unwrap();
    assert_eq!(bench.expect(&[OP_RW])[0].1, b"an answer");
    drop(host);
    assert_eq!(bench.expect(&[OP_SHUTDOWN])[0].0.flags, SHUTDOWN_BOTH);
    bench.send_op(OP_RST);
    bench.expect(&[]);
    bench.assert_forgotten();
}

#[test]
fn the_host_stops_sending_and_goes_on_receiving() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    host.write_all(&pattern(5, 0, 20_000)).unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let (bytes, end) = bench.read_to_end();
    assert!(bytes == pattern(5, 0, 20_000));
    assert_eq!((end.op, end.flags), (OP_SHUTDOWN, SHUTDOWN_SEND));
    bench.send_data(b"still here");
    assert_eq!(read_some(&mut host), b"still here");
    bench.send_shutdown(SHUTDOWN_BOTH);
    assert_eq!(read_all(&mut host), b"");
    bench.expect(&[OP_RST]);
    bench.assert_forgotten();
}

#[test]
fn the_host_closes() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    host.write_all(&pattern(6, 0, 150_000)).unwrap();
    drop(host);
    let (bytes, end) = bench.read_to_end();
    assert!(bytes == pattern(6, 0, 150_000));
    assert_eq!((end.op, end.flags), (OP_SHUTDOWN, SHUTDOWN_BOTH));
    bench.send_data(b"nobody reads this, and it is no crime");
    bench.send_op(OP_RST);
    bench.expect(&[]);
    bench.assert_forgotten();
}

#[test]
fn the_host_closes_without_reading_all() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    bench.send_data(&[1; 10_000]);
    host.write_all(b"bye").unwrap();
    drop(host);
    let (bytes, end) = bench.read_to_end();
    assert_eq!((bytes.as_slice(), end.flags), (&b"bye"[..], SHUTDOWN_BOTH));
}

#[test]
fn a_host_that_is_gone_does_not_hold_the_guest_up() {
    let mut bench = Bench::new();
    drop(bench.connected());
    bench.expect(&[OP_SHUTDOWN]);
    for _ in 0..20 {
        bench.send_data(&[2; 60_000]);
    }
    let told: u32 = bench.receive().iter().map(|p| p.0.fwd_cnt).max().unwrap();
    assert!(told > 1_000_000, "what is thrown away gives credit, too");
}

#[test]
fn the_guest_closes_and_the_reset_says_that_all_has_arrived() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    let mut sent = 0;
    // More than the socket takes, so that some is buffered.
    for _ in 0..5 {
        bench.send_data(&pattern(7, sent, 60_000));
        sent += 60_000;
    }
    bench.send_shutdown(SHUTDOWN_BOTH);
    let early = bench.receive().iter().any(|p| p.0.op == OP_RST);
    assert!(!early, "300 KB are not all with the host");
    assert!(!lock(&*bench.device).is_flushed());
    let mut got = Vec::new();
    let mut reset = false;
    while !reset {
        got.extend(read_some(&mut host));
        reset = bench.receive().iter().any(|p| p.0.op == OP_RST);
    }
    got.extend(read_all(&mut host));
    assert!(got == pattern(7, 0, 300_000));
    assert!(lock(&*bench.device).is_flushed());
    bench.assert_forgotten();
}

#[test]
fn a_reset_of_the_guest_still_lets_the_host_read_all() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    for part in 0..5 {
        bench.send_data(&pattern(8, part * 60_000, 60_000));
    }
    bench.send_op(OP_RST);
    bench.receive();
    assert!(host.write_all(b"x").is_err(), "nobody reads that any more");
    // The same ports again, while the old bytes are on their way.
    let mut second = bench.listen(HOST_PORT);
    bench.send_op(OP_REQUEST);
    bench.expect(&[OP_RESPONSE]);
    bench.send_data(b"new");
    assert_eq!(read_some(&mut second), b"new");
    let mut got = Vec::new();
    while got.len() < 300_000 {
        let more = read_some_or_all(&mut host);
        assert!(!more.is_empty(), "stuck at {}", got.len());
        got.extend(more);
        bench.guest.run();
    }
    assert!(got == pattern(8, 0, 300_000));
    assert_eq!(read_all(&mut host), b"");
    bench.send_data(b"er");
    assert_eq!(read_some(&mut second), b"er");
    bench.guest.assert_works();
}

fn read_some_or_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.set_nonblocking(true).unwrap();
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

#[test]
fn a_reset_of_the_device_still_lets_the_host_read_all() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    for part in 0..5 {
        bench.send_data(&pattern(9, part * 60_000, 60_000));
    }
    bench.guest.reset();
    let mut got = Vec::new();
    while got.len() < 300_000 {
        let more = read_some_or_all(&mut host);
        assert!(!more.is_empty(), "stuck at {}", got.len());
        got.extend(more);
        bench.guest.run();
    }
    assert!(got == pattern(9, 0, 300_000));
    assert_eq!(read_all(&mut host), b"");
    assert!(lock(&*bench.device).is_flushed());
}

#[test]
fn the_guest_stops_receiving() {
    let mut bench = Bench::new();
    let mut host = bench.connected();
    bench.send_shutdown(SHUTDOWN_RCV);
    assert!(host.write_all(b"x").is_err());
    bench.expect(&[]);
    bench.send_data(b"but sends");
    assert_eq!(read_some(&mut host), b"but sends");
    bench.send_shutdown(SHUTDOWN_SEND);
    assert_eq!(read_all(&mut host), b"");
    bench.expect(&[OP_RST]);
}

#[test]
fn the_guest_closes_with_the_hosts_bytes_unread() {
    let mut bench = Bench::new();
    bench.buf_alloc = 10;
    let mut host = bench.connected();
    host.write_all(&[3; 1000]).unwrap();
    assert_eq!(bench.expect(&[OP_RW])[0].1.len(), 10);
    bench.send_data(b"goodbye");
    bench.send_shutdown(SHUTDOWN_BOTH);
    assert_eq!(read_all(&mut host), b"goodbye", "an end of stream, not ECONNRESET");
    bench.expect(&[OP_RST]);
}

#[test]
fn what_is_written_just_before_the_end_arrives_200_times() {
    let mut bench = Bench::new();
    for round in 0..200 {
        bench.fwd_cnt = 0;
        let mut host = bench.connected();
        let len = 1 + (round * 7919) as usize % 60_000;
        if round % 2 == 0 {
            bench.send_data(&pattern(round, 0, len));
            bench.send_shutdown(SHUTDOWN_BOTH);
            assert!(read_all(&mut host) == pattern(round, 0, len));
            bench.expect(&[OP_RST]);
        } else {
            host.write_all(&pattern(round, 0, len)).unwrap();
            drop(host);
            let (bytes, end) = bench.read_to_end();
            assert!(bytes == pattern(round, 0, len));
            assert_eq!(end.flags, SHUTDOWN_BOTH);
            bench.send_op(OP_RST);
        }
    }
    bench.guest.assert_works();
}
