//! A Podman of a test's own, with folders of its own in [`Namespaces`] of its own.
//!
//! When it is dropped, no process and no mount of its containers may be left.

use std::{
    env, fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::{
    Ampoule, Outcome, Runtime,
    containerd::{LIMIT, Namespaces},
    program,
};

const STORAGE: &str = r#"[storage]
driver = "overlay"
graphroot = "/run/test/graph"
runroot = "/run/test/podman"
"#;

pub struct Podman {
    pub runtime: Runtime,
    pub inside: Namespaces,
    mounts: Vec<String>,
}

impl Podman {
    /// One that has the image `alpine`; says why when this machine has none.
    pub fn new(runtime: Runtime) -> Result<Self, String> {
        let image =
            env::var_os("AMPOULE_ALPINE_ARCHIVE").ok_or("AMPOULE_ALPINE_ARCHIVE is not set")?;
        if !Path::new("/usr/bin/podman").exists() {
            return Err("there is no podman".into());
        }
        let inside = Namespaces::new()?;
        fs::write(inside.path("/run/test/containers.conf"), config(runtime)).expect("a file");
        fs::write(inside.path("/run/test/storage.conf"), STORAGE).expect("a file");
        let mut podman = Self { runtime, inside, mounts: Vec::new() };
        let image = image.to_string_lossy();
        let loaded = podman.does(&["load", "--quiet", "--input", &image]).ended_with(0).text();
        let name = loaded.rsplit(' ').next().expect("a name");
        podman.does(&["tag", name, "alpine"]).ended_with(0);
        podman.mounts = podman.inside.mounts();
        Ok(podman)
    }

    /// `podman --runtime RUNTIME ARGS...`
    pub fn podman(&self, args: &[&str]) -> Ampoule {
        let mut command = self.inside.command("podman");
        command.args(["--runtime", self.runtime.name()]).args(args);
        self.environment(&mut command);
        program(command)
    }

    /// To its end.
    #[track_caller]
    pub fn does(&self, args: &[&str]) -> Outcome {
        self.podman(args).output()
    }

    /// `podman run --network none ARGS...`
    pub fn run(&self, args: &[&str]) -> Ampoule {
        self.podman(&[&["run", "--network", "none"], args].concat())
    }

    fn environment(&self, command: &mut Command) {
        command
            .env("CONTAINERS_CONF", "/run/test/containers.conf")
            .env("CONTAINERS_STORAGE_CONF", "/run/test/storage.conf")
            .env("TMPDIR", "/run/test/tmp")
            .env("AMPOULE_ROOT", "/run/test/ampoule");
    }

    /// What `podman inspect` says of a container, by a template of Go's.
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
        let processes = self.inside.processes().into_iter();
        let processes = processes.filter(|process| process.program() != "catatonit");
        let mounts = self.inside.mounts().into_iter().filter(|mount| !self.mounts.contains(mount));
        let states = fs::read_dir(self.inside.path("/run/test/ampoule/run/oci"));
        let states = states.into_iter().flatten().flatten().map(|entry| entry.path());
        processes
            .map(|process| format!("{process:?}"))
            .chain(mounts.map(|mount| format!("mount {mount}")))
            .chain(states.map(|state| state.display().to_string()))
            .collect()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {left:#?}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn config(runtime: Runtime) -> String {
    let (name, program) = (runtime.name(), runtime.program());
    // Limits that a host may have less of than Podman asks for; and no lock that other tests see.
    format!(
        r#"[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime_supports_json = ["{name}"]
[engine.runtimes]
{name} = [{program:?}]
"#
    )
}
