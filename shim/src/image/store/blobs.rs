//! Blobs as registries gave them: each whole, verified and named by its digest, or partial and kept to be
//! gone on with. Whoever writes one holds its lock.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Instant, SystemTime};

use super::{PATIENCE, Store};
use crate::image::ImageError;
use crate::image::digest::{Digest, Hashing};
use crate::image::lock::{Lock, POLL};
use crate::image::oci::Blob;

/// A blob on its way into the store.
pub(super) struct Partial {
    blob: Blob,
    path: PathBuf,
    place: PathBuf,
    file: File,
    /// Bytes that are there.
    pub at: u64,
    _lock: Lock,
}

impl Store {
    /// Whether a blob is there; if so, it counts as used now.
    pub(super) fn has_blob(&self, Blob { digest, size }: Blob) -> bool {
        let file = File::open(self.blob_path(digest));
        let whole = |file: &File| file.metadata().is_ok_and(|meta| meta.len() == size);
        file.is_ok_and(|file| {
            // Only its age depends on this.
            let _ = file.set_modified(SystemTime::now());
            whole(&file)
        })
    }

    /// Puts a blob into the store that is at hand whole and verified.
    pub(super) fn save_blob(&self, digest: Digest, bytes: &[u8]) -> Result<(), ImageError> {
        let key = digest.hex();
        let _lock = self.lock(&key, &digest.to_string())?;
        self.publish(&format!("{key}.blob"), &self.blob_path(digest), |mut file, path| {
            let written = file.write_all(bytes);
            written.map_err(|source| ImageError::Store { path: path.into(), source })
        })
    }

    /// Where to write a blob, with what earlier attempts left; `None` if another process has put it there.
    pub(super) async fn begin_blob(&self, blob: Blob) -> Result<Option<Partial>, ImageError> {
        let key = blob.digest.hex();
        let lock = self.hold(&key, &blob.digest.to_string()).await?;
        if self.has_blob(blob) {
            return Ok(None);
        }
        let path = self.root.join("partial").join(&key);
        let failed = |source| ImageError::Store { path: path.clone(), source };
        let file = File::options().read(true).append(true).create(true).open(&path);
        let file = file.map_err(failed)?;
        let at = file.metadata().map_err(failed)?.len();
        let place = self.blob_path(blob.digest);
        Ok(Some(Partial { blob, path, place, file, at, _lock: lock }))
    }

    /// As [`Store::lock`], letting other tasks go on.
    async fn hold(&self, key: &str, what: &str) -> Result<Lock, ImageError> {
        let path = self.root.join("locks").join(key);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let taken = Lock::try_take(&path);
            match taken.map_err(|source| ImageError::Store { path: path.clone(), source })? {
                Some(lock) => return Ok(lock),
                None => tokio::time::sleep(POLL).await,
            }
        }
        Err(ImageError::Busy { what: what.into(), minutes: PATIENCE.as_secs() / 60 })
    }

    pub(super) fn blob_path(&self, digest: Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }
}

impl Partial {
    /// Adds bytes; never more than the blob has.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let end = self.at + bytes.len() as u64;
        if end > self.blob.size {
            let Blob { digest, size: expected } = self.blob;
            self.forget();
            return Err(ImageError::BlobSize { digest, expected, actual: end });
        }
        self.file.write_all(bytes).map_err(|source| self.failed(source))?;
        self.at = end;
        Ok(())
    }

    /// Throws away what is there.
    pub fn restart(&mut self) -> Result<(), ImageError> {
        self.file.set_len(0).map_err(|source| self.failed(source))?;
        self.at = 0;
        Ok(())
    }

    pub fn is_complete(&self) -> bool {
        self.at >= self.blob.size
    }

    /// Verifies the blob, brings it to disk and gives it its name.
    pub fn finish(self) -> Result<(), ImageError> {
        let whole = File::open(&self.path).and_then(|file| Hashing::new(file).finish());
        let (actual, bytes) = whole.map_err(|source| self.failed(source))?;
        let Blob { digest, size: expected } = self.blob;
        if bytes != expected {
            self.forget();
            return Err(ImageError::BlobSize { digest, expected, actual: bytes });
        }
        if actual != digest {
            self.forget();
            return Err(ImageError::BlobDigest { digest, actual });
        }
        let placed = self.file.sync_all().and_then(|()| fs::rename(&self.path, &self.place));
        placed.map_err(|source| self.failed(source))
    }

    /// Nobody shall go on with this.
    fn forget(&self) {
        // What stays is found out again by the next who takes it up.
        let _ = fs::remove_file(&self.path);
    }

    fn failed(&self, source: io::Error) -> ImageError {
        ImageError::Store { path: self.path.clone(), source }
    }
}
