//! What a container has written, on the host: when it has ended, when it has been paused, and when somebody looks while it
//! runs, the guest writes it out to the upper directory of its root file system, where engines look for it.
//!
//! That directory is the guest's for as long, by the file server that serves shares. What is there after the end is all that
//! counts: the disk is removed that it was on. Where not all can be written out, the disk stays, and is the container's
//! again when it is started again.

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ampoule_agent_api::agent::{WriteOutRequest, WriteOutResponse};
use ampoule_fsd_api::Access;
use rustix::{
    fs::{CWD, Mode, OFlags, open},
    io,
    mount::{FsPickFlags, fsconfig_reconfigure, fspick},
};
use tokio::sync::Mutex;

use super::{
    gate::Gate,
    shares::{Lender, SharesError},
};
use crate::{
    agent::{Agent, AgentError, Code},
    error::chain_text,
    id::Id,
    share::Share,
    text::one_line,
};

/// More is not written out: who waits for the end of a container waits for it, too.
const MOST_FILES: u64 = 20_000;
const MOST_BYTES: u64 = 1 << 30;
/// How long it usually may take to see how much there is, and to write it out.
const LOOK: Duration = Duration::from_secs(10);
const WRITE_OUT: Duration = Duration::from_secs(30);

/// The upper directory of a container's root file system.
#[derive(Debug)]
pub struct HostUpper {
    path: PathBuf,
    root: OwnedFd,
    /// Where the host has mounted the overlay that it belongs to, if it has.
    mounted: Option<PathBuf>,
    /// It was not empty: what it had is the first lower file system.
    has_start: bool,
    /// The disk that the container writes to.
    disk: PathBuf,
    /// One at a time.
    turn: Mutex<()>,
}

/// One that is to be done, once or several times.
pub(super) struct WriteOut {
    pub upper: Arc<HostUpper>,
    pub container: Id,
    pub agent: Agent,
    pub lender: Lender,
    pub when: When,
}

/// What the container does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// If somebody looks.
    Running,
    Paused,
    Ended,
}

/// Why the host does not have what a container has written.
#[derive(Debug, thiserror::Error)]
enum WriteOutError {
    #[error("it is more than {MOST_FILES} files or {} MiB", MOST_BYTES >> 20)]
    TooMuch,
    #[error("{count} files, or attributes of them, cannot be made on the host, as {first}")]
    LeftOut { count: u64, first: String },
    #[error(transparent)]
    Shares(#[from] SharesError),
    #[error(transparent)]
    Agent(#[from] AgentError),
}

impl HostUpper {
    pub fn open(path: &Path, has_start: bool, disk: PathBuf) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty())?;
        let (path, mounted, turn) = (path.into(), None, Mutex::default());
        Ok(Self { path, root, mounted, has_start, disk, turn })
    }

    /// The host has its overlay mounted there.
    pub fn below(self, mounted: &Path) -> Self {
        Self { mounted: Some(mounted.into()), ..self }
    }

    /// To learn who looks at it while the container runs.
    pub(super) fn gate(&self) -> std::io::Result<Gate> {
        Gate::new(&self.root)
    }

    fn share(&self) -> std::io::Result<Share> {
        let (source, root) = (self.path.clone(), self.root.try_clone()?);
        Ok(Share { source, root, access: Access::WriteUpper, owners: None, mount: 0 })
    }

    /// An overlay that is mounted believes what it has looked up: it forgets that when it is mounted once more, as it is.
    async fn look_again(&self) {
        let Some(mounted) = self.mounted.clone() else { return };
        let again = move || {
            let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_NO_AUTOMOUNT;
            fsconfig_reconfigure(fspick(CWD, mounted, flags)?)
        };
        let again = tokio::task::spawn_blocking(again).await;
        // An ordinary user's may, where the mount is that user's.
        if let Ok(Err(error)) = again {
            tracing::debug!(%error, mounted = ?self.mounted, "an overlay is not up to date");
        }
    }

    fn remove_disk(&self) -> bool {
        let removed = fs::remove_file(&self.disk);
        if let Err(error) = &removed {
            tracing::warn!(%error, disk = ?self.disk, "a disk that is not needed any more stays");
        }
        removed.is_ok()
    }
}

impl WriteOut {
    /// Says whether the host has all that the container has written.
    pub async fn run(&self) -> bool {
        let _turn = self.upper.turn.lock().await;
        match self.try_run().await {
            Ok(()) => self.when != When::Ended || self.upper.remove_disk(),
            // Whoever waits for the container hears of that.
            Err(WriteOutError::Agent(AgentError::Disconnected { .. })) => false,
            // It has ended meanwhile.
            Err(WriteOutError::Agent(AgentError::Refused { code, .. }))
                if self.when == When::Running && code != Code::INTERNAL =>
            {
                false
            }
            Err(error @ WriteOutError::LeftOut { .. }) if self.when == When::Running => {
                let error = chain_text(&error);
                tracing::info!(container = %self.container, error, "who looks at its files does not see all of them");
                true
            }
            Err(error) => {
                let (error, disk) = (chain_text(&error), &self.upper.disk);
                tracing::warn!(container = %self.container, error, ?disk, "{}", self.when.loss());
                false
            }
        }
    }

    async fn try_run(&self) -> Result<(), WriteOutError> {
        let mut request = WriteOutRequest {
            container_id: self.container.to_string(),
            has_start: self.upper.has_start,
            most_files: MOST_FILES,
            most_bytes: MOST_BYTES,
            ..Default::default()
        };
        let WriteOutResponse { files, bytes, .. } = self.agent.write_out(&request, LOOK).await?;
        if files > MOST_FILES || bytes > MOST_BYTES {
            return Err(WriteOutError::TooMuch);
        }
        if files == 0 {
            return Ok(());
        }
        let share = self.upper.share().map_err(SharesError::Open)?;
        let share = self.lender.number(vec![share])?;
        request.share = share.first();
        let written = self.agent.write_out(&request, WRITE_OUT);
        let written = share.lend(&self.agent, written).await??;
        self.upper.look_again().await;
        match written.left_out {
            0 => Ok(()),
            count => {
                let first = one_line(&String::from_utf8_lossy(&written.first_left_out), 200);
                Err(WriteOutError::LeftOut { count, first })
            }
        }
    }
}

impl When {
    /// What it means that not all is on the host.
    fn loss(self) -> &'static str {
        match self {
            Self::Running => {
                "while it runs its directory on the host stays as it is now: pause it to see what it has written, or look with an exec"
            }
            Self::Paused => {
                "its directory on the host does not show all that it has written: look with an exec when it runs again"
            }
            Self::Ended => {
                "what it has written stays on its disk: to look at its files start it again, and use an exec"
            }
        }
    }
}
