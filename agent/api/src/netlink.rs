//! A route netlink socket (rtnetlink(7)): with it the shim finds what a network namespace has, and the agent gives it to the
//! guest. One request at a time; the messages are those of netlink-packet-route.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NetlinkBuffer, NetlinkHeader, Parseable, parse_i32,
};
use rustix::{
    io::retry_on_intr,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

/// The kernel answers at once: this keeps a wait from having no end.
const LIMIT: Duration = Duration::from_secs(5);
/// The kernel fills half of this at most.
const DATAGRAM: usize = 64 << 10;
/// A list that changes while it is read is read again.
const TRIES: usize = 10;

#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A message of the kernel's.
enum Answer<'a> {
    Message(&'a [u8]),
    /// Of the request: the error number, 0 for none.
    End(i32),
}

impl Netlink {
    /// Of this thread's network namespace, and it stays there.
    pub fn open() -> io::Result<Self> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Self::of(socket)
    }

    /// With a socket that was opened elsewhere, in the network namespace of its opener.
    pub fn of(socket: OwnedFd) -> io::Result<Self> {
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Has something done. `kind` and `flags` are the message's header's.
    pub fn change(&mut self, kind: u16, flags: u16, message: &impl Emitable) -> io::Result<()> {
        self.send(kind, flags | NLM_F_REQUEST | NLM_F_ACK, message)?;
        self.receive(|_| Ok(()))?;
        Ok(())
    }

    /// All that there is of a kind.
    pub fn list<M: Parseable<[u8]>>(
        &mut self,
        kind: u16,
        message: &impl Emitable,
    ) -> io::Result<Vec<M>> {
        for _ in 0..TRIES {
            self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, message)?;
            let mut all = Vec::new();
            let whole = self.receive(|bytes| {
                all.push(M::parse(bytes).map_err(io::Error::other)?);
                Ok(())
            })?;
            if whole {
                return Ok(all);
            }
        }
        Err(io::Error::other("it changes all the time"))
    }

    fn send(&mut self, kind: u16, flags: u16, message: &impl Emitable) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        let length = header.buffer_len() + message.buffer_len();
        header.length = length as u32;
        header.message_type = kind;
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut bytes = vec![0; length];
        let (head, body) = bytes.split_at_mut(header.buffer_len());
        header.emit(head);
        message.emit(body);
        retry_on_intr(|| send(&self.socket, &bytes, SendFlags::empty()))?;
        Ok(())
    }

    /// Reads to the end of the answer; returns whether that was not disturbed.
    fn receive(&self, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<bool> {
        let mut datagram = vec![0; DATAGRAM];
        let (mut whole, mut failed) = (true, Ok(()));
        loop {
            let (len, _) =
                retry_on_intr(|| recv(&self.socket, &mut *datagram, RecvFlags::empty()))?;
            let mut rest = &datagram[..len];
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
                rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or(&[]);
                // What is left of a request that was given up.
                if message.sequence_number() != self.sequence {
                    continue;
                }
                whole &= message.flags() & NLM_F_DUMP_INTR == 0;
                match answer(&message)? {
                    // The rest has to be read all the same.
                    Answer::Message(bytes) if failed.is_ok() => failed = each(bytes),
                    Answer::Message(_) => {}
                    Answer::End(0) => return failed.map(|()| whole),
                    Answer::End(errno) => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }
}

fn answer<'a>(message: &NetlinkBuffer<&'a [u8]>) -> io::Result<Answer<'a>> {
    let payload = message.payload();
    match message.message_type() {
        NLMSG_ERROR | NLMSG_DONE => {
            let code = payload.get(..4).map_or(Ok(0), parse_i32).map_err(io::Error::other)?;
            Ok(Answer::End(code.wrapping_neg()))
        }
        _ => Ok(Answer::Message(payload)),
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::*;

    #[test]
    fn what_there_is_is_listed_and_what_cannot_be_done_has_its_errno() {
        let mut netlink = Netlink::open().unwrap();
        let links: Vec<LinkMessage> =
            netlink.list(libc::RTM_GETLINK, &LinkMessage::default()).unwrap();
        let lo = LinkAttribute::IfName("lo".into());
        assert!(links.iter().any(|link| link.attributes.contains(&lo)), "{links:?}");
        let mut none = LinkMessage::default();
        none.header.index = i32::MAX as u32;
        for _ in 0..2 {
            let error = netlink.change(libc::RTM_DELLINK, 0, &none).unwrap_err();
            let expected = [libc::ENODEV, libc::EPERM].map(Some);
            assert!(expected.contains(&error.raw_os_error()), "{error}");
        }
    }
}
