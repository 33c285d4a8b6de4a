//! Names of running sandboxes, each held by one.
//!
//! A name is a lock on one byte, at an offset that is the name's hash, of one file in the state folder. The
//! kernel drops the lock with the process that holds it, however that ends: nothing is ever left to clean up.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::id::Id;

#[derive(Debug, thiserror::Error)]
pub enum NameError {
    #[error("sandbox {0}: the name is in use")]
    InUse(Id),
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// A name, held until dropped.
#[derive(Debug)]
pub struct HeldName(#[expect(dead_code, reason = "the lock goes with the open file")] File);

impl HeldName {
    /// Takes `name` among the sandboxes of the state folder.
    pub fn take(state: &Path, name: &Id) -> Result<Self, NameError> {
        let path = state.join("names");
        let failed = |source| NameError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(state).map_err(failed)?;
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match lock_byte(&file, libc::F_OFD_SETLK, offset(name)) {
            Ok(_) => Ok(Self(file)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Err(NameError::InUse(name.clone()))
            }
            Err(e) => Err(failed(e)),
        }
    }
}

/// Whether a process holds `name`: its sandbox lives.
pub fn is_held(state: &Path, name: &Id) -> Result<bool, NameError> {
    let path = state.join("names");
    let look = || -> io::Result<bool> {
        // Whoever may read it may ask: so in a file system that is read-only, too.
        let file = OpenOptions::new().read(true).open(&path)?;
        let found = lock_byte(&file, libc::F_OFD_GETLK, offset(name))?;
        Ok(found.l_type != libc::F_UNLCK as libc::c_short)
    };
    match look() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        held => held.map_err(|source| NameError::Io { path: path.clone(), source }),
    }
}

/// 63 bits of the name's SHA-256: two names of one host do not meet.
fn offset(name: &Id) -> i64 {
    let hash = Sha256::digest(name.as_str());
    hash.iter().take(8).fold(0, |sum: i64, byte| sum << 8 | i64::from(*byte)) & i64::MAX
}

/// A lock of the open file, not of the process, taken or asked for (fcntl(2), F_OFD_SETLK, F_OFD_GETLK).
fn lock_byte(file: &File, command: libc::c_int, offset: i64) -> io::Result<libc::flock> {
    // SAFETY: all zero is a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = offset;
    lock.l_len = 1;
    // SAFETY: the descriptor is open and the argument is what these commands take and fill in.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } {
        0 => Ok(lock),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_held_once_and_free_after() {
        let state = tempfile::tempdir().unwrap();
        let (web, other): (Id, Id) = ("web".parse().unwrap(), "web2".parse().unwrap());
        let held = HeldName::take(state.path(), &web).unwrap();
        let again = HeldName::take(state.path(), &web);
        assert!(matches!(again, Err(NameError::InUse(_))), "{again:?}");
        assert!(is_held(state.path(), &web).unwrap() && !is_held(state.path(), &other).unwrap());
        HeldName::take(state.path(), &other).unwrap();
        drop(held);
        assert!(!is_held(state.path(), &web).unwrap());
        HeldName::take(state.path(), &web).unwrap();
    }
}
