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

/// Alive as long as their PID 1, which waits for orphans.
pub struct Namespaces {
    unshare: Child,
    /// PID 1 as this side sees it.
    pid: u32,
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
        let mut unshare = unshare.stdin(Stdio::null()).spawn().expect("util-linux");
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let deadline = Instant::now() + LIMIT;
        loop {
            let pid = fs::read_to_string(&children).unwrap_or_default().trim().parse();
            if let Ok(pid) = pid
                && fs::exists(format!("/proc/{pid}/root/run/test/ready")).unwrap_or_default()
            {
                return Ok(Self { unshare, pid });
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
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--mount", "--net", "--pid", "--"]);
        command.arg(name);
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
    }
}
