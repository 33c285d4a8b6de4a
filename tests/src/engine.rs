//! A Podman or a Docker of a test's own, with folders of its own in [`Namespaces`] of its own, and the image `alpine`.
//!
//! When it is dropped, no process and no mount of its containers may be left.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    Ampoule, Outcome, Runtime,
    containerd::{LIMIT, Namespaces, nothing_is_left},
    program, stage,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Podman,
    /// 20.10, which calls runtimes by their command line.
    Docker,
    /// By containerd's Task API.
    Docker26,
}

pub struct Engine {
    pub kind: Kind,
    pub runtime: Runtime,
    pub inside: Namespaces,
    /// Of the command, and of what it needs.
    path: Vec<PathBuf>,
    /// Docker's; it ends with its PID namespace.
    daemon: Option<Child>,
}

impl Engine {
    /// Says why when this machine has none.
    pub fn new(kind: Kind, runtime: Runtime) -> Result<Self, String> {
        Self::inside(Namespaces::new()?, kind, runtime, "cgroupfs")
    }

    /// One that has systemd make cgroups.
    pub fn under_systemd(kind: Kind, runtime: Runtime) -> Result<Self, String> {
        Self::inside(Namespaces::with_systemd()?, kind, runtime, "systemd")
    }

    fn inside(
        inside: Namespaces,
        kind: Kind,
        runtime: Runtime,
        cgroups: &str,
    ) -> Result<Self, String> {
        let image = variable("AMPOULE_ALPINE_ARCHIVE")?;
        let mut path: Vec<_> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
        if kind != Kind::Podman {
            let root = variable("AMPOULE_DOCKER_20_10")?;
            path.splice(..0, ["usr/bin", "usr/sbin"].map(|folder| root.join(folder)));
            path.insert(0, variable("AMPOULE_COMPOSE")?);
        }
        if kind == Kind::Docker26 {
            // With the client of the other one.
            let daemon = variable("AMPOULE_DOCKER_26")?;
            path.splice(..0, [daemon, variable("AMPOULE_CONTAINERD_1_7")?, stage().join("bin")]);
        }
        let mut engine = Self { kind, runtime, inside, path, daemon: None };
        match kind {
            Kind::Podman => engine.configure_podman(cgroups),
            Kind::Docker | Kind::Docker26 => engine.start_docker(cgroups),
        }
        engine.load(&image);
        Ok(engine)
    }

    fn configure_podman(&self, cgroups: &str) {
        let (name, program) = (self.runtime.name(), self.runtime.program());
        let mut config =
            format!("{CONTAINERS}cgroup_manager = {cgroups:?}\nruntimes.{name} = [{program:?}]\n");
        if Self::has_netavark() {
            config += NETAVARK;
        }
        fs::write(self.inside.path("/run/test/containers.conf"), config).expect("a file");
        fs::write(self.inside.path("/run/test/storage.conf"), STORAGE).expect("a file");
    }

    /// Podman's networks with a server of names; else they are CNI's.
    pub fn has_netavark() -> bool {
        ["netavark", "aardvark-dns"]
            .iter()
            .all(|program| Path::new("/usr/lib/podman").join(program).exists())
    }

    fn start_docker(&mut self, cgroups: &str) {
        let config = json!({
            "data-root": "/run/test/docker",
            "storage-driver": "overlay2",
            "ip-forward": false,
            "exec-opts": [format!("native.cgroupdriver={cgroups}")],
            "default-ulimits": { "nofile": { "Name": "nofile", "Hard": 20000, "Soft": 20000 } },
            "runtimes": { "ampoule": { "path": self.runtime.program() } },
        });
        fs::write(self.inside.path("/run/test/docker.json"), config.to_string()).expect("a file");
        let log = fs::File::create(self.inside.path("/run/test/log")).expect("a file");
        let mut daemon =
            self.command("dockerd", &["--config-file", "/run/test/docker.json"]).command;
        daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.daemon = Some(daemon.spawn().expect("nsenter"));
        let deadline = Instant::now() + LIMIT;
        // Asking it would take the processor away from it.
        while !self.log().contains("API listen on") {
            assert!(Instant::now() < deadline, "no docker: {}", self.log());
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Loads the image as `alpine`, in the form that Docker knows too.
    fn load(&self, archive: &Path) {
        let from = format!("oci-archive:{}", archive.display());
        let copy = ["--insecure-policy", "copy", "--quiet", &from];
        let to = "docker-archive:/run/test/alpine.tar:docker.io/library/alpine:latest";
        self.command("skopeo", &[&copy[..], &[to]].concat()).output().ended_with(0);
        self.does(&["load", "--quiet", "--input", "/run/test/alpine.tar"]).ended_with(0);
        fs::remove_file(self.inside.path("/run/test/alpine.tar")).expect("a file");
    }

    fn command(&self, name: &str, args: &[&str]) -> Ampoule {
        let mut command = self.inside.command(name);
        command
            .args(args)
            .env("PATH", env::join_paths(&self.path).expect("no colons"))
            .env("CONTAINERS_CONF", "/run/test/containers.conf")
            .env("CONTAINERS_STORAGE_CONF", "/run/test/storage.conf")
            .env("TMPDIR", "/run/test/tmp")
            .env("AMPOULE_ROOT", "/run/test/ampoule");
        program(command)
    }

    /// What the runtime is called in `--runtime`.
    pub fn runtime_name(&self) -> String {
        match self.kind {
            Kind::Podman | Kind::Docker => self.runtime.name().into(),
            Kind::Docker26 => format!("io.containerd.{}.v2", self.runtime.name()),
        }
    }

    /// `podman ARGS...` or `docker ARGS...`
    pub fn call(&self, args: &[&str]) -> Ampoule {
        match self.kind {
            Kind::Podman => {
                let runtime = ["--runtime", self.runtime.name()];
                self.command("podman", &[&runtime[..], args].concat())
            }
            Kind::Docker | Kind::Docker26 => match args {
                ["compose", rest @ ..] => self.command("docker-compose", rest),
                _ => self.command("docker", args),
            },
        }
    }

    /// To its end.
    #[track_caller]
    pub fn does(&self, args: &[&str]) -> Outcome {
        self.call(args).output()
    }

    /// `run --network none ARGS...`
    pub fn run(&self, args: &[&str]) -> Ampoule {
        self.run_with_network("none", args)
    }

    pub fn run_with_network(&self, network: &str, args: &[&str]) -> Ampoule {
        let mut all = vec!["run", "--network", network];
        let runtime = self.runtime_name();
        if self.kind != Kind::Podman {
            all.extend(["--runtime", &runtime]);
        }
        self.call(&[&all, args].concat())
    }

    /// What `inspect` says of a container, by a template of Go's.
    #[track_caller]
    pub fn inspect(&self, container: &str, template: &str) -> String {
        self.does(&["inspect", "--format", template, container]).ended_with(0).text()
    }

    #[track_caller]
    pub fn until_logged(&self, container: &str, word: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let logs = self.does(&["logs", container]).ended_with(0).text();
            if logs.contains(word) {
                return;
            }
            assert!(Instant::now() < deadline, "no {word:?} in the logs: {logs}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn left(&self) -> Vec<String> {
        let own = ["catatonit", "dockerd", "containerd", "systemd", "dbus-daemon"];
        let processes = self.inside.processes().into_iter();
        let processes = processes.filter(|process| {
            !own.contains(&process.program()) && !process.program().starts_with("systemd-")
        });
        // What is a container's has its id in its path.
        let mounts = self.inside.mounts().into_iter();
        let mounts = mounts.filter(|mount| mount.split('/').any(|part| part.len() == 64));
        let states = fs::read_dir(self.inside.path("/run/test/ampoule/run/oci"));
        let states = states.into_iter().flatten().flatten().map(|entry| entry.path());
        processes
            .map(|process| format!("{process:?}"))
            .chain(mounts.map(|mount| format!("mount {mount}")))
            .chain(states.map(|state| state.display().to_string()))
            .collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if !thread::panicking() {
            nothing_is_left(|| self.left(), || self.log());
        }
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

impl Engine {
    /// What Docker logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.inside.path("/run/test/log")).unwrap_or_default()
    }
}

fn variable(name: &str) -> Result<PathBuf, String> {
    env::var_os(name).map(PathBuf::from).ok_or(format!("{name} is not set (see tests/run)"))
}

const STORAGE: &str = r#"[storage]
driver = "overlay"
graphroot = "/run/test/graph"
runroot = "/run/test/podman"
"#;

const NETAVARK: &str = r#"[network]
network_backend = "netavark"
network_config_dir = "/run/test/networks"
"#;

/// With limits that a host may have less of than Podman asks for, and no lock that other tests see.
const CONTAINERS: &str = r#"[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
events_logger = "file"
lock_type = "file"
runtime_supports_json = ["ampoule", "runc"]
"#;
