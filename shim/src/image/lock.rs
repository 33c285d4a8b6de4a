//! Locks between processes: `flock` on a file that exists while it is held. A killed holder's lock is
//! free at once; its file stays until the next holder is done.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

pub const POLL: Duration = Duration::from_millis(20);

/// Held until dropped.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the lock at once, or gives `None` if another holds it.
    pub fn try_take(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let file = File::options().write(true).create(true).truncate(false).open(path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Between open and flock the last holder may have removed the file.
                Ok(()) if !is_at(&file, path)? => {}
                Ok(()) => return Ok(Some(Self { path: path.into(), _file: file })),
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits up to `patience` for the lock, calling `waiting` once if it is not free; an error of kind
    /// `TimedOut` if it never came free.
    pub fn take(path: &Path, patience: Duration, waiting: impl FnOnce()) -> io::Result<Self> {
        if let Some(lock) = Self::try_take(path)? {
            return Ok(lock);
        }
        waiting();
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            sleep(POLL);
            if let Some(lock) = Self::try_take(path)? {
                return Ok(lock);
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The lock itself goes when the file is closed, right after; a file that stays does no harm.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether an open file is the one its path names.
pub fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((open.dev(), open.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn one_holder_at_a_time_and_no_endless_wait() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let held = Lock::try_take(&path).unwrap();
        assert!(held.is_some());
        assert!(Lock::try_take(&path).unwrap().is_none());
        let mut waited = false;
        let error = Lock::take(&path, Duration::from_millis(50), || waited = true).unwrap_err();
        assert_eq!((error.kind(), waited), (io::ErrorKind::TimedOut, true));
        drop(held);
        Lock::take(&path, Duration::ZERO, || unreachable!()).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn removing_the_file_lets_no_second_holder_in() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let (holders, rounds) = (AtomicU32::new(0), AtomicU32::new(0));
        let contend = || {
            while rounds.load(Ordering::SeqCst) < 300 {
                if let Some(_lock) = Lock::try_take(&path).unwrap() {
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    holders.fetch_sub(1, Ordering::SeqCst);
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(contend))));
    }
}
