//! The containers of one root, on disk. Each has a folder, made by its keeper and removed by `delete`:
//!
//! ```text
//! ROOT/ID/state.json    the record
//!         lock          held by the keeper as long as it lives
//!         control.sock  where the keeper takes requests (see `control`)
//!         keeper.log    what the keeper logs
//! ```
//!
//! ```text
//!   claim()              created()
//!  ──────────▶ creating ──────────▶ created, running, paused: the keeper says which
//!                  └── the keeper is gone: there is nothing     └── the keeper is gone: stopped
//! ```

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{OciError, Result, cgroup};
use crate::{id::Id, timestamp::Timestamp};

const RECORD: &str = "state.json";
const LOCK: &str = "lock";
/// More than this is no record: its annotations come from a spec.
const MAX_LEN: u64 = 16 << 20;

/// What is known of a container as long as it is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub oci_version: String,
    pub id: String,
    /// Of the keeper.
    pub pid: u32,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub created: Timestamp,
    /// Whoever made it.
    pub owner: u32,
    pub annotations: HashMap<String, String>,
    /// Of the host, that the keeper is in.
    pub cgroup: Option<PathBuf>,
    /// The container whose VM it is in, if it is not its own.
    #[serde(default)]
    pub sandbox: Option<String>,
    /// See [`crate::config::SandboxSettings::boot_timeout`].
    #[serde(default)]
    pub boot_timeout: u16,
    /// `create` has come to its end.
    pub complete: bool,
}

/// The folder of all containers.
#[derive(Clone, Debug)]
pub struct Containers(PathBuf);

/// A container that is there.
#[derive(Clone, Debug)]
pub struct Found {
    pub id: Id,
    pub folder: PathBuf,
    pub record: Record,
    /// Whether its keeper lives.
    pub kept: bool,
}

impl Containers {
    pub fn new(root: &Path) -> Self {
        // Absolute, since a keeper changes its working directory.
        Self(std::path::absolute(root).unwrap_or_else(|_| root.into()))
    }

    /// Makes the folder of a container that is to be; it is there whole or not at all.
    pub fn claim(&self, record: Record) -> Result<Claim> {
        let id = parse(&record.id)?;
        let folder = self.0.join(id.as_str());
        // No id begins with a dot.
        let aside = self.0.join(format!(".{id}.{}", std::process::id()));
        let failed = |source| OciError::File { what: "state folder", path: aside.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&aside).map_err(failed)?;
        let mut claim = Claim { folder: aside.clone(), record, keep: false, _lock: None };
        claim._lock = Some(lock(&aside).map_err(failed)?);
        claim.write()?;
        // A folder that is not empty is not replaced.
        if fs::rename(&aside, &folder).is_err() {
            self.forget_unfinished(&id)?;
            fs::rename(&aside, &folder).map_err(|e| match e.kind() {
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                    OciError::Exists(id.to_string())
                }
                _ => failed(e),
            })?;
        }
        claim.folder = folder;
        Ok(claim)
    }

    /// What a killed `create` has left.
    fn forget_unfinished(&self, id: &Id) -> Result<()> {
        match self.look(id)? {
            Some(found) if !found.kept && !found.record.complete => self.remove(id),
            _ => Ok(()),
        }
    }

    pub fn find(&self, text: &str) -> Result<Found> {
        let id = parse(text)?;
        let found = self.look(&id)?.filter(|found| found.kept || found.record.complete);
        found.ok_or_else(|| OciError::NotFound(text.into()))
    }

    pub fn list(&self) -> Result<Vec<Found>> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => {
                return Err(OciError::File { what: "state folder", path: self.0.clone(), source });
            }
        };
        let names = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        let mut all: Vec<Found> = names
            .filter_map(|id| self.look(&id).transpose())
            .filter(|found| found.as_ref().map_or(true, |f| f.kept || f.record.complete))
            .collect::<Result<_>>()?;
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(all)
    }

    pub fn remove(&self, id: &Id) -> Result<()> {
        let path = self.0.join(id.as_str());
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(OciError::File { what: "state folder", path, source: e })
            }
            _ => Ok(()),
        }
    }

    fn look(&self, id: &Id) -> Result<Option<Found>> {
        let folder = self.0.join(id.as_str());
        // The lock first: what ends after this look is at worst seen as it was before.
        let kept = is_locked(&folder);
        match read(&folder) {
            Ok(record) => Ok(Some(Found { id: id.clone(), folder, record, kept })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(OciError::File { what: "state", path: folder.join(RECORD), source }),
        }
    }
}

impl Found {
    /// Looks again whether the keeper lives.
    pub fn is_kept(&self) -> bool {
        is_locked(&self.folder)
    }
}

fn parse(text: &str) -> Result<Id> {
    text.parse().map_err(|source| OciError::Id { id: text.into(), source })
}

fn read(folder: &Path) -> io::Result<Record> {
    let path = folder.join(RECORD);
    if fs::metadata(&path)?.len() > MAX_LEN {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// Held while the file is open, which no program that is executed inherits.
fn lock(folder: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.create(true).truncate(false).write(true).mode(0o600);
    let file = file.open(folder.join(LOCK))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

fn is_locked(folder: &Path) -> bool {
    let Ok(file) = File::open(folder.join(LOCK)) else { return false };
    flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
}

/// A container's folder while its keeper lives. Dropping it removes the folder, unless it was to be kept.
#[derive(Debug)]
pub struct Claim {
    folder: PathBuf,
    record: Record,
    keep: bool,
    _lock: Option<File>,
}

impl Claim {
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The keeper is in this cgroup.
    pub fn cgroup(&mut self, folder: Option<PathBuf>) {
        self.record.cgroup = folder;
    }

    /// The container is there, and its record stays until it is deleted.
    pub fn created(&mut self) -> Result<()> {
        self.record.complete = true;
        self.write()?;
        self.keep = true;
        Ok(())
    }

    /// It goes with us.
    pub fn forget(&mut self) {
        self.keep = false;
    }

    fn write(&self) -> Result<()> {
        let path = self.folder.join(RECORD);
        let failed = |source| OciError::File { what: "state", path: path.clone(), source };
        let new = path.with_extension("new");
        let text = serde_json::to_vec(&self.record).map_err(|e| failed(e.into()))?;
        fs::write(&new, text).and_then(|()| fs::rename(&new, &path)).map_err(failed)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.folder);
            // Who would remove it finds no record of it any more.
            self.record.cgroup.as_deref().map(cgroup::leave);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        Record {
            oci_version: "1.0.2".into(),
            id: id.into(),
            pid: 1,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: Timestamp::now(),
            owner: 0,
            annotations: HashMap::new(),
            cgroup: None,
            sandbox: None,
            boot_timeout: 30,
            complete: false,
        }
    }

    fn containers() -> (tempfile::TempDir, Containers) {
        let folder = tempfile::tempdir().unwrap();
        let containers = Containers::new(&folder.path().join("root"));
        (folder, containers)
    }

    #[test]
    fn a_container_is_there_from_its_claim_to_its_removal() {
        let (_folder, all) = containers();
        assert!(matches!(all.find("a"), Err(OciError::NotFound(_))));
        assert!(all.list().unwrap().is_empty());
        let mut claim = all.claim(record("a")).unwrap();
        assert!(all.find("a").unwrap().kept);
        assert!(matches!(all.claim(record("a")), Err(OciError::Exists(_))));
        claim.created().unwrap();
        drop(claim);
        let found = all.find("a").unwrap();
        assert!(!found.kept && found.record.complete);
        assert!(matches!(all.claim(record("a")), Err(OciError::Exists(_))));
        assert_eq!(all.list().unwrap().len(), 1);
        all.remove(&found.id).unwrap();
        assert!(matches!(all.find("a"), Err(OciError::NotFound(_))));
    }

    #[test]
    fn what_was_not_finished_leaves_nothing_and_is_in_nobodys_way() {
        let (_folder, all) = containers();
        drop(all.claim(record("a")).unwrap());
        assert_eq!(fs::read_dir(&all.0).unwrap().count(), 0);
        // As a keeper that was killed leaves it.
        let mut claim = all.claim(record("a")).unwrap();
        (claim.keep, claim._lock) = (true, None);
        drop(claim);
        assert!(matches!(all.find("a"), Err(OciError::NotFound(_))));
        assert!(all.list().unwrap().is_empty());
        all.claim(record("a")).unwrap();
    }

    #[test]
    fn an_id_is_no_path() {
        let (_folder, all) = containers();
        for id in ["../a", "", ".a", "a/b"] {
            assert!(matches!(all.find(id), Err(OciError::Id { .. })), "{id}");
            assert!(matches!(all.claim(record(id)), Err(OciError::Id { .. })), "{id}");
        }
    }
}
