//! The control socket: one packet is one message with its descriptors, in postcard encoding.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
        sendmsg, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// Most descriptors beside one message.
pub const MAX_FDS: usize = 128;
const ANCILLARY: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// What can go wrong on a control socket. [`ChannelError::Closed`] is how the other side says goodbye.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("the other end of the control socket is closed")]
    Closed,
    #[error("the message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    #[error("a message with too many descriptors, or cut short")]
    Truncated,
    #[error("a message that cannot be understood")]
    Decode(#[source] postcard::Error),
    #[error("the control socket failed")]
    Io(#[from] io::Error),
}

impl ChannelError {
    /// Whether there was just nothing to read, or no room to write, on a non-blocking socket.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Io(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

/// One end of a control socket. Non-blocking: wait for it with poll, epoll or an async runtime.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// A connected pair, close-on-exec and non-blocking.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok((Self(a), Self(b)))
    }

    /// Takes over a socket that came from a [`Channel::pair`].
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends a message with its descriptors. All or nothing.
    ///
    /// # Errors
    /// `Closed` when nobody is there any more; one that [`ChannelError::would_block`] when the socket is full.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = postcard::to_stdvec(message).map_err(ChannelError::Decode)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLong(bytes.len()));
        }
        let mut space = [MaybeUninit::uninit(); ANCILLARY];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::Truncated);
        }
        loop {
            let sent = sendmsg(
                &self.0,
                &[IoSlice::new(&bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            return match sent {
                Ok(_) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::PIPE | Errno::CONNRESET) => Err(ChannelError::Closed),
                Err(e) => Err(ChannelError::Io(e.into())),
            };
        }
    }

    /// Receives one message and its descriptors.
    ///
    /// # Errors
    /// `Closed` at the end; `Truncated` or `Decode` for what no well-behaved peer sends; one that
    /// [`ChannelError::would_block`] when there is nothing yet.
    pub fn recv<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut bytes = [0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); ANCILLARY];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
            ) {
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(e) => return Err(ChannelError::Io(e.into())),
                Ok(received) => break received,
            }
        };
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|m| match m {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(ChannelError::Truncated);
        }
        let message =
            postcard::from_bytes(&bytes[..received.bytes]).map_err(ChannelError::Decode)?;
        Ok((message, fds))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::{Event, Request};

    #[test]
    fn messages_arrive_whole_with_their_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let (stream, _other) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        a.send(&Request::ListenVsock { port: 7 }, &[stream.as_fd()]).unwrap();
        a.send(&Request::Stop, &[]).unwrap();
        let (request, fds) = b.recv::<Request>().unwrap();
        assert_eq!(request, Request::ListenVsock { port: 7 });
        assert_eq!(fds.len(), 1);
        let (request, fds) = b.recv::<Request>().unwrap();
        assert_eq!((request, fds.len()), (Request::Stop, 0));
        assert!(b.recv::<Request>().unwrap_err().would_block());
        drop(a);
        assert!(matches!(b.recv::<Request>(), Err(ChannelError::Closed)));
        assert!(matches!(b.send(&Request::Stop, &[]), Err(ChannelError::Closed)));
    }

    #[test]
    fn an_over_long_message_is_refused_by_the_sender() {
        let (a, _b) = Channel::pair().unwrap();
        let event = Event::RequestFailed { request: String::new(), error: "x".repeat(MAX_MESSAGE) };
        assert!(matches!(a.send(&event, &[]), Err(ChannelError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 1..600)) {
            let (a, b) = Channel::pair().unwrap();
            rustix::net::send(&a, &bytes, SendFlags::empty()).unwrap();
            match b.recv::<Event>() {
                Ok(_) | Err(ChannelError::Decode(_)) => {}
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
    }
}
