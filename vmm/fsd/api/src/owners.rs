//! Whose files are whose in a share (mount_setattr(2), "ID-mapped mounts"): the mapping is a user namespace that nobody is
//! in.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{Mode, OFlags, open},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, WaitOptions, waitpid},
};

use crate::mount;

/// A mapping for a mount.
#[derive(Debug)]
pub struct Owners {
    namespace: OwnedFd,
    /// Of what is mounted below, too.
    recursive: bool,
}

impl Owners {
    /// The maps have lines of a first id on disk, the first id it is shown as, and how many (user_namespaces(7)).
    ///
    /// # Errors
    /// EPERM for who is not root of the host, EINVAL for maps that the kernel does not take.
    pub fn new(users: &str, groups: &str, recursive: bool) -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
        // SAFETY: without CLONE_VM it is a fork; the child makes system calls on numbers and memory of its own only.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid == 0 {
            drop(write);
            // Until the parent closes its end.
            let _ = rustix::io::read(&read, &mut [0; 1]);
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(0) }
        }
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(io::Error::last_os_error)?;
        let namespace = mapped(pid, users, groups);
        drop(write);
        let _ = waitpid(Some(pid), WaitOptions::empty());
        Ok(Self { namespace: namespace?, recursive })
    }

    /// Maps a detached mount.
    ///
    /// # Errors
    /// EINVAL for a file system whose owners the kernel cannot map.
    pub fn apply(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        mount::map_owners(mount, self.namespace.as_fd(), self.recursive)
    }
}

fn mapped(pid: Pid, users: &str, groups: &str) -> io::Result<OwnedFd> {
    let folder = format!("/proc/{pid}");
    fs::write(format!("{folder}/uid_map"), users)?;
    fs::write(format!("{folder}/gid_map"), groups)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(open(format!("{folder}/ns/user"), flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use rustix::{
        fs::{AtFlags, CWD, statat},
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
            .and_then(|owners| mount::detach(root.as_fd(), false, Some(&owners)));
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
