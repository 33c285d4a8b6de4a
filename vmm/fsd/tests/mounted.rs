//! Shares as this machine's kernel sees them through `/dev/fuse`.

#![allow(clippy::unwrap_used)]

mod relay;

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, symlink},
        },
    },
    path::Path,
    time::{Duration, Instant},
};

use ampoule_fsd_api::message::{Access, Change, Hint, Moved};
use ampoule_vmm_api::{Channel, guest::replay};
use relay::{Mounted, impossible};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{
        AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, Uid, chownat, fallocate, inotify,
        mkdirat, mknodat, openat, renameat, statat, symlinkat, unlinkat,
    },
    io::Errno,
};

#[test]
fn files_of_a_share_are_those_of_the_host() {
    if impossible().is_some() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "of the host").unwrap();
    let single = host.path().join("single");
    fs::write(&single, "alone").unwrap();
    let mounted = Mounted::new(&[(host.path(), false), (host.path(), true), (&single, false)]);
    let (share, read_only) = (mounted.share(0), mounted.share(1));
    assert_eq!(fs::read_to_string(share.join("a")).unwrap(), "of the host");
    fs::write(share.join("b"), "of the guest").unwrap();
    assert_eq!(fs::read_to_string(host.path().join("b")).unwrap(), "of the guest");

    // The same directory, read-only.
    assert_eq!(fs::read_to_string(read_only.join("b")).unwrap(), "of the guest");
    for refused in [
        fs::write(read_only.join("b"), "no"),
        fs::write(read_only.join("c"), "no"),
        fs::remove_file(read_only.join("b")),
        fs::create_dir(read_only.join("d")),
        fs::set_permissions(read_only.join("b"), fs::metadata(&single).unwrap().permissions()),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    }

    // A file alone, which has no directory.
    let alone = mounted.share(2);
    assert_eq!(fs::read_to_string(&alone).unwrap(), "alone");
    fs::write(&alone, "written").unwrap();
    assert_eq!(fs::read_to_string(&single).unwrap(), "written");
    assert!(fs::metadata(alone.join("..")).is_err());

    // The root lists the shares, and is nobody's to change.
    let mut names: Vec<_> =
        fs::read_dir(&mounted.root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["0", "1", "2"]);
    assert!(fs::write(mounted.root.join("x"), "no").is_err());
    let across = fs::rename(share.join("b"), read_only.join("c")).unwrap_err();
    assert_eq!(Errno::from_io_error(&across), Some(Errno::XDEV));
}

#[test]
fn what_the_host_changes_is_seen_within_a_second() {
    if impossible().is_some() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    let file = host.path().join("a");
    fs::write(&file, "before").unwrap();
    let mounted = Mounted::new(&[(host.path(), false)]);
    let (seen, new) = (mounted.share(0).join("a"), mounted.share(0).join("new"));
    assert_eq!(fs::read_to_string(&seen).unwrap(), "before");
    assert!(!new.exists());
    fs::write(&file, "after it").unwrap();
    fs::write(host.path().join("new"), "").unwrap();
    let changed = Instant::now();
    while fs::metadata(&seen).unwrap().len() != 8 || !new.exists() {
        assert!(changed.elapsed() < Duration::from_secs(1));
    }
    assert_eq!(fs::read_to_string(&seen).unwrap(), "after it");
    fs::remove_file(&file).unwrap();
    let changed = Instant::now();
    while seen.exists() {
        assert!(changed.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn a_hundred_thousand_files_are_each_listed_once() {
    if impossible().is_some() {
        return;
    }
    const FILES: usize = 100_000;
    let host = tempfile::tempdir().unwrap();
    for number in 0..FILES {
        fs::File::create(host.path().join(format!("file-{number}"))).unwrap();
    }
    let mut mounted = Mounted::new(&[(host.path(), false)]);
    for _ in 0..2 {
        let entries = fs::read_dir(mounted.share(0)).unwrap();
        let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), FILES);
        assert_eq!(names.into_iter().collect::<HashSet<_>>().len(), FILES);
    }
    let pid = mounted.fsd.process().pid().as_raw_nonzero();
    let status = format!("/proc/{pid}/status");
    let status = fs::read_to_string(status).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 64 << 10, "{peak} KiB for what the guest knows");
}

#[test]
fn shares_come_and_go_and_a_killed_server_is_an_error_at_once() {
    if impossible().is_some() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "a").unwrap();
    let mut mounted = Mounted::new(&[(host.path(), false)]);
    let later = relay::path_of(host.path());
    mounted.fsd.add(7, later.as_fd(), Access::Read, None).unwrap();
    assert_eq!(fs::read_to_string(mounted.share(7).join("a")).unwrap(), "a");
    assert!(mounted.fsd.add(7, later.as_fd(), Access::Read, None).is_err());
    let late = mounted.fsd.watch(Channel::pair().unwrap().0).unwrap_err();
    assert!(late.to_string().contains("served already"), "{late}");
    mounted.fsd.remove(7).unwrap();
    assert!(mounted.fsd.remove(7).is_err());
    assert!(fs::write(mounted.share(7).join("a"), "no").is_err());

    let open = fs::File::open(mounted.share(0).join("a")).unwrap();
    mounted.fsd.process().kill();
    mounted.fsd.process().wait().unwrap();
    let killed = Instant::now();
    let error = std::io::Read::read(&mut &open, &mut [0; 4]).unwrap_err();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::IO));
    assert!(fs::write(mounted.share(0).join("b"), "b").is_err());
    assert!(killed.elapsed() < Duration::from_secs(2));
}

/// The directory, or the file shared alone, that a hint is about: as the agent finds it, by its number.
fn find(share: &Path, node: u64, flags: OFlags) -> OwnedFd {
    let root = fs::File::open(share).unwrap();
    // struct file_handle: FILEID_INO64_GEN.
    let handle = [12, 0x81, (node >> 32) as u32, node as u32, 0];
    let (root, flags) = (root.as_raw_fd(), flags.bits());
    // SAFETY: the handle is a whole one; the descriptor is new.
    unsafe {
        let fd = libc::syscall(libc::SYS_open_by_handle_at, root, &raw const handle, flags);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

fn punch(file: OwnedFd) -> Result<(), Errno> {
    let nothing = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, nothing, 1 << 40, 4096)
}

/// What the agent does with a hint: says it again, so that whoever watches in its kernel is told.
fn replay(share: &Path, change: &Change) {
    if change.place.name.is_empty() {
        let open = || punch(find(share, change.place.node, OFlags::WRONLY));
        return as_group(replay::CHANGE, open).unwrap();
    }
    let directory = find(share, change.place.node, OFlags::PATH);
    let name = OsStr::from_bytes(&change.place.name);
    let (mode, none) = (Mode::from_raw_mode(0o600), AtFlags::empty());
    let stat = || statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    if change.created {
        let kind = FileType::from_raw_mode(stat().st_mode);
        as_group(replay::CREATE, || match kind {
            FileType::Directory => mkdirat(&directory, name, mode),
            FileType::Symlink => symlinkat("x", &directory, name),
            kind => mknodat(&directory, name, kind, mode, 0),
        })
        .unwrap();
    }
    if change.written {
        as_group(replay::CHANGE, || {
            punch(openat(&directory, name, OFlags::WRONLY, Mode::empty())?)
        })
        .unwrap();
    }
    if change.attributes {
        let now = stat();
        let (uid, gid) = (Uid::from_raw(now.st_uid), Gid::from_raw(now.st_gid));
        let chown = || chownat(&directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW);
        as_group(replay::CHANGE, chown).unwrap();
    }
    if change.deleted && change.is_dir {
        as_group(replay::DELETE_DIR, || unlinkat(&directory, name, AtFlags::REMOVEDIR)).unwrap();
    } else if change.deleted {
        as_group(replay::DELETE, || unlinkat(&directory, name, none)).unwrap();
    }
}

fn repeat_move(share: &Path, Moved { from, to, is_dir }: &Moved) {
    let [old, new] = [from, to].map(|place| find(share, place.node, OFlags::PATH));
    let [from, to] = [from, to].map(|place| OsStr::from_bytes(&place.name));
    let group = if *is_dir { replay::MOVE_DIR } else { replay::MOVE };
    as_group(group, || renameat(&old, from, &new, to)).unwrap();
}

/// The calling thread's group for files, while `act` runs.
fn as_group<T>(gid: u32, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    // SAFETY: takes a number.
    unsafe { libc::setfsgid(gid) };
    let result = act();
    // SAFETY: as before.
    unsafe { libc::setfsgid(0) };
    result
}

/// Waits for a hint. `None` if there is none for so long.
fn hint(hints: &Channel, patience: Duration) -> Option<Hint> {
    let patience = Timespec { tv_sec: 0, tv_nsec: patience.as_nanos() as i64 };
    match poll(&mut [PollFd::new(hints, PollFlags::IN)], Some(&patience)).unwrap() {
        0 => None,
        _ => Some(hints.recv().unwrap().0),
    }
}

/// An inotify instance that watches a directory.
fn watch(directory: &Path) -> OwnedFd {
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    let events = inotify::WatchFlags::CREATE
        | inotify::WatchFlags::DELETE
        | inotify::WatchFlags::MODIFY
        | inotify::WatchFlags::CLOSE_WRITE
        | inotify::WatchFlags::MOVE
        | inotify::WatchFlags::ATTRIB;
    inotify::add_watch(&watch, directory, events).unwrap();
    watch
}

fn noticed(watch: &OwnedFd) -> Vec<(inotify::ReadFlags, String)> {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch, &mut buffer);
    let mut noticed = Vec::new();
    while let Ok(event) = reader.next() {
        let name = event.file_name().map(|name| name.to_str().unwrap().to_owned());
        noticed.push((event.events(), name.unwrap_or_default()));
    }
    noticed
}

#[test]
fn who_watches_a_share_learns_what_the_host_changes() {
    if impossible().is_some() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    fs::create_dir(host.path().join("sub")).unwrap();
    let (hints, theirs) = Channel::pair().unwrap();
    // Read-only, where no event could come about by doing something.
    let alone = host.path().join("alone");
    fs::write(&alone, "").unwrap();
    let shares = [(host.path(), true), (host.path(), false), (&*alone, true)];
    let mounted = Mounted::prepared(&shares, |fsd| fsd.watch(theirs).unwrap());
    let share = mounted.share(0);
    let container = watch(&share.join("sub"));
    let container_alone = watch(&mounted.share(2));
    let on_host = |name: &str| host.path().join("sub").join(name);

    let expect = |act: &dyn Fn(), expected: &[(inotify::ReadFlags, &str)]| {
        act();
        while let Some(hint) = hint(&hints, Duration::from_millis(300)) {
            match hint {
                Hint::Changed(change) => replay(&mounted.share(change.place.share), &change),
                Hint::Moved(moved) => repeat_move(&share, &moved),
                Hint::Lost | Hint::Crowded => panic!("nothing is lost"),
            }
        }
        let noticed = noticed(&container);
        for (event, name) in expected {
            let found = noticed.iter().any(|(events, of)| events.contains(*event) && of == name);
            assert!(found, "{event:?} {name} is not in {noticed:?}");
        }
    };
    use inotify::ReadFlags as Is;
    expect(
        &|| fs::write(on_host("f"), "text").unwrap(),
        &[(Is::CREATE, "f"), (Is::MODIFY, "f"), (Is::CLOSE_WRITE, "f")],
    );
    assert_eq!(fs::read_to_string(share.join("sub/f")).unwrap(), "text");
    expect(&|| fs::write(on_host("f"), "more").unwrap(), &[(Is::MODIFY, "f")]);
    expect(
        &|| fs::set_permissions(on_host("f"), fs::Permissions::from_mode(0o640)).unwrap(),
        &[(Is::ATTRIB, "f")],
    );
    expect(
        &|| fs::rename(on_host("f"), on_host("g")).unwrap(),
        &[(Is::MOVED_FROM, "f"), (Is::MOVED_TO, "g")],
    );
    expect(&|| fs::create_dir(on_host("d")).unwrap(), &[(Is::CREATE | Is::ISDIR, "d")]);
    expect(&|| fs::remove_dir(on_host("d")).unwrap(), &[(Is::DELETE | Is::ISDIR, "d")]);
    assert_eq!(fs::read_to_string(share.join("sub/g")).unwrap(), "more");
    let up = host.path().join("up");
    expect(&|| fs::rename(on_host("g"), &up).unwrap(), &[(Is::MOVED_FROM, "g")]);
    expect(&|| fs::rename(&up, on_host("g")).unwrap(), &[(Is::MOVED_TO, "g")]);
    let outside = host.path().with_extension("outside");
    expect(&|| fs::rename(on_host("g"), &outside).unwrap(), &[(Is::DELETE, "g")]);
    expect(&|| fs::rename(&outside, on_host("h")).unwrap(), &[(Is::CREATE, "h")]);
    expect(&|| symlink("h", on_host("new")).unwrap(), &[(Is::CREATE, "new")]);
    // As a kubelet does it.
    expect(
        &|| fs::rename(on_host("new"), on_host("h")).unwrap(),
        &[(Is::MOVED_FROM, "new"), (Is::MOVED_TO, "h")],
    );
    assert_eq!(fs::read_link(share.join("sub/h")).unwrap(), Path::new("h"));
    expect(&|| fs::remove_file(on_host("h")).unwrap(), &[(Is::DELETE, "h")]);
    expect(&|| fs::write(&alone, "text").unwrap(), &[]);
    assert!(noticed(&container_alone).iter().any(|(events, _)| events.contains(Is::MODIFY)));
    assert_eq!(fs::read_to_string(mounted.share(2)).unwrap(), "text");
    // Nothing was done on the host for it.
    assert_eq!(fs::read_dir(on_host("")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(share.join("sub")).unwrap().count(), 0);

    // What the guest does itself is no news.
    fs::write(mounted.share(1).join("sub/mine"), "text").unwrap();
    assert_eq!(hint(&hints, Duration::from_millis(200)), None);
}

#[test]
fn a_thousand_changes_in_a_second_are_all_told() {
    if impossible().is_some() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    let (hints, theirs) = Channel::pair().unwrap();
    let mounted = Mounted::prepared(&[(host.path(), false)], |fsd| fsd.watch(theirs).unwrap());
    assert_eq!(fs::read_dir(mounted.share(0)).unwrap().count(), 0);
    for number in 0..1000 {
        fs::write(host.path().join(format!("{number}")), "").unwrap();
    }
    let mut told = HashSet::new();
    while let Some(hint) = hint(&hints, Duration::from_millis(300)) {
        match hint {
            Hint::Changed(change) => drop(told.insert(change.place.name)),
            Hint::Moved(_) | Hint::Lost | Hint::Crowded => panic!("the kernel keeps 16,384 events"),
        }
    }
    assert_eq!(told.len(), 1000);
    assert_eq!(fs::read_dir(mounted.share(0)).unwrap().count(), 1000);
}
