//! The vsock device against a guest that speaks the protocol by hand.
//!
//! - this file: the guest, and how connections begin
//! - `flow`: bulk data, credit, starvation, fairness
//! - `ends`: every way in which a connection ends
//! - `hostile`: the V rows

mod ends;
mod flow;
mod hostile;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{LazyLock, Mutex},
};

use super::{packet::*, *};
use crate::virtio::{lock, testing::*};

const GUEST_CID: u64 = 3;
const HOST_PORT: u32 = 1024;
const GUEST_PORT: u32 = 7000;
/// What Linux gives: header and payload in one buffer.
const RX_LEN: u32 = 4096;
const RX_AT: u64 = BUFFERS;
const TX_AT: u64 = BUFFERS + (2 << 20);
const TX_LEN: u64 = 0x1_1000;

/// A packet as the guest got it.
type Got = (Header, Vec<u8>);

struct Bench {
    guest: Guest,
    device: Arc<Mutex<Vsock>>,
    /// Receive buffers that the guest has in hand.
    spare: Vec<u16>,
    next_tx: u16,
    /// Credit the guest gives with every packet.
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Bench {
    fn new() -> Self {
        let mut bench = Self::without_buffers();
        bench.post(256);
        bench
    }

    fn without_buffers() -> Self {
        let device = Arc::new(Mutex::new(Vsock::new(GUEST_CID as u32).unwrap()));
        let guest = Guest::new(device.clone());
        let spare = (0..256).collect();
        Self { guest, device, spare, next_tx: 0, buf_alloc: 256 * 1024, fwd_cnt: 0 }
    }

    /// Gives the device `count` receive buffers.
    fn post(&mut self, count: usize) {
        for _ in 0..count {
            let Some(index) = self.spare.pop() else { break };
            let buffer = [into(RX_AT + u64::from(index) * 8192, RX_LEN)];
            self.guest.chain(self.guest.queues[0].descriptors, index, &buffer);
            self.guest.publish(0, index);
        }
        self.guest.kick(0);
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: HOST_PORT,
            socket_type: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    /// Sends a packet, its header and payload each in two pieces.
    fn send(&mut self, header: Header, payload: &[u8]) {
        self.send_bytes(&header.to_bytes(), payload);
    }

    fn send_bytes(&mut self, header: &[u8], payload: &[u8]) {
        let slot = self.next_tx % 32;
        self.next_tx = self.next_tx.wrapping_add(1);
        let at = TX_AT + u64::from(slot) * TX_LEN;
        self.guest.put_bytes(at, header);
        self.guest.put_bytes(at + 64, payload);
        let (head, half) = (header.len() as u32, payload.len() as u32 / 2);
        let pieces = [
            out(at, head / 3),
            out(at + u64::from(head / 3), head - head / 3),
            out(at + 64, half),
            out(at + 64 + u64::from(half), payload.len() as u32 - half),
        ];
        self.guest.submit(1, slot * 4, &pieces);
        self.guest.run();
        assert_eq!(self.guest.used(1), Some((u32::from(slot) * 4, 0)));
    }

    fn send_op(&mut self, op: u16) {
        self.send(self.header(op), &[]);
    }

    fn send_data(&mut self, payload: &[u8]) {
        self.send(Header { len: payload.len() as u32, ..self.header(OP_RW) }, payload);
    }

    fn send_shutdown(&mut self, flags: u32) {
        self.send(Header { flags, ..self.header(OP_SHUTDOWN) }, &[]);
    }

    /// What arrived; the buffers stay with the guest until they are posted again.
    fn take(&mut self) -> Vec<Got> {
        self.guest.run();
        let mut packets = Vec::new();
        while let Some((index, len)) = self.guest.used(0) {
            self.spare.push(index as u16);
            let bytes = self.guest.get_bytes(RX_AT + u64::from(index) * 8192, len as usize);
            let (head, payload) = bytes.split_at(HEADER_LEN);
            let header = Header::from_bytes(head.try_into().unwrap());
            assert_eq!(header.len as usize, payload.len());
            assert_eq!(header.dst_cid, GUEST_CID);
            assert!(header.src_cid == HOST_CID || header.op == OP_RST);
            packets.push((header, payload.to_vec()));
        }
        packets
    }

    /// What arrived, and the buffers are given back.
    fn receive(&mut self) -> Vec<Got> {
        let packets = self.take();
        self.post(256);
        packets
    }

    /// The operations of what arrived.
    #[track_caller]
    fn expect(&mut self, ops: &[u16]) -> Vec<Got> {
        let packets = self.receive();
        assert_eq!(packets.iter().map(|p| p.0.op).collect::<Vec<_>>(), ops);
        packets
    }

    /// Everything that arrives up to and without a first packet other than RW, of which there must be one.
    fn read_to_end(&mut self) -> (Vec<u8>, Header) {
        let mut bytes = Vec::new();
        for _ in 0..100_000 {
            for (header, payload) in self.receive() {
                if header.op != OP_RW {
                    return (bytes, header);
                }
                self.fwd_cnt = self.fwd_cnt.wrapping_add(header.len);
                bytes.extend(payload);
            }
            self.send_op(OP_CREDIT_UPDATE);
        }
        panic!("no end after {} bytes", bytes.len());
    }

    fn listen(&mut self, port: u32) -> UnixStream {
        let (host, device) = UnixStream::pair().unwrap();
        lock(&*self.device).listen(port, device.into()).unwrap();
        host
    }

    fn dial(&mut self, port: u32) -> UnixStream {
        let (host, device) = UnixStream::pair().unwrap();
        lock(&*self.device).connect(port, device.into()).unwrap();
        host
    }

    /// A connection that the guest made.
    fn connected(&mut self) -> UnixStream {
        let host = self.listen(HOST_PORT);
        self.send_op(OP_REQUEST);
        self.expect(&[OP_RESPONSE]);
        host
    }

    /// The device has forgotten the connection: its packets are answered as a stranger's.
    #[track_caller]
    fn assert_forgotten(&mut self) {
        self.receive();
        self.send_op(OP_CREDIT_UPDATE);
        self.expect(&[OP_RST]);
    }
}

/// Reads until nothing is left, which must be for now.
fn read_some(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.set_nonblocking(true).unwrap();
    let end = stream.read_to_end(&mut bytes);
    stream.set_nonblocking(false).unwrap();
    assert!(end.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock));
    bytes
}

/// Reads to the end of the stream, which must be there.
fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.set_nonblocking(true).unwrap();
    stream.read_to_end(&mut bytes).unwrap();
    stream.set_nonblocking(false).unwrap();
    bytes
}

/// `len` bytes from `from` on of a stream that repeats only after a prime number of bytes near 2^20.
fn pattern(seed: u64, from: u64, len: usize) -> Vec<u8> {
    static PERIOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
        (0..1_048_573u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
    });
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = (seed * 7919 + from + bytes.len() as u64) as usize % PERIOD.len();
        let count = (PERIOD.len() - at).min(len - bytes.len());
        bytes.extend_from_slice(&PERIOD[at..at + count]);
    }
    bytes
}

#[test]
fn the_guest_connects_once_to_each_stream_that_waits() {
    let mut bench = Bench::new();
    let mut first = bench.listen(HOST_PORT);
    let mut second = bench.listen(HOST_PORT);
    for (port, stream) in [(1, &mut first), (2, &mut second)] {
        bench.send(Header { src_port: port, ..bench.header(OP_REQUEST) }, &[]);
        let response = bench.expect(&[OP_RESPONSE])[0].0;
        assert_eq!((response.src_port, response.dst_port), (HOST_PORT, port));
        assert_eq!((response.buf_alloc, response.fwd_cnt), (256 * 1024, 0));
        let data = Header { src_port: port, len: 2, ..bench.header(OP_RW) };
        bench.send(data, &[port as u8; 2]);
        assert_eq!(read_some(stream), [port as u8; 2]);
    }
    bench.send(Header { src_port: 3, ..bench.header(OP_REQUEST) }, &[]);
    let reset = bench.expect(&[OP_RST])[0].0;
    assert_eq!((reset.src_port, reset.dst_port, reset.len), (HOST_PORT, 3, 0));
    bench.guest.assert_works();
}

#[test]
fn the_host_connects_and_what_it_wrote_before_is_not_lost() {
    let mut bench = Bench::new();
    let mut host = bench.dial(GUEST_PORT);
    host.write_all(b"early").unwrap();
    let request = bench.expect(&[OP_REQUEST])[0].0;
    assert_eq!((request.dst_port, request.socket_type), (GUEST_PORT, TYPE_STREAM));
    assert!(request.src_port >= 1 << 30);
    bench.expect(&[]);
    bench.send(Header { dst_port: request.src_port, ..bench.header(OP_RESPONSE) }, &[]);
    assert_eq!(bench.expect(&[OP_RW])[0].1, b"early");
    bench.send(Header { dst_port: request.src_port, len: 4, ..bench.header(OP_RW) }, b"back");
    assert_eq!(read_some(&mut host), b"back");
    bench.guest.assert_works();
}

#[test]
fn a_refused_connection_closes_the_stream() {
    let mut bench = Bench::new();
    let mut host = bench.dial(GUEST_PORT);
    host.write_all(b"for nobody").unwrap();
    let request = bench.expect(&[OP_REQUEST])[0].0;
    bench.send(Header { dst_port: request.src_port, ..bench.header(OP_RST) }, &[]);
    assert_eq!(read_all(&mut host), b"");
    assert!(host.write_all(b"x").is_err());
    bench.expect(&[]);
}

#[test]
fn streams_wait_for_a_driver_and_listeners_outlive_it() {
    let device = Arc::new(Mutex::new(Vsock::new(3).unwrap()));
    let mut cold = Guest::cold(device.clone());
    let (_host, stream) = UnixStream::pair().unwrap();
    lock(&*device).connect(GUEST_PORT, stream.into()).unwrap();
    cold.run();
    assert_eq!(cold.interrupts(), 0);

    let mut bench = Bench::new();
    let mut lost = bench.connected();
    let mut kept = bench.listen(HOST_PORT);
    bench.guest.reset();
    assert_eq!(read_all(&mut lost), b"", "connections end with the driver");
    bench.guest.start(u64::MAX);
    bench.spare = (0..256).collect();
    bench.post(256);
    bench.send_op(OP_REQUEST);
    bench.expect(&[OP_RESPONSE]);
    bench.send_data(b"again");
    assert_eq!(read_some(&mut kept), b"again");
}

#[test]
fn streams_are_counted() {
    let mut bench = Bench::new();
    let mut hosts = Vec::new();
    for _ in 0..20 {
        hosts.push(bench.connected());
        bench.send_shutdown(SHUTDOWN_BOTH);
        bench.expect(&[OP_RST]);
    }
    let (host, device) = UnixStream::pair().unwrap();
    for port in 0..mux::MAX_STREAMS as u32 {
        let stream = device.try_clone().unwrap().into();
        match port % 2 {
            0 => lock(&*bench.device).listen(port, stream).unwrap(),
            _ => lock(&*bench.device).connect(port, stream).unwrap(),
        }
    }
    let device: OwnedFd = device.into();
    let full = lock(&*bench.device).listen(9, device.try_clone().unwrap());
    assert!(matches!(full, Err(StreamError::TooMany)));
    let full = lock(&*bench.device).connect(9, device);
    assert!(matches!(full, Err(StreamError::TooMany)));
    drop(host);
}
