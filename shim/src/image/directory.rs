//! A directory of the host as an image: what identifies it, and its tree.
//!
//! A directory has no digest of its own, so it is known by a digest over what `stat` says of all its
//! files: path, type and mode, owner, size, inode number, device number, modification and change time.
//! No write escapes the change time, and nothing need be read to compute it. Directories on other file
//! systems (`/proc` of a chroot) are taken as empty. No symbolic link is followed.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::fs::{lgetxattr, llistxattr, major, minor, openat, readlinkat, statat};
use rustix::io::Errno;

use super::digest::Digest;
use super::error::ImageError;
use super::spool::Spool;
use super::tree::{Metadata, Node, Tree, TreeError, lossy};

/// Linux: the longest list of attribute names, and the longest value (XATTR_LIST_MAX, XATTR_SIZE_MAX).
const MAX_XATTR: usize = 64 << 10;

#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    pub digest: Digest,
}

/// Something found on a walk.
pub struct Found<'a> {
    parent: &'a OwnedFd,
    name: &'a CStr,
    /// Relative to the root of the walk; empty for the root itself.
    pub path: &'a [u8],
    stat: Stat,
}

pub enum WalkError {
    Io(io::Error),
    Tree(TreeError),
    /// An attribute of overlayfs by which the layer is not all there is to its file.
    Overlay(String),
}

/// The first name of each inode that has several.
pub type Links = HashMap<(u64, u64), Vec<u8>>;
pub type Attributes = BTreeMap<Vec<u8>, Vec<u8>>;

impl Directory {
    /// Looks at all files, reading none.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let digest = walk(path, |_| Ok(()))?;
        Ok(Self { path: path.into(), digest })
    }

    /// Adds all files to `tree` and their contents to `spool`; an error if anything changed meanwhile.
    pub fn merge(&self, tree: &mut Tree, spool: &mut Spool) -> Result<(), ImageError> {
        let mut links = Links::new();
        let before = walk(&self.path, |found| {
            let attributes = found.attributes()?;
            found.add(tree, spool, &mut links, attributes)
        })?;
        let after = walk(&self.path, |_| Ok(()))?;
        if before != self.digest || after != self.digest {
            return Err(ImageError::Changed { path: self.path.clone() });
        }
        Ok(())
    }
}

/// Calls `visit` for the root and all below it, parents first, and gives the digest of all it saw.
pub fn walk(
    root: &Path,
    mut visit: impl FnMut(&Found) -> Result<(), WalkError>,
) -> Result<Digest, ImageError> {
    let unreadable =
        |path: PathBuf, errno: Errno| ImageError::Source { path, source: errno.into() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = openat(CWD, root, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOTDIR => ImageError::NotADirectory { path: root.into() },
        errno => unreadable(root.into(), errno),
    })?;
    let stat = statat(&fd, c"", AtFlags::EMPTY_PATH).map_err(|e| unreadable(root.into(), e))?;
    let mut digests = Vec::new();
    let mut path = Vec::new();
    let mut step = |found: &Found| {
        digests.push(identity(found));
        visit(found)
    };
    let top = Found { parent: &fd, name: c".", path: b"", stat };
    let walked = step(&top).and_then(|()| descend(&fd, stat.st_dev, &mut path, &mut step));
    walked.map_err(|error| match error {
        WalkError::Io(source) => ImageError::Source { path: root.join(lossy(&path)), source },
        WalkError::Tree(source) => {
            ImageError::SourceEntry { path: root.into(), entry: lossy(&path), source }
        }
        WalkError::Overlay(attribute) => {
            ImageError::SourceOverlay { path: root.into(), entry: lossy(&path), attribute }
        }
    })?;
    Ok(Digest::of_parts(digests.iter().map(|digest| &digest.as_bytes()[..])))
}

fn descend(
    directory: &OwnedFd,
    device: u64,
    path: &mut Vec<u8>,
    step: &mut dyn FnMut(&Found) -> Result<(), WalkError>,
) -> Result<(), WalkError> {
    for name in names(directory)? {
        let length = path.len();
        if length > 0 {
            path.push(b'/');
        }
        path.extend(name.to_bytes());
        let mut stat = statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let is_elsewhere = is_directory && stat.st_dev != device;
        if is_elsewhere {
            // What happens in there is no change here.
            (stat.st_size, stat.st_mtime, stat.st_mtime_nsec) = (0, 0, 0);
            (stat.st_ctime, stat.st_ctime_nsec) = (0, 0);
        }
        step(&Found { parent: directory, name: &name, path, stat })?;
        if is_directory && !is_elsewhere {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let child = openat(directory, &name, flags, Mode::empty())?;
            descend(&child, device, path, step)?;
        }
        path.truncate(length);
    }
    Ok(())
}

fn names(directory: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if ![&b"."[..], b".."].contains(&entry.file_name().to_bytes()) {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn identity(found: &Found) -> Digest {
    let stat = &found.stat;
    let numbers: [u64; 10] = [
        stat.st_mode.into(),
        u64::from(stat.st_uid) << 32 | u64::from(stat.st_gid),
        stat.st_size as u64,
        stat.st_ino,
        stat.st_dev,
        stat.st_rdev,
        stat.st_mtime as u64,
        stat.st_mtime_nsec,
        stat.st_ctime as u64,
        stat.st_ctime_nsec,
    ];
    let numbers = numbers.map(u64::to_le_bytes).concat();
    Digest::of_parts([found.path, &numbers])
}

impl Found<'_> {
    /// Adds it to `tree` with these attributes, its content to `spool`.
    pub fn add(
        &self,
        tree: &mut Tree,
        spool: &mut Spool,
        links: &mut Links,
        attributes: Attributes,
    ) -> Result<(), WalkError> {
        let kind = FileType::from_raw_mode(self.stat.st_mode);
        if kind != FileType::Directory && self.stat.st_nlink > 1 {
            let inode = (self.stat.st_dev, self.stat.st_ino);
            if let Some(first) = links.get(&inode) {
                return Ok(tree.link(self.path, first)?);
            }
            links.insert(inode, self.path.to_vec());
        }
        let (node, meta) = (self.node(kind, spool)?, self.metadata(attributes));
        tree.put(self.path, meta, node)?;
        Ok(())
    }

    fn node(&self, kind: FileType, spool: &mut Spool) -> Result<Node, WalkError> {
        let (major, minor) = (major(self.stat.st_rdev), minor(self.stat.st_rdev));
        Ok(match kind {
            FileType::Directory => Node::Directory,
            FileType::Symlink => {
                Node::Symlink(readlinkat(self.parent, self.name, Vec::new())?.into_bytes())
            }
            FileType::CharacterDevice => Node::CharDevice(major, minor),
            FileType::BlockDevice => Node::BlockDevice(major, minor),
            FileType::Fifo => Node::Fifo,
            FileType::Socket => Node::Socket,
            _ => Node::File(spool.copy(&self.open()?, self.stat.st_size as u64)?),
        })
    }

    /// Opens a regular file; one that became something else since is not waited for.
    fn open(&self) -> Result<File, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(openat(self.parent, self.name, flags, Mode::empty())?.into())
    }

    fn metadata(&self, xattrs: Attributes) -> Metadata {
        Metadata {
            mode: (self.stat.st_mode & 0o7777) as u16,
            uid: self.stat.st_uid,
            gid: self.stat.st_gid,
            mtime: (self.stat.st_mtime, self.stat.st_mtime_nsec as u32),
            xattrs,
        }
    }

    /// The mark by which overlayfs hides what lower layers have under this name.
    pub fn is_whiteout(&self) -> bool {
        let kind = FileType::from_raw_mode(self.stat.st_mode);
        kind == FileType::CharacterDevice && self.stat.st_rdev == 0
    }

    /// The extended attributes, but for those by which overlayfs talks to itself and those that label
    /// the file for the host's own policy.
    pub fn attributes(&self) -> Result<Attributes, Errno> {
        self.attributes_where(is_carried)
    }

    /// All extended attributes whose names are wanted.
    pub fn attributes_where(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<Attributes, Errno> {
        // These calls take no descriptor to start from.
        let directory = format!("/proc/self/fd/{}/", self.parent.as_raw_fd());
        let path = &[directory.as_bytes(), self.name.to_bytes()].concat()[..];
        let mut list = vec![0; MAX_XATTR];
        let length = match llistxattr(path, &mut list[..]) {
            Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
            other => other?,
        };
        let mut attributes = BTreeMap::new();
        let names = list[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
        for name in names.filter(|name| wanted(name)) {
            let mut value = vec![0; MAX_XATTR];
            let length = lgetxattr(path, name, &mut value[..])?;
            value.truncate(length);
            attributes.insert(name.to_vec(), value);
        }
        Ok(attributes)
    }
}

/// Whether an attribute is the file's own.
pub fn is_carried(attribute: &[u8]) -> bool {
    let host: [&[u8]; 2] = [b"trusted.overlay.", b"security.selinux"];
    !host.iter().any(|prefix| attribute.starts_with(prefix))
}

impl From<Errno> for WalkError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl From<io::Error> for WalkError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<TreeError> for WalkError {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}
