//! The socket to `ampoule-fsd`: one packet is one FUSE message. Owns the descriptor and the epoll set that
//! watches it (edge-triggered), and knows whether there is a point in trying.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use libc::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::message::{REPLY_HEADER, REQUEST_HEADER, Reply, Request};
use crate::virtio::{buffers::Buffers, retry};

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    Done,
    /// No room yet.
    Full,
    /// It will never get there: nobody is there any more, or the host cannot take it.
    Refused,
}

/// A reply that waits, as far as it has been looked at.
#[derive(Debug)]
pub struct Waiting {
    pub header: Reply,
    /// Of the whole message, in bytes.
    pub len: usize,
}

/// See the top of this file.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
    epoll: Epoll,
    readable: bool,
    writable: bool,
    gone: bool,
}

impl Link {
    /// Takes over a socket of packets.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, 0);
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)?;
        Ok(Self { fd, epoll, readable: true, writable: true, gone: false })
    }

    /// Readable when the link needs [`poll`](Self::poll).
    pub fn event(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes note of what has changed.
    pub fn poll(&mut self) {
        let mut events = [EpollEvent::default()];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            let gone = event.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP);
            self.readable |= gone || event.event_set().contains(EventSet::IN);
            self.writable |= gone || event.event_set().contains(EventSet::OUT);
        }
    }

    /// Whether `ampoule-fsd` has ended. It does not come back.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Sends one request: its header, then the rest from guest memory.
    pub fn send(&mut self, header: &Request, rest: &Buffers<'_>) -> Sent {
        if self.gone {
            return Sent::Refused;
        }
        if !self.writable {
            return Sent::Full;
        }
        let head = iovec { iov_base: header.0.as_ptr().cast_mut().cast(), iov_len: REQUEST_HEADER };
        let mut pieces = vec![head];
        pieces.extend(rest.iovecs());
        let message = message(&mut pieces);
        let sent = retry(|| {
            // SAFETY: the pieces are `header` and guest memory, which `rest` borrows; they are only read.
            unsafe { sendmsg(self.fd.as_raw_fd(), &raw const message, MSG_NOSIGNAL | MSG_DONTWAIT) }
        });
        match sent {
            Ok(_) => Sent::Done,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                Sent::Full
            }
            Err(e) => {
                self.gone = is_gone(&e);
                Sent::Refused
            }
        }
    }

    /// The next reply's header; the message stays where it is. `None`: not now, or never again.
    pub fn peek(&mut self) -> Option<Waiting> {
        if self.gone || !self.readable {
            return None;
        }
        let mut header = [0; REPLY_HEADER];
        let mut pieces = [iovec { iov_base: header.as_mut_ptr().cast(), iov_len: REPLY_HEADER }];
        // The whole length is told, though most of it is not read.
        match self.receive(&mut pieces, MSG_PEEK | MSG_TRUNC) {
            Ok(len) if len > 0 => Some(Waiting { header: Reply(header), len }),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            _ => {
                self.gone = true;
                None
            }
        }
    }

    /// Takes the message that was looked at: what is behind its header goes to guest memory, as much as fits.
    pub fn take(&mut self, body: &Buffers<'_>) {
        let mut header = [0; REPLY_HEADER];
        let head = iovec { iov_base: header.as_mut_ptr().cast(), iov_len: REPLY_HEADER };
        let mut pieces = vec![head];
        pieces.extend(body.iovecs());
        // It is there, and nobody else reads here.
        let _ = self.receive(&mut pieces, 0);
    }

    fn receive(&self, pieces: &mut [iovec], flags: c_int) -> io::Result<usize> {
        let mut message = message(pieces);
        retry(|| {
            // SAFETY: the pieces are our caller's memory and guest memory that it borrows.
            unsafe { recvmsg(self.fd.as_raw_fd(), &raw mut message, flags | MSG_DONTWAIT) }
        })
    }
}

/// A message of these pieces, without an address or descriptors.
fn message(pieces: &mut [iovec]) -> msghdr {
    // SAFETY: all zero is a valid msghdr.
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    message
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(EPIPE | ECONNRESET | ENOTCONN))
}
