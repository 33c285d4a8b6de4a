//! One connection. Owned by the [`Mux`](super::mux::Mux), which brings it packets and events and asks it
//! for packets.
//!
//! ```text
//! host connects:  Opening -- REQUEST out, RESPONSE in --> Open
//! guest connects: Accepting -- RESPONSE out ------------> Open
//! Open -- SHUTDOWN of both in, all bytes at the host, RST out --> Gone     (5.10.6.5: a clean disconnect)
//! any  -- RST in ------------------------------------------------> Gone
//! ```
//! A connection that is `Gone` has no guest any more; it is kept until the host has its bytes.
//!
//! The ends of the two directions are independent. The host's end of stream (`SHUTDOWN` with the send flag)
//! follows its last byte; the guest's becomes an end of stream once its last byte is written. Events come
//! once per change (edge-triggered): `readable` holds until a read finds nothing.

use super::{
    credit::{Credit, CreditLie},
    packet::*,
    stream::{Received, Stream},
    to_host::ToHost,
};
use crate::virtio::buffers::Buffers;

/// The two ports that name a connection: the context ids are always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Opening { asked: bool },
    Accepting,
    Open,
    Gone,
}

/// The guest broke the protocol: the connection is to be reset.
#[derive(Debug, PartialEq, Eq)]
pub enum Violation {
    Credit,
    /// A packet that has no place in this phase.
    OutOfTurn,
}

impl From<CreditLie> for Violation {
    fn from(_: CreditLie) -> Self {
        Self::Credit
    }
}

/// A packet to send, but for the addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outgoing {
    pub op: u16,
    pub flags: u32,
    pub len: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

/// See the top of this file.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    phase: Phase,
    to_host: ToHost,
    credit: Credit,
    /// A read may give bytes.
    readable: bool,
    /// The host writes no more, and all it wrote is with the guest.
    ended: bool,
    /// SHUTDOWN flags the guest sent, and those it was sent.
    guest_shut: u32,
    told_shut: u32,
    credit_requested: bool,
}

impl Connection {
    /// The host connects to the guest. `window` is how much the guest may have on the way, in bytes.
    pub fn opening(stream: Stream, window: u32) -> Self {
        Self {
            stream,
            phase: Phase::Opening { asked: false },
            to_host: ToHost::new(window),
            credit: Credit::default(),
            readable: true,
            ended: false,
            guest_shut: 0,
            told_shut: 0,
            credit_requested: false,
        }
    }

    /// The guest connected, with this REQUEST.
    pub fn accepting(stream: Stream, window: u32, request: &Header) -> Result<Self, Violation> {
        let mut connection = Self { phase: Phase::Accepting, ..Self::opening(stream, window) };
        connection.credit.update(request.buf_alloc, request.fwd_cnt)?;
        Ok(connection)
    }

    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// A well-formed packet of the guest, other than RST.
    pub fn receive(&mut self, header: &Header, payload: Buffers<'_>) -> Result<(), Violation> {
        self.credit.update(header.buf_alloc, header.fwd_cnt)?;
        match (self.phase, header.op) {
            (Phase::Opening { asked: true }, OP_RESPONSE) => self.phase = Phase::Open,
            (Phase::Open, OP_RW) if self.guest_shut & SHUTDOWN_SEND == 0 => {
                self.to_host.take(&self.stream, payload)?;
            }
            (Phase::Open, OP_SHUTDOWN) => self.shut_by_guest(header.flags),
            (Phase::Open, OP_CREDIT_UPDATE) => {}
            (Phase::Open, OP_CREDIT_REQUEST) => self.credit_requested = true,
            _ => return Err(Violation::OutOfTurn),
        }
        Ok(())
    }

    /// The guest reset the connection, or refused it.
    pub fn reset_by_guest(&mut self) {
        if let Phase::Opening { .. } = self.phase {
            self.to_host.give_up();
        }
        self.lose_guest();
        self.stream.refuse();
    }

    /// There is no guest any more. While [`is_blocked`](Self::is_blocked), this makes no system call.
    pub fn lose_guest(&mut self) {
        self.to_host.end(&self.stream);
        self.phase = Phase::Gone;
    }

    /// There may be something to read.
    pub fn on_readable(&mut self) {
        self.readable = true;
    }

    /// There is room to write.
    pub fn on_writable(&mut self) {
        self.to_host.flush(&self.stream);
    }

    /// The host can neither be written to nor write; what it wrote before can still be read.
    pub fn on_hang_up(&mut self) {
        self.readable = true;
        self.to_host.give_up();
    }

    /// The host is slow; [`on_writable`](Self::on_writable) is waited for.
    pub fn is_blocked(&self) -> bool {
        self.to_host.is_blocked()
    }

    /// Nothing is left to do.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Gone && self.to_host.is_done()
    }

    /// Whether [`next_packet`](Self::next_packet) is worth a try.
    pub fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Opening { asked } => !asked,
            Phase::Accepting => true,
            Phase::Open if self.guest_shut == SHUTDOWN_BOTH => self.to_host.is_done(),
            Phase::Open => {
                self.can_read()
                    || self.untold_shut() != 0
                    || self.credit_requested
                    || self.to_host.window.is_update_due()
            }
            Phase::Gone => false,
        }
    }

    /// The next packet for the guest; the payload of an RW is in `room` already.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Outgoing> {
        let mut packet = self.choose_packet(room)?;
        (packet.buf_alloc, packet.fwd_cnt) = self.to_host.window.tell();
        self.credit_requested = false;
        Some(packet)
    }

    fn choose_packet(&mut self, room: &Buffers<'_>) -> Option<Outgoing> {
        match self.phase {
            Phase::Opening { asked: false } => {
                self.phase = Phase::Opening { asked: true };
                control(OP_REQUEST)
            }
            Phase::Accepting => {
                self.phase = Phase::Open;
                control(OP_RESPONSE)
            }
            Phase::Open if self.guest_shut == SHUTDOWN_BOTH => self.confirm_end(),
            Phase::Open => {
                self.read(room).or_else(|| self.tell_shut()).or_else(|| self.tell_credit())
            }
            Phase::Opening { asked: true } | Phase::Gone => None,
        }
    }

    fn can_read(&self) -> bool {
        self.readable
            && !self.ended
            && self.guest_shut & SHUTDOWN_RCV == 0
            && self.credit.available() > 0
    }

    fn read(&mut self, room: &Buffers<'_>) -> Option<Outgoing> {
        if !self.can_read() {
            return None;
        }
        let most = self.credit.available().min(MAX_PAYLOAD);
        match self.stream.receive(&room.split_at(most as usize).0) {
            Received::Bytes(count) => {
                self.credit.spend(count as u32);
                return Some(Outgoing { op: OP_RW, len: count as u32, ..Outgoing::default() });
            }
            Received::Empty => self.readable = false,
            Received::End => self.ended = true,
        }
        None
    }

    fn untold_shut(&self) -> u32 {
        let send = if self.ended { SHUTDOWN_SEND } else { 0 };
        let receive = if self.to_host.is_gone() { SHUTDOWN_RCV } else { 0 };
        (send | receive) & !self.told_shut
    }

    fn tell_shut(&mut self) -> Option<Outgoing> {
        let flags = self.untold_shut();
        self.told_shut |= flags;
        (flags != 0).then(|| Outgoing {
            op: OP_SHUTDOWN,
            flags: self.told_shut,
            ..Outgoing::default()
        })
    }

    fn tell_credit(&self) -> Option<Outgoing> {
        if !self.credit_requested && !self.to_host.window.is_update_due() {
            return None;
        }
        control(OP_CREDIT_UPDATE)
    }

    /// The guest is done with both directions; RST says that its bytes have arrived.
    fn confirm_end(&mut self) -> Option<Outgoing> {
        if !self.to_host.is_done() {
            return None;
        }
        self.phase = Phase::Gone;
        control(OP_RST)
    }

    fn shut_by_guest(&mut self, flags: u32) {
        let new = flags & !self.guest_shut;
        self.guest_shut |= flags;
        if new & SHUTDOWN_SEND != 0 {
            self.to_host.end(&self.stream);
        }
        if new & SHUTDOWN_RCV != 0 {
            self.stream.refuse();
        }
    }
}

fn control(op: u16) -> Option<Outgoing> {
    Some(Outgoing { op, ..Outgoing::default() })
}
