//! Locks between processes: `flock` on files that stay. A killed holder's lock goes with it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

const POLL: Duration = Duration::from_millis(20);

/// Held until dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock at once, or gives `None` if another holds it.
    pub fn try_take(path: &Path) -> io::Result<Option<Self>> {
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
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

#[cfg(test)]
mod tests {
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
    }
}
