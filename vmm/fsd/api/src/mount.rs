//! A tree of the host as a detached mount: its root has no parent, so `..` ends there; whether it can be
//! written is the mount's property, so the kernel's; device nodes on it cannot be opened and symbolic links
//! are never followed, by anyone who comes through it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::mount::{OpenTreeFlags, open_tree};

use ampoule_vmm_api::{Owners, attributes::Attributes};

const ATTRIBUTES: u64 = libc::MOUNT_ATTR_NOSUID
    | libc::MOUNT_ATTR_NODEV
    | libc::MOUNT_ATTR_NOEXEC
    | libc::MOUNT_ATTR_NOSYMFOLLOW;

/// Clones the tree below `root`, which is of the caller's mount namespace, with what is mounted in it now.
/// Later mounts and unmounts on the host do not reach the clone.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN in the mount namespace's user namespace; with owners, those of [`Owners::apply`].
pub fn detach(
    root: BorrowedFd<'_>,
    read_only: bool,
    owners: Option<&Owners>,
) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(root, "", flags)?;
    let read_only = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    set_attributes(mount.as_fd(), ATTRIBUTES | read_only)?;
    owners.map_or(Ok(()), |owners| owners.apply(mount.as_fd()))?;
    Ok(mount)
}

/// On all mounts of the tree, which also leave their peer groups.
pub fn set_attributes(mount: BorrowedFd<'_>, set: u64) -> io::Result<()> {
    Attributes { set, propagation: libc::MS_PRIVATE, ..Default::default() }.apply(mount, true)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, chown},
    };

    use rustix::{
        fs::{AtFlags, CWD, Mode, OFlags, open, statat},
        process::geteuid,
    };

    use super::*;

    #[test]
    fn files_have_the_owners_that_the_mapping_says() {
        if !geteuid().is_root() {
            return eprintln!("skipped: takes root");
        }
        let folder = std::env::temp_dir().join(format!("owners-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let file = folder.join("file");
        fs::write(&file, "").unwrap();
        chown(&file, Some(7), Some(8)).unwrap();
        let root = open(&folder, OFlags::PATH, Mode::empty()).unwrap();
        let map = "0 100000 10\n";
        let mapped = Owners::new(map, map, true)
            .and_then(|owners| detach(root.as_fd(), false, Some(&owners)));
        let found = mapped.as_ref().map(|mount| statat(mount, "file", AtFlags::empty()).unwrap());
        let plain = statat(CWD, &file, AtFlags::empty()).unwrap();
        let own = fs::metadata(&file).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        match found {
            Ok(found) => assert_eq!((found.st_uid, found.st_gid), (100_007, 100_008)),
            Err(e) => eprintln!("skipped: {e}"),
        }
        assert_eq!((plain.st_uid, own.gid()), (7, 8));
        assert!(Owners::new("0 1 0\n", map, false).is_err());
    }
}
