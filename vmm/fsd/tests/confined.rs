//! The process as the host sees it, started by root and by an ordinary user.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use ampoule_fsd_api::{Access, Fsd};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair},
    process::geteuid,
};

const NOBODY: u32 = 65534;
const EXE: &str = "AMPOULE_TEST_FSD";

/// A file server that serves `share` under 0, and its guest.
struct Guest {
    fsd: Fsd,
    requests: OwnedFd,
}

impl Guest {
    fn new(exe: &Path, share: &Path) -> Self {
        let fsd = Fsd::spawn(exe, "test", Duration::from_secs(10)).unwrap();
        let path = openat(CWD, share, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        fsd.add(0, path.as_fd(), Access::Write, None).unwrap();
        let (requests, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        fsd.serve(theirs).unwrap();
        let mut guest = Self { fsd, requests };
        let init = [7, 41, 0, u32::MAX, u32::MAX, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        guest.ask(26, 0, 0, &init.map(u32::to_ne_bytes).concat()).unwrap();
        guest
    }

    /// The body of the answer, or its errno.
    fn ask(&mut self, opcode: u32, node: u64, uid: u32, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut message = [40 + body.len() as u32, opcode].map(u32::to_ne_bytes).concat();
        message.extend([1, node].map(u64::to_ne_bytes).concat());
        message.extend([uid, uid, 1, 0].map(u32::to_ne_bytes).concat());
        message.extend(body);
        send(&self.requests, &message, SendFlags::NOSIGNAL).unwrap();
        let mut answer = vec![0; 4096];
        let (_, length) = recv(&self.requests, &mut answer[..], RecvFlags::empty()).unwrap();
        answer.truncate(length);
        match i32::from_ne_bytes(answer[4..8].try_into().unwrap()) {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> u64 {
        let found = self.ask(1, parent, 0, format!("{name}\0").as_bytes()).unwrap();
        u64::from_ne_bytes(found[..8].try_into().unwrap())
    }

    fn make_directory(&mut self, parent: u64, uid: u32, name: &str) -> Result<Vec<u8>, i32> {
        let body = [[0o755, 0o022].map(u32::to_ne_bytes).concat(), format!("{name}\0").into()];
        self.ask(9, parent, uid, &body.concat())
    }

    /// A line of its `/proc/PID/status`, for each thread.
    fn status(&self, field: &str) -> Vec<String> {
        let tasks = fs::read_dir(self.proc("task")).unwrap();
        let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).unwrap();
        let value = |status: String| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            line.trim_start_matches(':').trim().to_owned()
        };
        tasks.map(|task| value(status(task.unwrap()))).collect()
    }

    fn proc(&self, name: &str) -> std::path::PathBuf {
        // The first thing asked of it, through its parent's list of children.
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        let pid = children.split_whitespace().next_back().unwrap().to_owned();
        Path::new("/proc").join(pid).join(name)
    }
}

fn share() -> tempfile::TempDir {
    let share = tempfile::tempdir().unwrap();
    fs::set_permissions(share.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(share.path().join("f"), "text").unwrap();
    share
}

#[test]
fn roots_file_server_holds_nothing_but_its_shares() {
    if !geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let share = share();
    let mut guest = Guest::new(Path::new(env!("CARGO_BIN_EXE_ampoule-fsd")), share.path());
    let root = guest.lookup(1, "0");
    guest.lookup(root, "f");
    guest.make_directory(root, 1234, "d").unwrap();
    let made = fs::metadata(share.path().join("d")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 1234);

    assert_eq!(fs::read_dir(guest.proc("root")).unwrap().count(), 0);
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let theirs = fs::read_link(guest.proc("ns").join(namespace)).unwrap();
        assert_ne!(theirs, fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap());
    }
    let mounts = fs::read_to_string(guest.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP: of its user namespace.
    let kept = "00000000800000db";
    for (field, value) in [
        ("CapPrm", kept),
        ("CapEff", kept),
        ("CapBnd", kept),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Groups", ""),
    ] {
        let values = guest.status(field);
        assert_eq!(values.len(), 9);
        assert!(values.iter().all(|found| found == value), "{field} {values:?}");
    }
    // Ends with its shim.
    let Guest { mut fsd, .. } = guest;
    fsd.process().kill();
    fsd.process().wait().unwrap();
}

#[test]
fn an_ordinary_user_shares_as_root_of_a_user_namespace() {
    if geteuid().is_root() {
        // Once more, as somebody else, who must be able to read the program.
        let programs = tempfile::tempdir().unwrap();
        fs::set_permissions(programs.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (test, fsd) = (programs.path().join("test"), programs.path().join("fsd"));
        // Not by this process: what another test executes meanwhile would have them open for writing.
        let copy = |from: &Path, to: &Path| {
            assert!(Command::new("cp").args([from, to]).status().unwrap().success());
        };
        copy(&std::env::current_exe().unwrap(), &test);
        copy(Path::new(env!("CARGO_BIN_EXE_ampoule-fsd")), &fsd);
        let name = "an_ordinary_user_shares_as_root_of_a_user_namespace";
        let output = Command::new(test)
            .args(["--exact", name, "--nocapture"])
            .env(EXE, fsd)
            .env("TMPDIR", "/tmp")
            .uid(NOBODY)
            .gid(NOBODY)
            .current_dir("/")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let exe = std::env::var(EXE).unwrap_or_else(|_| env!("CARGO_BIN_EXE_ampoule-fsd").to_owned());
    let share = share();
    let mut guest = Guest::new(Path::new(&exe), share.path());
    let root = guest.lookup(1, "0");
    guest.lookup(root, "f");
    // The guest's root is this user; others there are none.
    guest.make_directory(root, 0, "d").unwrap();
    let made = fs::metadata(share.path().join("d")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), geteuid().as_raw());
    assert_eq!(guest.make_directory(root, 1234, "e"), Err(libc::EOVERFLOW));
    assert!(!share.path().join("e").exists());
}
