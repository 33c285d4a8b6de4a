//! Files as names in open directories; no link is followed.

use std::{
    collections::BTreeSet,
    ffi::{CStr, CString, OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStringExt, fs::FileExt},
    },
    path::Path,
    time::Instant,
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Stat, Timespec,
        Timestamps, Uid, fchmod, fchown, fgetxattr, flistxattr, fstat, ftruncate, mknodat, openat,
        openat2, seek, statat, unlinkat,
    },
    io::Errno,
};

use super::DEPTH;

/// XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
pub const ATTRIBUTE: usize = 64 << 10;
const OPAQUE: &CStr = c"trusted.overlay.opaque";

type Result<T> = std::result::Result<T, Errno>;

pub fn attribute_names(file: BorrowedFd<'_>) -> Result<BTreeSet<CString>> {
    let mut list = vec![0_u8; ATTRIBUTE];
    let length = match flistxattr(file, &mut list) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let names = list[..length].split_inclusive(|byte| *byte == 0);
    Ok(names.filter_map(|name| CStr::from_bytes_with_nul(name).ok().map(CStr::to_owned)).collect())
}

/// Whether it shows nothing of the lower ones.
pub fn is_opaque(directory: &OwnedFd) -> Result<bool> {
    let mut value = [0_u8; 1];
    match fgetxattr(directory, OPAQUE, &mut value) {
        Ok(length) => Ok(value[..length] == *b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(e) => Err(e),
    }
}

/// What is data; the rest stays a hole, as does what is there no more. Until `end`.
pub fn copy_data(
    from: &File,
    to: &File,
    size: u64,
    buffer: &mut [u8],
    end: Instant,
) -> io::Result<()> {
    let (mut at, mut written) = (0, 0);
    'file: while at < size {
        let data = match seek(from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            data => data?,
        };
        at = data;
        let hole = seek(from, SeekFrom::Hole(data))?.min(size);
        while at < hole {
            in_time(end)?;
            let most = usize::try_from(hole - at).unwrap_or(usize::MAX).min(buffer.len());
            let read = from.read_at(&mut buffer[..most], at)?;
            if read == 0 {
                break 'file;
            }
            to.write_all_at(&buffer[..read], at)?;
            at += read as u64;
            written = at;
        }
    }
    if written < size { Ok(ftruncate(to, size)?) } else { Ok(()) }
}

pub fn in_time(end: Instant) -> io::Result<()> {
    if Instant::now() > end { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
}

pub fn set_owner_and_mode(file: BorrowedFd<'_>, stat: &Stat) -> Result<()> {
    let now = fstat(file)?;
    let is_owned = (now.st_uid, now.st_gid) == (stat.st_uid, stat.st_gid);
    if !is_owned {
        let (user, group) = owner(stat);
        fchown(file, user, group)?;
    }
    // chown(2) takes set-id bits away.
    if !is_owned || mode(&now) != mode(stat) { fchmod(file, mode(stat)) } else { Ok(()) }
}

pub fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
}

pub fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

pub fn times(stat: &Stat) -> Timestamps {
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as i64),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as i64),
    }
}

pub fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub fn is_directory(stat: &Stat) -> bool {
    kind(stat) == FileType::Directory
}

pub fn is_whiteout(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// That its file system has for it, shared by its names.
pub fn bytes(stat: &Stat) -> u64 {
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    (blocks << 9) / stat.st_nlink.max(1)
}

pub fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

pub fn look(directory: BorrowedFd<'_>, name: &OsStr) -> Result<Stat> {
    statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
}

pub fn directory(at: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
}

/// A regular file, for reading. Nothing else is opened, whatever the name has become meanwhile.
pub fn open_regular(at: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat(at, name, flags, Mode::empty())?;
    match kind(&fstat(&found)?) {
        FileType::RegularFile => {}
        _ => return Err(Errno::STALE),
    }
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Whether a name means something else now, or what it means is not as it was.
pub fn has_changed(at: BorrowedFd<'_>, name: &OsStr, then: &Stat) -> bool {
    let change = |stat: &Stat| (identity(stat), stat.st_ctime, stat.st_ctime_nsec);
    !look(at, name).is_ok_and(|now| change(&now) == change(then))
}

/// A directory of several names, none of them a link.
pub fn beneath(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

pub fn names(directory: BorrowedFd<'_>) -> Result<BTreeSet<OsString>> {
    entries(directory)?.collect()
}

/// The same, as they are read.
pub fn entries(directory: BorrowedFd<'_>) -> Result<impl Iterator<Item = Result<OsString>>> {
    let entries = Dir::read_from(directory)?.map(|entry| {
        entry.map(|entry| match entry.file_name().to_bytes() {
            b"." | b".." => None,
            name => Some(OsString::from_vec(name.to_vec())),
        })
    });
    Ok(entries.filter_map(Result::transpose))
}

/// Removes what has a name, if anything has, with all that is in it.
pub fn remove(at: BorrowedFd<'_>, name: &OsStr, depth: usize) -> Result<()> {
    if depth > DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    match unlinkat(at, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(Errno::NOENT) => return Ok(()),
        removed => return removed,
    }
    let below = directory(at, name)?;
    for name in names(below.as_fd())? {
        remove(below.as_fd(), &name, depth + 1)?;
    }
    unlinkat(at, name, AtFlags::REMOVEDIR)
}

pub fn make_whiteout(at: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    mknodat(at, name, FileType::CharacterDevice, Mode::empty(), 0)
}
