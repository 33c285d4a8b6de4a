//! The sandboxes of a user, on disk. Each has a folder in the state folder, written only by the process that
//! runs it and removed by that process or, after its end, by `ampoule rm`:
//!
//! ```text
//! STATE/names                      locks: a name that is held is a sandbox that lives (see `name`)
//! STATE/sandboxes/NAME/state.json  the record
//!                      control.sock  where it takes requests (see `control`)
//!                      log, log.1  what a detached container wrote (see `log`)
//! ```
//!
//! ```text
//!    claim()            started                ended, of `run -d`
//!  ──────────▶ created ────────▶ running ─────────────────────────▶ exited ── rm ──▶ (gone)
//!                 └─────────────────┴── killed -9: the lock is free ─▶ dead ── rm, or the next of the name
//!                 └─────────────────┴── ended, in the foreground or with --rm ──▶ (gone)
//! ```
//!
//! A dead one that was to leave nothing goes with the next list (`ampoule ps`).

mod record;

use std::{
    fmt, fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

pub use record::{Ended, Record};

use crate::{
    id::Id,
    name::{self, HeldName, NameError},
    timestamp::Timestamp,
};

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("sandbox {0}: the name is that of an ended sandbox")]
    Ended(Id),
    #[error("sandbox {0:?}: there is none")]
    NotFound(String),
    #[error("sandbox {0:?}: that begins the names {1}")]
    Ambiguous(String, String),
    #[error("state folder {}: belongs to user {owner}", path.display())]
    Foreign { path: PathBuf, owner: u32 },
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

type Result<T> = std::result::Result<T, RegistryError>;

/// The state folder.
#[derive(Clone, Debug)]
pub struct Registry(PathBuf);

/// What a sandbox is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Being made: its VM boots.
    Created,
    Running,
    /// Its record and log wait to be removed.
    Exited,
    /// The process that ran it was killed.
    Dead,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Dead => "dead",
        })
    }
}

/// A sandbox that was found.
#[derive(Clone, Debug)]
pub struct Found {
    pub name: Id,
    pub folder: PathBuf,
    pub record: Record,
    pub status: Status,
}

impl Found {
    pub fn is_alive(&self) -> bool {
        matches!(self.status, Status::Created | Status::Running)
    }
}

impl Registry {
    pub fn new(state: &Path) -> Self {
        // Absolute, since who keeps a sandbox in the background changes its working directory.
        Self(std::path::absolute(state).unwrap_or_else(|_| state.into()))
    }

    /// The folder of all sandboxes. In a state folder of somebody else, nothing is what it seems; root looks at
    /// others' on purpose only.
    fn sandboxes(&self) -> Result<PathBuf> {
        let us = rustix::process::geteuid().as_raw();
        match fs::metadata(&self.0).map(|meta| meta.uid()) {
            Ok(owner) if us != 0 && owner != us => {
                Err(RegistryError::Foreign { path: self.0.clone(), owner })
            }
            _ => Ok(self.0.join("sandboxes")),
        }
    }

    /// Takes a name and makes its folder, in place of one whose sandbox was killed.
    pub fn claim(&self, name: &Id, record: Record) -> Result<Claim> {
        let held = HeldName::take(&self.0, name)?;
        let sandboxes = self.sandboxes()?;
        let folder = sandboxes.join(name.as_str());
        if Record::read(&folder).is_ok_and(|record| record.ended.is_some()) {
            return Err(RegistryError::Ended(name.clone()));
        }
        // Whole from the first moment on it is seen: made aside, then renamed. No name begins with a dot.
        let new = sandboxes.join(format!(".{name}"));
        let failed = |source| RegistryError::Io { path: folder.clone(), source };
        remove(&folder)?;
        remove(&new)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&new).map_err(failed)?;
        let placed = record.write(&new).and_then(|()| fs::rename(&new, &folder));
        placed.map_err(|source| {
            // The first error is the one to tell.
            let _ = remove(&new);
            failed(source)
        })?;
        Ok(Claim { folder, record, _held: held })
    }

    /// All of them, the newest first. Dead ones that were to leave nothing are cleared away.
    pub fn list(&self) -> Result<Vec<Found>> {
        let path = self.sandboxes()?;
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(RegistryError::Io { path, source }),
        };
        let names = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        let all = names.filter_map(|name| self.look(name).transpose());
        let mut all = all.collect::<Result<Vec<Found>>>()?;
        all.retain(|found| {
            let forgotten = found.status == Status::Dead && found.record.remove;
            !(forgotten && self.remove(&found.name).is_ok())
        });
        all.sort_by_key(|found| std::cmp::Reverse(found.record.created));
        Ok(all)
    }

    /// The one of this name, or the only one whose name begins so.
    pub fn find(&self, text: &str) -> Result<Found> {
        if let Ok(name) = text.parse()
            && let Some(found) = self.look(name)?
        {
            return Ok(found);
        }
        let mut all = self.list()?;
        all.retain(|found| !text.is_empty() && found.name.as_str().starts_with(text));
        match &all[..] {
            [] => Err(RegistryError::NotFound(text.into())),
            [one] => Ok(one.clone()),
            several => {
                let names: Vec<&str> = several.iter().map(|f| f.name.as_str()).collect();
                Err(RegistryError::Ambiguous(text.into(), names.join(", ")))
            }
        }
    }

    /// Forgets one that has ended.
    pub fn remove(&self, name: &Id) -> Result<()> {
        let _held = HeldName::take(&self.0, name)?;
        remove(&self.sandboxes()?.join(name.as_str()))
    }

    /// Whether it still lives; of a sandbox found earlier.
    pub fn is_held(&self, name: &Id) -> Result<bool> {
        Ok(name::is_held(&self.0, name)?)
    }

    /// None if there is none, or its record is not ours.
    fn look(&self, name: Id) -> Result<Option<Found>> {
        let folder = self.sandboxes()?.join(name.as_str());
        // The lock first: what ends after this look is at worst seen as it was before.
        let held = self.is_held(&name)?;
        let record = match Record::read(&folder) {
            Ok(record) => record,
            Err(e) if is_refusal(&e) => return Err(RegistryError::Io { path: folder, source: e }),
            Err(_) => return Ok(None),
        };
        let status = match (&record.ended, held, &record.started) {
            (Some(_), ..) => Status::Exited,
            (None, false, _) => Status::Dead,
            (None, true, None) => Status::Created,
            (None, true, Some(_)) => Status::Running,
        };
        Ok(Some(Found { name, folder, record, status }))
    }
}

/// Whether it was not for the file that it could not be read.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EIO))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(RegistryError::Io { path: folder.into(), source }),
        Ok(()) => Ok(()),
    }
}

/// A sandbox's name and folder while it runs. Dropping it frees the name, and removes the folder unless the
/// end was recorded in it.
#[derive(Debug)]
pub struct Claim {
    folder: PathBuf,
    record: Record,
    _held: HeldName,
}

impl Claim {
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Records that the workload runs.
    pub fn started(&mut self, at: Timestamp) -> Result<()> {
        self.record.started = Some(at);
        self.write()
    }

    /// Records the end, which then stays until it is removed.
    pub fn ended(mut self, ended: Ended) -> Result<()> {
        self.record.ended = Some(ended);
        self.write()
    }

    fn write(&self) -> Result<()> {
        let failed = |source| RegistryError::Io { path: self.folder.clone(), source };
        self.record.write(&self.folder).map_err(failed)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.record.ended.is_none() {
            // What cannot be removed now is found dead, and removed then.
            let _ = remove(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests;
