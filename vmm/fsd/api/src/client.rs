//! Starting a file server, and asking it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use ampoule_vmm_api::{Channel, ChannelError, Owners, SpawnError, VmmProcess};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::geteuid,
};

use crate::{
    message::{Access, Kind, Reply, Request},
    mount,
};

/// Why the file server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum FsdError {
    #[error("starting the file server")]
    Spawn(#[from] SpawnError),
    #[error("making the file server's control socket")]
    Socket(#[source] io::Error),
    #[error("making share {number} a mount of its own")]
    Detach { number: u32, source: io::Error },
    #[error(
        "mapping the owners of its files (uidMappings, gidMappings), which takes root and a file system of the host that \
         Linux can map; leave the mapping out"
    )]
    Owners(#[source] io::Error),
    #[error("asking the file server")]
    Channel(#[from] ChannelError),
    #[error("waiting for the file server")]
    Wait(#[source] io::Error),
    #[error("the file server does not answer")]
    Silent,
    #[error("the file server: {0}")]
    Refused(String),
}

/// A running file server. Dropping it ends it.
#[derive(Debug)]
pub struct Fsd {
    // First: closing it ends the process without force.
    control: Channel,
    process: VmmProcess,
    patience: Duration,
}

impl Fsd {
    /// Starts `exe`; `name` is for process listings only. Root's file server keeps the host's users, of whom
    /// it acts as the guest's; an ordinary user's is root of a user namespace with that user only. It may take
    /// `patience` for each answer.
    pub fn spawn(exe: &Path, name: &str, patience: Duration) -> Result<Self, FsdError> {
        let (control, theirs) = Channel::pair().map_err(FsdError::Socket)?;
        let process = if geteuid().is_root() {
            VmmProcess::spawn_with_all_users(exe, name, theirs)?
        } else {
            VmmProcess::spawn(exe, name, theirs)?
        };
        Ok(Self { control, process, patience })
    }

    /// Shares what `root` is, a directory or a file of the caller's mount namespace, opened with O_PATH. Callers
    /// that may not mount must do so before [`Fsd::serve`].
    pub fn add(
        &self,
        number: u32,
        root: BorrowedFd<'_>,
        access: Access,
        owners: Option<&Owners>,
    ) -> Result<(), FsdError> {
        let add = |kind| Request::Add { number, access, kind };
        match mount::detach(root, access == Access::Read, owners) {
            Ok(mount) => self.ask(&add(Kind::Mount), Some(mount.as_fd())),
            Err(source) if owners.is_some() => Err(FsdError::Owners(source)),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                self.ask(&add(Kind::Path), Some(root))
            }
            Err(source) => Err(FsdError::Detach { number, source }),
        }
    }

    /// Takes a share away.
    pub fn remove(&self, number: u32) -> Result<(), FsdError> {
        self.ask(&Request::Remove { number }, None)
    }

    /// Has the host's changes told on `hints`, a socket of a [`Channel::pair`], as [`Hint`](crate::Hint)s; those that tell of
    /// something else even if it is refused. Before [`Fsd::serve`].
    pub fn watch(&self, hints: Channel) -> Result<(), FsdError> {
        let hints = hints.into_fd();
        self.ask(&Request::Watch, Some(hints.as_fd()))
    }

    /// Has FUSE requests on `requests` answered, a `SOCK_SEQPACKET` socket. Once.
    pub fn serve(&self, requests: OwnedFd) -> Result<(), FsdError> {
        self.ask(&Request::Serve, Some(requests.as_fd()))
    }

    /// To learn how it ended, and what it said.
    pub fn process(&mut self) -> &mut VmmProcess {
        &mut self.process
    }

    /// Blocks until it has answered: it does so at once, unless the host stands still.
    fn ask(&self, request: &Request, fd: Option<BorrowedFd<'_>>) -> Result<(), FsdError> {
        self.control.send(request, fd.as_slice())?;
        self.wait()?;
        let (reply, _) = self.control.recv::<Reply>()?;
        reply.map_err(FsdError::Refused)
    }

    fn wait(&self) -> Result<(), FsdError> {
        let patience = Timespec::try_from(self.patience);
        let patience = patience.map_err(|e| FsdError::Wait(io::Error::other(e)))?;
        loop {
            let mut fds = [PollFd::new(&self.control, PollFlags::IN)];
            match poll(&mut fds, Some(&patience)) {
                Ok(0) => return Err(FsdError::Silent),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(FsdError::Wait(e.into())),
            }
        }
    }
}
