//! A tap, or one of its queues: one descriptor, the shim's gift, and the I/O on it. Owns it, its share of the limits of
//! both directions and the epoll set that watches them all (edge-triggered), and knows whether there is a point in trying.
//!
//! A queue that is detached is given no frames by the host, and takes none.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use libc::*;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_net::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{frame::HEADER_LEN, limit::Limits, usage::Usage};
use crate::virtio::{buffers::Buffers, retry};

/// What a tap must have been made with.
const FLAGS: c_int = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
/// Every Linux that runs us cuts TCP; 6.2 was the first for UDP, which comes as a pair.
const TCP: c_uint = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
const UDP: c_uint = TUN_F_USO4 | TUN_F_USO6;
/// Most pieces of guest memory in one system call (IOV_MAX is 1,024).
const MAX_PIECES: usize = 1000;

/// Event data of the tap, and of what else there is to wake up for.
const TAP: u64 = 0;
const OTHER: u64 = 1;

/// Why a descriptor cannot be a network device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("the descriptor is not a tap's")]
    NotTap(#[source] io::Error),
    #[error("the tap was made with flags {0:#x} and not with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags(c_int),
    #[error("the tap cannot be set up: {what}")]
    Setup { what: &'static str, source: io::Error },
    #[error("its limits cannot be set up")]
    Limits(#[source] io::Error),
    #[error("no descriptor came with it")]
    NoTap,
    #[error("the interrupt event cannot be made")]
    Interrupt(#[source] io::Error),
    #[error("the event of its queues' use cannot be made")]
    Usage(#[source] io::Error),
}

/// A frame as it was read, header included.
#[derive(Debug)]
pub struct Frame {
    pub len: usize,
    /// This many bytes are where they were wanted, the others in the spill.
    pub direct: usize,
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    Done,
    /// No room yet.
    Full,
    /// The host will not have this one.
    Refused,
}

/// See the top of this file.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    epoll: Epoll,
    /// `TUN_F_*` that it knows.
    known: c_uint,
    readable: bool,
    writable: bool,
    attached: bool,
    limits: Limits,
    up: bool,
    failure: Option<io::Error>,
}

impl Tap {
    /// Sets the tap up: header size, no offloads yet, no blocking. What it sets is set for all of its queues.
    pub fn new(fd: OwnedFd, limits: Limits) -> Result<Self, NetError> {
        check_flags(&fd)?;
        let size = HEADER_LEN as c_int;
        // SAFETY: reads an integer that outlives the call.
        check(unsafe { ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })
            .map_err(setup("the size of its header"))?;
        let known = [TCP | UDP, TCP, TUN_F_CSUM, 0]
            .into_iter()
            .find(|&offloads| set_offloads(&fd, offloads).is_ok())
            .unwrap_or(0);
        set_offloads(&fd, 0).map_err(setup("its offloads"))?;
        Self::watch(fd, known, limits, None).map_err(setup("waiting for it"))
    }

    /// A further queue of one that is set up; detached, which one that is not watched yet must not be.
    pub fn further(fd: OwnedFd, limits: Limits, usage: &Usage) -> Result<Self, NetError> {
        check_flags(&fd)?;
        let mut tap = Self::watch(fd, 0, limits, Some(usage)).map_err(setup("waiting for it"))?;
        set_queue(&tap.fd, false).map_err(setup("which of its queues are in use"))?;
        tap.attached = false;
        Ok(tap)
    }

    fn watch(
        fd: OwnedFd,
        known: c_uint,
        limits: Limits,
        usage: Option<&Usage>,
    ) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        let epoll = Epoll::new()?;
        let add = |fd, events, data| {
            let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, data);
            epoll.ctl(ControlOperation::Add, fd, event)
        };
        add(fd.as_raw_fd(), EventSet::IN | EventSet::OUT, TAP)?;
        for event in limits.timers().chain(usage.map(Usage::event)) {
            add(event, EventSet::IN, OTHER)?;
        }
        Ok(Self {
            fd,
            epoll,
            known,
            readable: true,
            writable: true,
            attached: true,
            limits,
            up: true,
            failure: None,
        })
    }

    /// A socket of packets in place of a tap's queue.
    #[cfg(test)]
    pub fn stand_in(fd: impl Into<OwnedFd>, limits: Limits, usage: Option<&Usage>) -> Self {
        let mut tap = Self::watch(fd.into(), TCP | UDP, limits, usage).unwrap();
        tap.attached = usage.is_none();
        tap
    }

    /// Whether the host says that it uses this queue.
    #[cfg(test)]
    pub fn real_queue(&self) -> bool {
        flags(&self.fd).is_ok_and(|flags| flags & IFF_DETACH_QUEUE == 0)
    }

    /// Has the host use this queue, or not any more: what it had is dropped there.
    pub fn attach(&mut self, attached: bool) {
        if self.attached != attached {
            self.attached = attached;
            (self.readable, self.writable) = (self.up, self.up);
            // A tap that is gone says so when it is read.
            let _ = set_queue(&self.fd, attached);
        }
    }

    /// Readable when the tap needs [`poll`](Self::poll).
    pub fn event(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes note of what has changed. A tap that is gone is both readable and writable: to find out. Of all else
    /// there is nothing to note: the limits look at the clock.
    pub fn poll(&mut self) {
        let mut events = [EpollEvent::default(); 4];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in events[..count].iter().filter(|event| event.data() == TAP) {
            let gone = event.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP);
            self.readable |= gone || event.event_set().contains(EventSet::IN);
            self.writable |= gone || event.event_set().contains(EventSet::OUT);
        }
    }

    /// The offloads that the device may offer, as feature bits.
    pub fn features(&self) -> u64 {
        let to_guest = [
            (TUN_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
            (TUN_F_TSO4, VIRTIO_NET_F_GUEST_TSO4),
            (TUN_F_TSO6, VIRTIO_NET_F_GUEST_TSO6),
            (TUN_F_TSO_ECN, VIRTIO_NET_F_GUEST_ECN),
            (TUN_F_USO4, VIRTIO_NET_F_GUEST_USO4),
            (TUN_F_USO6, VIRTIO_NET_F_GUEST_USO6),
        ];
        // What comes from the guest every tap takes, but for UDP.
        let from_guest = [
            (0, VIRTIO_NET_F_CSUM),
            (0, VIRTIO_NET_F_HOST_TSO4),
            (0, VIRTIO_NET_F_HOST_TSO6),
            (0, VIRTIO_NET_F_HOST_ECN),
            (UDP, VIRTIO_NET_F_HOST_USO),
        ];
        let offered =
            to_guest.iter().chain(&from_guest).filter(|(tun, _)| self.known & tun == *tun);
        offered.fold(0, |features, (_, bit)| features | 1 << bit)
    }

    /// Tells the tap which frames the driver takes whole.
    pub fn negotiated(&self, features: u64) {
        // Known to work for all there is; a tap that is gone says so when it is read.
        let _ = set_offloads(&self.fd, offloads(features));
    }

    /// Reads one frame into guest memory, what does not fit there into `spill`. `None`: not now.
    pub fn read(&mut self, into: &Buffers<'_>, spill: &mut [u8]) -> Option<Frame> {
        if !self.attached || !self.readable || !self.limits.to_guest.may_pass() {
            return None;
        }
        let mut iovecs = into.iovecs();
        iovecs.truncate(MAX_PIECES);
        let room: usize = iovecs.iter().map(|piece| piece.iov_len).sum();
        iovecs.push(iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() });
        let read = retry(|| {
            // SAFETY: the pieces lie in guest memory, which `into` borrows, and in `spill`.
            unsafe { readv(self.fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as c_int) }
        });
        match read {
            // A tap has no end; only what stands for it has.
            Ok(0) => self.fail(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => {
                self.limits.to_guest.charge(len.saturating_sub(HEADER_LEN));
                return Some(Frame { len, direct: room.min(len) });
            }
            Err(e) if is_gone(&e) => self.fail(e),
            Err(_) => self.readable = false,
        }
        None
    }

    /// Writes one frame: `head`, then the rest from guest memory.
    pub fn write(&mut self, head: &[u8], rest: &Buffers<'_>) -> Sent {
        if !self.attached {
            return Sent::Refused;
        }
        if !self.writable || !self.limits.from_guest.may_pass() {
            return Sent::Full;
        }
        let mut iovecs =
            vec![iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() }];
        iovecs.extend(rest.iovecs());
        let written = retry(|| {
            // SAFETY: the pieces are `head` and guest memory, which `rest` borrows; they are only read.
            unsafe { writev(self.fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as c_int) }
        });
        match written {
            Ok(len) => {
                self.limits.from_guest.charge(len.saturating_sub(HEADER_LEN));
                Sent::Done
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                Sent::Full
            }
            Err(e) if is_gone(&e) => {
                self.fail(e);
                Sent::Full
            }
            Err(_) => Sent::Refused,
        }
    }

    /// Whether there is a network behind it.
    pub fn is_up(&self) -> bool {
        self.up
    }

    /// Why it is gone; once.
    pub fn take_failure(&mut self) -> Option<io::Error> {
        self.failure.take()
    }

    fn fail(&mut self, error: io::Error) {
        (self.readable, self.writable) = (false, false);
        if std::mem::take(&mut self.up) {
            self.failure = Some(error);
        }
    }
}

/// The `TUN_F_*` for a set of features; what makes no sense without another is left out (5.1.3.1).
fn offloads(features: u64) -> c_uint {
    let has = |bit: u32| features & 1 << bit != 0;
    let mut offloads = 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return offloads;
    }
    offloads |= TUN_F_CSUM;
    for (bit, tun) in [(VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6)]
    {
        offloads |= if has(bit) { tun } else { 0 };
    }
    if offloads != TUN_F_CSUM && has(VIRTIO_NET_F_GUEST_ECN) {
        offloads |= TUN_F_TSO_ECN;
    }
    if has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6) {
        offloads |= UDP;
    }
    offloads
}

fn check_flags(fd: &OwnedFd) -> Result<(), NetError> {
    let flags = flags(fd).map_err(NetError::NotTap)?;
    if flags & FLAGS == FLAGS { Ok(()) } else { Err(NetError::Flags(flags & 0xffff)) }
}

fn flags(fd: &OwnedFd) -> io::Result<c_int> {
    // SAFETY: an ifreq is plain data.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: fills the request, which outlives the call.
    check(unsafe { ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
    // SAFETY: TUNGETIFF fills this member of the union.
    Ok(c_int::from(unsafe { request.ifr_ifru.ifru_flags }))
}

fn set_offloads(fd: &OwnedFd, offloads: c_uint) -> io::Result<()> {
    // SAFETY: takes a number.
    check(unsafe { ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, c_ulong::from(offloads)) })
}

/// Attaches one of a tap's queues, or detaches it.
fn set_queue(fd: &OwnedFd, attach: bool) -> io::Result<()> {
    // SAFETY: an ifreq is plain data.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags =
        if attach { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE } as c_short;
    // SAFETY: reads the request, which outlives the call.
    check(unsafe { ioctl(fd.as_raw_fd(), TUNSETQUEUE, &raw const request) })
}

fn setup(what: &'static str) -> impl FnOnce(io::Error) -> NetError {
    move |source| NetError::Setup { what, source }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The interface was deleted; the other two are what sockets say.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(EBADFD | EPIPE | ECONNRESET))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_are_those_that_make_sense_together() {
        let bits = |bits: &[u32]| bits.iter().fold(0u64, |all, bit| all | 1 << bit);
        assert_eq!(offloads(u64::MAX), TCP | UDP);
        assert_eq!(offloads(!bits(&[VIRTIO_NET_F_GUEST_CSUM])), 0);
        let csum = VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(offloads(bits(&[csum, VIRTIO_NET_F_GUEST_ECN])), TUN_F_CSUM);
        assert_eq!(offloads(bits(&[csum, VIRTIO_NET_F_GUEST_USO4])), TUN_F_CSUM);
        assert_eq!(offloads(bits(&[csum, VIRTIO_NET_F_GUEST_TSO6])), TUN_F_CSUM | TUN_F_TSO6);
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let limits = Limits::new(&super::super::tests::config(Default::default())).unwrap();
        assert!(matches!(Tap::new(file.into(), limits), Err(NetError::NotTap(_))));
    }
}
