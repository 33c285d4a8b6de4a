//! What the host shares with a sandbox: its file server, `ampoule-fsd`, and the shares that each container has.
//! Belongs to the owner task.
//!
//! ```text
//!  Waiting ──the first share──▶ Serving ──the process ends, or the sandbox does──▶ Ended
//! ```
//!
//! The VM's end of the socket is there from boot on, as a device has to be; the server is started when there is
//! something to serve. A server that has ended is not started again: the guest's open files were in it. The guest
//! reads I/O errors from then on.

use std::{
    collections::HashMap,
    mem,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use ampoule_fsd_api::{Fsd, FsdError};
use ampoule_vmm_api::Channel;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, SocketFlags, SocketType, socketpair, sockopt::set_socket_send_buffer_size,
    },
};
use tokio::sync::watch::{Receiver, Sender};

use super::follow::follow;
use crate::{
    agent::Agent,
    id::Id,
    oom,
    pace::Pace,
    share::Share,
    text::one_line,
    vm::{VmError, watch as registered},
};

/// How long a server that was killed may take to be gone before the sandbox ends without it.
const GONE: Duration = Duration::from_secs(1);
/// How long it usually may take to answer: it does so at once.
const ANSWER: Duration = Duration::from_secs(10);
/// Room for two messages of 128 KiB, as far as the host permits it (net.core.wmem_max).
const SOCKET_BUFFER: usize = 320 << 10;

/// Why a container does not get its shares.
#[derive(Debug, thiserror::Error)]
pub enum SharesError {
    #[error("this sandbox was made without shares")]
    None,
    #[error("copy a descriptor")]
    Open(#[source] std::io::Error),
    #[error("the sandbox's file server has ended; it takes another sandbox")]
    Ended,
    #[error("{}", path.display())]
    Add { path: PathBuf, source: FsdError },
    #[error(transparent)]
    Fsd(#[from] FsdError),
}

/// How a file server is started.
#[derive(Debug)]
pub(super) struct Start {
    pub exe: PathBuf,
    /// Of the sandbox.
    pub name: String,
    pub oom_score_adj: i32,
    pub pace: Pace,
    /// The server's end.
    pub socket: OwnedFd,
}

impl Start {
    /// With the VM's end.
    pub fn new(
        exe: PathBuf,
        name: String,
        oom_score_adj: i32,
        pace: Pace,
    ) -> Result<(Self, OwnedFd), VmError> {
        let pair = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (ours, vms) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            set_socket_send_buffer_size(&ours, SOCKET_BUFFER)?;
            set_socket_send_buffer_size(&vms, SOCKET_BUFFER)?;
            Ok((ours, vms))
        };
        let (socket, vms): (OwnedFd, OwnedFd) = pair().map_err(|e: rustix::io::Errno| {
            VmError::Prepare("make the share's socket", e.into())
        })?;
        Ok((Self { exe, name, oom_score_adj, pace, socket }, vms))
    }
}

#[derive(Debug)]
enum Server {
    Waiting(Start),
    Serving(Fsd),
    /// Or there never was one, if no device waits for it.
    Ended,
}

/// See the top of this file.
#[derive(Debug)]
pub(super) struct Shares {
    lender: Lender,
    numbers: HashMap<Id, Vec<u32>>,
}

/// Gives shares to the server; clones give to the same.
#[derive(Clone, Debug)]
pub(super) struct Lender {
    server: Arc<Mutex<Server>>,
    has_device: bool,
    pid: Sender<Option<u32>>,
    next: Arc<AtomicU32>,
}

/// A container's shares on their way to the server.
pub(super) struct Batch {
    shares: Vec<(u32, Share)>,
    server: Arc<Mutex<Server>>,
    pid: Sender<Option<u32>>,
}

impl Shares {
    pub fn new(start: Option<Start>) -> Self {
        let has_device = start.is_some();
        let server = start.map_or(Server::Ended, Server::Waiting);
        let lender = Lender {
            server: Arc::new(Mutex::new(server)),
            has_device,
            pid: Sender::new(None),
            next: Arc::default(),
        };
        Self { lender, numbers: HashMap::new() }
    }

    pub fn lender(&self) -> &Lender {
        &self.lender
    }

    /// They are this container's, until it is forgotten.
    pub fn belong(&mut self, container: &Id, batch: &Batch) {
        if !batch.shares.is_empty() {
            let numbers = batch.shares.iter().map(|(number, _)| *number).collect();
            self.numbers.insert(container.clone(), numbers);
        }
    }

    /// A container has gone, or was never made.
    pub fn forget(&mut self, container: &Id) {
        let Some(numbers) = self.numbers.remove(container) else { return };
        let server = self.lender.server.clone();
        tokio::task::spawn_blocking(move || {
            if let Server::Serving(fsd) = &*lock(&server) {
                // It has ended, or never heard of it: there is nothing to take away.
                numbers.iter().for_each(|number| drop(fsd.remove(*number)));
            }
        });
    }

    /// The sandbox has ended: so does its server, if need be without being waited for.
    pub fn end(&self) {
        let Lender { server, pid, .. } = &self.lender;
        match server.try_lock() {
            Ok(mut server) => end(&mut server, pid),
            Err(_) => {
                let (server, pid) = (server.clone(), pid.clone());
                thread::spawn(move || end(&mut lock(&server), &pid));
            }
        }
    }
}

impl Drop for Shares {
    fn drop(&mut self) {
        self.end();
    }
}

impl Lender {
    /// The server's PID on this host, while it is there.
    pub fn pid(&self) -> Receiver<Option<u32>> {
        self.pid.subscribe()
    }

    /// Gives shares their numbers, which nothing else has ever had.
    pub fn number(&self, shares: Vec<Share>) -> Result<Batch, SharesError> {
        if !self.has_device && !shares.is_empty() {
            return Err(SharesError::None);
        }
        let number = |share| (self.next.fetch_add(1, Ordering::Relaxed), share);
        let shares = shares.into_iter().map(number).collect();
        Ok(Batch { shares, server: self.server.clone(), pid: self.pid.clone() })
    }
}

impl Batch {
    /// The numbers, by the mounts they are for.
    pub fn by_mount(&self) -> HashMap<usize, u32> {
        self.shares.iter().map(|(number, share)| (share.mount, *number)).collect()
    }

    /// The number of the first.
    pub fn first(&self) -> Option<u32> {
        self.shares.first().map(|(number, _)| *number)
    }

    /// The server has them for as long as something takes.
    pub async fn lend<T>(
        self,
        agent: &Agent,
        work: impl Future<Output = T>,
    ) -> Result<T, SharesError> {
        let numbers: Vec<_> = self.shares.iter().map(|(number, _)| *number).collect();
        let server = self.server.clone();
        self.add(agent).await?;
        let done = work.await;
        let remove = move || match &*lock(&server) {
            Server::Serving(fsd) => numbers.iter().try_for_each(|number| fsd.remove(*number)),
            _ => Ok(()),
        };
        let removed = tokio::task::spawn_blocking(remove).await;
        removed.map_err(|_| SharesError::Ended)??;
        Ok(done)
    }

    /// Returns when the server has them all. What the guest is to be told of them is told to the agent.
    pub async fn add(self, agent: &Agent) -> Result<(), SharesError> {
        if self.shares.is_empty() {
            return Ok(());
        }
        let (server, pid) = (self.server.clone(), self.pid.clone());
        let added = tokio::task::spawn_blocking(move || lock(&self.server).add(&self.shares)).await;
        // It neither panics nor is it cancelled.
        let started = added.map_err(|_| SharesError::Ended)??;
        if let Some(Started { pid: number, pidfd, hints }) = started {
            pid.send_replace(Some(number));
            tokio::spawn(attend(server, pid, pidfd));
            if let Ok(hints) = registered(hints) {
                tokio::spawn(follow(hints, agent.clone()));
            }
        }
        Ok(())
    }
}

/// A server that has just been started.
struct Started {
    pid: u32,
    pidfd: OwnedFd,
    /// What the guest is to be told.
    hints: Channel,
}

impl Server {
    /// Starts it if it is to be started: then says so.
    fn add(&mut self, shares: &[(u32, Share)]) -> Result<Option<Started>, SharesError> {
        match mem::replace(self, Self::Ended) {
            Self::Ended => Err(SharesError::Ended),
            Self::Serving(fsd) => {
                let added = add_all(&fsd, shares);
                *self = Self::Serving(fsd);
                added.map(|()| None)
            }
            Self::Waiting(start) => match begin(&start, shares) {
                Ok((fsd, started)) => {
                    *self = Self::Serving(fsd);
                    Ok(Some(started))
                }
                Err(error) => {
                    *self = Self::Waiting(start);
                    Err(error)
                }
            },
        }
    }
}

/// Users without privileges can share only what is there before it serves.
fn begin(start: &Start, shares: &[(u32, Share)]) -> Result<(Fsd, Started), SharesError> {
    let mut fsd = Fsd::spawn(&start.exe, &start.name, start.pace.limit(ANSWER))?;
    let pid = fsd.process().pid().as_raw_pid().unsigned_abs();
    oom::set_score(pid, start.oom_score_adj);
    add_all(&fsd, shares)?;
    let hints = watch(&fsd)?;
    let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().map_err(FsdError::Socket);
    fsd.serve(copy(&start.socket)?)?;
    let pidfd = copy(fsd.process())?;
    Ok((fsd, Started { pid, pidfd, hints }))
}

/// The host has only so many watchers of files for each user: a sandbox does without rather than not at all, and is told
/// only what concerns the file server itself.
fn watch(fsd: &Fsd) -> Result<Channel, FsdError> {
    let (hints, theirs) = Channel::pair().map_err(FsdError::Socket)?;
    match fsd.watch(theirs) {
        Ok(()) => Ok(hints),
        Err(FsdError::Refused(why)) => {
            let why = one_line(&why, 500);
            tracing::warn!(why, "inotify will not tell of the host's changes (fs.fanotify)");
            Ok(hints)
        }
        Err(error) => Err(error),
    }
}

/// All or none.
fn add_all(fsd: &Fsd, shares: &[(u32, Share)]) -> Result<(), SharesError> {
    for (n, (number, share)) in shares.iter().enumerate() {
        let owners = share.owners.as_ref();
        if let Err(source) = fsd.add(*number, share.root.as_fd(), share.access, owners) {
            shares[..n].iter().for_each(|(number, _)| drop(fsd.remove(*number)));
            return Err(SharesError::Add { path: share.source.clone(), source });
        }
    }
    Ok(())
}

/// Says so when a server ends before its sandbox does.
async fn attend(server: Arc<Mutex<Server>>, pid: Sender<Option<u32>>, pidfd: OwnedFd) {
    let Ok(pidfd) = registered(pidfd) else { return };
    let _ = pidfd.readable().await;
    let _ = tokio::task::spawn_blocking(move || {
        if let Server::Serving(mut fsd) = mem::replace(&mut *lock(&server), Server::Ended) {
            pid.send_replace(None);
            let how = fsd.process().try_wait().ok().flatten();
            let how = how.map(|exit| exit.to_string()).unwrap_or_default();
            let said = one_line(&String::from_utf8_lossy(&fsd.process().stderr()), 500);
            tracing::warn!(how, said, "ampoule-fsd has ended: shared files are I/O errors now");
        }
    })
    .await;
}

fn end(server: &mut Server, pid: &Sender<Option<u32>>) {
    pid.send_replace(None);
    let Server::Serving(mut fsd) = mem::replace(server, Server::Ended) else { return };
    fsd.process().kill();
    let limit = Timespec { tv_sec: GONE.as_secs() as i64, tv_nsec: 0 };
    let gone = poll(&mut [PollFd::new(fsd.process(), PollFlags::IN)], Some(&limit));
    if gone.is_ok_and(|count| count > 0) {
        drop(fsd);
    } else {
        // A file system of the host that does not answer holds it up: it ends when that does.
        tracing::warn!("ampoule-fsd was killed and is still there");
        thread::spawn(move || drop(fsd));
    }
}

fn lock(server: &Mutex<Server>) -> MutexGuard<'_, Server> {
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use ampoule_fsd_api::Access;
    use rustix::fs::{Mode, OFlags, open};

    use super::*;

    /// Who is not there.
    fn agent() -> Agent {
        Agent::new(tokio::net::UnixStream::pair().unwrap().0, Pace::default())
    }

    fn share() -> Share {
        let root = open("/tmp", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        Share { source: "/tmp".into(), root, access: Access::Write, owners: None, mount: 2 }
    }

    /// The error of a container with a share, where the server's program is this.
    async fn refused(exe: PathBuf) -> (Shares, String) {
        let (start, _vms_end) = Start::new(exe, "test".into(), 0, Pace::default()).unwrap();
        let mut shares = Shares::new(Some(start));
        let batch = shares.lender().number(vec![share()]).unwrap();
        assert_eq!(batch.by_mount(), [(2, 0)].into());
        shares.belong(&"c".parse().unwrap(), &batch);
        let error = batch.add(&agent()).await.unwrap_err();
        shares.forget(&"c".parse().unwrap());
        (shares, crate::error::chain_text(&error))
    }

    #[tokio::test]
    async fn a_server_that_cannot_be_started_is_named_and_may_be_tried_again() {
        let (shares, error) = refused("/nonexistent/ampoule-fsd".into()).await;
        assert!(error.contains("/nonexistent/ampoule-fsd"), "{error}");
        assert_eq!(*shares.lender().pid().borrow(), None);
        let again = shares.lender().number(vec![share()]).unwrap();
        assert_eq!(again.by_mount(), [(2, 1)].into(), "a number has been nothing else before");
        assert!(matches!(again.add(&agent()).await, Err(SharesError::Fsd(_))));
    }

    #[tokio::test]
    async fn a_server_that_ends_at_once_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let exe = folder.path().join("fsd");
        fs::write(&exe, "#!/bin/sh\nexit 3\n").unwrap();
        fs::set_permissions(&exe, fs::Permissions::from_mode(0o755)).unwrap();
        let (_, error) = refused(exe).await;
        assert!(error.starts_with("/tmp: "), "{error}");
    }

    #[tokio::test]
    async fn without_a_device_there_are_no_shares() {
        let shares = Shares::new(None);
        assert!(matches!(shares.lender().number(vec![share()]), Err(SharesError::None)));
        shares.lender().number(Vec::new()).unwrap().add(&agent()).await.unwrap();
    }
}
