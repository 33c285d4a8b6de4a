//! What of the shares anybody in the guest watches, as /proc tells it: each inotify instance lists the files it watches
//! by the handles of their file systems, which in FUSE's are the numbers that its server has given them.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, read_dir, read_link},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::fs::{Dev, OFlags, makedev};

use crate::share::{self, Share};

/// FILEID_INO64_GEN of Linux, in hexadecimal as fdinfo has it: 12 bytes.
const HANDLE: (&str, &str) = ("c", "81");

/// Device and number of all that is watched, on FUSE and what has handles like it.
#[derive(Debug, Default)]
pub struct Watched(HashSet<(Dev, u64)>);

impl Watched {
    /// As it is now. Processes come and go meanwhile.
    pub fn look() -> Self {
        let processes = read_dir("/proc").into_iter().flatten().flatten();
        let processes = processes.map(|entry| entry.path()).filter(|path| path.join("fd").is_dir());
        Self(
            processes
                .flat_map(|process| instances(&process))
                .flat_map(|text| files(&text))
                .collect(),
        )
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, device: Dev, node: u64) -> bool {
        self.0.contains(&(device, node))
    }

    /// The numbers on a device.
    pub fn of(&self, device: Dev) -> impl Iterator<Item = u64> {
        self.0.iter().filter(move |(on, _)| *on == device).map(|(_, node)| *node)
    }
}

/// Where the watched ones are: kept from call to call, since the kernel tells it of an entry only as long as that is
/// there.
#[derive(Debug, Default)]
pub struct Places {
    known: HashSet<(Dev, u64)>,
    /// By the number of a directory and a name in it.
    entries: HashMap<(u64, Vec<u8>), (Dev, u64)>,
}

impl Places {
    /// Only those that are watched still.
    pub fn keep(&mut self, watched: &Watched) {
        self.known.retain(|(device, node)| watched.contains(*device, *node));
        self.entries.retain(|_, file| self.known.contains(file));
    }

    /// Looks where further ones of a share are, and returns them open: they are to stay so, until what happened to them
    /// has been told.
    pub fn add(&mut self, share: &Share, watched: &Watched) -> HashMap<u64, OwnedFd> {
        let mut directories = HashMap::new();
        let mut open = HashMap::new();
        for node in watched.of(share.device) {
            if !self.known.insert((share.device, node)) {
                continue;
            }
            let Ok(file) = share.find(node, OFlags::PATH) else { continue };
            if let Some(entry) = entry(share, &file, &mut directories) {
                self.entries.insert(entry, (share.device, node));
            }
            open.insert(node, file);
        }
        open
    }

    /// What has a name there.
    pub fn get(&self, directory: u64, name: &[u8]) -> Option<u64> {
        self.entries.get(&(directory, name.to_vec())).map(|(_, node)| *node)
    }

    /// It is there no more; by now it is `to`, if that is known.
    pub fn moved(&mut self, (directory, name): (u64, &[u8]), to: Option<(u64, &[u8])>) {
        let file = self.entries.remove(&(directory, name.to_vec()));
        if let (Some(file), Some((directory, name))) = (file, to) {
            self.entries.insert((directory, name.to_vec()), file);
        }
    }
}

/// The number of the directory in which a file is, and the file's name. Few directories are asked for, many files.
fn entry(
    share: &Share,
    file: &OwnedFd,
    directories: &mut HashMap<PathBuf, Option<u64>>,
) -> Option<(u64, Vec<u8>)> {
    let path = share::name_of(file)?;
    let name = path.file_name()?.as_bytes().to_vec();
    let directory = path.parent().filter(|directory| directory.starts_with(&share.path))?;
    let number = directories.entry(directory.into());
    let number = *number.or_insert_with(|| Share::number_of(directory).ok());
    Some((number?, name))
}

/// The texts that describe a process's inotify instances.
fn instances(process: &Path) -> Vec<String> {
    let fds = read_dir(process.join("fd")).into_iter().flatten().flatten();
    let inotify = fds.filter(|fd| {
        read_link(fd.path()).is_ok_and(|link| link.as_os_str().as_bytes() == b"anon_inode:inotify")
    });
    let text = |fd: fs::DirEntry| fs::read_to_string(process.join("fdinfo").join(fd.file_name()));
    inotify.filter_map(|fd| text(fd).ok()).collect()
}

/// Lines like `inotify wd:1 ino:5 sdev:2b mask:fce ignored_mask:0 fhandle-bytes:c fhandle-type:81 f_handle:...`.
fn files(text: &str) -> Vec<(Dev, u64)> {
    let file = |line: &str| {
        let field = |name: &str| {
            line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix(':'))
        };
        if (field("fhandle-bytes")?, field("fhandle-type")?) != HANDLE {
            return None;
        }
        let device = u32::from_str_radix(field("sdev")?, 16).ok()?;
        let handle = field("f_handle")?;
        let word = |n: usize| u32::from_str_radix(handle.get(n * 8..n * 8 + 8)?, 16).ok();
        let node = u64::from(word(0)?.swap_bytes()) << 32 | u64::from(word(1)?.swap_bytes());
        Some((makedev(device >> 20, device & 0xf_ffff), node))
    };
    text.lines().filter(|line| line.starts_with("inotify ")).filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_watched_is_read_from_fdinfo() {
        let text = "pos:\t0\nflags:\t00\nmnt_id:\t15\nino:\t1058\n\
            inotify wd:2 ino:1f sdev:2b mask:fce ignored_mask:0 fhandle-bytes:c fhandle-type:81 \
            f_handle:010000002a00000000000000\n\
            inotify wd:1 ino:2 sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 \
            f_handle:02000000e2b1c3d4\n\
            inotify wd:3 ino:2 sdev:2b mask:2 ignored_mask:0 fhandle-bytes:c fhandle-type:81 f_handle:01\n\
            inotify wd:4\n";
        assert_eq!(files(text), [(makedev(0, 0x2b), 0x1_0000_002a)]);
    }

    #[test]
    fn an_instance_of_this_process_is_found() {
        let instance =
            rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::CLOEXEC).unwrap();
        let flags = rustix::fs::inotify::WatchFlags::CREATE;
        rustix::fs::inotify::add_watch(&instance, "/", flags).unwrap();
        let found = instances(Path::new("/proc/self"));
        assert!(found.iter().any(|text| text.contains("inotify wd:1 ")), "{found:?}");
    }
}
