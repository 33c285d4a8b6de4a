//! What a container has written, on the host: when it has ended, and when it has been paused, the guest writes it out to the
//! upper directory of its root file system, where engines look for it.
//!
//! That directory is the guest's for as long, by the file server that serves shares. What is there after the end is all that
//! counts: the disk is removed that it was on. Where not all can be written out, the disk stays, and is the container's
//! again when it is started again.

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use ampoule_agent_api::agent::{WriteOutRequest, WriteOutResponse};
use ampoule_fsd_api::Access;
use rustix::{
    fs::{Mode, OFlags, open},
    io,
};
use tokio::sync::Mutex;

use super::shares::{Batch, SharesError};
use crate::{
    agent::{Agent, AgentError},
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
    /// It was not empty: what it had is the first lower file system.
    has_start: bool,
    /// The disk that the container writes to.
    disk: PathBuf,
    /// One at a time.
    turn: Mutex<()>,
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
        Ok(Self { path: path.into(), root, has_start, disk, turn: Mutex::default() })
    }

    pub(super) fn share(&self) -> std::io::Result<Share> {
        let (source, root) = (self.path.clone(), self.root.try_clone()?);
        Ok(Share { source, root, access: Access::WriteUpper, owners: None, mount: 0 })
    }

    /// Says whether the host has all that the container has written.
    pub(super) async fn write_out(
        &self,
        container: &Id,
        agent: &Agent,
        share: Result<Batch, SharesError>,
        has_ended: bool,
    ) -> bool {
        let _turn = self.turn.lock().await;
        match self.try_write_out(container, agent, share).await {
            Ok(()) => !has_ended || self.remove_disk(),
            // Whoever waits for the container hears of that.
            Err(WriteOutError::Agent(AgentError::Disconnected { .. })) => false,
            Err(error) => {
                let (error, disk) = (chain_text(&error), &self.disk);
                tracing::warn!(
                    %container, error, ?disk,
                    "what it has written stays on its disk: to look at its files, or to commit them, it takes an exec"
                );
                false
            }
        }
    }

    async fn try_write_out(
        &self,
        container: &Id,
        agent: &Agent,
        share: Result<Batch, SharesError>,
    ) -> Result<(), WriteOutError> {
        let mut request = WriteOutRequest {
            container_id: container.to_string(),
            has_start: self.has_start,
            most_files: MOST_FILES,
            most_bytes: MOST_BYTES,
            ..Default::default()
        };
        let WriteOutResponse { files, bytes, .. } = agent.write_out(&request, LOOK).await?;
        if files > MOST_FILES || bytes > MOST_BYTES {
            return Err(WriteOutError::TooMuch);
        }
        if files == 0 {
            return Ok(());
        }
        let share = share?;
        request.share = share.first();
        let written = share.lend(agent, agent.write_out(&request, WRITE_OUT)).await??;
        match written.left_out {
            0 => Ok(()),
            count => {
                let first = one_line(&String::from_utf8_lossy(&written.first_left_out), 200);
                Err(WriteOutError::LeftOut { count, first })
            }
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
