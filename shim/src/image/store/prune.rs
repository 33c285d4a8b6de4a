//! What goes, and when: names on request, content when nobody needs it or when it does not fit.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{KEEP, Store};
use crate::image::lock::Lock;
use crate::image::{ImageError, Name};

/// The folders with content that can be had again.
const CONTENT: [&str; 3] = ["rootfs", "blobs/sha256", "partial"];
/// How the locks of images on their way begin.
const ARRIVAL: &str = "arrival.";

impl Store {
    /// Forgets a name. What no name needs any more goes when it has not been used for a day.
    pub fn remove(&self, name: &Name) -> Result<(), ImageError> {
        let path = self.record_path(name);
        match fs::remove_file(&path) {
            Ok(()) => self.prune(KEEP).map(drop),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(self.unknown(name)),
            Err(source) => Err(ImageError::Store { path, source }),
        }
    }

    /// While this is held an image is on its way to its name: what is used from now on stays until it has one.
    pub(super) fn arrival(&self) -> Result<Lock, ImageError> {
        let folder = self.root.join("locks");
        let mut paths = (0..u32::MAX).map(|n| folder.join(format!("{ARRIVAL}{n}")));
        let taken = paths.find_map(|path| Lock::try_take(&path).transpose());
        let taken = taken.unwrap_or(Err(io::ErrorKind::WouldBlock.into()));
        taken.map_err(|source| ImageError::Store { path: folder, source })
    }

    /// Since when images are on their way.
    fn arriving_since(&self) -> Result<Option<SystemTime>, ImageError> {
        let locks = self.files("locks")?.into_iter();
        let arrivals = locks.filter(|path| {
            path.file_name().is_some_and(|name| name.as_bytes().starts_with(ARRIVAL.as_bytes()))
        });
        // A killed process's lock can be taken, and goes when it is given back.
        let held = arrivals.filter(|path| matches!(Lock::try_take(path), Ok(None)));
        Ok(held.filter_map(|path| path.metadata().and_then(|meta| meta.modified()).ok()).min())
    }

    /// Removes downloads, and root file systems without a name, that nobody used for `unused`; tells how
    /// many bytes that were. Running sandboxes are not disturbed: they hold the file itself; nor are pulls and
    /// imports under way.
    pub fn prune(&self, unused: Duration) -> Result<u64, ImageError> {
        let records = self.records()?;
        let named: Vec<_> = records.iter().map(|record| self.rootfs_path(record.rootfs)).collect();
        let arriving = self.arriving_since()?;
        let mut freed = 0;
        for path in self.content()?.into_iter().filter(|path| !named.contains(path)) {
            let used = path.metadata().and_then(|meta| meta.modified()).ok();
            let used = used.filter(|used| arriving.is_none_or(|since| *used < since));
            let age = used.and_then(|used| SystemTime::now().duration_since(used).ok());
            if age.is_some_and(|age| age >= unused) {
                freed += self.discard(&path)?;
            }
        }
        Ok(freed)
    }

    /// Prunes, and if the store is still larger than `most` bytes, removes named images too: those used the
    /// longest time ago first.
    pub fn shrink(&self, most: u64) -> Result<u64, ImageError> {
        let mut freed = self.prune(Duration::ZERO)?;
        let mut left = self.content()?;
        left.sort_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok());
        let mut size: u64 = left.iter().map(|path| size_of(path)).sum();
        for path in left {
            if size <= most {
                break;
            }
            for record in self.records()?.iter().filter(|r| self.rootfs_path(r.rootfs) == path) {
                let name = self.record_path(&record.name);
                fs::remove_file(&name)
                    .map_err(|source| ImageError::Store { path: name.clone(), source })?;
            }
            let gone = self.discard(&path)?;
            (size, freed) = (size - gone.min(size), freed + gone);
        }
        Ok(freed)
    }

    /// Removes a file that nobody is making; tells the bytes this freed.
    fn discard(&self, path: &Path) -> Result<u64, ImageError> {
        let size = size_of(path);
        self.remove_unlocked(path)?;
        Ok(if path.exists() { 0 } else { size })
    }

    fn content(&self) -> Result<Vec<PathBuf>, ImageError> {
        let folders = CONTENT.into_iter().map(|folder| self.files(folder));
        Ok(folders.collect::<Result<Vec<_>, _>>()?.concat())
    }
}

/// What a file takes on the disk.
fn size_of(path: &Path) -> u64 {
    path.metadata().map_or(0, |meta| meta.blocks() * 512)
}
