//! Mounts as file descriptors (fsopen(2), open_tree(2), mount_setattr(2)): made detached, then attached
//! to a directory that is itself an open descriptor, so that no path can change in between.

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};

/// A file system could not be mounted: the kernel's reasons, if it gave some, and the error.
#[derive(Debug)]
pub struct MountError {
    errno: Errno,
    reasons: String,
}

impl fmt::Display for MountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = crate::plan::cause(self.errno.into());
        match self.reasons.as_str() {
            "" => f.write_str(&error),
            reasons => write!(f, "{error} ({reasons})"),
        }
    }
}

impl std::error::Error for MountError {}

impl From<MountError> for io::Error {
    fn from(error: MountError) -> Self {
        Self::new(error.errno.kind(), error)
    }
}

/// Mounts a new instance of a file system, detached. Options are "key" or "key=value".
///
/// # Errors
/// With what the kernel says about the option or the device it did not like.
pub fn new<'a>(
    kind: &str,
    options: impl IntoIterator<Item = &'a str>,
    attributes: MountAttrFlags,
) -> Result<OwnedFd, MountError> {
    let bare = |errno| MountError { errno, reasons: String::new() };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(bare)?;
    let explained = |errno| MountError { errno, reasons: reasons(&context) };
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&context, key, value),
            None => fsconfig_set_flag(&context, option),
        }
        .map_err(explained)?;
    }
    fsconfig_create(&context).map_err(explained)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(explained)
}

/// What the kernel wrote into the log of a file system context: lines like "e erofs: bad superblock".
fn reasons(context: &OwnedFd) -> String {
    let mut line = [0; 512];
    let mut all = Vec::new();
    while let Ok(n) = rustix::io::read(context, &mut line) {
        let text = String::from_utf8_lossy(&line[..n]);
        all.push(text.trim_end().get(2..).unwrap_or_default().to_owned());
        if n == 0 || all.len() == 8 {
            break;
        }
    }
    all.join("; ")
}

/// A detached copy of the mount at `path`, with what is mounted below if `recursive`.
pub fn copy(directory: BorrowedFd<'_>, path: &str, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    flags.set(OpenTreeFlags::AT_EMPTY_PATH, path.is_empty());
    Ok(open_tree(directory, path, flags)?)
}

/// Attaches a detached mount at an open directory or file.
pub fn attach(mount: &OwnedFd, target: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", target, "", flags)?)
}

/// Attaches a detached mount at a path of the guest.
pub fn attach_at(mount: &OwnedFd, path: &Path) -> io::Result<()> {
    Ok(move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}
