//! A cgroup (v2) for one process, below our own, so that limits of ours are its limits.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::{Path, PathBuf},
};

use rustix::thread::gettid;

use crate::id::Id;

/// What the names begin with; the number of the thread that made it follows.
const NAME: &str = "ampoule-egress-";

/// It is taken away when this is dropped, if nobody is in it any more.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    folder: File,
    /// Who writes 0 to it is in the cgroup.
    entrance: File,
}

impl Cgroup {
    pub fn new() -> io::Result<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let none = || io::Error::new(io::ErrorKind::NotFound, "none is mounted here");
        let own = own(&groups, &mounts).ok_or_else(none)?;
        clear(&own);
        let path = own.join(format!("{NAME}{}-{}", gettid().as_raw_nonzero(), Id::random()?));
        fs::create_dir(&path)?;
        let opened = || {
            let entrance = OpenOptions::new().write(true).open(path.join("cgroup.procs"))?;
            Ok((File::open(&path)?, entrance))
        };
        match opened() {
            Ok((folder, entrance)) => Ok(Self { path, folder, entrance }),
            Err(error) => {
                let _ = fs::remove_dir(&path);
                Err(error)
            }
        }
    }

    pub fn entrance(&self) -> RawFd {
        self.entrance.as_raw_fd()
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// The folder of the cgroup that a process is in: from its /proc/PID/cgroup, and a /proc/PID/mountinfo.
fn own(groups: &str, mounts: &str) -> Option<PathBuf> {
    let group = Path::new(groups.lines().find_map(|line| line.strip_prefix("0::"))?);
    mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let [_, _, _, root, point, ..] = place.split(' ').collect::<Vec<_>>()[..] else {
            return None;
        };
        let ours = kind.starts_with("cgroup2 ").then(|| group.strip_prefix(root).ok())??;
        Some(Path::new(point).join(ours))
    })
}

/// Takes away what those have left that were killed. One in use cannot be taken away; one that is about to be used has a
/// thread that lives.
fn clear(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let left = name.to_str().and_then(|name| name.strip_prefix(NAME));
        let thread = left.and_then(|left| left.split('-').next()?.parse::<u32>().ok());
        if thread.is_some_and(|thread| !Path::new("/proc").join(thread.to_string()).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_folder_is_found_wherever_cgroups_are_mounted() {
        let point = |root: &str, at: &str| {
            format!(
                "24 1 0:5 / /proc rw - proc proc rw\n30 23 0:26 {root} {at} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
            )
        };
        let v1 = "9:memory:/a\n0::/user.slice/s\n";
        for (groups, root, at, folder) in [
            ("0::/\n", "/", "/sys/fs/cgroup", Some("/sys/fs/cgroup/")),
            ("0::/a/b\n", "/", "/sys/fs/cgroup", Some("/sys/fs/cgroup/a/b")),
            (v1, "/", "/sys/fs/cgroup/unified", Some("/sys/fs/cgroup/unified/user.slice/s")),
            ("0::/docker/x/y\n", "/docker/x", "/sys/fs/cgroup", Some("/sys/fs/cgroup/y")),
            ("0::/other\n", "/docker/x", "/sys/fs/cgroup", None),
            ("9:memory:/a\n", "/", "/sys/fs/cgroup", None),
        ] {
            assert_eq!(own(groups, &point(root, at)), folder.map(PathBuf::from), "{groups} {root}");
        }
        assert_eq!(own("0::/\n", "24 1 0:5 / /proc rw - proc proc rw\n"), None);
    }
}
