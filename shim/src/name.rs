//! Names of running sandboxes, each held by one: a locked file in the state folder.
//!
//! The lock, not the file, is what holds a name: it goes with the process, however that ends. A file left by a
//! process that was killed is removed by the next one that takes any name.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use crate::id::Id;

#[derive(Debug, thiserror::Error)]
pub enum NameError {
    #[error("sandbox {0}: the name is in use: choose another --name")]
    InUse(Id),
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// A name, held until dropped.
#[derive(Debug)]
pub struct HeldName {
    path: PathBuf,
    _lock: File,
}

impl HeldName {
    /// Takes `name` among the sandboxes of the state folder.
    pub fn take(state: &Path, name: &Id) -> Result<Self, NameError> {
        let folder = state.join("names");
        let path = folder.join(format!("{name}.lock"));
        let failed = |source| NameError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(failed)?;
        sweep(&folder);
        loop {
            let mut options = OpenOptions::new();
            let file =
                options.create(true).truncate(false).write(true).open(&path).map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Its former holder may have removed the file between our opening and locking it.
                Ok(()) if is_at(&file, &path) => return Ok(Self { path, _lock: file }),
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(NameError::InUse(name.clone())),
                Err(e) => return Err(failed(e.into())),
            }
        }
    }
}

impl Drop for HeldName {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the files nobody holds any more.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(file) = OpenOptions::new().write(true).open(&path) else { continue };
        let free = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if free && is_at(&file, &path) {
            let _ = fs::remove_file(&path);
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_held_once_and_free_after() {
        let state = tempfile::tempdir().unwrap();
        let name: Id = "web".parse().unwrap();
        let held = HeldName::take(state.path(), &name).unwrap();
        let again = HeldName::take(state.path(), &name);
        assert!(matches!(again, Err(NameError::InUse(_))));
        drop(held);
        assert!(!state.path().join("names/web.lock").exists());
        HeldName::take(state.path(), &name).unwrap();
    }

    #[test]
    fn what_a_killed_one_left_is_swept() {
        let state = tempfile::tempdir().unwrap();
        let stale = state.path().join("names/stale.lock");
        fs::create_dir(state.path().join("names")).unwrap();
        fs::write(&stale, "").unwrap();
        let _held = HeldName::take(state.path(), &"web".parse().unwrap()).unwrap();
        assert!(!stale.exists());
    }
}
