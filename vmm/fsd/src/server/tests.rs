//! Requests as a guest could make them, well-formed and not, on a directory beside which lies a secret.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use ampoule_vmm_api::guest::replay;
use proptest::prelude::*;
use rustix::{
    fs::open,
    process::{getegid, geteuid, umask},
};

use super::*;
use crate::{
    abi::{IN_HEADER, LK_FLOCK, MAX_DATA, MAX_MESSAGE, OUT_HEADER, init},
    locks::{Kind, Range},
    worker,
};

const SECRET: &str = "what no guest may read";

/// A file server of one share, number 3, in this thread.
struct Guest {
    dir: tempfile::TempDir,
    server: Server,
    reply: Reply,
}

impl Guest {
    fn new() -> Self {
        Self::with_limits(1000, 100)
    }

    fn with_limits(nodes: usize, handles: usize) -> Self {
        let links = open("/proc/self/fd", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        worker::prepare(links.unwrap()).unwrap();
        // That of this thread, and of a request before this guest.
        umask(Mode::from_raw_mode(0o022));
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), SECRET).unwrap();
        let share = dir.path().join("share");
        fs::create_dir_all(share.join("d")).unwrap();
        fs::write(share.join("f"), "text").unwrap();
        symlink("../secret", share.join("l")).unwrap();
        symlink("..", share.join("up")).unwrap();
        let server = Server::new(Privileges::kept().unwrap(), nodes, handles);
        server.add_share(3, path(&share), false).unwrap();
        let mut guest = Self { dir, server, reply: Reply::new() };
        guest.ask(opcode::INIT, 0, &init_body()).unwrap();
        guest
    }

    fn share(&self) -> std::path::PathBuf {
        self.dir.path().join("share")
    }

    /// The body of the answer.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let ids = [geteuid().as_raw(), getegid().as_raw()];
        let answer = self.answer(&message(opcode, node, ids, body)).unwrap();
        let error = i32::from_ne_bytes(answer[4..8].try_into().unwrap());
        if error == 0 {
            Ok(answer[OUT_HEADER..].to_vec())
        } else {
            Err(Errno::from_raw_os_error(-error))
        }
    }

    fn answer(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        self.server.answer(message, &mut self.reply).map(<[u8]>::to_vec)
    }

    fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<u64, Errno> {
        let found = self.ask(opcode::LOOKUP, parent, &[name, b"\0"].concat())?;
        match u64_at(&found, 0) {
            0 => Err(Errno::NOENT),
            id => Ok(id),
        }
    }

    fn root(&mut self) -> u64 {
        self.lookup(ROOT_ID, b"3").unwrap()
    }

    fn open(&mut self, node: u64, flags: OFlags) -> Result<u64, Errno> {
        self.ask(opcode::OPEN, node, &words(&[flags.bits(), 0])).map(|opened| u64_at(&opened, 0))
    }

    /// That nothing but the share has changed.
    fn assert_unharmed(&self) {
        let secret = self.dir.path().join("secret");
        assert_eq!(fs::read_to_string(&secret).unwrap(), SECRET);
        assert_eq!(fs::metadata(&secret).unwrap().permissions().mode() & 0o7777, 0o644);
        let mut names: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["secret", "share"]);
    }
}

fn path(path: &Path) -> OwnedFd {
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn message(opcode: u32, node: u64, [uid, gid]: [u32; 2], body: &[u8]) -> Vec<u8> {
    let mut message = words(&[(IN_HEADER + body.len()) as u32, opcode]);
    message.extend(77u64.to_ne_bytes());
    message.extend(node.to_ne_bytes());
    message.extend(words(&[uid, gid, 1, 0]));
    message.extend(body);
    message
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn init_body() -> Vec<u8> {
    [words(&[7, 41, 128 << 10, u32::MAX, u32::MAX]), vec![0; 44]].concat()
}

/// struct fuse_read_in.
fn read_body(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [longs(&[handle, offset]), words(&[size, 0, 0, 0, 0, 0])].concat()
}

#[test]
fn no_name_leads_out_of_the_share() {
    let mut guest = Guest::new();
    let root = guest.root();
    let long = vec![b'x'; 5000];
    let bad: [&[u8]; 8] =
        [b"", b".", b"..", b"../secret", b"/etc/passwd", b"d/../../secret", b"d/", b"/"];
    for name in bad {
        assert_eq!(guest.lookup(root, name), Err(Errno::INVAL), "{name:?}");
        assert_eq!(guest.lookup(ROOT_ID, name), Err(Errno::INVAL), "{name:?}");
    }
    assert_eq!(guest.lookup(root, &long), Err(Errno::NAMETOOLONG));
    assert_eq!(guest.ask(opcode::LOOKUP, root, b"f"), Err(Errno::INVAL), "without its NUL");
    for name in [&b"03"[..], b"+3", b"4294967299", b"4", b"3 ", b"\xff"] {
        assert!(guest.lookup(ROOT_ID, name).is_err(), "{name:?}");
    }
    // A link is what the guest follows, never the server.
    let link = guest.lookup(root, b"l").unwrap();
    assert_eq!(guest.ask(opcode::READLINK, link, b"").unwrap(), b"../secret");
    assert_eq!(guest.open(link, OFlags::RDONLY), Err(Errno::NXIO));
    let up = guest.lookup(root, b"up").unwrap();
    assert!(guest.lookup(up, b"secret").is_err());
    assert!(guest.ask(opcode::OPENDIR, up, &words(&[0, 0])).is_err());
    let create = [words(&[OFlags::RDWR.bits(), 0o644, 0, 0]), b"l\0".to_vec()].concat();
    assert_eq!(guest.ask(opcode::CREATE, root, &create), Err(Errno::EXIST));
    guest.assert_unharmed();
}

#[test]
fn both_ends_of_a_rename_and_a_link_are_checked() {
    let mut guest = Guest::new();
    let root = guest.root();
    let file = guest.lookup(root, b"f").unwrap();
    let rename = |to: u64, names: &[u8]| [longs(&[to, 0]), names.to_vec()].concat();
    for names in [&b"f\0../x\0"[..], b"../secret\0x\0", b"f\0..\0", b"f\0/x\0", b"f\0", b"f\0x"] {
        assert_eq!(guest.ask(opcode::RENAME2, root, &rename(root, names)), Err(Errno::INVAL));
    }
    assert_eq!(guest.ask(opcode::RENAME2, root, &rename(ROOT_ID, b"f\0x\0")), Err(Errno::ROFS));
    assert_eq!(guest.ask(opcode::RENAME2, root, &rename(999, b"f\0x\0")), Err(Errno::STALE));
    let whiteout = [longs(&[root, 4]), b"f\0x\0".to_vec()].concat();
    assert_eq!(guest.ask(opcode::RENAME2, root, &whiteout), Err(Errno::INVAL));
    let link = [longs(&[file]), b"../x\0".to_vec()].concat();
    assert_eq!(guest.ask(opcode::LINK, root, &link), Err(Errno::INVAL));
    for body in
        [words(&[0o20666, 0x103, 0, 0]), words(&[0o60666, 0x800, 0, 0]), words(&[0o20000, 0, 0, 0])]
    {
        let device = [body, b"x\0".to_vec()].concat();
        assert_eq!(guest.ask(opcode::MKNOD, root, &device), Err(Errno::PERM));
    }
    guest.assert_unharmed();
}

#[test]
fn an_upper_directory_may_have_whiteouts_and_no_devices() {
    let mut guest = Guest::new();
    guest.server.remove_share(3).unwrap();
    guest.server.add_share(3, path(&guest.share()), true).unwrap();
    let root = guest.root();
    let mut make = |mode: u32, device: u32| {
        let node = [words(&[mode, device, 0, 0]), b"w\0".to_vec()].concat();
        guest.ask(opcode::MKNOD, root, &node).map(|_| ())
    };
    for (mode, device) in [(0o20666, 0x103), (0o60000, 0), (0o60666, 0x800)] {
        assert_eq!(make(mode, device), Err(Errno::PERM), "{mode:o} {device:x}");
    }
    make(0o20000, 0).unwrap();
    let made = fs::symlink_metadata(guest.share().join("w")).unwrap();
    assert_eq!((made.mode(), made.rdev()), (0o20000, 0));
    guest.assert_unharmed();
}

#[test]
fn numbers_that_were_never_given_are_errors() {
    let mut guest = Guest::new();
    let root = guest.root();
    let file = guest.lookup(root, b"f").unwrap();
    let handle = guest.open(file, OFlags::RDWR).unwrap();
    assert_eq!(guest.ask(opcode::READ, file, &read_body(handle, 0, 100)).unwrap(), b"text");
    for node in [0, 2000, u64::MAX] {
        assert_eq!(guest.lookup(node, b"f"), Err(Errno::STALE));
        assert_eq!(guest.ask(opcode::READ, node, &read_body(handle, 0, 1)), Err(Errno::STALE));
    }
    for number in [0, handle + 1, u64::MAX] {
        assert_eq!(guest.ask(opcode::READ, file, &read_body(number, 0, 1)), Err(Errno::BADF));
    }
    // Another file's handle.
    assert_eq!(guest.ask(opcode::READ, root, &read_body(handle, 0, 1)), Err(Errno::BADF));
    let release = [longs(&[handle]), vec![0; 16]].concat();
    assert_eq!(guest.ask(opcode::RELEASE, root, &release), Err(Errno::BADF));
    guest.ask(opcode::RELEASE, file, &release).unwrap();
    assert_eq!(guest.ask(opcode::RELEASE, file, &release), Err(Errno::BADF));
    assert_eq!(guest.server.handles.count(), 0);
}

#[test]
fn sizes_beyond_a_message_are_cut_or_refused() {
    let mut guest = Guest::new();
    let root = guest.root();
    let file = guest.lookup(root, b"f").unwrap();
    let handle = guest.open(file, OFlags::RDWR).unwrap();
    fs::write(guest.share().join("f"), vec![1; 1 << 20]).unwrap();
    let read = guest.ask(opcode::READ, file, &read_body(handle, 0, u32::MAX)).unwrap();
    assert_eq!(read.len(), MAX_DATA);
    assert!(guest.reply.len() + OUT_HEADER <= MAX_MESSAGE);
    let end = guest.ask(opcode::READ, file, &read_body(handle, u64::MAX, 1));
    assert_eq!(end, Err(Errno::INVAL));
    // A write that says more than it brings.
    let write = [longs(&[handle, 0]), words(&[100, 0, 0, 0, 0, 0]), vec![0; 99]].concat();
    assert_eq!(guest.ask(opcode::WRITE, file, &write), Err(Errno::INVAL));
    let list = words(&[u32::MAX, 0]);
    assert!(guest.ask(opcode::LISTXATTR, file, &list).is_ok());
    let set = [words(&[u32::MAX, 0, 0, 0]), b"user.x\0v".to_vec()].concat();
    assert_eq!(guest.ask(opcode::SETXATTR, file, &set), Err(Errno::INVAL));
    let forget = words(&[u32::MAX, 0]);
    let message = message(opcode::BATCH_FORGET, 0, [0, 0], &forget);
    assert_eq!(guest.answer(&message), None);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let mut guest = Guest::new();
    let whole = message(opcode::GETATTR, ROOT_ID, [0, 0], &[0; 16]);
    for cut in 0..IN_HEADER {
        assert_eq!(guest.answer(&whole[..cut]), None, "nobody to answer to");
    }
    for cut in IN_HEADER..whole.len() {
        let answer = guest.answer(&whole[..cut]).unwrap();
        assert_eq!(i32::from_ne_bytes(answer[4..8].try_into().unwrap()), -libc::EINVAL);
        assert_eq!(u64_at(&answer, 8), 77);
    }
    // More extensions than bytes.
    let mut extended = whole.clone();
    extended[36] = 0xff;
    assert!(guest.answer(&extended).unwrap()[4] != 0);
}

#[test]
fn what_the_guest_knows_and_holds_is_bounded() {
    let mut guest = Guest::with_limits(10, 5);
    let root = guest.root();
    for number in 0..20 {
        fs::write(guest.share().join(format!("n{number}")), "").unwrap();
    }
    let found: Vec<_> =
        (0..20).map(|number| guest.lookup(root, format!("n{number}").as_bytes())).collect();
    assert_eq!(found.iter().filter(|found| found.is_ok()).count(), 9);
    assert_eq!(found[9], Err(Errno::NFILE));
    // Reading the directory goes on, without telling of files.
    let opened = guest.ask(opcode::OPENDIR, root, &words(&[0, 0])).unwrap();
    let listed =
        guest.ask(opcode::READDIRPLUS, root, &read_body(u64_at(&opened, 0), 0, 1 << 16)).unwrap();
    assert!(listed.len() > 20 * 150);
    assert_eq!(guest.server.nodes.count(), 10);
    // What is forgotten makes room.
    let first = found[0].unwrap();
    let message = message(opcode::FORGET, first, [0, 0], &longs(&[u64::MAX]));
    assert_eq!(guest.answer(&message), None);
    assert!(guest.lookup(root, b"n15").is_ok());

    let node = found[1].unwrap();
    let handles: Vec<_> = (0..6).map(|_| guest.open(node, OFlags::RDONLY)).collect();
    assert_eq!(handles[5], Err(Errno::NFILE));
    // DESTROY, or another INIT, begins anew.
    guest.ask(opcode::INIT, 0, &init_body()).unwrap();
    assert_eq!((guest.server.nodes.count(), guest.server.handles.count()), (0, 0));
}

#[test]
fn a_guest_that_forgets_when_it_is_asked_to_finds_files_without_end() {
    let mut guest = Guest::with_limits(40, 5);
    let (hints, theirs) = Channel::pair().unwrap();
    guest.server.tell(theirs).unwrap();
    let root = guest.root();
    let name = |n: usize| format!("n{n}").into_bytes();
    for n in 0..300 {
        fs::write(guest.share().join(format!("n{n}")), "").unwrap();
    }
    let mut known = Vec::new();
    for n in 0..300 {
        known.push(guest.lookup(root, &name(n)).unwrap());
        if matches!(hints.recv(), Ok((Hint::Crowded, _))) {
            assert!(known.len() >= 29, "it is asked after {}", known.len());
            for node in known.drain(..) {
                guest.answer(&message(opcode::FORGET, node, [0, 0], &longs(&[1])));
            }
        }
    }
    assert!(known.len() < 30, "it is not asked any more");

    // What is in use has an end, and others find what is known already.
    let first = (0..300).find(|n| guest.lookup(root, &name(*n)) == Err(Errno::NFILE));
    assert!(first.is_some_and(|n| n >= 10), "{first:?}");
    assert!(guest.lookup(root, b"n0").is_ok());
}

#[test]
fn a_file_is_one_node_however_often_it_is_found() {
    let mut guest = Guest::new();
    let root = guest.root();
    fs::hard_link(guest.share().join("f"), guest.share().join("g")).unwrap();
    let first = guest.lookup(root, b"f").unwrap();
    assert_eq!(guest.lookup(root, b"g"), Ok(first));
    let forget = |count| message(opcode::FORGET, first, [0, 0], &longs(&[count]));
    guest.answer(&forget(1));
    assert!(guest.ask(opcode::GETATTR, first, &[0; 16]).is_ok());
    guest.answer(&forget(1));
    assert_eq!(guest.ask(opcode::GETATTR, first, &[0; 16]), Err(Errno::STALE));
    // A number is never given twice.
    assert!(guest.lookup(root, b"f").unwrap() > first);
}

#[test]
fn a_removed_share_takes_along_what_was_open() {
    let mut guest = Guest::new();
    let root = guest.root();
    let file = guest.lookup(root, b"f").unwrap();
    let handle = guest.open(file, OFlags::RDONLY).unwrap();
    guest.server.remove_share(3).unwrap();
    assert_eq!(guest.ask(opcode::READ, file, &read_body(handle, 0, 1)), Err(Errno::STALE));
    assert_eq!(guest.lookup(root, b"f"), Err(Errno::STALE));
    assert_eq!(guest.lookup(ROOT_ID, b"3"), Err(Errno::NOENT));
    assert_eq!((guest.server.nodes.count(), guest.server.handles.count()), (0, 0));
}

#[test]
fn where_nobody_watches_nothing_is_only_repeated() {
    let mut guest = Guest::new();
    let root = guest.root();
    let ids = [geteuid().as_raw(), replay::DELETE];
    let answer = guest.answer(&message(opcode::UNLINK, root, ids, b"f\0")).unwrap();
    assert_eq!(answer[4..8], [0; 4]);
    assert!(!guest.share().join("f").exists());
}

#[test]
fn what_is_only_repeated_does_nothing() {
    let mut guest = Guest::new();
    guest.server.watch(Watch::new().unwrap()).unwrap();
    let root = guest.root();
    let file = guest.lookup(root, b"f").unwrap();
    let mut repeat = |gid, opcode, node, body: &[u8]| {
        let answer = guest.answer(&message(opcode, node, [geteuid().as_raw(), gid], body)).unwrap();
        -i32::from_ne_bytes(answer[4..8].try_into().unwrap())
    };
    let set_size = [words(&[8, 0]), vec![0; 80]].concat();
    for (gid, opcode, node, body, errno) in [
        (replay::DELETE, opcode::UNLINK, root, &b"f\0"[..], 0),
        (replay::DELETE_DIR, opcode::RMDIR, root, b"d\0", 0),
        (replay::CHANGE, opcode::SETATTR, file, &set_size, 0),
        (replay::CREATE, opcode::MKDIR, root, &[&[0; 8], &b"new\0"[..]].concat(), 0),
        (replay::CREATE, opcode::MKNOD, root, &[&[0; 16], &b"new\0"[..]].concat(), 0),
        (replay::CREATE, opcode::SYMLINK, root, b"l\0f\0", 0),
        (replay::MOVE, opcode::LOOKUP, root, b"f\0", 0),
        (replay::MOVE, opcode::LOOKUP, root, b"new\0", 0),
        (replay::MOVE, opcode::RENAME2, root, &[], 0),
        (replay::MOVE_DIR, opcode::RENAME, root, &[], 0),
        (replay::MOVE, opcode::UNLINK, root, b"f\0", libc::EPERM),
        (replay::CREATE, opcode::UNLINK, root, b"f\0", libc::EPERM),
        (replay::CHANGE, opcode::RENAME2, root, &[], libc::EPERM),
        (replay::DELETE, opcode::WRITE, file, &[0; 40], libc::EPERM),
    ] {
        assert_eq!(repeat(gid, opcode, node, body), errno);
    }
    let mut names: Vec<_> =
        fs::read_dir(guest.share()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["d", "f", "l", "up"]);
    assert_eq!(fs::read_to_string(guest.share().join("f")).unwrap(), "text");
}

/// struct fuse_lk_in.
fn lock_body(handle: u64, owner: u64, bytes: [u64; 2], kind: i32, flags: u32) -> Vec<u8> {
    [longs(&[handle, owner, bytes[0], bytes[1]]), words(&[kind as u32, 0, flags, 0])].concat()
}

#[test]
fn locks_hold_against_others_until_they_are_released() {
    let mut guest = Guest::new();
    let root = guest.root();
    let file = guest.lookup(root, b"f").unwrap();
    let handle = guest.open(file, OFlags::RDWR).unwrap();
    let name = guest.share().join("f");
    let open_it = || fs::File::options().read(true).write(true).open(&name).unwrap();
    let on_host = open_it();
    let (others, owner) = (Locks::new(1, 1), (0, 0));
    let theirs = || {
        let bytes = Range::new(10, 19).unwrap();
        others.set(owner, (0, 0), bytes, Kind::Exclusive, || Ok(open_it().into()))
    };
    let mut ask = |opcode, owner, bytes, kind| {
        guest.ask(opcode, file, &lock_body(handle, owner, bytes, kind, 0))
    };
    assert_eq!(theirs(), Ok(()));
    let all = [0, i64::MAX as u64];
    assert_eq!(ask(opcode::SETLK, 1, all, libc::F_RDLCK), Err(Errno::AGAIN));
    let found = ask(opcode::GETLK, 1, all, libc::F_RDLCK).unwrap();
    assert_eq!(found, [longs(&[10, 19]), words(&[libc::F_WRLCK as u32, 0])].concat());
    assert_eq!(ask(opcode::SETLK, 1, [20, 29], libc::F_WRLCK), Ok(vec![]));
    assert_eq!(ask(opcode::SETLK, 2, [20, 20], libc::F_RDLCK), Err(Errno::AGAIN));
    others.clear();
    assert_eq!(ask(opcode::SETLK, 1, [0, 15], libc::F_WRLCK), Ok(vec![]));
    assert_eq!(theirs(), Err(Errno::AGAIN));
    assert_eq!(ask(opcode::SETLK, 1, [0, 15], libc::F_UNLCK), Ok(vec![]));
    assert_eq!(theirs(), Ok(()));
    others.clear();
    assert_eq!(ask(opcode::SETLK, 3, [10, 10], libc::F_RDLCK), Ok(vec![]));
    for (owner, bytes, kind) in [(1, [2, 1], 0), (1, [0, 1 << 63], 0), (1, [0, 0], 7)] {
        assert_eq!(ask(opcode::SETLK, owner, bytes, kind), Err(Errno::INVAL));
    }

    // flock(2), which is the open file's.
    let whole = |kind| lock_body(handle, 0, all, kind, LK_FLOCK);
    rustix::fs::flock(&on_host, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(guest.ask(opcode::SETLK, file, &whole(libc::F_RDLCK)), Err(Errno::AGAIN));
    rustix::fs::flock(&on_host, rustix::fs::FlockOperation::Unlock).unwrap();
    assert_eq!(guest.ask(opcode::SETLK, file, &whole(libc::F_WRLCK)), Ok(vec![]));
    let share = rustix::fs::FlockOperation::NonBlockingLockShared;
    assert_eq!(rustix::fs::flock(&on_host, share), Err(Errno::AGAIN));

    // What is closed has none, though nobody unlocked it.
    guest.ask(opcode::RELEASE, file, &[longs(&[handle]), vec![0; 16]].concat()).unwrap();
    assert_eq!((theirs(), rustix::fs::flock(&on_host, share)), (Ok(()), Ok(())));
    let closed = guest.ask(opcode::SETLK, file, &lock_body(handle, 1, [0, 0], libc::F_RDLCK, 0));
    assert_eq!(closed, Err(Errno::BADF));
}

#[test]
fn locks_are_for_a_kernel_that_waits_for_them_itself() {
    let mut guest = Guest::new();
    let offered = |guest: &mut Guest, more: u32| {
        let body = [words(&[7, 41, 128 << 10, u32::MAX, more]), vec![0; 44]].concat();
        let reply = guest.ask(opcode::INIT, 0, &body).unwrap();
        u64_at(&reply, 12) & (init::POSIX_LOCKS | init::FLOCK_LOCKS)
    };
    assert_eq!(offered(&mut guest, !(1 << 30)), 0);
    assert_eq!(offered(&mut guest, 1 << 30), init::POSIX_LOCKS | init::FLOCK_LOCKS);
}

#[test]
fn an_old_or_strange_driver_is_refused() {
    let mut guest = Guest::new();
    for body in [
        words(&[6, 41, 0, u32::MAX, u32::MAX]),
        words(&[8, 0, 0, u32::MAX, u32::MAX]),
        words(&[7, 12, 0, u32::MAX, u32::MAX]),
        words(&[7, 41, 0, 0, 0]),
    ] {
        assert_eq!(guest.ask(opcode::INIT, 0, &body), Err(Errno::PROTO));
    }
    assert_eq!(guest.ask(opcode::INIT, 0, &[]), Err(Errno::INVAL));
    assert_eq!(guest.ask(4096, ROOT_ID, &[]), Err(Errno::NOSYS));
}

/// Numbers that mean something, or nearly.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..12, Just(u64::MAX), Just(1 << 63), Just(4096), any::<u64>()]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let usual = ["f", "d", "l", "up", "n", "..", ".", "", "/", "../secret", "d/x", "3", "secret"];
    prop_oneof![
        proptest::sample::select(usual.to_vec()).prop_map(|name| name.as_bytes().to_vec()),
        proptest::collection::vec(any::<u8>(), 0..300),
    ]
}

/// A body of numbers, then names, then bytes: most operations find what they look for.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let parts = (
        proptest::collection::vec(number(), 0..8),
        proptest::collection::vec(name(), 0..3),
        proptest::collection::vec(any::<u8>(), 0..16),
    );
    parts.prop_map(|(numbers, names, rest)| {
        let names = names.into_iter().flat_map(|name| [name, vec![0]].concat());
        longs(&numbers).into_iter().chain(names).chain(rest).collect()
    })
}

fn request() -> impl Strategy<Value = Vec<u8>> {
    let replay = (replay::CREATE..=replay::MOVE_DIR).prop_map(|gid| [0, gid]);
    let ids = prop_oneof![Just([0, 0]), Just([1000, 1000]), replay, any::<[u32; 2]>()];
    let usual = (1u32..56, number(), ids, body())
        .prop_map(|(opcode, node, ids, body)| message(opcode, node, ids, &body));
    prop_oneof![20 => usual, 1 => proptest::collection::vec(any::<u8>(), 0..200)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_requests_do_harm(requests in proptest::collection::vec(request(), 1..60)) {
        let mut guest = Guest::with_limits(20, 10);
        guest.server.watch(Watch::new().unwrap()).unwrap();
        let root = guest.root();
        guest.lookup(root, b"f").unwrap();
        for request in requests {
            let Some(answer) = guest.answer(&request) else { continue };
            prop_assert!(answer.len() <= MAX_MESSAGE);
            prop_assert_eq!(u64::from(u32::from_ne_bytes(answer[..4].try_into().unwrap())), answer.len() as u64);
            let error = i32::from_ne_bytes(answer[4..8].try_into().unwrap());
            prop_assert!((-4095..=0).contains(&error));
            prop_assert!(error == 0 || answer.len() == OUT_HEADER);
            prop_assert_eq!(&answer[8..16], &request[8..16]);
            let told = answer.windows(SECRET.len()).any(|bytes| bytes == SECRET.as_bytes());
            prop_assert!(!told);
        }
        prop_assert!(guest.server.nodes.count() <= 20 && guest.server.handles.count() <= 10);
        guest.assert_unharmed();
    }
}
