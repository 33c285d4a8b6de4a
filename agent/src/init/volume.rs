//! Volumes on the container's scratch disk: directories beside the overlay that its root is, where the kernel lets
//! further overlays keep what is written to them, as those of containers inside it. A volume begins with what the image
//! has in its place.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Gid, Mode, OFlags, Uid, fchmod, fchown, fstat, mkdirat, openat},
    io::Errno,
};

use super::copy_up::copy_up;
use crate::plan::{StepError, at, refuse};

/// The type of such mounts.
pub const TYPE: &str = "scratch";

/// The directory of the spec's `number`th mount, like and with what is in the one that it will hide. A disk that outlives
/// containers may have it already.
pub fn open(
    scratch: &Path,
    number: usize,
    hidden: &OwnedFd,
    destination: &str,
) -> Result<OwnedFd, StepError> {
    let disk = match open_directory(CWD, scratch) {
        Err(Errno::NOENT) => {
            let cause = "the root file system has none; use a tmpfs";
            return Err(refuse("mount", format_args!("scratch disk at {destination}"), cause));
        }
        disk => disk.map_err(at("mount", scratch.display()))?,
    };
    make(&disk, number, hidden)
        .map_err(at("mount", format_args!("{destination} on the scratch disk")))
}

fn make(disk: &OwnedFd, number: usize, hidden: &OwnedFd) -> std::io::Result<OwnedFd> {
    let (volumes, _) = make_directory(disk, "volumes")?;
    let (volume, is_new) = make_directory(&volumes, &number.to_string())?;
    if is_new {
        copy_up(hidden, &volume)?;
        let like = fstat(hidden)?;
        let owner = (Some(Uid::from_raw(like.st_uid)), Some(Gid::from_raw(like.st_gid)));
        fchown(&volume, owner.0, owner.1)?;
        fchmod(&volume, Mode::from_raw_mode(like.st_mode & 0o7777))?;
    }
    Ok(volume)
}

/// And whether it was not there. A symbolic link is none, whatever it leads to.
fn make_directory(parent: &OwnedFd, name: &str) -> rustix::io::Result<(OwnedFd, bool)> {
    let is_new = match mkdirat(parent, name, Mode::RWXU) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(e) => return Err(e),
    };
    Ok((open_directory(parent, name)?, is_new))
}

fn open_directory(parent: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    #[test]
    fn a_volume_begins_with_what_it_hides_and_is_kept() {
        let (disk, image) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(image.path().join("file"), "image").unwrap();
        fs::set_permissions(image.path(), PermissionsExt::from_mode(0o1777)).unwrap();
        let hidden = OwnedFd::from(File::open(image.path()).unwrap());
        let volume = disk.path().join("volumes/7");
        open(disk.path(), 7, &hidden, "/data").unwrap();
        assert_eq!(fs::read(volume.join("file")).unwrap(), b"image");
        assert_eq!(fs::metadata(&volume).unwrap().mode() & 0o7777, 0o1777);
        fs::write(volume.join("file"), "mine").unwrap();
        open(disk.path(), 7, &hidden, "/data").unwrap();
        assert_eq!(fs::read(volume.join("file")).unwrap(), b"mine");
        symlink("/etc", disk.path().join("volumes/8")).unwrap();
        let refused = open(disk.path(), 8, &hidden, "/data").unwrap_err().to_string();
        assert!(refused.contains("/data on the scratch disk"), "{refused}");
        let refused = open(&disk.path().join("none"), 0, &hidden, "/data").unwrap_err().to_string();
        assert!(refused.contains("use a tmpfs"), "{refused}");
    }
}
