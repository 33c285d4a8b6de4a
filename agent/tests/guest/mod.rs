//! A guest without a VM: the agent as PID 1 of a PID and mount namespace of its own, with this test as
//! its host on the other end of vsock's loopback. Needs root, cgroup v2 and loop devices: the bed.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use ampoule_agent_api::{AGENT_PORT, agent::*, agent_ttrpc::AgentClient};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Mutex, MutexGuard},
    task::JoinHandle,
    time::timeout,
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use ttrpc::{r#async::transport::Socket, context};

const BOUND: Duration = Duration::from_secs(60);
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
static PORT: AtomicU32 = AtomicU32::new(5000);

pub struct Guest {
    pub agent: AgentClient,
    process: Child,
    _turn: MutexGuard<'static, ()>,
}

/// One process, with its streams.
pub struct Run {
    pub container: String,
    pub exec: String,
    pub stdin: Option<VsockStream>,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

pub struct Output {
    pub status: u32,
    pub oom_kills: u64,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Output {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

impl Guest {
    pub async fn boot() -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        prepare_machine();
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, AGENT_PORT)).unwrap();
        let process = Command::new("unshare")
            .args(["--pid", "--mount", "--uts", "--net", "--fork", "--kill-child"])
            .arg(env!("CARGO_BIN_EXE_ampoule-agent"))
            .process_group(0)
            .spawn()
            .unwrap();
        let (stream, _) = timeout(BOUND, listener.accept()).await.unwrap().unwrap();
        let client = ttrpc::r#async::Client::new(Socket::new(stream));
        Self { agent: AgentClient::new(client), process, _turn: turn }
    }

    /// Creates a container and connects its streams.
    pub async fn create(&self, id: &str, spec: Value) -> ttrpc::Result<Run> {
        self.create_on(id, spec, root_fs::Upper::TMPFS).await
    }

    pub async fn create_on(
        &self,
        id: &str,
        spec: Value,
        upper: root_fs::Upper,
    ) -> ttrpc::Result<Run> {
        if upper == root_fs::Upper::DISK {
            sh_on_host("mkfs.ext4 -q -F -O ^has_journal /dev/vdc");
        }
        let (stdio, streams) = listen(spec["process"]["terminal"] == true);
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: serde_json::to_vec(&spec).unwrap(),
            rootfs: Some(RootFs {
                lowers: vec![root_fs::Lower {
                    slot: 1,
                    type_: "erofs".into(),
                    ..Default::default()
                }],
                upper: upper.into(),
                upper_slot: 2,
                ..Default::default()
            })
            .into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.agent.create_container(context(), &request).await?;
        Ok(streams.await.unwrap().of(id, ""))
    }

    /// Adds a process to a container and connects its streams.
    pub async fn exec(&self, id: &str, exec: &str, process: Value) -> ttrpc::Result<Run> {
        let (stdio, streams) = listen(process["terminal"] == true);
        let request = CreateExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: serde_json::to_vec(&process).unwrap(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.agent.create_exec(context(), &request).await?;
        Ok(streams.await.unwrap().of(id, exec))
    }

    pub async fn start(&self, run: &Run) -> ttrpc::Result<StartResponse> {
        self.agent.start(context(), &run.request()).await
    }

    /// Starts it, closes its stdin, waits for its end and its output, and deletes it.
    pub async fn finish(&self, mut run: Run) -> Output {
        let started = self.start(&run).await.unwrap();
        assert_eq!(started.failure.value(), 0, "{}", started.message);
        run.stdin = None;
        let output = self.wait(&mut run).await;
        self.agent.delete(context(), &run.request()).await.unwrap();
        output
    }

    pub async fn wait(&self, run: &mut Run) -> Output {
        let exit = self.agent.wait(context(), &run.request()).await.unwrap();
        Output {
            status: exit.status,
            oom_kills: exit.oom_kills,
            stdout: run.stdout().await,
            stderr: run.stderr().await,
        }
    }

    /// Creates a container, runs it to its end, and deletes it.
    pub async fn run(&self, spec: Value) -> Output {
        let run = self.create("c", spec).await.unwrap();
        self.finish(run).await
    }

    pub async fn signal(&self, run: &Run, signal: i32, all: bool) -> ttrpc::Result<Empty> {
        let request = SignalRequest {
            container_id: run.container.clone(),
            exec_id: run.exec.clone(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.agent.signal(context(), &request).await
    }

    /// Switches off, and checks that nothing is left.
    pub async fn shutdown(self) {
        let _ = self.agent.shutdown(context(), &Empty::new()).await;
        self.abandon().await;
    }

    /// Closes the connection, waits for the end, and checks that nothing is left.
    pub async fn abandon(mut self) {
        drop(self.agent);
        let ended = tokio::task::spawn_blocking(move || self.process.wait().unwrap());
        timeout(BOUND, ended).await.unwrap().unwrap();
        let left = fs::read_dir("/sys/fs/cgroup/containers").unwrap();
        let left: Vec<_> =
            left.flatten().filter(|e| e.file_type().unwrap().is_dir()).map(|e| e.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Run {
    fn of(mut self, container: &str, exec: &str) -> Self {
        (self.container, self.exec) = (container.into(), exec.into());
        self
    }

    pub fn request(&self) -> ProcessRequest {
        ProcessRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            ..Default::default()
        }
    }

    pub async fn stdout(&mut self) -> Vec<u8> {
        read(self.stdout.take()).await
    }

    pub async fn stderr(&mut self) -> Vec<u8> {
        read(self.stderr.take()).await
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).await.unwrap();
    }
}

async fn read(stream: Option<JoinHandle<Vec<u8>>>) -> Vec<u8> {
    match stream {
        Some(stream) => timeout(BOUND, stream).await.unwrap().unwrap(),
        None => Vec::new(),
    }
}

pub fn context() -> context::Context {
    context::with_duration(BOUND)
}

/// Names ports for the streams of a process, and accepts their connections.
fn listen(terminal: bool) -> (Stdio, JoinHandle<Run>) {
    let port = || PORT.fetch_add(1, Ordering::Relaxed);
    let bind = |port| VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).unwrap();
    let stdio = Stdio {
        stdin: port(),
        stdout: port(),
        stderr: if terminal { 0 } else { port() },
        ..Default::default()
    };
    let (stdin, stdout) = (bind(stdio.stdin), bind(stdio.stdout));
    let stderr = (!terminal).then(|| bind(stdio.stderr));
    let streams = tokio::spawn(async move {
        let stdin = stdin.accept().await.unwrap().0;
        let stdout = collect(stdout.accept().await.unwrap().0);
        let stderr = match stderr {
            Some(stderr) => Some(collect(stderr.accept().await.unwrap().0)),
            None => None,
        };
        Run {
            container: String::new(),
            exec: String::new(),
            stdin: Some(stdin),
            stdout: Some(stdout),
            stderr,
        }
    });
    (stdio, streams)
}

fn collect(mut stream: VsockStream) -> JoinHandle<Vec<u8>> {
    tokio::spawn(async move {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        bytes
    })
}

/// A spec like docker's, for a command.
pub fn spec(args: &[&str]) -> Value {
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let namespaces = namespaces.map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.1.0",
        "hostname": "inside",
        "root": {"path": "rootfs"},
        "process": process(args),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": namespaces,
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi",
                            "/sys/firmware", "/proc/nothing"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                              "/proc/sysrq-trigger"],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}]
            }
        }
    })
}

pub const CAPABILITIES: [&str; 4] = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_MKNOD"];

pub fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": true,
        "capabilities": {
            "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 512, "hard": 1024}]
    })
}

pub fn sh(script: &str) -> Value {
    spec(&["/bin/sh", "-c", script])
}

/// The modules, and disks in slots 1 (an Alpine) and 2 (scratch). Once.
fn prepare_machine() {
    if Path::new("/dev/vdb").exists() {
        return;
    }
    sh_on_host("modprobe vsock_loopback && modprobe erofs && modprobe overlay && modprobe loop");
    let tar = std::env::var_os("AMPOULE_ALPINE_TAR").map(PathBuf::from);
    let tar = tar.expect("AMPOULE_ALPINE_TAR names the tar of an Alpine root");
    sh_on_host(&format!(
        "d=$(mktemp -d) && mkdir $d/root && tar -xf {} -C $d/root &&
         mkfs.erofs --quiet $d/alpine.erofs $d/root && truncate -s 256M $d/scratch && rm -r $d/root &&
         disk() {{ mknod /dev/$2 b 7 $(losetup --show -f $1 | tr -dc 0-9); }} &&
         disk $d/alpine.erofs vdb && disk $d/scratch vdc",
        tar.display()
    ));
}

fn sh_on_host(script: &str) {
    let done = Command::new("sh").args(["-ec", script]).status().unwrap();
    assert!(done.success(), "{script}");
}
