//! Directories of containerd, Docker and their like as file systems.
//!
//! Committed layers are converted once and shared by all who start from them, in `snapshots`; the key is the
//! list of their [identities](crate::image::identity). Who uses a file holds a shared `flock` on it with the very
//! descriptor that goes to the VM, so that the lock ends with the VM whichever way that happens. When there are
//! more than the store may keep, those go that were used the longest time ago and are locked by nobody.
//!
//! A directory that a container may have written to is converted for each start, to a file without a name.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::Store;
use super::convert::key;
use crate::image::ImageError;
use crate::image::digest::Digest;
use crate::image::directory::Directory;
use crate::image::erofs;
use crate::image::identity::identity;
use crate::image::lock::is_at;
use crate::image::overlay::{self, Dialect, Marks};
use crate::image::spool::Spool;
use crate::image::tree::Tree;

/// Part of the key: raise it whenever the same layers would give another tree.
const VERSION: &[u8] = b"1";

/// Tells the conversions of this process that have no key.
static NEXT: AtomicU64 = AtomicU64::new(0);

impl Store {
    /// The file system that committed layers make together, top first; converted if it is not there.
    pub fn committed(&self, directories: &[PathBuf], dialect: Dialect) -> Result<File, ImageError> {
        let key = key_of(directories, dialect)?;
        let place = self.root.join("snapshots").join(format!("{}.erofs", key.hex()));
        if let Some(file) = hold(&place) {
            return Ok(file);
        }
        let source = describe(directories);
        let lock = self.lock(&key.hex(), &source)?;
        if let Some(file) = hold(&place) {
            return Ok(file);
        }
        let merge = |tree: &mut Tree, spool: &mut Spool| {
            for path in directories.iter().rev() {
                overlay::merge(path, Marks::Applied, dialect, tree, spool)?;
            }
            // What was removed and made anew meanwhile is no content of this key.
            if key_of(directories, dialect)? != key {
                return Err(ImageError::Changed { path: source.clone().into() });
            }
            Ok(())
        };
        let mut file = None;
        self.write(key, &place, &source, merge, |path| {
            // Before it can be found, and so removed, by others.
            file = Some(locked(path)?);
            Ok(())
        })?;
        drop(lock);
        self.shrink_snapshots(self.snapshots)?;
        file.ok_or(ImageError::Store { path: place, source: io::ErrorKind::NotFound.into() })
    }

    /// The file system of one directory as it is now.
    pub fn changing(
        &self,
        directory: &Path,
        marks: Marks,
        dialect: Dialect,
    ) -> Result<File, ImageError> {
        let turn = NEXT.fetch_add(1, Ordering::Relaxed);
        let own = [std::process::id().into(), turn].map(u64::to_le_bytes).concat();
        let key = key("changing", [&Digest::of(&own)]);
        let mut tree = Tree::new();
        let _lock = self.lock(&key.hex(), &directory.display().to_string())?;
        let mut spool = Spool::new(self.unnamed(key)?);
        overlay::merge(directory, marks, dialect, &mut tree, &mut spool)
            .map_err(|error| self.out_of_room(error))?;
        let out = self.unnamed(key)?;
        let id = key.as_bytes().first_chunk().copied().unwrap_or_default();
        let path = || directory.to_path_buf();
        let written = erofs::write(&tree, &spool, id, &out)
            .map_err(|source| ImageError::Write { path: path(), source });
        written.map_err(|error| self.out_of_room(error))?;
        read_only(&out).map_err(|source| ImageError::Source { path: path(), source })
    }

    /// Removes unused snapshots until all take at most so many bytes; tells how many bytes that freed.
    pub fn shrink_snapshots(&self, most: u64) -> Result<u64, ImageError> {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for path in self.files("snapshots")? {
            // Another may be removing it.
            let Ok(meta) = path.metadata() else { continue };
            files.push((
                meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                meta.blocks() * 512,
                path,
            ));
        }
        files.sort_unstable();
        let mut size: u64 = files.iter().map(|(_, size, _)| size).sum();
        let mut freed = 0;
        for (_, bytes, path) in files {
            if size <= most {
                break;
            }
            if remove_unused(&path).map_err(|source| ImageError::Store { path, source })? {
                (size, freed) = (size - bytes, freed + bytes);
            }
        }
        Ok(freed)
    }
}

/// All that a committed file system's bytes depend on.
fn key_of(layers: &[PathBuf], dialect: Dialect) -> Result<Digest, ImageError> {
    let mut parts = vec![Digest::of(VERSION), Digest::of(&[dialect as u8])];
    for layer in layers {
        parts.push(match identity(layer)? {
            Some(identity) => identity,
            None => Directory::open(layer)?.digest,
        });
    }
    Ok(key("committed", &parts))
}

/// Opens a whole file and locks it against removal; it counts as used now.
fn hold(path: &Path) -> Option<File> {
    let file = locked(path).ok()?;
    // Between open and flock it may have been removed.
    if !is_at(&file, path).ok()? || erofs::check(&file).is_err() {
        return None;
    }
    // Only its age depends on this.
    let _ = file.set_modified(SystemTime::now());
    Some(file)
}

fn locked(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    flock(&file, FlockOperation::NonBlockingLockShared)?;
    Ok(file)
}

/// Removes a file unless somebody uses it.
fn remove_unused(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        file => file?,
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
        Ok(()) => fs::remove_file(path).map(|()| true),
    }
}

/// A second descriptor of a file without a name, for reading alone.
fn read_only(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Layers in a message.
fn describe(layers: &[PathBuf]) -> String {
    let top = layers.first().map(|top| top.display().to_string()).unwrap_or_default();
    match layers.len() {
        0 | 1 => top,
        n => format!("{top} and {} layers below it", n - 1),
    }
}

#[cfg(test)]
mod tests;
