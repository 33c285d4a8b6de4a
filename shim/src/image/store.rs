//! The image store: a directory that owns converted images and their names.
//!
//! ```text
//! ROOT/images/NAME.json     a name (`/` written as `%`), its digest, its config, its root file system
//! ROOT/rootfs/KEY.erofs     a root file system; KEY is a digest over all that determines its bytes
//! ROOT/snapshots/KEY.erofs  likewise, of containerd's snapshots
//! ROOT/blobs/sha256/HEX     what came from a registry: manifests, configs, layers, by their digests
//! ROOT/partial/HEX          the same on its way, gone on with by the next pull
//! ROOT/locks/KEY            there while someone makes KEY
//! ROOT/tmp/KEY.*            the work of who holds that lock; anyone may remove it who gets the lock
//! ```
//!
//! A file appears under `images`, `rootfs`, `snapshots` or `blobs` by a rename, complete and on disk, and is never written
//! again. Whoever dies leaves nothing but files in `tmp`, which the next [`Store::open`] removes. Only
//! this module writes here. All calls block: async callers use a blocking thread.
//!
//! - [`pull`], [`blobs`]: from a registry, by way of blobs that are verified and shared
//! - [`archive`]: what comes as one stream, by way of blobs too
//! - [`convert`]: a source becomes a root file system, once for each content
//! - [`snapshot`]: containerd's snapshots, converted once and kept as long as there is room
//! - [`record`]: what a name stands for
//! - [`prune`]: what goes, and when

mod archive;
mod blobs;
mod convert;
mod prune;
mod pull;
mod record;
mod snapshot;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::digest::Digest;
use super::error::ImageError;
use super::lock::Lock;
use super::reference::{Name, Reference};
use super::{Image, ImageConfig};

/// How long a conversion of the same image by another process is waited for.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// How long a root file system without a name is kept after its last use.
const KEEP: Duration = Duration::from_secs(24 * 60 * 60);

const PARTS: [&str; 7] =
    ["images", "rootfs", "snapshots", "blobs/sha256", "partial", "locks", "tmp"];

pub struct Store {
    root: PathBuf,
    progress: fn(&str),
    /// Bytes that converted snapshots may take.
    snapshots: u64,
}

/// A root file system of the store, and what is to be run on it.
struct Converted {
    digest: Digest,
    rootfs: Digest,
    config: ImageConfig,
}

impl Store {
    /// Opens the store at `root`, making it if it is not there, and clears what killed processes left.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let store = Self { root: root.into(), progress: |_| {}, snapshots: u64::MAX };
        for part in PARTS {
            let path = store.root.join(part);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|source| ImageError::Store { path, source })?;
        }
        store.files("tmp")?.iter().try_for_each(|path| store.remove_unlocked(path))?;
        Ok(store)
    }

    /// Has `line` called with what takes long enough to be told.
    pub fn with_progress(self, line: fn(&str)) -> Self {
        Self { progress: line, ..self }
    }

    /// Bounds the bytes that converted snapshots take; without this they are not bound.
    pub fn with_snapshots(self, bytes: u64) -> Self {
        Self { snapshots: bytes, ..self }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The image a reference means; files are converted the first time their content is seen.
    pub fn resolve(&self, reference: &Reference) -> Result<Image, ImageError> {
        match reference {
            Reference::Name(name) => self.load(name),
            source => Ok(self.image(source.to_string(), self.convert(source)?)),
        }
    }

    /// Resolves `source` and gives the image these names as well, taking them from whoever had them.
    pub fn import(&self, source: &Reference, names: &[Name]) -> Result<Image, ImageError> {
        let _arrival = self.arrival()?;
        let converted = self.convert(source)?;
        for name in names {
            self.save(name, &converted)?;
        }
        let reference = names.first().map_or_else(|| source.to_string(), Name::to_string);
        Ok(self.image(reference, converted))
    }

    /// All named images, sorted by name.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let records = self.records()?.into_iter();
        Ok(records.map(|record| self.image(record.name.to_string(), record.into())).collect())
    }

    fn image(&self, reference: String, Converted { digest, rootfs, config }: Converted) -> Image {
        Image { reference, digest: digest.to_string(), rootfs: self.rootfs_path(rootfs), config }
    }

    fn rootfs_path(&self, key: Digest) -> PathBuf {
        self.root.join("rootfs").join(format!("{}.erofs", key.hex()))
    }

    /// Waits for the lock of a key; `what` it stands for is for messages.
    fn lock(&self, key: &str, what: &str) -> Result<Lock, ImageError> {
        let path = self.root.join("locks").join(key);
        let waiting = || (self.progress)(&format!("waiting for another process to finish {what}"));
        Lock::take(&path, PATIENCE, waiting).map_err(|source| match source.kind() {
            io::ErrorKind::TimedOut => {
                ImageError::Busy { what: what.into(), minutes: PATIENCE.as_secs() / 60 }
            }
            _ => ImageError::Store { path, source },
        })
    }

    /// Writes a file in `tmp`, brings it to disk and moves it to its place; its key's lock is held.
    fn publish(
        &self,
        temporary: &str,
        place: &Path,
        write: impl FnOnce(&File, &Path) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let path = self.root.join("tmp").join(temporary);
        let failed = |source| ImageError::Store { path: path.clone(), source };
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(failed)?;
        let written = write(&file, &path)
            .and_then(|()| file.sync_all().and_then(|()| fs::rename(&path, place)).map_err(failed));
        if written.is_err() {
            // The first error is the one to tell; what stays is swept by the next to open the store.
            let _ = fs::remove_file(&path);
        }
        written
    }

    /// Removes a file if the lock of its key is free.
    fn remove_unlocked(&self, path: &Path) -> Result<(), ImageError> {
        let key = path.file_stem().unwrap_or_default();
        let remove = || match Lock::try_take(&self.root.join("locks").join(key))? {
            Some(_lock) => fs::remove_file(path),
            None => Ok(()),
        };
        match remove() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ImageError::Store { path: path.into(), source: error })
            }
            _ => Ok(()),
        }
    }

    fn files(&self, part: &str) -> Result<Vec<PathBuf>, ImageError> {
        let path = self.root.join(part);
        let entries = fs::read_dir(&path).and_then(|entries| {
            entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()
        });
        entries.map_err(|source| ImageError::Store { path, source })
    }
}

#[cfg(test)]
mod tests;
