//! The process: it answers the shim's requests until their socket ends, and the guest's in threads.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Barrier},
    thread,
};

use ampoule_fsd_api::{
    message::{Access, Kind, Reply, Request},
    mount,
};
use ampoule_vmm_api::{
    Channel, ChannelError,
    confine::ConfineError,
    seccomp::{Filter, SeccompError},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{AtFlags, Mode, OFlags, StatxFlags, fcntl_setfl, open, readlink, statx},
    io::Errno,
    path::DecInt,
};

use crate::{
    caller::Privileges,
    confine::{self, Apart},
    seccomp,
    server::Server,
    watch::{self, Watch},
    worker,
};

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error("waiting for a request")]
    Wait(#[from] Errno),
    #[error("a request of the shim's")]
    Channel(#[from] ChannelError),
    #[error("starting to answer the guest")]
    Serve(#[from] ServeError),
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the request has no socket")]
    NoSocket,
    #[error("it is served already")]
    Again,
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error("system call filters")]
    Seccomp(#[from] SeccompError),
    #[error("the socket")]
    Socket(#[source] Errno),
    #[error("a thread")]
    Thread(#[source] std::io::Error),
}

/// Returns when the shim has closed `control`.
pub fn run(control: &Channel) -> Result<(), RunError> {
    let apart = confine::apart()?;
    let limits = apart.limits;
    let server = Server::new(Privileges::kept()?, limits.nodes, limits.handles);
    let mut fsd = Fsd { server: Arc::new(server), apart: Some(apart) };
    loop {
        let (request, fds) = match receive(control) {
            Err(RunError::Channel(ChannelError::Closed)) => return Ok(()),
            received => received?,
        };
        let serving = matches!(request, Request::Serve);
        let reply = fsd.perform(request, fds.into_iter().next());
        control.send(&reply, &[])?;
        // Half confined is neither.
        if serving && reply.is_err() {
            return Ok(());
        }
    }
}

fn receive(control: &Channel) -> Result<(Request, Vec<OwnedFd>), RunError> {
    loop {
        match control.recv() {
            Err(e) if e.would_block() => {
                let mut fds = [PollFd::new(control, PollFlags::IN)];
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            received => return Ok(received?),
        }
    }
}

struct Fsd {
    server: Arc<Server>,
    /// Until it is confined.
    apart: Option<Apart>,
}

impl Fsd {
    fn perform(&mut self, request: Request, fd: Option<OwnedFd>) -> Reply {
        match request {
            Request::Add { number, access, kind } => self.add(number, access, kind, fd),
            Request::Remove { number } => self
                .server
                .remove_share(number)
                .map_err(|e| format!("removing share {number}: {e}")),
            Request::Watch => self.watch(fd).map_err(|e| format!("watching: {e}")),
            Request::Serve => self.serve(fd).map_err(|e| chain(&e)),
        }
    }

    fn add(&self, number: u32, access: Access, kind: Kind, fd: Option<OwnedFd>) -> Reply {
        let failed = |e: std::io::Error| format!("adding share {number}: {e}");
        let root =
            fd.ok_or_else(|| format!("adding share {number}: no descriptor came with it"))?;
        let root = match kind {
            Kind::Mount => root,
            Kind::Path if self.apart.is_none() => {
                return Err(format!("adding share {number}: no mounts can be made any more"));
            }
            Kind::Path => detach(&root, access == Access::Read).map_err(failed)?,
        };
        let whiteouts = access == Access::WriteUpper;
        self.server.add_share(number, root, whiteouts).map_err(|e| failed(e.into()))
    }

    fn watch(&self, hints: Option<OwnedFd>) -> std::io::Result<()> {
        if self.apart.is_none() {
            return Err(std::io::Error::other("the guest is served already"));
        }
        let hints = hints.ok_or(Errno::BADF)?;
        self.server.tell(Channel::from_fd(hints))?;
        Ok(self.server.watch(Watch::new()?)?)
    }

    fn serve(&mut self, requests: Option<OwnedFd>) -> Result<(), ServeError> {
        let apart = self.apart.take().ok_or(ServeError::Again)?;
        let requests = Arc::new(requests.ok_or(ServeError::NoSocket)?);
        fcntl_setfl(&*requests, OFlags::empty()).map_err(ServeError::Socket)?;
        let links = Arc::new(apart.enter()?);
        let watches = self.server.watch.get().is_some();
        let threads = worker::COUNT + usize::from(watches);
        let started = Arc::new(Barrier::new(threads + 1));
        let filter = Arc::new(seccomp::worker(self.server.hints.get().is_some())?);
        for number in 0..worker::COUNT {
            let (server, requests) = (self.server.clone(), requests.clone());
            let answer = move || worker::serve(&server, &requests);
            start(format!("worker-{number}"), &links, &filter, &started, answer)?;
        }
        if watches {
            let server = self.server.clone();
            let filter = Arc::new(seccomp::watch()?);
            let tell = move || watch::tell(&server);
            start("watch".to_owned(), &links, &filter, &started, tell)?;
        }
        started.wait();
        seccomp::main()?.install()?;
        Ok(())
    }
}

/// A thread that does its work as a worker may, behind its filter, once all are there.
fn start(
    name: String,
    links: &Arc<OwnedFd>,
    filter: &Arc<Filter>,
    started: &Arc<Barrier>,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), ServeError> {
    let (links, filter, started) = (links.clone(), filter.clone(), started.clone());
    let run = move || {
        if worker::prepare(&*links).is_err() || filter.install().is_err() {
            // Without its filter no thread may go on, and the others would not know.
            std::process::abort();
        }
        drop((links, filter));
        started.wait();
        work();
    };
    let thread = thread::Builder::new().name(name).stack_size(worker::STACK);
    thread.spawn(run).map(drop).map_err(ServeError::Thread)
}

/// A detached mount of what `path` is of, which another mount namespace's descriptor leads to: looked up by its
/// name in this one, and then compared.
fn detach(path: &OwnedFd, read_only: bool) -> std::io::Result<OwnedFd> {
    let name = readlink(format!("/proc/self/fd/{}", DecInt::from_fd(path).as_str()), Vec::new())?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let here = open(name, flags, Mode::empty())?;
    if identity(path)? != identity(&here)? {
        return Err(std::io::Error::other("something else has its name"));
    }
    mount::detach(here.as_fd(), read_only, None)
}

fn identity(file: &OwnedFd) -> Result<(u32, u32, u64), Errno> {
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino))
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", chain(cause)),
        None => error.to_string(),
    }
}
