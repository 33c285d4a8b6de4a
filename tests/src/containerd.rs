//! A containerd of a test's own, with folders of its own in [`Namespaces`] of its own, driven by `ctr` and over its socket.
//!
//! When it is dropped, nothing may be left of the containers: see [`Containerd::left`].

mod erofs;
mod events;
mod grpc;
mod hosts;
mod known;
mod left;
mod mappable;
mod namespaces;
mod spec;

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

pub use crate::Runtime;
pub use events::Event;
pub use grpc::Grpc;
pub use hosts::on;
pub use left::nothing_is_left;
pub use mappable::Mappable;
pub use namespaces::{Namespaces, Process};

use crate::{Ampoule, program, scaled, stage};
use events::Events;
use left::things;

/// No step of these tests takes longer, even in the bed.
pub const LIMIT: Duration = Duration::from_secs(90);
const SOCKET: &str = "/run/containerd/containerd.sock";
const CONFIG: &str = "/run/test/config.toml";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// The machine's own.
    V1_6,
    /// Debian 13's, beside it.
    V1_7,
    /// Debian 14's, likewise.
    V2_1,
}

/// A running containerd. Containers are named by their last word; their ids begin with the test's own name.
pub struct Containerd {
    pub runtime: Runtime,
    pub version: Version,
    /// What every id begins with, unique on this host.
    pub name: String,
    pub inside: Namespaces,
    pub grpc: Grpc,
    daemon: Mutex<Child>,
    events: Events,
    /// What there is without a task.
    things: Vec<String>,
}

impl Containerd {
    /// Starts one; says why when this machine has none or not the runtime.
    pub fn start(version: Version, runtime: Runtime) -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = folder("AMPOULE_CONTAINERD_ROOT", "tests/containerd/root.sh")?;
        programs(version)?;
        if runtime == Runtime::Ampoule && !stage().join("bin/containerd-shim-ampoule-v2").exists() {
            return Err("containerd-shim-ampoule-v2 is not staged".into());
        }
        let name = format!("c{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        if version == Version::V2_1 {
            erofs::load();
        }
        let inside = Namespaces::new()?;
        fs::write(inside.path(CONFIG), config(version)).expect("the configuration");
        fs::write(inside.path("/run/test/fstab"), fstab(&root)).expect("the mounts");
        fs::create_dir(inside.path("/run/test/cni")).expect("a folder");
        fs::write(inside.path("/run/test/cni/10-pods.conf"), NETWORK).expect("the network");
        fs::create_dir(inside.path("/run/test/ctr-cni")).expect("a folder");
        fs::write(inside.path("/run/test/ctr-cni/10-ctr.conf"), CTR_NETWORK).expect("the network");
        if env::var_os("AMPOULE_BED").is_some() {
            // VMs that boot at once share an emulated processor.
            fs::create_dir_all("/etc/ampoule").expect("a folder");
            let settings = format!("sandbox.boot_timeout = {}\n", scaled(80, 900));
            fs::write("/etc/ampoule/config.toml", settings).expect("a file");
        }
        adopt(&root, &inside);
        let daemon = daemon(&inside, version);
        let mut containerd = Self {
            runtime,
            version,
            name,
            grpc: Grpc::new(inside.path(SOCKET)),
            events: Events::default(),
            things: Vec::new(),
            daemon: Mutex::new(daemon),
            inside,
        };
        containerd.is_up();
        containerd.things = things(&containerd.inside);
        Ok(containerd)
    }

    /// Waits until it answers, and listens to its events.
    fn is_up(&self) {
        let deadline = Instant::now() + LIMIT;
        while !self.grpc.answers() {
            assert!(Instant::now() < deadline, "containerd does not answer: {}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
        self.events.follow(self.command("ctr").arg("events"), &self.grpc);
    }

    /// Kills it as a crash would, leaving shims and tasks alone.
    pub fn kill(&self) {
        for process in self.inside.processes() {
            if process.program() == "containerd" {
                self.inside.kill("KILL", process.pid);
            }
        }
        let mut daemon = self.daemon.lock().expect("the daemon");
        daemon.wait().expect("the daemon");
    }

    pub fn start_again(&self) {
        *self.daemon.lock().expect("the daemon") = daemon(&self.inside, self.version);
        self.is_up();
    }

    /// Its configuration, as this side reaches it.
    pub fn config(&self) -> PathBuf {
        self.inside.path(CONFIG)
    }

    /// `ampoule install --containerd ARGS...`, for its configuration.
    pub fn install(&self, args: &[&str]) {
        let mut command = self.inside.command(stage().join("bin/ampoule"));
        command.args(["install", "--containerd", "--config", CONFIG]).args(args);
        program(command).output().ended_with(0);
    }

    /// A program of this version of containerd, inside.
    pub fn command(&self, name: &str) -> Command {
        self.inside.command(programs(self.version).expect("it was there").join(name))
    }

    /// `ctr ARGS...`
    pub fn ctr<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Ampoule {
        let mut command = self.command("ctr");
        command.args(args);
        program(command)
    }

    pub fn id(&self, container: &str) -> String {
        format!("{}-{container}", self.name)
    }

    /// `ctr run --runtime RUNTIME OPTIONS... IMAGE ID COMMAND...`
    pub fn run(&self, options: &[&str], image: &str, container: &str, command: &[&str]) -> Ampoule {
        let runtime = format!("io.containerd.{}.v2", self.runtime.name());
        let (image, id) = (format!("docker.io/local/{image}:latest"), self.id(container));
        let run = ["run", "--runtime", &runtime];
        self.ctr(run.iter().chain(options).chain(&[&*image, &id]).chain(command).copied())
    }

    /// `ctr tasks VERB ID ARGS...`
    pub fn task(&self, verb: &[&str], container: &str, args: &[&str]) -> Ampoule {
        self.ctr(["tasks"].iter().chain(verb).chain(&[&*self.id(container)]).chain(args).copied())
    }

    /// `ctr tasks exec --exec-id EXEC OPTIONS... ID COMMAND...`
    pub fn exec(&self, options: &[&str], container: &str, exec: &str, command: &[&str]) -> Ampoule {
        let verb: Vec<&str> = ["exec", "--exec-id", exec].iter().chain(options).copied().collect();
        self.task(&verb, container, command)
    }

    /// Ends a container by force and removes it.
    pub fn remove(&self, container: &str) {
        self.task(&["kill", "--all", "-s", "KILL"], container, &[]).output();
        self.exited(container, container);
        // That may have been the end of an earlier task.
        let began = Instant::now();
        while self.listed(container).is_some() {
            assert!(began.elapsed() < LIMIT, "{container} stays");
            self.task(&["delete"], container, &[]).output();
        }
        self.ctr(["containers", "rm", &self.id(container)]).output().ended_with(0);
    }

    /// PID and status of a task, as `ctr tasks ls` has them.
    pub fn listed(&self, container: &str) -> Option<(i32, String)> {
        let id = self.id(container);
        let out = self.ctr(["tasks", "ls"]).output().ended_with(0).text();
        let line = out.lines().find(|line| line.split_whitespace().next() == Some(&id))?;
        let words: Vec<&str> = line.split_whitespace().collect();
        Some((words[1].parse().expect("a PID"), words[2].to_owned()))
    }

    /// Events of a container's task so far.
    pub fn events(&self, container: &str) -> Vec<Event> {
        let id = self.id(container);
        self.events.all().into_iter().filter(|event| event.is_of_task(&id)).collect()
    }

    /// The ids of tasks that were told to be out of memory so far, pods' among them.
    pub fn out_of_memory(&self) -> Vec<String> {
        let ooms = self.events.all().into_iter().filter(|event| event.topic == "oom");
        ooms.map(|event| event.text("container_id").into()).collect()
    }

    /// Waits for the first event of a container's task that `is`.
    #[track_caller]
    pub fn event(&self, container: &str, what: &str, is: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + LIMIT;
        loop {
            let events = self.events(container);
            if let Some(event) = events.iter().find(|event| is(event)) {
                return event.clone();
            }
            assert!(Instant::now() < deadline, "no {what} in {events:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the exit of a process (an init by its container's name) and gives its status.
    #[track_caller]
    pub fn exited(&self, container: &str, process: &str) -> u64 {
        let process = if process == container { self.id(container) } else { process.to_owned() };
        let is = |event: &Event| event.topic == "exit" && event.text("id") == process;
        self.event(container, &format!("exit of {process}"), is).number("exit_status")
    }

    /// The shim that serves a container.
    pub fn shim(&self, container: &str) -> i32 {
        self.shim_of(&self.id(container))
    }

    /// The shim of a container or a pod with this id.
    pub fn shim_of(&self, id: &str) -> i32 {
        let processes = self.inside.processes();
        let shim = processes.iter().find(|process| {
            process.program().starts_with("containerd-shim")
                && process.args.iter().any(|arg| arg == id)
        });
        shim.unwrap_or_else(|| panic!("no shim of {id} in {processes:?}")).pid
    }

    /// The end of what it logged, for the message of a failure.
    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.inside.path("/run/test/log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().filter(|line| !line.contains("level=info")).collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

/// The folder that `variable` names, which `script` makes.
fn folder(variable: &str, script: &str) -> Result<PathBuf, String> {
    env::var_os(variable).map(PathBuf::from).ok_or(format!("{variable} is not set (see {script})"))
}

/// Where the programs of a version lie.
fn programs(version: Version) -> Result<PathBuf, String> {
    match version {
        Version::V1_6 => Ok("/usr/bin".into()),
        Version::V1_7 => folder("AMPOULE_CONTAINERD_1_7", "tests/containerd/containerd-1.7.sh"),
        Version::V2_1 => folder("AMPOULE_CONTAINERD_2_1", "tests/containerd/containerd-2.1.sh"),
    }
}

fn daemon(inside: &Namespaces, version: Version) -> Child {
    let log = fs::OpenOptions::new().append(true).create(true).open(inside.path("/run/test/log"));
    let programs = programs(version).expect("it was there");
    let mut paths = vec![programs.clone(), stage().join("bin")];
    paths.extend(erofs::utils());
    paths.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    let mut command = inside.command(programs.join("containerd"));
    command
        .args(["--config", CONFIG])
        .env("PATH", env::join_paths(paths).expect("no colons"))
        .env("TMPDIR", "/run/test/tmp")
        .env("AMPOULE_ROOT", "/run/test/ampoule")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.expect("the log"));
    command.spawn().expect("nsenter")
}

/// The runtime handler for pods that containerd 2 makes by ampoule's Sandbox service, with streams over its socket.
pub const BY_SHIM: &str = "ampoule-by-shim";

fn config(version: Version) -> String {
    const PAUSE: &str = "docker.io/local/pause:latest";
    const PLUGINS: &str = "\"/usr/lib/cni\"";
    let (format, plugin, image, cni) = match version {
        Version::V1_6 | Version::V1_7 => {
            (2, "io.containerd.grpc.v1.cri", "sandbox_image", format!("bin_dir = {PLUGINS}"))
        }
        Version::V2_1 => {
            let images = "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox";
            (3, "io.containerd.cri.v1.runtime", images, format!("bin_dirs = [{PLUGINS}]"))
        }
    };
    let mut text = format!(
        r#"version = {format}
root = "/run/test/root"
state = "/run/containerd"
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
path = "/run/test/opt"
[plugins."{plugin}"]
restrict_oom_score_adj = true
{image} = "{PAUSE}"
[plugins."{plugin}".cni]
{cni}
conf_dir = "/run/test/cni"
"#
    );
    let mut handler = |handler: &str, runtime: Runtime, more: &str| {
        let table = format!(r#"[plugins."{plugin}".containerd.runtimes.{handler}]"#);
        let kind = format!("runtime_type = \"io.containerd.{}.v2\"", runtime.name());
        writeln!(text, "{table}\n{kind}\n{more}").expect("a string");
    };
    for runtime in [Runtime::Runc, Runtime::Ampoule] {
        handler(runtime.name(), runtime, "");
    }
    if version == Version::V2_1 {
        handler(BY_SHIM, Runtime::Ampoule, "sandboxer = \"shim\"\nio_type = \"streaming\"");
        text += "[plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"erofs\", \"walking\"]\n";
    }
    text
}

/// The network of all pods: a bridge.
const NETWORK: &str = r#"{
    "cniVersion": "0.4.0", "name": "pods", "type": "bridge", "bridge": "pods0", "isGateway": true,
    "ipam": {
        "type": "host-local", "dataDir": "/run/test/ipam",
        "ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd88::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    }
}"#;

/// That of `ctr run --cni`: a veth whose gateway lies in no subnet, and is reached by a route of its own.
const CTR_NETWORK: &str = r#"{
    "cniVersion": "0.4.0", "name": "ctr", "type": "ptp", "mtu": 1450,
    "ipam": {
        "type": "host-local", "dataDir": "/run/test/ipam",
        "ranges": [[{"subnet": "10.89.0.0/24"}], [{"subnet": "fd89::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    }
}"#;

/// Where it looks for that.
const CNI: &str = "set -e; mount -t tmpfs opt /opt; mkdir /opt/cni; ln -s /usr/lib/cni /opt/cni/bin; \
    mount -t tmpfs cni /etc/cni; ln -s /run/test/ctr-cni /etc/cni/net.d";

const DATABASES: [&str; 2] = [
    "io.containerd.metadata.v1.bolt/meta.db",
    "io.containerd.snapshotter.v1.overlayfs/metadata.db",
];

/// Everything in the folder of unpacked images that is not a database: it is only read.
fn fstab(root: &Path) -> String {
    let root = &seen_without_overlay(root);
    let blobs = PathBuf::from("io.containerd.content.v1.content/blobs");
    let snapshots = Path::new("io.containerd.snapshotter.v1.overlayfs/snapshots");
    let names = entries(&root.join(snapshots));
    let snapshots = names.iter().map(|path| snapshots.join(path.file_name().expect("a name")));
    let mut text = String::new();
    for path in [blobs].into_iter().chain(snapshots) {
        let (from, to) = (root.join(&path), Path::new("/run/test/root").join(&path));
        writeln!(text, "{} {} none bind,x-mount.mkdir", from.display(), to.display())
            .expect("a string");
    }
    text
}

/// The bed's root is an overlay, which hides the whiteouts of layers that lie on it: below `/machine` they are seen.
fn seen_without_overlay(path: &Path) -> PathBuf {
    match env::var_os("AMPOULE_BED") {
        Some(_) => Path::new("/machine").join(path.strip_prefix("/").unwrap_or(path)),
        None => path.into(),
    }
}

/// Makes the folder of unpacked images containerd's own.
fn adopt(root: &Path, inside: &Namespaces) {
    for database in DATABASES {
        let copy = inside.path("/run/test/root").join(database);
        fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder");
        fs::copy(root.join(database), copy).expect("a database");
    }
    let mut mount = inside.command("mount");
    mount.args(["--all", "--fstab", "/run/test/fstab"]);
    program(mount).output().ended_with(0);
    let mut cni = inside.command("sh");
    cni.args(["-c", CNI]);
    program(cni).output().ended_with(0);
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
