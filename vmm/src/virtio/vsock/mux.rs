//! All streams of a guest: who may connect where, which packet belongs to which connection, and whose turn
//! it is to send. Owns every stream descriptor and the epoll set that watches them (edge-triggered).
//!
//! No socket is ever opened here. A stream comes in with [`Mux::listen`] or [`Mux::connect`] and serves one
//! connection; whatever else the guest asks for is answered with RST.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    connection::{Connection, Outgoing, Ports, Violation},
    packet::*,
    stream::Stream,
};
use crate::virtio::buffers::Buffers;

/// Most streams at a time, connected or waiting to be.
pub const MAX_STREAMS: usize = 1023;
/// Most resets that wait for a receive buffer. Beyond, the guest is not listening to them anyway.
const MAX_RESETS: usize = 128;
/// What a guest may have on its way to a host that is slow: enough for two of Linux's 64 KiB packets in
/// flight while the credit for two more travels back, so that a bulk stream does not stop and go. All
/// buffers together stay below 16 MiB, so only the first streams get the large size.
const LARGE_WINDOW: u32 = 256 * 1024;
const SMALL_WINDOW: u32 = 8 * 1024;
const LARGE_WINDOWS: usize = 32;
/// Host ports of connections that the host makes begin here.
const FIRST_PORT: u32 = 1 << 30;
/// Events taken at a time.
const EVENTS: usize = 64;

/// Why a stream was not taken.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("there are {MAX_STREAMS} streams already")]
    TooMany,
    #[error("the stream cannot be watched")]
    Watch(#[source] io::Error),
}

/// Names a connection for as long as the VM lives; ports come again.
type Token = u64;

#[derive(Debug)]
struct Entry {
    connection: Connection,
    ports: Ports,
    large: bool,
    /// In `ready`.
    queued: bool,
    /// Writability is watched, too.
    watches_room: bool,
}

/// See the top of this file.
#[derive(Debug)]
pub struct Mux {
    guest_cid: u64,
    epoll: Epoll,
    /// In the order they came; the first of a port is the next to be used.
    listeners: Vec<(u32, Stream)>,
    entries: BTreeMap<Token, Entry>,
    /// The connections that the guest knows of.
    by_ports: BTreeMap<Ports, Token>,
    /// Connections with something to send, each once, the next first.
    ready: VecDeque<Token>,
    resets: VecDeque<Header>,
    last_token: Token,
    last_port: u32,
}

impl Mux {
    pub fn new(guest_cid: u32) -> io::Result<Self> {
        Ok(Self {
            guest_cid: guest_cid.into(),
            epoll: Epoll::new()?,
            listeners: Vec::new(),
            entries: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            last_token: 0,
            last_port: FIRST_PORT,
        })
    }

    /// Readable when a stream needs [`poll`](Self::poll).
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// The guest's next connection to host port `port` is spliced to `stream`.
    pub fn listen(&mut self, port: u32, stream: OwnedFd) -> Result<(), StreamError> {
        self.check_room()?;
        self.listeners.push((port, Stream::new(stream)));
        Ok(())
    }

    /// Connects to guest port `port`. The stream is watched for room, which it has: that event sends the
    /// REQUEST.
    pub fn connect(&mut self, port: u32, stream: OwnedFd) -> Result<(), StreamError> {
        self.check_room()?;
        let ports = Ports { host: self.free_host_port(port), guest: port };
        let large = self.is_large_left();
        let connection = Connection::opening(Stream::new(stream), window(large));
        self.insert(ports, connection, large, true).map_err(StreamError::Watch)
    }

    /// Takes the streams' events in.
    pub fn poll(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        // Fails only when a signal comes; what is left is reported again.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            self.on_event(event.data(), event.event_set());
        }
    }

    /// A packet from the guest.
    pub fn receive(&mut self, packet: Packet<'_>) {
        let header = packet.header;
        if header.src_cid != self.guest_cid {
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        if header.dst_cid != HOST_CID || header.socket_type != TYPE_STREAM {
            return self.answer_reset(&header);
        }
        match (self.by_ports.get(&ports).copied(), header.op) {
            (Some(token), OP_RST) => self.forget(token),
            (Some(token), _) => self.deliver(token, packet),
            (None, OP_REQUEST) => self.accept(ports, &header),
            (None, _) => self.answer_reset(&header),
        }
    }

    /// A packet from the guest whose header makes no sense: it also ends the connection it names.
    pub fn receive_malformed(&mut self, header: &Header) {
        if header.src_cid != self.guest_cid {
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        if let Some(&token) = self.by_ports.get(&ports) {
            self.remove(token);
        }
        self.answer_reset(header);
    }

    /// Whether [`next_packet`](Self::next_packet) is worth a receive buffer.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, one connection after the other; its payload is in `room` already.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(entry) = self.entries.get_mut(&token) else { continue };
            entry.queued = false;
            let header =
                entry.connection.next_packet(room).map(|p| address(p, entry.ports, self.guest_cid));
            self.settle(token);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// The driver reset the device. Its connections are gone, but for bytes that are on their way to the
    /// host; the listeners stay. Runs on vCPU threads, which may make hardly any system call.
    pub fn reset(&mut self) {
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
        for (token, mut entry) in std::mem::take(&mut self.entries) {
            if entry.connection.is_blocked() {
                entry.connection.lose_guest();
                entry.queued = false;
                self.entries.insert(token, entry);
            } else {
                self.unwatch(&entry);
            }
        }
    }

    /// Whether everything the guest sent is with the host.
    pub fn is_flushed(&self) -> bool {
        !self.entries.values().any(|e| e.connection.is_blocked())
    }

    fn check_room(&self) -> Result<(), StreamError> {
        match self.listeners.len() + self.entries.len() {
            MAX_STREAMS.. => Err(StreamError::TooMany),
            _ => Ok(()),
        }
    }

    fn is_large_left(&self) -> bool {
        self.entries.values().filter(|e| e.large).count() < LARGE_WINDOWS
    }

    /// Ends soon: there are fewer connections than ports.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            self.last_port = self.last_port.wrapping_add(1).max(FIRST_PORT);
            if !self.by_ports.contains_key(&Ports { host: self.last_port, guest }) {
                return self.last_port;
            }
        }
    }

    fn insert(
        &mut self,
        ports: Ports,
        connection: Connection,
        large: bool,
        watches_room: bool,
    ) -> io::Result<()> {
        self.last_token += 1;
        let token = self.last_token;
        let fd = connection.stream().as_fd().as_raw_fd();
        self.epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(interest(watches_room), token),
        )?;
        let entry = Entry { connection, ports, large, queued: false, watches_room };
        self.entries.insert(token, entry);
        self.by_ports.insert(ports, token);
        Ok(())
    }

    /// A REQUEST of the guest: the port's next stream, or a refusal.
    fn accept(&mut self, ports: Ports, request: &Header) {
        let Some(at) = self.listeners.iter().position(|(port, _)| *port == ports.host) else {
            return self.answer_reset(request);
        };
        let (_, stream) = self.listeners.remove(at);
        let large = self.is_large_left();
        let accepted = Connection::accepting(stream, window(large), request)
            .is_ok_and(|connection| self.insert(ports, connection, large, false).is_ok());
        if !accepted {
            return self.answer_reset(request);
        }
        self.settle(self.last_token);
    }

    fn deliver(&mut self, token: Token, packet: Packet<'_>) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        match entry.connection.receive(&packet.header, packet.payload) {
            Ok(()) => self.settle(token),
            Err(Violation::Credit | Violation::OutOfTurn) => {
                self.remove(token);
                self.answer_reset(&packet.header);
            }
        }
    }

    /// The guest ended a connection; its last bytes may still be on their way to the host.
    fn forget(&mut self, token: Token) {
        if let Some(entry) = self.entries.get_mut(&token) {
            self.by_ports.remove(&entry.ports);
            entry.connection.reset_by_guest();
            self.settle(token);
        }
    }

    fn on_event(&mut self, token: Token, events: EventSet) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        if events.contains(EventSet::OUT) {
            entry.connection.on_writable();
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            entry.connection.on_readable();
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            entry.connection.on_hang_up();
        }
        self.settle(token);
    }

    /// After anything happened to a connection: queues it, watches it, removes it, as it needs.
    fn settle(&mut self, token: Token) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        if entry.connection.is_finished() {
            return self.remove(token);
        }
        if entry.connection.has_packet() && !entry.queued {
            entry.queued = true;
            self.ready.push_back(token);
        }
        let blocked = entry.connection.is_blocked();
        if blocked != entry.watches_room {
            entry.watches_room = blocked;
            let fd = entry.connection.stream().as_fd().as_raw_fd();
            // Cannot fail: the descriptor is ours and watched.
            let _ = self.epoll.ctl(
                ControlOperation::Modify,
                fd,
                EpollEvent::new(interest(blocked), token),
            );
        }
    }

    /// Closes a stream so that the host reads to its end of stream.
    fn remove(&mut self, token: Token) {
        let Some(entry) = self.entries.remove(&token) else { return };
        if self.by_ports.get(&entry.ports) == Some(&token) {
            self.by_ports.remove(&entry.ports);
        }
        if entry.queued {
            self.ready.retain(|&queued| queued != token);
        }
        self.unwatch(&entry);
        entry.connection.stream().end();
        entry.connection.stream().refuse();
    }

    /// Whoever still shares the stream must not make it report to us.
    fn unwatch(&self, entry: &Entry) {
        let fd = entry.connection.stream().as_fd().as_raw_fd();
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    /// Never answers a RST: that could go on for ever.
    fn answer_reset(&mut self, header: &Header) {
        if header.op != OP_RST && self.resets.len() < MAX_RESETS {
            self.resets.push_back(header.reset());
        }
    }
}

fn window(large: bool) -> u32 {
    if large { LARGE_WINDOW } else { SMALL_WINDOW }
}

fn interest(room: bool) -> EventSet {
    let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room { always | EventSet::OUT } else { always }
}

fn address(packet: Outgoing, ports: Ports, guest_cid: u64) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: ports.host,
        dst_port: ports.guest,
        len: packet.len,
        socket_type: TYPE_STREAM,
        op: packet.op,
        flags: packet.flags,
        buf_alloc: packet.buf_alloc,
        fwd_cnt: packet.fwd_cnt,
    }
}
