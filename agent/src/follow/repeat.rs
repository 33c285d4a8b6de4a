//! Operations that the file server answers and does not do, because of the group that asks for them.

use std::{ffi::CStr, os::fd::OwnedFd};

use ampoule_vmm_api::guest::replay;
use rustix::{
    fs::{
        AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, Statx, StatxFlags, Uid, chownat,
        fallocate, mkdirat, mknodat, openat, renameat, statx, symlinkat, unlinkat,
    },
    io::{Errno, Result},
};

/// Beyond the end of all files.
const NOWHERE: u64 = 1 << 40;

/// `now` says what it has become.
pub fn create(directory: &OwnedFd, name: &CStr, now: &Statx) -> Result<()> {
    let mode = Mode::from_raw_mode(u32::from(now.stx_mode) & 0o7777);
    as_group(replay::CREATE, || match kind(now) {
        FileType::Directory => mkdirat(directory, name, mode),
        FileType::Symlink => symlinkat(c"somewhere", directory, name),
        kind => mknodat(directory, name, kind, mode, 0),
    })
}

pub fn delete(directory: &OwnedFd, name: &CStr, is_dir: bool) -> Result<()> {
    let (group, flags) = match is_dir {
        true => (replay::DELETE_DIR, AtFlags::REMOVEDIR),
        false => (replay::DELETE, AtFlags::empty()),
    };
    surely(group, directory, name, || unlinkat(directory, name, flags))
}

pub fn rename(
    old_directory: &OwnedFd,
    old: &CStr,
    directory: &OwnedFd,
    name: &CStr,
    is_dir: bool,
) -> Result<()> {
    let group = if is_dir { replay::MOVE_DIR } else { replay::MOVE };
    surely(group, old_directory, old, || renameat(old_directory, old, directory, name))
}

/// What it has become, if it is there.
pub fn look(directory: &OwnedFd, name: &CStr) -> Result<Statx> {
    surely(replay::CHANGE, directory, name, || {
        statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
    })
}

/// A regular file's content.
pub fn write(directory: &OwnedFd, name: &CStr, now: &Statx) -> Result<()> {
    if kind(now) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    write_to(|| openat(directory, name, flags, Mode::empty()))
}

/// Of a file that is opened in here for writing: nothing is written.
pub fn write_to(open: impl FnOnce() -> Result<OwnedFd>) -> Result<()> {
    let nothing = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    as_group(replay::CHANGE, || fallocate(open()?, nothing, NOWHERE, 4096))
}

pub fn attributes(directory: &OwnedFd, name: &CStr, now: &Statx) -> Result<()> {
    chown(directory, name, now, AtFlags::SYMLINK_NOFOLLOW)
}

/// Of an open file.
pub fn attributes_of(file: &OwnedFd) -> Result<()> {
    let now = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    chown(file, c"", &now, AtFlags::EMPTY_PATH)
}

/// To the owner that it has, or root: the answer says whose it is.
fn chown(directory: &OwnedFd, name: &CStr, now: &Statx, flags: AtFlags) -> Result<()> {
    let owner = Some(Uid::from_raw_unchecked(now.stx_uid));
    let group = Some(Gid::from_raw_unchecked(now.stx_gid));
    as_group(replay::CHANGE, || chownat(directory, name, owner, group, flags))
}

fn kind(now: &Statx) -> FileType {
    FileType::from_raw_mode(now.stx_mode.into())
}

/// That there is no such name the kernel believes for a while, so that it would not ask, but not where it is to make
/// one: that is refused, and it has asked.
fn surely<T>(
    group: u32,
    directory: &OwnedFd,
    name: &CStr,
    act: impl Fn() -> Result<T>,
) -> Result<T> {
    as_group(group, || match act() {
        Err(Errno::NOENT) => {
            let _ = mknodat(directory, name, FileType::RegularFile, Mode::empty(), 0);
            act()
        }
        done => done,
    })
}

/// With another group for file systems, in this thread, while `act` runs.
fn as_group<T>(group: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let _own = Group::take(group)?;
    act()
}

struct Group {
    before: u32,
}

impl Group {
    fn take(group: u32) -> Result<Self> {
        let own = Self { before: set(group) };
        // It fails in silence and returns what was before.
        if set(u32::MAX) == group { Ok(own) } else { Err(Errno::PERM) }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        set(self.before);
    }
}

fn set(group: u32) -> u32 {
    // SAFETY: setfsgid(2) takes a number; u32::MAX changes nothing.
    unsafe { libc::setfsgid(group) as u32 }
}
