//! What POSIX and Linux promise of files, as checks that run in any directory: `posix DIRECTORY [CHECK...]` runs them
//! there, as root, wherever that is; `posix share DIRECTORY [CHECK...]` in a sandbox, on a share; without arguments they
//! run on a directory of this machine and through `ampoule-fsd`. What differs on a share is compared with [`DIFFERENCES`].
//!
//! `POSIX_ENTRIES=100000` makes the large directory larger.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "other tests use more of it")]
mod relay;

use std::{
    collections::{BTreeSet, HashSet},
    error::Error,
    ffi::{CString, OsStr},
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Barrier,
    thread,
    time::Duration,
};

use rustix::{
    fs::{
        AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, Timespec,
        Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags,
    },
    io::Errno,
};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

macro_rules! ensure {
    ($left:expr, $right:expr) => {
        match (&$left, &$right) {
            (left, right) if left != right => {
                return Err(format!("line {}: {left:?} is not {right:?}", line!()).into());
            }
            _ => {}
        }
    };
    ($true:expr) => {
        if !$true {
            return Err(format!("line {}: {} does not hold", line!(), stringify!($true)).into());
        }
    };
}

/// That an operation fails, and how.
macro_rules! refused {
    ($result:expr, $errno:ident) => {
        match $result {
            Ok(_) => return Err(format!("line {}: not refused", line!()).into()),
            Err(e) => {
                let e = io::Error::from(e);
                ensure!(Errno::from_io_error(&e), Some(Errno::$errno));
            }
        }
    };
}

/// What a share does otherwise than the host's directory it is, and why.
const DIFFERENCES: &[(&str, &str)] = &[
    (
        "device_nodes",
        "a device made by a guest would be one of the host's: EPERM, and none on a share can be opened",
    ),
    (
        "trusted_attributes",
        "trusted.* takes CAP_SYS_ADMIN on the host, which the file server does not have",
    ),
    ("collapse_and_insert", "FUSE passes on no mode of fallocate(2) that moves data"),
    ("inode_flags", "ioctl(2) is not passed on, so there is no chattr(1)"),
    (
        "set_id_bits_stay",
        "write(2) asks for CAP_FSETID on the host, not in a user namespace: they are cleared for root too",
    ),
];

/// The same on a kernel before 6.3.
const BEFORE_6_3: &[(&str, &str)] = &[(
    "set_group_id_directories",
    "FUSE does not say yet that the caller is of the directory's group: the bit is cleared",
)];

type Check = fn(&Path) -> Outcome;

const CHECKS: &[(&str, Check)] = &[
    ("modes_and_umask", modes_and_umask),
    ("owners_and_groups", owners_and_groups),
    ("set_group_id_directories", set_group_id_directories),
    ("permissions", permissions),
    ("set_id_bits_are_cleared", set_id_bits_are_cleared),
    ("set_id_bits_stay", set_id_bits_stay),
    ("file_capabilities_are_cleared", file_capabilities_are_cleared),
    ("extended_attributes", extended_attributes),
    ("trusted_attributes", trusted_attributes),
    ("access_control_lists", access_control_lists),
    ("default_access_control_lists", default_access_control_lists),
    ("holes", holes),
    ("large_files", large_files),
    ("record_locks", record_locks),
    ("whole_file_locks", whole_file_locks),
    ("renames", renames),
    ("renames_with_flags", renames_with_flags),
    ("temporary_files", temporary_files),
    ("mappings", mappings),
    ("large_directory", large_directory),
    ("directory_positions", directory_positions),
    ("names", names),
    ("hard_links", hard_links),
    ("unlinked_but_open", unlinked_but_open),
    ("appending", appending),
    ("exclusive_creation", exclusive_creation),
    ("timestamps", timestamps),
    ("preallocation", preallocation),
    ("collapse_and_insert", collapse_and_insert),
    ("copy_file_range", copy_file_range),
    ("truncation", truncation),
    ("symbolic_links", symbolic_links),
    ("fifos_and_sockets", fifos_and_sockets),
    ("device_nodes", device_nodes),
    ("directories", directories),
    ("opening", opening),
    ("identity", identity),
    ("programs", programs),
    ("concurrent_changes", concurrent_changes),
    ("contents", contents),
    ("direct_io", direct_io),
    ("syncing", syncing),
    ("notification", notification),
    ("inode_flags", inode_flags),
    ("free_space", free_space),
];

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let (passed, failed) = match arguments.split_first() {
        Some((share, [directory, only @ ..])) if share == "share" => {
            run("share", Path::new(directory), only, &differences())
        }
        Some((directory, only)) if Path::new(directory).is_dir() => {
            run("here", Path::new(directory), only, &[])
        }
        _ => compare(&arguments),
    };
    let ok = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {ok}. {passed} passed; {failed} failed; 0 ignored");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// On the host and through the file server; returns how many are as expected, and how many are not.
fn compare(only: &[String]) -> (usize, usize) {
    if relay::impossible().is_some() {
        return (0, 0);
    }
    let host = tempfile::tempdir().unwrap();
    chmod(host.path(), 0o755).unwrap();
    let on_host = run("host", host.path(), only, &[]);
    let mounted = relay::Mounted::new(&[(host.path(), false)]);
    let shared = run("share", &mounted.share(0), only, &differences());
    (on_host.0 + shared.0, on_host.1 + shared.1)
}

/// By the kernel that has the share mounted.
fn differences() -> Vec<(&'static str, &'static str)> {
    let mut differences = DIFFERENCES.to_vec();
    if kernel() < (6, 3) {
        differences.extend(BEFORE_6_3);
    }
    differences
}

fn kernel() -> (u32, u32) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Each check in a directory of its own; returns how many are as expected, and how many are not.
fn run(
    place: &str,
    directory: &Path,
    only: &[String],
    differences: &[(&str, &str)],
) -> (usize, usize) {
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in CHECKS {
        if !only.is_empty() && !only.iter().any(|only| name.contains(only.as_str())) {
            continue;
        }
        let own = directory.join(format!("check-{name}"));
        let outcome = fs::create_dir(&own)
            .and_then(|()| chmod(&own, 0o755))
            .map_err(Box::from)
            .and_then(|()| check(&own));
        let cleared = fs::remove_dir_all(&own);
        let difference = differences.iter().find(|(differs, _)| differs == name);
        let verdict = match (outcome, difference, cleared) {
            (Ok(()), None, Ok(())) => Ok("ok"),
            (Err(_), Some(_), Ok(())) => Ok("differs, as is known ... ok"),
            (Ok(()), Some(_), _) => Err("differs no longer".into()),
            (Err(why), None, _) => Err(why.to_string()),
            (_, _, Err(e)) => Err(format!("clearing up: {e}")),
        };
        match verdict {
            Ok(how) => {
                passed += 1;
                println!("test {place}::{name} ... {how}");
            }
            Err(why) => {
                failed += 1;
                println!("test {place}::{name} ... FAILED: {why}");
            }
        }
    }
    (passed, failed)
}

/// Runs `act` in a thread that is this user, with these groups and no capabilities.
fn as_user<T: Send>(uid: u32, gid: u32, groups: &[u32], act: impl FnOnce() -> T + Send) -> T {
    let become_user = || {
        // SAFETY: raw system calls, which change the calling thread only.
        let changed = unsafe {
            libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) == 0
                && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
                && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
        };
        assert!(changed, "{}", io::Error::last_os_error());
        act()
    };
    thread::scope(|scope| scope.spawn(become_user).join().unwrap())
}

const USER: u32 = 12345;
const GROUP: u32 = 23456;
const OTHER: u32 = 34567;

fn mode(path: &Path) -> io::Result<u32> {
    Ok(fs::symlink_metadata(path)?.mode() & 0o7777)
}

fn owner(path: &Path) -> io::Result<(u32, u32)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.uid(), metadata.gid()))
}

fn chmod(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn chown(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)
}

/// With a umask, which is the calling thread's process's: restored at once.
fn with_umask<T>(mask: u32, act: impl FnOnce() -> T) -> T {
    let before = rustix::process::umask(Mode::from_raw_mode(mask));
    let result = act();
    rustix::process::umask(before);
    result
}

fn modes_and_umask(dir: &Path) -> Outcome {
    let (file, sub) = (dir.join("f"), dir.join("d"));
    with_umask(0o027, || {
        OpenOptions::new().write(true).create_new(true).mode(0o666).open(&file)?;
        fs::create_dir(&sub)
    })?;
    ensure!(mode(&file)?, 0o640);
    ensure!(mode(&sub)?, 0o750);
    for bits in [0, 0o111, 0o444, 0o1755, 0o2755, 0o4755, 0o7777] {
        chmod(&file, bits)?;
        ensure!(mode(&file)?, bits);
        chmod(&sub, bits)?;
        ensure!(mode(&sub)?, bits);
    }
    Ok(())
}

fn owners_and_groups(dir: &Path) -> Outcome {
    chmod(dir, 0o777)?;
    let [file, sub, link, fifo] = ["f", "d", "l", "p"].map(|name| dir.join(name));
    as_user(USER, GROUP, &[], || -> io::Result<()> {
        create(&file)?;
        fs::create_dir(&sub)?;
        symlink("f", &link)?;
        Ok(rustix::fs::mknodat(CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RWXU, 0)?)
    })?;
    for path in [&file, &sub, &link, &fifo] {
        ensure!(owner(path)?, (USER, GROUP));
    }
    chown(&file, OTHER, GROUP)?;
    chown(&link, OTHER, OTHER)?;
    ensure!((owner(&file)?, owner(&link)?), ((OTHER, GROUP), (OTHER, OTHER)));
    refused!(as_user(USER, GROUP, &[], || chown(&file, USER, GROUP)), PERM);
    refused!(as_user(USER, GROUP, &[], || chmod(&file, 0o777)), PERM);
    chown(&file, USER, GROUP)?;
    as_user(USER, GROUP, &[OTHER], || chown(&file, USER, OTHER))?;
    ensure!(owner(&file)?, (USER, OTHER));
    Ok(())
}

fn set_group_id_directories(dir: &Path) -> Outcome {
    chown(dir, 0, GROUP)?;
    chmod(dir, 0o2777)?;
    let [member, stranger, sub] = ["member", "stranger", "d"].map(|name| dir.join(name));
    let set_id = |path: &Path| {
        OpenOptions::new().write(true).create_new(true).mode(0o2755).open(path).map(drop)
    };
    with_umask(0, || {
        as_user(USER, USER, &[GROUP], || set_id(&member))?;
        as_user(USER, USER, &[], || set_id(&stranger))?;
        as_user(USER, USER, &[], || fs::create_dir(&sub))
    })?;
    ensure!(owner(&member)?, (USER, GROUP));
    ensure!(mode(&member)?, 0o2755);
    // CVE-2022-0358: who is not in the group makes no program that acts as it.
    ensure!(owner(&stranger)?, (USER, GROUP));
    ensure!(mode(&stranger)?, 0o755);
    ensure!(mode(&sub)? & 0o2000, 0o2000);
    Ok(())
}

fn permissions(dir: &Path) -> Outcome {
    let (secret, shared, sticky) = (dir.join("secret"), dir.join("shared"), dir.join("sticky"));
    fs::write(&secret, "s")?;
    chmod(&secret, 0o600)?;
    fs::write(&shared, "s")?;
    chown(&shared, 0, GROUP)?;
    chmod(&shared, 0o660)?;
    fs::create_dir(&sticky)?;
    chmod(&sticky, 0o1777)?;
    as_user(USER, USER, &[], || -> Outcome {
        refused!(fs::read(&secret), ACCESS);
        refused!(fs::read(&shared), ACCESS);
        refused!(create(&dir.join("new")), ACCESS);
        refused!(fs::remove_file(&secret), ACCESS);
        fs::write(sticky.join("mine"), "m")?;
        Ok(())
    })?;
    as_user(USER, USER, &[GROUP], || fs::write(&shared, "by the group"))?;
    as_user(OTHER, OTHER, &[], || -> Outcome {
        refused!(fs::remove_file(sticky.join("mine")), PERM);
        refused!(fs::rename(sticky.join("mine"), sticky.join("yours")), PERM);
        Ok(())
    })?;
    chmod(dir, 0o700)?;
    refused!(as_user(USER, USER, &[], || fs::metadata(&shared).map(drop)), ACCESS);
    Ok(())
}

fn set_id_bits_are_cleared(dir: &Path) -> Outcome {
    let file = dir.join("f");
    let prepare = || -> io::Result<()> {
        fs::write(&file, "text")?;
        chown(&file, USER, GROUP)?;
        chmod(&file, 0o6777)
    };
    prepare()?;
    as_user(OTHER, OTHER, &[], || OpenOptions::new().write(true).open(&file)?.write_all(b"more"))?;
    ensure!(mode(&file)?, 0o777);
    prepare()?;
    as_user(OTHER, OTHER, &[], || OpenOptions::new().write(true).open(&file)?.set_len(1))?;
    ensure!(mode(&file)?, 0o777);
    prepare()?;
    as_user(OTHER, OTHER, &[], || {
        OpenOptions::new().write(true).truncate(true).open(&file).map(drop)
    })?;
    ensure!(mode(&file)?, 0o777);
    prepare()?;
    chown(&file, OTHER, GROUP)?;
    ensure!(mode(&file)?, 0o777);
    Ok(())
}

/// When root writes, who has CAP_FSETID.
fn set_id_bits_stay(dir: &Path) -> Outcome {
    let file = dir.join("f");
    fs::write(&file, "text")?;
    chmod(&file, 0o6777)?;
    OpenOptions::new().write(true).open(&file)?.write_all(b"more")?;
    ensure!(mode(&file)?, 0o6777);
    Ok(())
}

/// `cap_net_raw=ep`, as setcap(8) writes it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn file_capabilities_are_cleared(dir: &Path) -> Outcome {
    let file = dir.join("f");
    fs::write(&file, "text")?;
    let name = c"security.capability";
    rustix::fs::setxattr(&file, name, &CAPABILITY, XattrFlags::empty())?;
    let mut value = [0; 64];
    let read = |value: &mut [u8]| rustix::fs::getxattr(&file, name, value);
    let length = read(&mut value)?;
    ensure!(value[..length], CAPABILITY);
    OpenOptions::new().write(true).open(&file)?.write_all(b"more")?;
    refused!(read(&mut value), NODATA);
    Ok(())
}

fn extended_attributes(dir: &Path) -> Outcome {
    let (file, link) = (dir.join("f"), dir.join("l"));
    fs::write(&file, "")?;
    symlink("f", &link)?;
    let (name, value) = (c"user.name", vec![0xa5; 2000]);
    for path in [&file, &dir.to_owned()] {
        let mut buffer = vec![0; 4096];
        refused!(rustix::fs::getxattr(path, name, &mut buffer[..]), NODATA);
        refused!(rustix::fs::setxattr(path, name, b"v", XattrFlags::REPLACE), NODATA);
        rustix::fs::setxattr(path, name, &value, XattrFlags::CREATE)?;
        refused!(rustix::fs::setxattr(path, name, b"v", XattrFlags::CREATE), EXIST);
        let length = rustix::fs::getxattr(path, name, &mut buffer[..])?;
        ensure!(buffer[..length], value[..]);
        refused!(rustix::fs::getxattr(path, name, &mut [0u8; 10][..]), RANGE);
        let length = rustix::fs::listxattr(path, &mut buffer[..])?;
        let listed: Vec<_> = buffer[..length].split(|byte| *byte == 0).collect();
        ensure!(listed.contains(&name.to_bytes()));
        rustix::fs::removexattr(path, name)?;
        refused!(rustix::fs::removexattr(path, name), NODATA);
    }
    rustix::fs::setxattr(&file, c"user.empty", b"", XattrFlags::empty())?;
    ensure!(rustix::fs::getxattr(&file, c"user.empty", &mut [0u8; 4][..])?, 0);
    refused!(rustix::fs::lsetxattr(&link, name, b"v", XattrFlags::empty()), PERM);
    refused!(rustix::fs::setxattr(&file, c"nonsense", b"v", XattrFlags::empty()), OPNOTSUPP);
    chmod(&file, 0o600)?;
    let refused =
        as_user(USER, USER, &[], || rustix::fs::setxattr(&file, name, b"v", XattrFlags::empty()));
    refused!(refused, ACCESS);
    Ok(())
}

fn trusted_attributes(dir: &Path) -> Outcome {
    rustix::fs::setxattr(dir, c"trusted.name", b"v", XattrFlags::empty())?;
    Ok(())
}

/// The extended attribute of an access control list: owner, `user`, group, mask, others.
fn acl(owner: u16, user: (u32, u16), group: u16, mask: u16, others: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (0x01u16, owner, NOBODY),
        (0x02, user.1, user.0),
        (0x04, group, NOBODY),
        (0x10, mask, NOBODY),
        (0x20, others, NOBODY),
    ] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const ACCESS_ACL: &std::ffi::CStr = c"system.posix_acl_access";
const DEFAULT_ACL: &std::ffi::CStr = c"system.posix_acl_default";

fn read_acl(path: &Path, name: &std::ffi::CStr) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 256];
    let length = rustix::fs::getxattr(path, name, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}

fn access_control_lists(dir: &Path) -> Outcome {
    let file = dir.join("f");
    fs::write(&file, "text")?;
    chmod(&file, 0o600)?;
    refused!(as_user(USER, USER, &[], || fs::read(&file).map(drop)), ACCESS);
    let list = acl(6, (USER, 6), 0, 6, 0);
    rustix::fs::setxattr(&file, ACCESS_ACL, &list, XattrFlags::empty())?;
    ensure!(read_acl(&file, ACCESS_ACL)?, list);
    // The mode shows the mask for the group.
    ensure!(mode(&file)?, 0o660);
    as_user(USER, USER, &[], || fs::write(&file, "by the user"))?;
    refused!(as_user(OTHER, OTHER, &[], || fs::read(&file).map(drop)), ACCESS);
    // chmod(2) sets the mask.
    chmod(&file, 0o640)?;
    refused!(as_user(USER, USER, &[], || fs::write(&file, "no")), ACCESS);
    ensure!(read_acl(&file, ACCESS_ACL)?, acl(6, (USER, 6), 0, 4, 0));
    rustix::fs::removexattr(&file, ACCESS_ACL)?;
    refused!(as_user(USER, USER, &[], || fs::read(&file).map(drop)), ACCESS);
    Ok(())
}

fn default_access_control_lists(dir: &Path) -> Outcome {
    chmod(dir, 0o777)?;
    let list = acl(7, (USER, 7), 5, 7, 0);
    rustix::fs::setxattr(dir, DEFAULT_ACL, &list, XattrFlags::empty())?;
    let (file, sub) = (dir.join("f"), dir.join("d"));
    // The umask is not applied where there is a default list.
    with_umask(0o077, || {
        OpenOptions::new().write(true).create_new(true).mode(0o666).open(&file)?;
        fs::create_dir(&sub)
    })?;
    ensure!(mode(&file)?, 0o660);
    ensure!(read_acl(&file, ACCESS_ACL)?, acl(6, (USER, 7), 5, 6, 0));
    ensure!(read_acl(&sub, DEFAULT_ACL)?, list);
    as_user(USER, USER, &[], || fs::write(&file, "by the user"))?;
    Ok(())
}

fn holes(dir: &Path) -> Outcome {
    let file = create(&dir.join("f"))?;
    const MIB: u64 = 1 << 20;
    file.set_len(64 * MIB)?;
    file.write_all_at(&[1; 4096], 16 * MIB)?;
    ensure!(file.metadata()?.blocks() < 1000);
    let seek = |from| rustix::fs::seek(&file, from);
    ensure!(seek(rustix::fs::SeekFrom::Data(0))?, 16 * MIB);
    ensure!(seek(rustix::fs::SeekFrom::Hole(16 * MIB))?, 16 * MIB + 4096);
    ensure!(seek(rustix::fs::SeekFrom::Hole(0))?, 0);
    refused!(seek(rustix::fs::SeekFrom::Data(17 * MIB)), NXIO);
    refused!(seek(rustix::fs::SeekFrom::Data(64 * MIB)), NXIO);
    let mut hole = [1; 4096];
    file.read_exact_at(&mut hole, 32 * MIB)?;
    ensure!(hole, [0; 4096]);
    Ok(())
}

fn large_files(dir: &Path) -> Outcome {
    const BEYOND: u64 = (4 << 30) + 123;
    let path = dir.join("f");
    create(&path)?.write_all_at(b"beyond", BEYOND)?;
    ensure!(fs::metadata(&path)?.len(), BEYOND + 6);
    let mut text = [0; 6];
    File::open(&path)?.read_exact_at(&mut text, BEYOND)?;
    ensure!(&text, b"beyond");
    File::open(&path)?.read_exact_at(&mut text, 123)?;
    ensure!(text, [0; 6]);
    OpenOptions::new().write(true).open(&path)?.set_len(BEYOND - 1)?;
    ensure!(fs::metadata(&path)?.len(), BEYOND - 1);
    Ok(())
}

/// fcntl(2) on bytes `start` to `start + 10`. Locks of open file descriptions, so that one process can have several.
fn lock(file: &File, kind: libc::c_int, start: i64) -> io::Result<()> {
    // SAFETY: all zero is a valid flock; it outlives the call.
    let result = unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = kind as libc::c_short;
        lock.l_start = start;
        lock.l_len = 10;
        libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn record_locks(dir: &Path) -> Outcome {
    let (one, two) = (create(&dir.join("f"))?, create(&dir.join("f"))?);
    lock(&one, libc::F_WRLCK, 0)?;
    refused!(lock(&two, libc::F_WRLCK, 5), AGAIN);
    refused!(lock(&two, libc::F_RDLCK, 9), AGAIN);
    lock(&two, libc::F_WRLCK, 10)?;
    lock(&one, libc::F_UNLCK, 0)?;
    lock(&two, libc::F_RDLCK, 0)?;
    lock(&one, libc::F_RDLCK, 0)?;
    refused!(lock(&one, libc::F_WRLCK, 0), AGAIN);
    drop(two);
    lock(&one, libc::F_WRLCK, 0)?;
    Ok(())
}

fn whole_file_locks(dir: &Path) -> Outcome {
    let (one, two) = (create(&dir.join("f"))?, create(&dir.join("f"))?);
    rustix::fs::flock(&one, FlockOperation::LockExclusive)?;
    refused!(rustix::fs::flock(&two, FlockOperation::NonBlockingLockShared), AGAIN);
    let waiting = thread::spawn(move || rustix::fs::flock(&two, FlockOperation::LockExclusive));
    thread::sleep(Duration::from_millis(50));
    ensure!(!waiting.is_finished());
    rustix::fs::flock(&one, FlockOperation::Unlock)?;
    waiting.join().unwrap()?;
    Ok(())
}

fn renames(dir: &Path) -> Outcome {
    let [a, b, sub, full] = ["a", "b", "d", "full"].map(|name| dir.join(name));
    fs::write(&a, "a")?;
    fs::write(&b, "b")?;
    let mut open = File::open(&b)?;
    fs::rename(&a, &b)?;
    ensure!(fs::read_to_string(&b)?, "a");
    refused!(fs::metadata(&a), NOENT);
    // What was there is still what is open.
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    ensure!(text, "b");
    fs::create_dir(&sub)?;
    fs::create_dir(&full)?;
    fs::write(full.join("f"), "")?;
    refused!(fs::rename(&sub, &full), NOTEMPTY);
    refused!(fs::rename(&sub, sub.join("below")), INVAL);
    refused!(fs::rename(&b, &sub), ISDIR);
    refused!(fs::rename(&sub, &b), NOTDIR);
    fs::rename(full.join("f"), sub.join("moved"))?;
    fs::rename(&sub, &full)?;
    ensure!(full.join("moved").exists());
    Ok(())
}

fn renames_with_flags(dir: &Path) -> Outcome {
    let (a, b) = (dir.join("a"), dir.join("b"));
    fs::write(&a, "a")?;
    fs::create_dir(&b)?;
    let rename = |flags| rustix::fs::renameat_with(CWD, &a, CWD, &b, flags);
    refused!(rename(RenameFlags::NOREPLACE), EXIST);
    rename(RenameFlags::EXCHANGE)?;
    ensure!((fs::read_to_string(&b)?.as_str(), a.is_dir()), ("a", true));
    fs::remove_file(&b)?;
    refused!(rename(RenameFlags::EXCHANGE), NOENT);
    rename(RenameFlags::NOREPLACE)?;
    ensure!((a.exists(), b.is_dir()), (false, true));
    Ok(())
}

fn temporary_files(dir: &Path) -> Outcome {
    let open = |flags| {
        rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | flags, Mode::from_raw_mode(0o640))
    };
    let link = |file: &File, name: &Path| {
        let from = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(CWD, from, CWD, name, AtFlags::SYMLINK_FOLLOW)
    };
    let named = dir.join("named");
    let mut file = File::from(open(OFlags::empty())?);
    file.write_all(b"without a name")?;
    ensure!(file.metadata()?.nlink(), 0);
    ensure!(fs::read_dir(dir)?.count(), 0);
    link(&file, &named)?;
    ensure!(fs::read_to_string(&named)?, "without a name");
    ensure!((file.metadata()?.nlink(), mode(&named)?), (1, 0o640));
    let kept = File::from(open(OFlags::EXCL)?);
    refused!(link(&kept, &dir.join("never")), NOENT);
    Ok(())
}

fn mappings(dir: &Path) -> Outcome {
    let path = dir.join("f");
    let file = create(&path)?;
    file.set_len(8192)?;
    file.write_all_at(b"before", 0)?;
    // SAFETY: a new mapping of a file that stays as long, used in its bounds.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let map =
            |kind| libc::mmap(std::ptr::null_mut(), 8192, protection, kind, file.as_raw_fd(), 0);
        let (shared, private) = (map(libc::MAP_SHARED), map(libc::MAP_PRIVATE));
        ensure!(shared != libc::MAP_FAILED && private != libc::MAP_FAILED);
        let (shared, private) = (shared.cast::<u8>(), private.cast::<u8>());
        ensure!(std::slice::from_raw_parts(shared, 6), b"before");
        shared.copy_from(b"mapped".as_ptr(), 6);
        shared.add(5000).write(7);
        private.write(b'X');
        ensure!(libc::msync(shared.cast(), 8192, libc::MS_SYNC), 0);
        libc::munmap(shared.cast(), 8192);
        libc::munmap(private.cast(), 8192);
    }
    let text = fs::read(&path)?;
    ensure!(&text[..6], b"mapped");
    ensure!(text[5000], 7);
    Ok(())
}

fn large_directory(dir: &Path) -> Outcome {
    let entries =
        std::env::var("POSIX_ENTRIES").ok().and_then(|n| n.parse().ok()).unwrap_or(10_000);
    let sub = dir.join("d");
    fs::create_dir(&sub)?;
    for number in 0..entries {
        File::create(sub.join(format!("entry-{number}")))?;
    }
    let names: HashSet<_> =
        fs::read_dir(&sub)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    ensure!(names.len(), entries);
    ensure!(fs::read_dir(&sub)?.count(), entries);
    let mut total = 0;
    for entry in fs::read_dir(&sub)? {
        total += usize::from(entry?.metadata()?.is_file());
    }
    ensure!(total, entries);
    // Removing while reading misses none.
    for entry in fs::read_dir(&sub)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(&sub)?;
    Ok(())
}

fn directory_positions(dir: &Path) -> Outcome {
    for number in 0..500 {
        File::create(
            dir.join(format!("a-rather-long-name-so-that-several-reads-are-needed-{number}")),
        )?;
    }
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: the stream is open until the end, and its entries are copied before the next one is read.
    unsafe {
        let stream = libc::opendir(path.as_ptr());
        ensure!(!stream.is_null());
        let next = || {
            let entry = libc::readdir(stream);
            (!entry.is_null())
                .then(|| std::ffi::CStr::from_ptr((*entry).d_name.as_ptr()).to_owned())
        };
        let mut seen = Vec::new();
        loop {
            let position = libc::telldir(stream);
            let Some(name) = next() else { break };
            seen.push((position, name));
        }
        ensure!(seen.len(), 502);
        for (position, name) in seen.iter().rev().step_by(7) {
            libc::seekdir(stream, *position);
            ensure!(next().as_ref(), Some(name));
        }
        libc::rewinddir(stream);
        ensure!(next().as_ref(), Some(&seen[0].1));
        libc::closedir(stream);
    }
    Ok(())
}

fn names(dir: &Path) -> Outcome {
    let longest = [b'x'; 255];
    let odd: [&[u8]; 7] =
        [b"\xff\xfe\x80", b"new\nline", b" ", b"...", b"-rf", "\u{fc}".as_bytes(), &longest];
    for name in odd {
        fs::write(dir.join(OsStr::from_bytes(name)), name)?;
    }
    let listed: BTreeSet<Vec<u8>> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().as_bytes().to_owned()))
        .collect::<io::Result<_>>()?;
    ensure!(listed, odd.iter().map(|name| name.to_vec()).collect::<BTreeSet<_>>());
    for name in odd {
        ensure!(fs::read(dir.join(OsStr::from_bytes(name)))?, name);
    }
    refused!(create(&dir.join("x".repeat(256))), NAMETOOLONG);
    refused!(fs::metadata(dir.join("x".repeat(256))), NAMETOOLONG);
    // Names differ by case.
    fs::write(dir.join("\u{dc}"), "upper")?;
    ensure!(fs::read_to_string(dir.join("\u{fc}"))?, "\u{fc}");
    Ok(())
}

fn hard_links(dir: &Path) -> Outcome {
    let [a, b, link, other] = ["a", "b", "l", "m"].map(|name| dir.join(name));
    fs::write(&a, "one")?;
    fs::hard_link(&a, &b)?;
    let (first, second) = (fs::metadata(&a)?, fs::metadata(&b)?);
    ensure!((first.ino(), first.nlink()), (second.ino(), 2));
    fs::write(&b, "two")?;
    ensure!(fs::read_to_string(&a)?, "two");
    refused!(fs::hard_link(&a, &b), EXIST);
    refused!(fs::hard_link(dir, dir.join("d")), PERM);
    fs::remove_file(&a)?;
    ensure!(fs::metadata(&b)?.nlink(), 1);
    // Of a symbolic link itself.
    symlink("nowhere", &link)?;
    rustix::fs::linkat(CWD, &link, CWD, &other, AtFlags::empty())?;
    ensure!(fs::read_link(&other)?, PathBuf::from("nowhere"));
    // Renaming one name of a file to another does nothing.
    fs::hard_link(&b, &a)?;
    fs::rename(&a, &b)?;
    ensure!(a.exists() && b.exists());
    Ok(())
}

fn unlinked_but_open(dir: &Path) -> Outcome {
    let (path, sub) = (dir.join("f"), dir.join("d"));
    let mut file = create(&path)?;
    file.write_all(b"still here")?;
    fs::remove_file(&path)?;
    ensure!(file.metadata()?.nlink(), 0);
    file.write_all(b", and more")?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text, "still here, and more");
    file.set_len(5)?;
    ensure!(file.metadata()?.len(), 5);
    // Another one of that name is another file.
    fs::write(&path, "new")?;
    ensure!(fs::metadata(&path)?.ino() != file.metadata()?.ino());
    fs::create_dir(&sub)?;
    let open = rustix::fs::open(&sub, OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty())?;
    fs::remove_dir(&sub)?;
    refused!(rustix::fs::openat(&open, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU), NOENT);
    Ok(())
}

fn appending(dir: &Path) -> Outcome {
    let path = dir.join("f");
    create(&path)?;
    thread::scope(|scope| {
        for writer in 0..8u8 {
            let path = &path;
            scope.spawn(move || {
                let mut file = OpenOptions::new().append(true).open(path).unwrap();
                for _ in 0..200 {
                    file.write_all(&[b'a' + writer; 32]).unwrap();
                }
            });
        }
    });
    let text = fs::read(&path)?;
    ensure!(text.len(), 8 * 200 * 32);
    ensure!(text.chunks(32).all(|line| line.iter().all(|byte| byte == &line[0])));
    Ok(())
}

fn exclusive_creation(dir: &Path) -> Outcome {
    for round in 0..50 {
        let (path, barrier) = (dir.join(format!("f{round}")), Barrier::new(8));
        let won = thread::scope(|scope| {
            let try_it = || {
                barrier.wait();
                OpenOptions::new().write(true).create_new(true).open(&path).is_ok()
            };
            let tries: Vec<_> = (0..8).map(|_| scope.spawn(try_it)).collect();
            tries.into_iter().map(|t| t.join().unwrap()).filter(|won| *won).count()
        });
        ensure!(won, 1);
    }
    refused!(OpenOptions::new().write(true).create_new(true).open(dir.join("f0")), EXIST);
    Ok(())
}

fn timestamps(dir: &Path) -> Outcome {
    let (path, link) = (dir.join("f"), dir.join("l"));
    create(&path)?;
    symlink("f", &link)?;
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let set = |path: &Path, last_access, last_modification, flags| {
        let times = Timestamps { last_access, last_modification };
        rustix::fs::utimensat(CWD, path, &times, flags)
    };
    let times = |path: &Path| -> io::Result<_> {
        let m = fs::symlink_metadata(path)?;
        Ok(((m.atime(), m.atime_nsec()), (m.mtime(), m.mtime_nsec())))
    };
    for (access, modification) in [
        ((1, 1), (2, 999_999_999)),
        ((-86_400, 0), (-1, 500)),
        // 2106, beyond 32 bits.
        ((4_300_000_000, 7), (5_000_000_000, 8)),
    ] {
        let (a, m) = (time(access.0, access.1), time(modification.0, modification.1));
        set(&path, a, m, AtFlags::empty())?;
        ensure!(times(&path)?, (access, modification));
    }
    set(&path, time(0, UTIME_OMIT), time(33, 44), AtFlags::empty())?;
    ensure!(times(&path)?, ((4_300_000_000, 7), (33, 44)));
    set(&path, time(0, UTIME_NOW), time(0, UTIME_OMIT), AtFlags::empty())?;
    ensure!(times(&path)?.1, (33, 44));
    ensure!(times(&path)?.0.0 > 1_700_000_000);
    let before = times(&path)?;
    set(&link, time(11, 0), time(12, 0), AtFlags::SYMLINK_NOFOLLOW)?;
    ensure!(times(&link)?, ((11, 0), (12, 0)));
    ensure!(times(&path)?, before);
    // A write sets the time of modification.
    OpenOptions::new().write(true).open(&path)?.write_all(b"x")?;
    ensure!(times(&path)?.1.0 > 1_700_000_000);
    chmod(&path, 0o644)?;
    let refused = as_user(USER, USER, &[], || set(&path, time(1, 0), time(1, 0), AtFlags::empty()));
    refused!(refused, PERM);
    Ok(())
}

fn preallocation(dir: &Path) -> Outcome {
    let file = create(&dir.join("f"))?;
    let allocate = |mode, offset, length| rustix::fs::fallocate(&file, mode, offset, length);
    allocate(FallocateFlags::empty(), 0, 65_536)?;
    ensure!(file.metadata()?.len(), 65_536);
    ensure!(file.metadata()?.blocks() >= 128);
    allocate(FallocateFlags::KEEP_SIZE, 65_536, 65_536)?;
    ensure!(file.metadata()?.len(), 65_536);
    file.write_all_at(&[1; 16_384], 0)?;
    allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 4096, 4096)?;
    allocate(FallocateFlags::ZERO_RANGE, 8192, 4096)?;
    let mut data = [9; 16_384];
    file.read_exact_at(&mut data, 0)?;
    let zeros = data.iter().filter(|byte| **byte == 0).count();
    ensure!((zeros, data[4095], data[4096], data[12_288]), (8192, 1, 0, 1));
    refused!(allocate(FallocateFlags::empty(), 0, 0), INVAL);
    Ok(())
}

fn collapse_and_insert(dir: &Path) -> Outcome {
    let file = create(&dir.join("f"))?;
    file.write_all_at(&[1; 1 << 20], 0)?;
    rustix::fs::fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 65_536)?;
    rustix::fs::fallocate(&file, FallocateFlags::INSERT_RANGE, 0, 65_536)?;
    Ok(())
}

fn copy_file_range(dir: &Path) -> Outcome {
    let (from, to) = (create(&dir.join("from"))?, create(&dir.join("to"))?);
    let data: Vec<u8> = (0..300_000u32).map(|n| (n * 7919).to_le_bytes()[2]).collect();
    from.write_all_at(&data, 0)?;
    let (mut at, mut written) = (1000, 5);
    while at < data.len() as u64 {
        let copied =
            rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut written), 1 << 20)?;
        ensure!(copied > 0);
    }
    let mut copy = vec![0; data.len() - 1000];
    to.read_exact_at(&mut copy, 5)?;
    ensure!(copy == data[1000..]);
    ensure!(to.metadata()?.len(), data.len() as u64 - 995);
    Ok(())
}

fn truncation(dir: &Path) -> Outcome {
    let path = dir.join("f");
    fs::write(&path, "0123456789")?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    file.set_len(4)?;
    file.set_len(8)?;
    ensure!(fs::read(&path)?, b"0123\0\0\0\0");
    refused!(rustix::fs::ftruncate(File::open(&path)?, 1), INVAL);
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a NUL-terminated path.
    let by_name = |length| unsafe { libc::truncate(c_path.as_ptr(), length) };
    ensure!(by_name(2), 0);
    ensure!(fs::read(&path)?, b"01");
    ensure!(
        (by_name(-1), Errno::from_io_error(&io::Error::last_os_error())),
        (-1, Some(Errno::INVAL))
    );
    OpenOptions::new().write(true).truncate(true).open(&path)?;
    ensure!(file.metadata()?.len(), 0);
    Ok(())
}

fn symbolic_links(dir: &Path) -> Outcome {
    let [a, b, long, file] = ["a", "b", "long", "f"].map(|name| dir.join(name));
    let target = "x/".repeat(2000);
    symlink(&target, &long)?;
    ensure!(fs::read_link(&long)?, PathBuf::from(&target));
    ensure!(fs::symlink_metadata(&long)?.len(), 4000);
    symlink("f", &a)?;
    refused!(fs::read(&a), NOENT);
    fs::write(&file, "text")?;
    ensure!(fs::read_to_string(&a)?, "text");
    symlink("b", &b)?;
    refused!(fs::read(&b), LOOP);
    // As any text.
    let anything = dir.join("any");
    symlink(OsStr::from_bytes(b"../../..//\xff\n"), &anything)?;
    ensure!(fs::read_link(&anything)?.as_os_str().as_bytes(), b"../../..//\xff\n");
    refused!(symlink("", dir.join("empty")), NOENT);
    Ok(())
}

fn fifos_and_sockets(dir: &Path) -> Outcome {
    let (fifo, socket) = (dir.join("p"), dir.join("s"));
    rustix::fs::mknodat(CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RWXU, 0)?;
    ensure!(fs::metadata(&fifo)?.file_type().is_fifo());
    let path = fifo.clone();
    let writer = thread::spawn(move || fs::write(path, "through the fifo"));
    ensure!(fs::read_to_string(&fifo)?, "through the fifo");
    writer.join().unwrap()?;
    let listener = UnixListener::bind(&socket)?;
    ensure!(fs::metadata(&socket)?.file_type().is_socket());
    let mut client = UnixStream::connect(&socket)?;
    client.write_all(b"hello")?;
    let mut text = [0; 5];
    listener.accept()?.0.read_exact(&mut text)?;
    ensure!(&text, b"hello");
    Ok(())
}

fn device_nodes(dir: &Path) -> Outcome {
    let (kind, null) = (rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    rustix::fs::mknodat(CWD, dir.join("null"), kind, Mode::RWXU, null)?;
    ensure!(fs::metadata(dir.join("null"))?.file_type().is_char_device());
    Ok(())
}

fn directories(dir: &Path) -> Outcome {
    let (sub, file) = (dir.join("d"), dir.join("f"));
    fs::create_dir(&sub)?;
    refused!(fs::create_dir(&sub), EXIST);
    fs::write(&file, "")?;
    refused!(fs::create_dir(file.join("x")), NOTDIR);
    refused!(fs::remove_dir(&file), NOTDIR);
    refused!(fs::remove_file(&sub), ISDIR);
    fs::write(sub.join("f"), "")?;
    refused!(fs::remove_dir(&sub), NOTEMPTY);
    refused!(fs::remove_dir(dir.join(".")), INVAL);
    refused!(fs::remove_dir(dir.join("missing")), NOENT);
    fs::remove_file(sub.join("f"))?;
    fs::remove_dir(&sub)?;
    let deep = dir.join(vec!["d"; 100].join("/"));
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("f"), "deep")?;
    ensure!(fs::read_to_string(deep.join("../d/f"))?, "deep");
    ensure!(deep.join("../".repeat(100)).canonicalize()?, dir.canonicalize()?);
    Ok(())
}

fn opening(dir: &Path) -> Outcome {
    let (file, link) = (dir.join("f"), dir.join("l"));
    fs::write(&file, "text")?;
    symlink("f", &link)?;
    let open = |path: &Path, flags| rustix::fs::open(path, flags, Mode::RUSR).map(File::from);
    refused!(open(&dir.join("missing"), OFlags::RDONLY), NOENT);
    refused!(open(&file, OFlags::RDONLY | OFlags::DIRECTORY), NOTDIR);
    refused!(open(&link, OFlags::RDONLY | OFlags::NOFOLLOW), LOOP);
    refused!(open(dir, OFlags::WRONLY), ISDIR);
    refused!(open(dir, OFlags::RDONLY | OFlags::CREATE), ISDIR);
    refused!(open(&file.join("x"), OFlags::RDONLY), NOTDIR);
    refused!(open(&file, OFlags::RDONLY)?.write_all(b"x"), BADF);
    refused!(open(&file, OFlags::WRONLY)?.read_exact(&mut [0]), BADF);
    refused!(rustix::io::read(&open(dir, OFlags::RDONLY)?, &mut [0u8; 8][..]), ISDIR);
    // The mode is that of the next open, not of this one.
    let mut new = open(&dir.join("new"), OFlags::RDWR | OFlags::CREATE)?;
    new.write_all(b"x")?;
    let through = dir.join("through");
    symlink("made", &through)?;
    open(&through, OFlags::WRONLY | OFlags::CREATE)?;
    ensure!(dir.join("made").exists());
    open(&file, OFlags::RDONLY | OFlags::NOATIME)?;
    Ok(())
}

fn identity(dir: &Path) -> Outcome {
    let path = dir.join("f");
    let file = create(&path)?;
    let (by_name, by_file) = (fs::metadata(&path)?, file.metadata()?);
    ensure!((by_name.ino(), by_name.dev()), (by_file.ino(), by_file.dev()));
    ensure!(by_name.dev(), fs::metadata(dir)?.dev());
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        ensure!(std::os::unix::fs::DirEntryExt::ino(&entry), by_name.ino());
        ensure!(entry.file_type()?.is_file());
    }
    Ok(())
}

fn programs(dir: &Path) -> Outcome {
    let (script, program) = (dir.join("script"), dir.join("program"));
    fs::write(&script, "#!/bin/sh\necho \"$0 ran\"\n")?;
    chmod(&script, 0o644)?;
    refused!(Command::new(&script).output(), ACCESS);
    chmod(&script, 0o755)?;
    let said = Command::new(&script).output()?.stdout;
    ensure!(String::from_utf8(said)?, format!("{} ran\n", script.display()));
    fs::copy("/bin/true", &program)?;
    chmod(&program, 0o111)?;
    ensure!(Command::new(&program).status()?.success());
    Ok(())
}

fn concurrent_changes(dir: &Path) -> Outcome {
    let work = |worker: usize| -> io::Result<()> {
        for round in 0..50 {
            let (mine, next) = (dir.join(format!("{worker}")), dir.join(format!("{worker}.next")));
            fs::write(&next, format!("{worker} {round}"))?;
            fs::rename(&next, &mine)?;
            let read = fs::read_to_string(&mine)?;
            if read != format!("{worker} {round}") {
                return Err(io::Error::other(format!("{worker} {round} reads {read}")));
            }
            fs::create_dir(dir.join(format!("{worker}.d")))?;
            fs::read_dir(dir)?.for_each(drop);
            fs::remove_dir(dir.join(format!("{worker}.d")))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..8).map(|worker| scope.spawn(move || work(worker))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap())
    })?;
    ensure!(fs::read_dir(dir)?.count(), 8);
    Ok(())
}

fn contents(dir: &Path) -> Outcome {
    let path = dir.join("f");
    let mut state = 1u64;
    let data: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u8
    })
    .take(3_000_001)
    .collect();
    fs::write(&path, &data)?;
    ensure!(fs::read(&path)? == data);
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    for (at, length) in [(0, 1), (4095, 2), (131_071, 131_074), (2_999_999, 2), (1_000_000, 0)] {
        let mut part = vec![0; length];
        file.read_exact_at(&mut part, at)?;
        ensure!(part == data[at as usize..][..length]);
    }
    ensure!(file.read_at(&mut [0; 10], 3_000_001)?, 0);
    file.write_all_at(&[7; 200_000], 4_000_000)?;
    ensure!(file.metadata()?.len(), 4_200_000);
    let mut between = [1; 100];
    file.read_exact_at(&mut between, 3_500_000)?;
    ensure!(between, [0; 100]);
    Ok(())
}

fn direct_io(dir: &Path) -> Outcome {
    let path = dir.join("f");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::DIRECT;
    let file = File::from(rustix::fs::open(&path, flags, Mode::RUSR)?);
    let mut pages = vec![0u8; 3 * 4096];
    let start = pages.as_ptr().align_offset(4096);
    let page = &mut pages[start..][..4096];
    page.fill(5);
    file.write_all_at(page, 4096)?;
    page.fill(0);
    file.read_exact_at(page, 4096)?;
    ensure!(page.iter().all(|byte| *byte == 5));
    ensure!(fs::metadata(&path)?.len(), 8192);
    Ok(())
}

fn syncing(dir: &Path) -> Outcome {
    let mut file = create(&dir.join("f"))?;
    file.write_all(b"text")?;
    file.sync_data()?;
    file.sync_all()?;
    File::open(dir)?.sync_all()?;
    rustix::fs::syncfs(&file)?;
    let flags = OFlags::WRONLY | OFlags::SYNC;
    File::from(rustix::fs::open(dir.join("f"), flags, Mode::empty())?).write_all(b"more")?;
    Ok(())
}

/// Of changes made in the same kernel.
fn notification(dir: &Path) -> Outcome {
    // SAFETY: the descriptor is new, and nobody else's.
    let mut inotify = unsafe {
        let fd = libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK);
        let path = CString::new(dir.as_os_str().as_bytes())?;
        ensure!(libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_CREATE | libc::IN_DELETE) > 0);
        File::from_raw_fd(fd)
    };
    fs::write(dir.join("f"), "")?;
    fs::remove_file(dir.join("f"))?;
    let mut events = [0; 256];
    ensure!(inotify.read(&mut events)?, 2 * 32);
    Ok(())
}

fn inode_flags(dir: &Path) -> Outcome {
    let file = create(&dir.join("f"))?;
    rustix::fs::ioctl_getflags(&file)?;
    Ok(())
}

fn free_space(dir: &Path) -> Outcome {
    let stat = rustix::fs::statvfs(dir)?;
    ensure!(stat.f_bsize >= 512 && stat.f_blocks > 0 && stat.f_bavail <= stat.f_blocks);
    ensure!(stat.f_namemax, 255);
    Ok(())
}
