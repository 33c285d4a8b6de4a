//! What a VMM that was taken over could still use, seen from outside; for root and for an ordinary user.

use std::{
    env, fs,
    io::{self, Read, Write},
    net::TcpListener,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
    process::Command,
    thread,
};

use ampoule_tests::{Ampoule, ampoule, host_address, no_passt, run, skip, stage};
use tempfile::TempDir;

/// Runs until its standard input ends.
const WORKLOAD: [&str; 6] = ["-i", "alpine", "--", "sh", "-c", "echo ready; cat"];
const USER: u32 = 1000;

/// Every thread is without privileges and under a filter, in namespaces of its own, in an empty root.
fn check(pid: i32) {
    let process = Path::new("/proc").join(pid.to_string());
    for thread in fs::read_dir(process.join("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_string()
        };
        for capabilities in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(field(capabilities), "0000000000000000", "{capabilities} {status}");
        }
        assert_eq!((&*field("NoNewPrivs:"), &*field("Seccomp:")), ("1", "2"), "{status}");
    }
    for namespace in ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&process), of(Path::new("/proc/self")), "{namespace}");
    }
    assert_eq!(fs::read_dir(process.join("root")).unwrap().count(), 0);
    let network = fs::read_to_string(process.join("net/dev")).unwrap();
    let interfaces = network.lines().skip(2).filter(|line| !line.trim().starts_with("lo:"));
    assert_eq!(interfaces.count(), 0, "{network}");
    for descriptor in fs::read_dir(process.join("fd")).unwrap() {
        let path = descriptor.unwrap().path();
        let target = fs::read_link(&path).unwrap();
        // Disks may be files with a name; a folder would be a way to others.
        assert!(!path.is_dir(), "{}", target.display());
        let target = target.to_string_lossy().into_owned();
        let device = target.starts_with("/dev/") && !["/dev/kvm", "/dev/null"].contains(&&*target);
        assert!(!device, "{target}");
    }
}

#[test]
fn a_running_vmm_has_given_up_everything() {
    let mut running = run(WORKLOAD).spawn();
    running.wait_for("ready");
    check(running.vmm());
    running.finish().ended_with(0);
}

/// `ampoule` as a user who may open /dev/kvm and nothing else, with an installation and a store in `home`.
fn as_user(home: &Path, mut command: Ampoule) -> Ampoule {
    let script = "mount -t tmpfs none /mnt && mknod -m 666 /mnt/kvm c 10 232 && \
                  mount --bind /mnt/kvm /dev/kvm && chmod 666 /dev/net/tun && \
                  exec setpriv --reuid \"$0\" --regid \"$0\" --clear-groups \"$@\"";
    let mut other = Command::new("unshare");
    other.args(["-m", "sh", "-c", script, &USER.to_string()]);
    other.arg(home.join("ampoule/bin/ampoule")).args(command.command.get_args());
    other.env_clear().env("HOME", home).env("XDG_RUNTIME_DIR", home.join("run"));
    other.env("PATH", "/usr/bin:/bin").current_dir(home);
    command.command = other;
    command
}

#[test]
fn an_ordinary_user_needs_neither_root_nor_a_daemon() {
    let home = TempDir::new().unwrap();
    let path = home.path();
    let tar = env::var_os("AMPOULE_ALPINE_TAR").expect("AMPOULE_ALPINE_TAR names an Alpine root");
    fs::copy(tar, path.join("alpine.tar")).unwrap();
    let copy = Command::new("cp").arg("-rL").arg(stage()).arg(path.join("ampoule")).status();
    assert!(copy.unwrap().success());
    fs::create_dir(path.join("run")).unwrap();
    fs::create_dir(path.join("shared")).unwrap();
    for owned in [path, &path.join("run"), &path.join("shared"), &path.join("alpine.tar")] {
        chown(owned, Some(USER), Some(USER)).unwrap();
    }
    fs::set_permissions(path.join("run"), fs::Permissions::from_mode(0o700)).unwrap();

    as_user(path, ampoule(["image", "import", "alpine.tar", "alpine"])).output().ended_with(0);
    let script = "set -e; echo x > /data/new; stat -c %u /data/new; echo ready; cat";
    let shared = ["-v", "./shared:/data", "-i", "alpine", "--", "sh", "-c", script];
    let mut running = as_user(path, run(shared)).spawn();
    running.wait_for("0\nready");
    check(running.vmm());
    running.finish().ended_with(0);
    assert_eq!(fs::metadata(path.join("shared/new")).unwrap().uid(), USER);
    a_network_too(path);
    for place in [".local/share/ampoule", "run/ampoule"] {
        assert!(path.join(place).is_dir(), "{place}");
    }
}

/// With taps in a namespace that this user may make.
fn a_network_too(home: &Path) {
    if let Some(why) = no_passt() {
        return skip("an_ordinary_user_needs_neither_root_nor_a_daemon: --network user", why);
    }
    let host = TcpListener::bind((host_address().unwrap(), 0)).unwrap();
    let address = host.local_addr().unwrap();
    thread::spawn(move || -> io::Result<()> {
        let (mut stream, _) = host.accept()?;
        let _ = stream.read(&mut [0; 2000])?;
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello\n")
    });
    let script = format!("wget -qO- {address}");
    let words = run(["--network", "user", "alpine", "sh", "-c", &script]);
    assert_eq!(as_user(home, words).output().ended_with(0).text(), "hello");
    let words = run(["--network", "netns:/proc/1/ns/net", "alpine", "true"]);
    as_user(home, words).output().ended_with(125).says(&["/proc/1/ns/net", "ermission denied"]);
}
