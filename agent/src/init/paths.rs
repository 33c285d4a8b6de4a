//! Paths inside a root file system. Whatever symbolic links an image holds, a path is resolved by the
//! kernel as if the root were `/` (openat2(2), `RESOLVE_IN_ROOT`), and what was opened is used by its
//! descriptor: nothing outside is ever reached, and nothing can be exchanged in between.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{
        CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, fstatfs, mkdirat, open, openat,
        openat2,
    },
    io::{Errno, Result},
};

use crate::plan::{StepError, at};

/// PROC_SUPER_MAGIC of include/uapi/linux/magic.h.
const PROC_MAGIC: i64 = 0x9fa0;
/// The most components a path to be made may have.
const MAX_DEPTH: usize = 256;

/// A root file system, by a descriptor of its top directory.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// A root by its path in the guest.
    pub fn open(path: &Path) -> Result<Self> {
        open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map(Self)
    }

    /// The root directory of this process.
    pub fn current() -> std::result::Result<Self, StepError> {
        Self::open(Path::new("/")).map_err(at("root", "/"))
    }

    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Opens a path for its place alone (`O_PATH`).
    pub fn find(&self, path: &str) -> Result<OwnedFd> {
        self.open_with(path, OFlags::PATH, ResolveFlags::empty())
    }

    /// The same, where no component may be a symbolic link.
    pub fn find_plain(&self, path: &str) -> Result<OwnedFd> {
        self.open_with(path, OFlags::PATH, ResolveFlags::NO_SYMLINKS)
    }

    pub fn open_with(&self, path: &str, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd> {
        // An empty path is the root itself; openat2 would refuse it.
        let path = if path.is_empty() { "." } else { path };
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // A rename somewhere made the kernel unsure (openat2(2)): again.
                Err(Errno::AGAIN) => {}
                result => return result,
            }
        }
    }

    /// A directory that is made, with its parents, where it is missing.
    pub fn make_directory(&self, path: &str) -> std::result::Result<OwnedFd, StepError> {
        let made = match self.find(path) {
            Err(Errno::NOENT) => self.make_directories(path),
            found => found,
        };
        let is_directory = |fd: OwnedFd| match kind(&fd)? {
            FileType::Directory => Ok(fd),
            _ => Err(Errno::NOTDIR),
        };
        made.and_then(is_directory).map_err(at("make directory", path))
    }

    fn make_directories(&self, path: &str) -> Result<OwnedFd> {
        let names: Vec<&str> = path.split('/').filter(|n| !n.is_empty() && *n != ".").collect();
        if names.len() > MAX_DEPTH {
            return Err(Errno::NAMETOOLONG);
        }
        let mut parent = self.find("")?;
        let mut so_far = String::new();
        for name in names {
            so_far = format!("{so_far}/{name}");
            parent = match self.find(&so_far) {
                Err(Errno::NOENT) => {
                    match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(e) => return Err(e),
                    }
                    self.find(&so_far)?
                }
                found => found?,
            };
        }
        Ok(parent)
    }

    /// The directory in which the last component of a path lies, made where missing, and that component.
    pub fn make_parent<'a>(
        &self,
        path: &'a str,
    ) -> std::result::Result<(OwnedFd, &'a str), StepError> {
        let (parent, name) = path.trim_end_matches('/').rsplit_once('/').unwrap_or(("", path));
        if matches!(name, "" | "." | "..") {
            return Err(at("make file", path)(Errno::INVAL));
        }
        Ok((self.make_directory(parent)?, name))
    }

    /// A file that is made, empty, where it is missing.
    pub fn make_file(&self, path: &str) -> std::result::Result<OwnedFd, StepError> {
        match self.find(path) {
            Err(Errno::NOENT) => {}
            found => return found.map_err(at("make file", path)),
        }
        let (parent, name) = self.make_parent(path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        match openat(&parent, name, flags, Mode::from_raw_mode(0o644)) {
            Ok(_) | Err(Errno::EXIST) => self.find(path).map_err(at("make file", path)),
            Err(e) => Err(at("make file", path)(e)),
        }
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

pub fn kind(fd: impl AsFd) -> Result<FileType> {
    Ok(FileType::from_raw_mode(fstat(fd)?.st_mode))
}

/// Whether this is the character device `major`:`minor`.
pub fn is_char_device(stat: &Stat, major: u32, minor: u32) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(major, minor)
}

/// Whether this lies on a proc file system.
pub fn is_on_proc(fd: impl AsFd) -> bool {
    fstatfs(fd).is_ok_and(|s| s.f_type == PROC_MAGIC)
}

/// The guest's own /dev/null, checked to be what it says, to hide files behind.
pub fn guest_null() -> Result<OwnedFd> {
    let null = rustix::fs::openat(
        CWD,
        "/dev/null",
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    match is_char_device(&fstat(&null)?, 1, 3) {
        true => Ok(null),
        false => Err(Errno::NODEV),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, symlink},
    };

    use super::*;

    fn image() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(directory.path().join("outside")).unwrap();
        let open = Root::open(&root).unwrap();
        (directory, open)
    }

    #[test]
    fn links_lead_nowhere_but_inside() {
        let (directory, root) = image();
        let inside = directory.path().join("root");
        symlink("../../../outside", inside.join("up")).unwrap();
        symlink(directory.path().join("outside"), inside.join("absolute")).unwrap();
        symlink("/etc", inside.join("good")).unwrap();
        for path in ["up", "absolute", "/up/../outside"] {
            assert_eq!(root.find(path).unwrap_err(), Errno::NOENT, "{path}");
        }
        let etc = fs::metadata(inside.join("etc")).unwrap().ino();
        assert_eq!(fstat(root.find("/good").unwrap()).unwrap().st_ino, etc);
        assert_eq!(fstat(root.find("../../etc").unwrap()).unwrap().st_ino, etc);
        assert_eq!(root.find_plain("/good").unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn what_is_made_is_made_inside() {
        let (directory, root) = image();
        let inside = directory.path().join("root");
        symlink("/var", inside.join("link")).unwrap();
        root.make_directory("var").unwrap();
        root.make_directory("/link/../link/a/b").unwrap();
        assert!(inside.join("var/a/b").is_dir());
        root.make_file("/x/y/file").unwrap();
        assert!(inside.join("x/y/file").is_file());
        root.make_directory("../../../outside/new").unwrap();
        assert!(inside.join("outside/new").is_dir());
        assert!(!directory.path().join("outside/new").exists());
    }

    #[test]
    fn a_dangling_link_and_a_file_in_the_way_are_errors() {
        let (directory, root) = image();
        let inside = directory.path().join("root");
        symlink("/nowhere", inside.join("dangling")).unwrap();
        fs::write(inside.join("file"), "").unwrap();
        assert!(root.make_directory("/dangling/x").is_err());
        assert!(root.make_directory("/file").is_err());
        assert!(root.make_directory("/file/x").is_err());
        assert!(root.make_file("/etc/..").is_ok(), "an existing path is found, whatever it is");
        assert!(root.make_parent("/etc/..").is_err());
        assert!(!inside.join("nowhere").exists());
    }

    #[test]
    fn null_is_checked() {
        guest_null().unwrap();
        assert!(!is_char_device(&fstat(open_file("/dev/zero")).unwrap(), 1, 3));
    }

    fn open_file(path: &str) -> fs::File {
        fs::File::open(path).unwrap()
    }
}
