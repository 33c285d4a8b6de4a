//! The host's end of a connection: one end of a socketpair. No call here blocks (`MSG_DONTWAIT`) and none
//! raises a signal (`MSG_NOSIGNAL`).

use std::{
    io::ErrorKind,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::net::{Shutdown, shutdown};

use crate::virtio::{buffers::Buffers, retry};

/// What a socket may hold for us in bytes when it is thrown away; more than any default.
const MAX_UNREAD: usize = 4 << 20;

/// What reading gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    Bytes(usize),
    /// Nothing yet.
    Empty,
    /// Nothing any more.
    End,
}

/// What writing took.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    Bytes(usize),
    /// No room yet.
    Full,
    /// Nobody reads any more.
    Gone,
}

/// Owns the descriptor.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl Stream {
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Reads straight into guest memory.
    pub fn receive(&self, into: &Buffers<'_>) -> Received {
        self.receive_iovecs(&mut into.iovecs())
    }

    /// The iovecs are made by the callers, from memory they borrow.
    fn receive_iovecs(&self, iovecs: &mut [libc::iovec]) -> Received {
        let mut message = message(iovecs);
        let count = retry(|| {
            // SAFETY: the message describes memory that the caller borrows for writing.
            unsafe { libc::recvmsg(self.0.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        });
        match count {
            Ok(0) => Received::End,
            Ok(count) => Received::Bytes(count),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Received::Empty,
            // The other side closed without reading all: an end, too.
            Err(_) => Received::End,
        }
    }

    /// Writes straight from guest memory.
    pub fn send(&self, from: &Buffers<'_>) -> Sent {
        self.send_iovecs(&mut from.iovecs())
    }

    /// Writes two runs of bytes, one after the other.
    pub fn send_bytes(&self, runs: [&[u8]; 2]) -> Sent {
        self.send_iovecs(&mut runs.map(|run| libc::iovec {
            iov_base: run.as_ptr().cast_mut().cast(),
            iov_len: run.len(),
        }))
    }

    /// The iovecs are made by the two functions above, from memory they borrow.
    fn send_iovecs(&self, iovecs: &mut [libc::iovec]) -> Sent {
        let message = message(iovecs);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let count = retry(|| {
            // SAFETY: the message describes memory that the caller borrows, which is only read.
            unsafe { libc::sendmsg(self.0.as_raw_fd(), &message, flags) }
        });
        match count {
            Ok(count) => Sent::Bytes(count),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Sent::Full,
            Err(_) => Sent::Gone,
        }
    }

    /// The host reads to its end of stream.
    pub fn end(&self) {
        // Fails only if the other side is gone, which it will be found to be.
        let _ = shutdown(&self.0, Shutdown::Write);
    }

    /// The host's writes fail from now on; what it wrote before is thrown away. Without the latter, a
    /// later close would make its reads end with ECONNRESET instead of an end of stream.
    pub fn refuse(&self) {
        let _ = shutdown(&self.0, Shutdown::Read);
        let mut bytes = [0u8; 16 * 1024];
        let mut iovecs =
            [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        for _ in 0..MAX_UNREAD / bytes.len() {
            if !matches!(self.receive_iovecs(&mut iovecs), Received::Bytes(_)) {
                break;
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr is plain data, of which zeroes mean "none".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    message
}
