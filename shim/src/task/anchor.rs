//! The host process that containerd is told as a task's: all tasks of a sandbox have the same one.
//!
//! The real processes are in the guest, where no tool of the host can look for them. But a CNI plugin, nerdctl
//! and docker find a container's network as `/proc/PID/ns/net`, and some kill a container by its pid. So there
//! is one small process in the pod's network namespace: a fork of the shim that has closed everything and
//! sleeps. It ends with the shim; if it is killed, so is the sandbox ([`Anchor::ended`]).

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid},
};
use tokio::io::unix::AsyncFd;

use crate::vm::watch;

#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    #[error("network namespace {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// As of `docker run --network container:NAME`.
    #[error(
        "network namespace {}: another sandbox's, and its VM was made for it alone: containers share one in a pod",
        path.display()
    )]
    Taken { path: PathBuf },
    #[error("fork")]
    Fork(#[source] io::Error),
    #[error("enter its network namespace")]
    Enter(#[source] io::Error),
}

/// The network namespace of a sandbox on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostNetwork {
    /// The one of this path, which somebody else made.
    Path(PathBuf),
    /// An empty one, which somebody may fill by our pid.
    New,
    /// The shim's own.
    Host,
}

/// Dropping it ends the process.
#[derive(Debug)]
pub struct Anchor {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    /// Its end is the process's.
    _hold: OwnedFd,
}

impl Anchor {
    pub fn new(network: &HostNetwork) -> Result<Self, AnchorError> {
        let namespace = match network {
            HostNetwork::Path(path) => Some(open(path)?),
            HostNetwork::New | HostNetwork::Host => None,
        };
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| AnchorError::Fork(e.into()));
        let (wait, hold) = pipe()?;
        let (answer, answers_end) = pipe()?;
        let plan = Plan {
            namespace: namespace.as_ref().map(AsRawFd::as_raw_fd),
            new: *network == HostNetwork::New,
            wait: wait.as_raw_fd(),
            answer: answers_end.as_raw_fd(),
            hold: hold.as_raw_fd(),
        };
        // SAFETY: the child makes system calls on numbers of ours until it exits: it neither allocates nor
        // locks, so that whatever other threads held at the fork is no matter.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(AnchorError::Fork(io::Error::last_os_error())),
            0 => plan.live(),
            pid => pid,
        };
        drop(answers_end);
        let failed = || AnchorError::Fork(io::Error::other("no such process"));
        let pid = Pid::from_raw(pid).ok_or_else(failed)?;
        let pidfd =
            pidfd_open(pid, PidfdFlags::empty()).map_err(|e| AnchorError::Fork(e.into()))?;
        let pidfd = watch(pidfd).map_err(AnchorError::Fork)?;
        let anchor = Self { pid, pidfd, _hold: hold };
        let mut errno = [0; 4];
        match rustix::io::read(&answer, &mut errno) {
            Ok(4) if errno == [0; 4] => Ok(anchor),
            Ok(4) => {
                Err(AnchorError::Enter(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))))
            }
            Ok(_) => Err(AnchorError::Enter(io::ErrorKind::UnexpectedEof.into())),
            Err(e) => Err(AnchorError::Enter(e.into())),
        }
    }

    pub fn pid(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// The namespace it is in.
    pub fn network(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.pid()).into()
    }

    /// Returns when somebody has killed it.
    pub async fn ended(&self) {
        let _ = self.pidfd.readable().await;
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
    }
}

fn open(path: &Path) -> Result<File, AnchorError> {
    if is_of_anchor(path) {
        return Err(AnchorError::Taken { path: path.into() });
    }
    File::open(path).map_err(|source| AnchorError::Open { path: path.into(), source })
}

/// Whether a namespace is named by the process of a sandbox.
fn is_of_anchor(path: &Path) -> bool {
    let path = path.to_str().and_then(|path| path.strip_prefix("/proc/")?.strip_suffix("/ns/net"));
    let exe = |process: &str| {
        fs::metadata(format!("/proc/{process}/exe")).map(|found| (found.dev(), found.ino()))
    };
    path.and_then(|path| path.parse::<u32>().ok()).is_some_and(|pid| {
        exe(&pid.to_string()).is_ok_and(|found| exe("self").is_ok_and(|own| own == found))
    })
}

/// What the child does, in numbers alone.
struct Plan {
    namespace: Option<RawFd>,
    new: bool,
    wait: RawFd,
    answer: RawFd,
    hold: RawFd,
}

impl Plan {
    /// In the child. Descriptors it does not need are closed first of all: it must not keep sockets, pipes or
    /// disks of the sandbox open.
    fn live(&self) -> ! {
        // SAFETY: plain system calls on numbers and on memory of this function.
        unsafe {
            // The writing end would keep our own wait from ending.
            libc::close(self.hold);
            let entered = match self.namespace {
                Some(fd) => libc::setns(fd, libc::CLONE_NEWNET),
                None if self.new => libc::unshare(libc::CLONE_NEWNET),
                None => 0,
            };
            let errno: i32 = if entered == 0 { 0 } else { *libc::__errno_location() };
            libc::write(self.answer, (&raw const errno).cast(), size_of::<i32>());
            // 3: out of the way of 0, 1 and 2, all of which are closed as well.
            libc::dup2(self.wait, 3);
            for range in [(0, 2), (4, u32::MAX)] {
                libc::syscall(libc::SYS_close_range, range.0, range.1, 0);
            }
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD] {
                libc::signal(signal, libc::SIG_DFL);
            }
            if errno == 0 {
                let mut byte = 0_u8;
                while libc::read(3, (&raw mut byte).cast(), 1) == -1
                    && *libc::__errno_location() == libc::EINTR
                {}
            }
            libc::_exit(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn it_lives_with_us_in_our_network_and_holds_nothing() {
        let anchor = Anchor::new(&HostNetwork::Host).unwrap();
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        let pid = anchor.pid();
        assert_eq!(fs::read_link(format!("/proc/{pid}/ns/net")).unwrap(), own);
        // It closes them after its answer.
        let mut open = usize::MAX;
        for _ in 0..200 {
            open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
            if open == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(open, 1);
        drop(anchor);
        assert!(fs::metadata(format!("/proc/{pid}")).is_err());
    }

    #[tokio::test]
    async fn a_kill_is_noticed() {
        let anchor = Anchor::new(&HostNetwork::Host).unwrap();
        assert!(
            tokio::time::timeout(Duration::from_millis(50), anchor.ended()).await.is_err(),
            "ended by itself"
        );
        rustix::process::kill_process(anchor.pid, rustix::process::Signal::KILL).unwrap();
        tokio::time::timeout(Duration::from_secs(5), anchor.ended()).await.unwrap();
    }

    #[tokio::test]
    async fn a_namespace_that_is_none_is_an_error_of_its_own() {
        let missing = Anchor::new(&HostNetwork::Path("/no/such/netns".into())).unwrap_err();
        assert!(matches!(missing, AnchorError::Open { .. }), "{missing}");
        let other = Anchor::new(&HostNetwork::Path("/proc/self/ns/uts".into())).unwrap_err();
        assert!(matches!(other, AnchorError::Enter(_)), "{other}");
        let anchor = Anchor::new(&HostNetwork::Host).unwrap();
        let taken = Anchor::new(&HostNetwork::Path(anchor.network())).unwrap_err();
        assert!(matches!(taken, AnchorError::Taken { .. }), "{taken}");
    }
}
