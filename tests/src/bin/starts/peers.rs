//! Runtimes to compare with, set up in a folder of their own from the tar of a root file system.

use std::{fs, path::Path, process::Command};

use tempfile::TempDir;

use crate::WORKLOAD;

/// Where the limits of this process are low, podman's defaults are above them.
const CONTAINERS_CONF: &str = r#"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
"#;

pub struct Peer {
    pub name: &'static str,
    folder: TempDir,
    args: Vec<String>,
}

impl Peer {
    /// A bundle whose root file system is a plain folder, used read-only.
    pub fn runc(tar: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let rootfs = folder.path().join("rootfs");
        fs::create_dir(&rootfs).expect("a root");
        done(Command::new("tar").arg("-xf").arg(tar).arg("-C").arg(&rootfs));
        done(Command::new("runc").arg("spec").current_dir(&folder));
        let config = folder.path().join("config.json");
        let text = fs::read_to_string(&config).expect("runc's template");
        let mut spec: serde_json::Value = serde_json::from_str(&text).expect("a spec");
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = WORKLOAD.as_slice().into();
        fs::write(&config, spec.to_string()).expect("a spec");
        let own = folder.path().display();
        let line = format!("runc --root {own}/state run --bundle {own} bench");
        Self { name: "runc run", args: words(&line), folder }
    }

    /// An image in a store of its own, without a network.
    pub fn podman(tar: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("containers.conf"), CONTAINERS_CONF).expect("its settings");
        let own = folder.path().display();
        let podman = format!("podman --root {own}/store --runroot {own}/run --log-level error");
        let line = format!("{podman} run --rm --network none bench {}", WORKLOAD.join(" "));
        let peer = Self { name: "podman run --network none", args: words(&line), folder };
        let import = format!("{podman} import {} bench", tar.display());
        done(&mut peer.of(&words(&import)));
        peer
    }

    pub fn command(&self) -> Command {
        self.of(&self.args)
    }

    fn of(&self, args: &[String]) -> Command {
        let mut command = Command::new(&args[0]);
        command.args(&args[1..]).env("CONTAINERS_CONF", self.folder.path().join("containers.conf"));
        command
    }
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(String::from).collect()
}

fn done(command: &mut Command) {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}
