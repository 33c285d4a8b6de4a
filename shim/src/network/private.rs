//! A network namespace of a sandbox's own, which holds nothing but taps. Nobody is in it: it is there as long as the
//! descriptors that were opened in it.
//!
//! An ordinary user may make one in a user namespace, and a thread of ours could not enter that. So a child opens the
//! descriptors, which shares our table of them and ends at once: what is then done by them takes power over the
//! namespace, and who has made it has that.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use ampoule_agent_api::netlink::Netlink;
use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, WaitOptions, geteuid, waitpid},
};

use super::{NetworkError, Result, tap::DEVICE};

/// Its descriptors.
#[derive(Debug)]
pub struct Private {
    pub netlink: Netlink,
    /// Each may become a tap.
    pub tuns: [OwnedFd; 2],
}

/// What a child says: which descriptors it has opened, or at which step it failed, and why.
type Answer = [RawFd; 5];
const STEPS: [&str; 4] = ["make a network namespace", "open a netlink socket", OPEN_TUN, OPEN_TUN];
const OPEN_TUN: &str = "open /dev/net/tun, from which taps are made";

impl Private {
    pub fn new() -> Result<Self> {
        let failed = |source| NetworkError::Host(STEPS[0], source);
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (read, write) = pipe_with(flags).map_err(|e| failed(e.into()))?;
        let user = if geteuid().is_root() { 0 } else { libc::CLONE_NEWUSER };
        // SAFETY: without CLONE_VM it is a fork. The child makes system calls on numbers and memory of its own until it
        // exits: it neither allocates nor locks, so that whatever other threads held at the fork is no matter.
        let pid = unsafe {
            libc::syscall(libc::SYS_clone, libc::CLONE_FILES | libc::SIGCHLD, 0, 0, 0, 0)
        };
        match pid {
            -1 => return Err(failed(io::Error::last_os_error())),
            0 => child(user | libc::CLONE_NEWNET, write.as_raw_fd()),
            pid => waitpid(Pid::from_raw(pid as i32), WaitOptions::empty()),
        }
        .map_err(|e| failed(e.into()))?;
        let mut bytes = [0; size_of::<Answer>()];
        let len = rustix::io::read(&read, &mut bytes).map_err(|e| failed(e.into()))?;
        if len < bytes.len() {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut answer: Answer = [0; 5];
        for (number, bytes) in answer.iter_mut().zip(bytes.chunks_exact(4)) {
            *number = bytes.try_into().map_or(-1, RawFd::from_ne_bytes);
        }
        Self::of(answer)
    }

    fn of([step, errno, fds @ ..]: Answer) -> Result<Self> {
        // SAFETY: the child has opened it in our table, for nobody else.
        let mut open = fds.map(|fd| (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }));
        match open.each_mut().map(Option::take) {
            [Some(netlink), Some(one), Some(other)] => {
                let netlink = Netlink::of(netlink);
                let netlink = netlink.map_err(|e| NetworkError::Host(STEPS[1], e))?;
                Ok(Self { netlink, tuns: [one, other] })
            }
            _ => {
                let step = usize::try_from(step).ok().and_then(|step| STEPS.get(step));
                let error = io::Error::from_raw_os_error(errno);
                Err(NetworkError::Host(step.copied().unwrap_or(STEPS[0]), error))
            }
        }
    }
}

/// In the child.
fn child(namespaces: libc::c_int, answer_to: RawFd) -> ! {
    let mut answer: Answer = [0, 0, -1, -1, -1];
    // SAFETY: plain system calls on numbers and on memory of this function.
    unsafe {
        let mut last = libc::unshare(namespaces);
        while last >= 0 && answer[0] < 3 {
            last = match answer[0] {
                0 => libc::socket(
                    libc::AF_NETLINK,
                    libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                    libc::NETLINK_ROUTE,
                ),
                _ => libc::open(DEVICE.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC),
            };
            answer[0] += 1;
            answer[1 + answer[0] as usize] = last;
        }
        if last < 0 {
            answer[1] = *libc::__errno_location();
        }
        libc::write(answer_to, (&raw const answer).cast(), size_of::<Answer>());
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use ampoule_agent_api::netlink::Netlink;
    use netlink_packet_route::link::LinkMessage;

    use super::*;

    #[test]
    fn it_is_another_namespace_and_ours_to_change() {
        let links = |netlink: &mut Netlink| -> Vec<LinkMessage> {
            netlink.list(libc::RTM_GETLINK, &LinkMessage::default()).unwrap()
        };
        let Private { mut netlink, tuns: [one, other] } = match Private::new() {
            Ok(private) => private,
            Err(error) => return eprintln!("skipped: {error:?}"),
        };
        let own = links(&mut Netlink::open().unwrap()).len();
        assert!(links(&mut netlink).len() <= 1 + own);
        let before = links(&mut netlink).len();
        // Kept: another test's child may hold one that is closed, before its execve.
        let _tap = super::super::tap::of(one, "eth0").unwrap();
        let _plain = super::super::tap::plain(other, "eth0").unwrap();
        assert_eq!(links(&mut netlink).len(), before + 2);
        assert_eq!(links(&mut Netlink::open().unwrap()).len(), own);
    }
}
