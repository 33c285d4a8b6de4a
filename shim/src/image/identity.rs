//! What a committed layer's directory is known by, without a look at what is in it.
//!
//! Looking at every file of an image takes tens of milliseconds and more; this takes two system calls for each
//! layer. It rests on the promise of containerd and Docker that a committed layer never changes again; it says
//! which directory this is, and that it is still the one it was:
//!
//! - the file system (`f_fsid`) and the inode number say where it is,
//! - the time of its birth, in nanoseconds, tells it from any directory that had this number before: one that was
//!   removed and made anew is born later, whatever its number, its path and its content,
//! - the times of its last modification and change show that its own list of names and its attributes are as they
//!   were: more than the promise asks.
//!
//! A path is no part of it: file systems are mounted elsewhere after a reboot. Where the file system does not
//! tell the time of birth (FUSE, NFS), there is no identity, and all files have to be looked at.
//!
//! A directory on which an EROFS is mounted has the identity of that file system's image: it tells no time of birth, and
//! is mounted anew after each boot.
//!
//! So a change deep inside a committed layer goes unnoticed. Nothing but an administrator's own hand makes one, and
//! that breaks what containerd and Docker themselves believe about the layer.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, StatxTimestamp, statvfs, statx};
use rustix::io::Errno;

use super::digest::Digest;
use super::error::ImageError;
use crate::mountinfo::erofs_image;

/// `None` if this file system keeps too little to tell one directory from another.
pub fn identity(directory: &Path) -> Result<Option<Digest>, ImageError> {
    let failed = |e: Errno| ImageError::Source { path: directory.into(), source: e.into() };
    let image = erofs_image(directory)
        .map_err(|source| ImageError::Source { path: directory.into(), source })?;
    let directory = image.as_deref().unwrap_or(directory);
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = statx(CWD, directory, AtFlags::empty(), wanted).map_err(failed)?;
    let is_told = StatxFlags::from_bits_retain(stat.stx_mask).contains(wanted);
    // What a tool wrote into a disk image, and no kernel made, was born in 1970.
    if !is_told || stat.stx_btime.tv_sec == 0 {
        return Ok(None);
    }
    let system = statvfs(directory).map_err(failed)?.f_fsid;
    let time = |t: StatxTimestamp| [t.tv_sec as u64, t.tv_nsec.into()];
    let numbers = [
        &[system, stat.stx_ino][..],
        &time(stat.stx_btime),
        &time(stat.stx_mtime),
        &time(stat.stx_ctime),
    ];
    let bytes: Vec<u8> = numbers.concat().into_iter().flat_map(u64::to_le_bytes).collect();
    Ok(Some(Digest::of(&bytes)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_directory_made_anew_is_another_whatever_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fs");
        let make = || {
            fs::create_dir(&path).unwrap();
            fs::write(path.join("same"), "content").unwrap();
            identity(&path).unwrap()
        };
        let Some(first) = make() else {
            return eprintln!("SKIPPED: this file system does not tell when a file was made");
        };
        assert_eq!(identity(&path).unwrap(), Some(first));
        for _ in 0..50 {
            fs::remove_dir_all(&path).unwrap();
            // What lies between the two in truth is a conversion; a clock tick is 10 ms at most.
            std::thread::sleep(std::time::Duration::from_millis(11));
            assert_ne!(make(), Some(first));
        }
    }

    #[test]
    fn moved_it_is_the_same_and_changed_it_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        let first = identity(&a).unwrap();
        assert_ne!(first, identity(&b).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(11));
        fs::write(a.join("new"), "").unwrap();
        if first.is_some() {
            assert_ne!(identity(&a).unwrap(), first);
        }
        assert!(identity(&folder.path().join("none")).is_err());
        std::os::unix::fs::symlink("a", folder.path().join("short")).unwrap();
        assert_eq!(identity(&folder.path().join("short")).unwrap(), identity(&a).unwrap());
    }
}
