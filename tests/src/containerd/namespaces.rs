//! Mount, PID and network namespaces for one containerd, with a `/run` of their own. Everything inside ends with them.

use std::{
    ffi::OsStr,
    fs::{self, File},
    net::TcpStream,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::LIMIT;
use crate::program;

const SET_UP: &str = "set -e; ip link set lo up; mount -t tmpfs -o mode=755 run /run; \
    mkdir -p /run/lock /run/test/tmp; touch /run/test/ready; exec catatonit -P";

/// The cgroup is the root of its PID 1 and of nobody outside.
const CGROUP: &str = "echo 0 > $0/cgroup.procs && exec unshare --cgroup sh -c \"$1\"";

/// With a PID 1 that serves D-Bus, and makes scopes. Nothing else of a boot: that would clear /tmp.
const SYSTEMD: &str = "set -e; ip link set lo up; mount -t tmpfs -o mode=755 run /run; \
    umount /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup; mkdir -p /run/lock /run/test/tmp /run/systemd/system; \
    printf '[Unit]\\nRequires=dbus.socket\\nAfter=dbus.socket\\n' > /run/systemd/system/test.target; \
    for unit in dbus.socket dbus.service; do mkdir /run/systemd/system/$unit.d; \
    printf '[Unit]\\nDefaultDependencies=no\\n' > /run/systemd/system/$unit.d/alone.conf; done; \
    exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=test.target";
const BUS: &str = "/run/dbus/system_bus_socket";

/// Alive as long as their PID 1, which waits for orphans.
pub struct Namespaces {
    unshare: Child,
    /// PID 1 as this side sees it.
    pid: u32,
    /// Where all that is inside is, if that matters.
    cgroup: Option<PathBuf>,
}

/// A process inside, as it is seen there.
#[derive(Debug)]
pub struct Process {
    pub pid: i32,
    pub args: Vec<String>,
}

impl Process {
    /// Its program without a path.
    pub fn program(&self) -> &str {
        self.args[0].rsplit('/').next().unwrap_or_default()
    }
}

impl Namespaces {
    /// Says why where this process may not make them.
    pub fn new() -> Result<Self, String> {
        let mut unshare = Command::new("setpriv");
        unshare.args(["--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork"]);
        unshare.args(["--kill-child", "--mount-proc", "sh", "-c", SET_UP]);
        Self::begin(unshare, None, "/run/test/ready")
    }

    /// With systemd for PID 1, in a cgroup namespace besides.
    pub fn with_systemd() -> Result<Self, String> {
        let root = Path::new("/sys/fs/cgroup");
        let needed =
            ["/sys/fs/cgroup/cgroup.controllers", "/lib/systemd/systemd", "/usr/bin/dbus-daemon"];
        if let Some(missing) = needed.iter().find(|path| !Path::new(path).exists()) {
            return Err(format!("{missing} is not there"));
        }
        // What it is to hand on it must have.
        fs::write(root.join("cgroup.subtree_control"), "+cpu +io +memory +pids")
            .map_err(|e| format!("{}: {e}", root.display()))?;
        let cgroup = root.join(format!("ampoule-test-{}", std::process::id()));
        // What systemd does not know is left alone by it.
        fs::create_dir_all(cgroup.join("tests"))
            .map_err(|e| format!("{}: {e}", cgroup.display()))?;
        let mut unshare = Command::new("setpriv");
        unshare.args(["--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--ipc"]);
        unshare.args(["--uts", "--fork", "--kill-child", "--mount-proc", "sh", "-c", CGROUP]);
        unshare.arg(&cgroup).arg(SYSTEMD);
        unshare.stdout(Stdio::null()).stderr(Stdio::null());
        Self::begin(unshare, Some(cgroup), BUS)
    }

    fn begin(mut unshare: Command, cgroup: Option<PathBuf>, ready: &str) -> Result<Self, String> {
        let mut unshare = unshare.stdin(Stdio::null()).spawn().expect("util-linux");
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let deadline = Instant::now() + LIMIT;
        loop {
            let pid = fs::read_to_string(&children).unwrap_or_default().trim().parse();
            if let Ok(pid) = pid
                && fs::exists(format!("/proc/{pid}/root{ready}")).unwrap_or_default()
            {
                return Ok(Self { unshare, pid, cgroup });
            }
            if let Ok(Some(status)) = unshare.try_wait() {
                return Err(format!("no namespaces of its own here: {status}"));
            }
            assert!(Instant::now() < deadline, "no namespaces");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// A path inside as this side reaches it.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let inside = inside.strip_prefix("/").unwrap_or(inside);
        Path::new("/proc").join(self.pid.to_string()).join("root").join(inside)
    }

    /// A command inside.
    pub fn command(&self, name: impl AsRef<OsStr>) -> Command {
        let enter = ["--target", &self.pid.to_string(), "--mount", "--net", "--pid"];
        let mut command = match &self.cgroup {
            None => Command::new("nsenter"),
            Some(cgroup) => {
                let mut command = Command::new("sh");
                let script = "echo 0 > $0/tests/cgroup.procs && exec nsenter --cgroup \"$@\"";
                command.args(["-c", script]).arg(cgroup);
                command
            }
        };
        command.args(enter).arg("--").arg(name);
        command
    }

    /// Connects to a server inside, by an address as it is there.
    pub fn connect(&self, address: &str) -> TcpStream {
        let namespace = File::open(format!("/proc/{}/ns/net", self.pid)).expect("a namespace");
        // A namespace is a thread's, and this one ends.
        let connecting = || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).expect("root's rights");
            TcpStream::connect(address)
        };
        let connected = thread::scope(|scope| scope.spawn(connecting).join().expect("a thread"));
        connected.unwrap_or_else(|e| panic!("{address}: {e}"))
    }

    pub fn kill(&self, signal: &str, pid: i32) {
        let mut kill = self.command("kill");
        kill.args(["-s", signal, &pid.to_string()]);
        program(kill).output().ended_with(0);
    }

    /// Processes inside, zombies and kernel threads aside.
    pub fn processes(&self) -> Vec<Process> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.path("/proc")).into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let args = line.split(|b| *b == 0).map(|arg| String::from_utf8_lossy(arg).into_owned());
            if !line.is_empty() {
                found.push(Process { pid, args: args.collect() });
            }
        }
        found
    }

    /// Mount points inside, each with its source.
    pub fn mounts(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("/proc/1/mountinfo")).expect("mounts");
        let words = |line: &str| line.split(' ').skip(3).take(2).collect::<Vec<_>>().join(" at ");
        text.lines().map(words).collect()
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        if let Some(cgroup) = &self.cgroup {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            let deadline = Instant::now() + LIMIT;
            // From its leaves on, once all have ended.
            let mut remove = Command::new("find");
            remove.arg(cgroup).args(["-depth", "-type", "d", "-delete"]).stderr(Stdio::null());
            while !remove.status().is_ok_and(|status| status.success()) && Instant::now() < deadline
            {
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
}
