//! One process of a container, from its runner's start to its exit.
//!
//!     prepare ──► parked ──start──► running ──exit──► ended
//!                    └────────────────exit──────────────┘
//!
//! A [`Process`] owns its pidfd, its runner's channel while parked, its terminal's master and its pumps.
//! Parked is who still has the channel; ended is who the reaper says has.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ampoule_agent_api::agent::{StartResponse, start_response::Failure};
use ampoule_vmm_api::{Channel, ChannelError};
use rustix::{
    process::Pid,
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    error::Error,
    pace,
    plan::{Fault, Order, Plan, Report, StepError, at},
    random::{self, Random},
    reaper::{Reaper, Status},
    spawn::{Launch, Namespaces, launch},
    stdio::{ChildEnds, Pumps, Streams, null},
};

/// How long a runner usually may take to prepare a process, and how long from the word to its exec.
const RUNNER: Duration = Duration::from_secs(60);
/// How long a killed process usually may take to end.
const KILLED: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    pub status: Status,
    /// How often the kernel has killed something of the container for lack of memory.
    pub oom_kills: u64,
    /// CLOCK_REALTIME, nanoseconds.
    pub at_ns: u64,
}

pub struct Process {
    pub pid: Pid,
    pidfd: OwnedFd,
    parked: Mutex<Option<Channel>>,
    master: Option<OwnedFd>,
    pumps: Pumps,
    exit: watch::Receiver<Option<Exit>>,
}

/// The end of a process that is still to come: its container turns the status into an [`Exit`].
pub struct Ending {
    pub status: oneshot::Receiver<Status>,
    pub exit: watch::Sender<Option<Exit>>,
}

/// What a process is made of.
pub struct Recipe<'a> {
    pub plan: &'a Plan,
    pub cgroup: BorrowedFd<'a>,
    pub namespaces: Namespaces<'a>,
    pub terminal: bool,
    pub streams: Streams,
    /// Where its random numbers come from, if that is not the kernel, and for a first process the file that takes
    /// the place of the kernel's devices.
    pub random: Option<Arc<Random>>,
    pub random_file: Option<OwnedFd>,
    /// Of a first process, those that are mapped.
    pub mounts: Vec<OwnedFd>,
}

impl Process {
    /// Starts a runner and waits until it is parked. If this fails, the runner is gone.
    pub async fn prepare(reaper: &Reaper, recipe: Recipe<'_>) -> Result<(Self, Ending), StepError> {
        let Recipe { plan, cgroup, namespaces, terminal, streams, random, random_file, mounts } =
            recipe;
        let (stdio, streams, pumps) = connect(terminal, streams).map_err(at("stdio", "pipes"))?;
        let file = random_file.as_ref().map(OwnedFd::as_fd);
        let launched = launch(Launch { plan, stdio, cgroup, namespaces, random: file })?;
        let status = reaper.expect(launched.pid);
        let prepared = async {
            if !mounts.is_empty() {
                let mounts: Vec<_> = mounts.iter().map(AsFd::as_fd).collect();
                match launched.channel.send(&Order::Mounts, &mounts) {
                    // It has said why it ended.
                    Ok(()) | Err(ChannelError::Closed) => {}
                    Err(e) => return Err(at("runner", "mounts")(io::Error::other(e))),
                }
            }
            let mut fds = prepared(&launched.channel).await?.into_iter();
            let master = if terminal { fds.next() } else { None };
            if let Some(random) = random {
                let missing = || at("seed", "listener")(io::Error::from(io::ErrorKind::NotFound));
                let listener = fds.next().ok_or_else(missing)?;
                random::calls::serve(listener, random).map_err(at("seed", "listener"))?;
            }
            match (streams, &master) {
                (Some(streams), Some(master)) => {
                    streams.through_terminal(master).map_err(at("stdio", "terminal"))
                }
                _ => Ok(pumps),
            }
            .map(|pumps| (master, pumps))
        };
        let (master, pumps) = match prepared.await {
            Ok(parts) => parts,
            Err(error) => {
                let _ = send_signal(&launched.pidfd, libc::SIGKILL);
                let _ = timeout(pace::limit(KILLED), status).await;
                return Err(error);
            }
        };
        let (sender, exit) = watch::channel(None);
        let process = Self {
            pid: launched.pid,
            pidfd: launched.pidfd,
            parked: Mutex::new(Some(launched.channel)),
            master,
            pumps,
            exit,
        };
        Ok((process, Ending { status, exit: sender }))
    }

    /// Lets the workload run.
    pub async fn start(&self) -> Result<StartResponse, Error> {
        let channel = self.lock_parked().take();
        let channel = channel.ok_or(Error::Started)?;
        match channel.send(&Order::Start, &[]) {
            Ok(()) => {}
            Err(ChannelError::Closed) => return Err(Error::Ended),
            Err(e) => return Err(at("start", "runner")(io::Error::other(e)).into()),
        }
        let failed = match timeout(pace::limit(RUNNER), receive(&channel)).await {
            // The exec closed it. (Or a signal did: that is an exit like any other.)
            Ok(Err(ChannelError::Closed)) => return Ok(StartResponse::default()),
            Ok(Ok((Report::Failed { fault, message }, _))) => StepError::relayed(fault, message),
            Ok(Ok((Report::Prepared | Report::Joined, _))) => {
                StepError::new(Fault::Internal, "start", "runner", "prepared twice")
            }
            Ok(Err(e)) => at("start", "runner")(io::Error::other(e)),
            Err(_) => at("start", "runner")(io::Error::from(io::ErrorKind::TimedOut)),
        };
        // Whoever hears of the failure can delete the process at once.
        self.kill().await?;
        let failure = match failed.fault {
            Fault::NotFound => Failure::NOT_FOUND,
            Fault::NotExecutable => Failure::NOT_EXECUTABLE,
            Fault::Spec | Fault::Internal => return Err(failed.into()),
        };
        let message = failed.to_string();
        Ok(StartResponse { failure: failure.into(), message, ..Default::default() })
    }

    pub fn is_parked(&self) -> bool {
        self.lock_parked().is_some()
    }

    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// The exit, now or later.
    pub async fn wait(&self) -> Result<Exit, Error> {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.ok_or(Error::Ended)
    }

    /// Any signal there is; 0 only asks whether the process is there.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        if self.has_ended() {
            return Err(Error::Ended);
        }
        match send_signal(&self.pidfd, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(Error::Ended),
            result => result.map_err(at("signal", signal)).map_err(Error::from),
        }
    }

    /// Kills it, if it has not ended yet, and waits for that.
    pub async fn kill(&self) -> Result<(), Error> {
        match self.signal(libc::SIGKILL) {
            Ok(()) | Err(Error::Ended) => {}
            Err(e) => return Err(e),
        }
        match timeout(pace::limit(KILLED), self.wait()).await {
            Ok(exit) => exit.map(drop),
            Err(_) => Err(at("kill", self.pid)(io::Error::from(io::ErrorKind::TimedOut)).into()),
        }
    }

    /// In characters. Without a terminal there is nothing to resize.
    pub fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        let master = self.master.as_ref().ok_or(Error::NoTerminal)?;
        let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(master, size).map_err(at("resize", "terminal"))?)
    }

    pub fn close_stdin(&self) {
        self.pumps.close_stdin();
    }

    /// A descriptor that names the process for as long as it lives.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    fn lock_parked(&self) -> std::sync::MutexGuard<'_, Option<Channel>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the runner gets as standard streams, the streams still to be joined to its terminal, and the
/// pumps there are.
fn connect(terminal: bool, streams: Streams) -> io::Result<(ChildEnds, Option<Streams>, Pumps)> {
    if terminal {
        return Ok(([null()?, null()?, null()?], Some(streams), Pumps::default()));
    }
    let (ends, pumps) = streams.through_pipes()?;
    Ok((ends, None, pumps))
}

/// Waits until the runner is parked; gives what came along.
pub async fn prepared(channel: &Channel) -> Result<Vec<OwnedFd>, StepError> {
    let broken = |e: ChannelError| at("runner", "channel")(io::Error::other(e));
    let answer = timeout(pace::limit(RUNNER), receive(channel)).await;
    match answer {
        Ok(Ok((Report::Prepared, fds))) => Ok(fds),
        Ok(Ok((Report::Failed { fault, message }, _))) => Err(StepError::relayed(fault, message)),
        Ok(Ok((Report::Joined, _))) => {
            Err(StepError::new(Fault::Internal, "runner", "process", "joined twice"))
        }
        Ok(Err(ChannelError::Closed)) => {
            let cause = "ended before it was prepared";
            Err(StepError::new(Fault::Internal, "runner", "process", cause))
        }
        Ok(Err(e)) => Err(broken(e)),
        Err(_) => Err(at("runner", "process")(io::Error::from(io::ErrorKind::TimedOut))),
    }
}

async fn receive(channel: &Channel) -> Result<(Report, Vec<OwnedFd>), ChannelError> {
    // SAFETY: the channel is borrowed for longer, and is not replaced.
    let readable = unsafe { AsyncFd::register_with_interest(channel.as_fd(), Interest::READABLE) };
    let readable = readable.map_err(io::Error::from)?;
    loop {
        match channel.recv() {
            Err(e) if e.would_block() => readable.readable().await?.clear_ready(),
            result => return result,
        }
    }
}

pub fn send_signal(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: pidfd_send_signal(2) without a siginfo takes plain numbers.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, 0usize, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
