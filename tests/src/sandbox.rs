//! A sandbox with several containers, through the library: what the command line has no words for.

use std::{path::Path, time::Duration};

use ampoule_shim::{
    id::Id,
    image::{Reference, Store},
    paths::{Environment, Paths},
    rootfs::{self, Mount},
    run_spec::{RunOptions, run_spec},
    sandbox::{
        ContainerConfig, Event, ExecConfig, Exit, FIRST_DISK, ProcessId, RootFs, Sandbox,
        SandboxConfig, Stdio, Streams,
    },
};
use tokio::{io::AsyncReadExt, sync::mpsc::UnboundedReceiver, time::timeout};

use crate::{root, stage};

/// No step of these tests takes longer, even in the bed.
const LIMIT: Duration = Duration::from_secs(60);

/// What a process printed and how it ended.
#[derive(Debug)]
pub struct Ended {
    pub exit: Exit,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Ended {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_string()
    }
}

/// A sandbox whose containers all are Alpine, each on a disk of its own.
pub struct Pod {
    pub sandbox: Sandbox,
    pub events: UnboundedReceiver<Event>,
    roots: Vec<RootFs>,
}

pub fn id(name: &str) -> Id {
    name.parse().expect("an id")
}

pub fn init(container: &str) -> ProcessId {
    ProcessId::init(id(container))
}

/// What a pod is made from, without disks.
pub fn config(name: &str) -> SandboxConfig {
    let paths = paths();
    SandboxConfig {
        name: id(name),
        hostname: name.into(),
        vcpus: 2,
        memory_mib: 256,
        vmm: paths.vmm,
        kernel: paths.kernel,
        guest_image: paths.guest,
        disks: Vec::new(),
        spare_disks: 4,
        network: None,
        cmdline: String::new(),
        seeded: false,
        oom_score_adj: 0,
        boot_timeout: LIMIT,
        fsd: None,
    }
}

fn paths() -> Paths {
    Paths::new(&Environment {
        exe: stage().join("bin/ampoule"),
        root: Some(root().into()),
        ..Environment::default()
    })
}

impl Pod {
    /// Boots a VM with root file systems for `containers` containers.
    pub async fn boot(name: &str, containers: u8) -> Self {
        let paths = paths();
        let store = Store::open(&paths.store).expect("the image store");
        let image = store.resolve(&"alpine".parse::<Reference>().expect("a name")).expect("alpine");
        let (mut disks, mut roots) = (Vec::new(), Vec::new());
        for slot in (FIRST_DISK..).take(containers.into()) {
            let mounts = [Mount::image(&image.rootfs)];
            let prepared = rootfs::prepare(&store, &mounts, Path::new(""), None);
            let (disk, rootfs) = prepared.expect("a rootfs").from_slot(slot);
            disks.extend(disk);
            roots.push(rootfs);
        }
        roots.reverse();
        let config = SandboxConfig { disks, ..config(name) };
        let (sandbox, events) = Sandbox::create(config).await.expect("a sandbox");
        Self { sandbox, events, roots }
    }

    /// Creates a container on the next free root file system: `sh -c SCRIPT`.
    pub async fn create(&mut self, name: &str, script: &str) -> Streams {
        let rootfs = self.roots.pop().expect("a free root file system");
        self.create_on(name, script, rootfs).await
    }

    /// Creates a container on this root file system.
    pub async fn create_on(&self, name: &str, script: &str, rootfs: RootFs) -> Streams {
        let options = RunOptions {
            command: ["sh", "-c", script].map(String::from).into(),
            hostname: name.into(),
            memory: 64 << 20,
            ..RunOptions::default()
        };
        let spec = run_spec(&Default::default(), &options).expect("a spec");
        let config = ContainerConfig {
            id: id(name),
            spec,
            rootfs,
            upper: None,
            stdio: Stdio { stdin: true, stdout: true, stderr: true },
            files: Vec::new(),
            binds: Vec::new(),
            shares: Vec::new(),
            joins: None,
            init: false,
            fixed: Default::default(),
        };
        self.sandbox.create_container(config).await.expect("a container").streams
    }

    /// Creates and starts it.
    pub async fn start(&mut self, name: &str, script: &str) -> Streams {
        let streams = self.create(name, script).await;
        self.sandbox.start(&init(name)).await.expect("it starts");
        streams
    }

    /// Runs `sh -c SCRIPT` in a container to its end, and forgets it.
    pub async fn exec(&self, container: &str, name: &str, script: &str) -> Ended {
        let options = RunOptions {
            command: ["sh", "-c", script].map(String::from).into(),
            ..RunOptions::default()
        };
        let spec = run_spec(&Default::default(), &options).expect("a spec");
        let config = ExecConfig {
            container: id(container),
            id: id(name),
            process: spec.process().clone().expect("a process"),
            stdio: Stdio { stdin: false, stdout: true, stderr: true },
        };
        let created = self.sandbox.create_exec(config).await.expect("an exec");
        let process = ProcessId::exec(id(container), id(name));
        self.sandbox.start(&process).await.expect("it starts");
        let ended = self.end(&process, created.streams).await;
        self.sandbox.delete(&process).await.expect("it is forgotten");
        ended
    }

    /// Reads a process's streams to their end and waits for its own.
    pub async fn end(&self, process: &ProcessId, streams: Streams) -> Ended {
        let (stdout, stderr) = (read(streams.stdout), read(streams.stderr));
        let all = async { tokio::join!(stdout, stderr, self.sandbox.wait(process)) };
        let (stdout, stderr, exit) = timeout(LIMIT, all).await.expect("it ends in time");
        Ended { exit: exit.expect("an exit"), stdout, stderr }
    }

    /// The next event.
    pub async fn event(&mut self) -> Event {
        timeout(LIMIT, self.events.recv()).await.expect("an event in time").expect("an event")
    }
}

async fn read(stream: Option<tokio::net::UnixStream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        stream.read_to_end(&mut bytes).await.expect("a stream");
    }
    bytes
}
