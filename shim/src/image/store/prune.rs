//! What goes, and when: names on request, content when nobody needs it or when it does not fit.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{KEEP, Store};
use crate::image::{ImageError, Name};

/// The folders with content that can be had again.
const CONTENT: [&str; 3] = ["rootfs", "blobs/sha256", "partial"];

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

    /// Removes downloads, and root file systems without a name, that nobody used for `unused`; tells how
    /// many bytes that were. Running sandboxes are not disturbed: they hold the file itself.
    pub fn prune(&self, unused: Duration) -> Result<u64, ImageError> {
        let records = self.records()?;
        let named: Vec<_> = records.iter().map(|record| self.rootfs_path(record.rootfs)).collect();
        let mut freed = 0;
        for path in self.content()?.into_iter().filter(|path| !named.contains(path)) {
            let used = path.metadata().and_then(|meta| meta.modified()).ok();
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
