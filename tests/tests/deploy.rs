//! What the DaemonSet does on a node: its script, on a node whose root is this host's, whose containerd is the test's, and
//! whose systemd only writes down what it is asked for.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use ampoule_tests::{
    Outcome,
    containerd::{Containerd, LIMIT},
    host, program, stage,
};

host!(ampoule_1_6 = Ampoule V1_6: a_node);

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shim/deploy/node.sh");
const CONFIG: &str = "/run/test/config.toml";
const LOG: &str = "/run/test/deployed.log";
const HANDLER: &str = "privileged_without_host_devices = true";

/// Mounts a node, on which nothing of this host is changed.
const NODE: &str = "set -e; mkdir -p /run/test/node /run/test/bin; mount --rbind / /run/test/node; \
    mount -t tmpfs local /run/test/node/usr/local";

fn systemctl(containerd: &Containerd, status: u8) {
    let path = containerd.inside.path("/run/test/bin/systemctl");
    fs::write(&path, format!("#!/bin/sh\necho \"$@\" >>/run/test/asked\nexit {status}\n")).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(path, executable).unwrap();
}

fn script(containerd: &Containerd) -> std::process::Command {
    let mut script = containerd.inside.command("sh");
    let path = std::env::var("PATH").unwrap();
    script
        .arg(SCRIPT)
        .env("PATH", format!("/run/test/bin:{path}"))
        .env("NODE", "/run/test/node")
        .env("FROM", stage())
        .env("CONTAINERD_CONFIG", CONFIG)
        .env("READY", "/run/test/deployed");
    script
}

/// Runs it where it cannot succeed.
fn fails(containerd: &Containerd) -> Outcome {
    program(script(containerd)).output().ended_with(1)
}

fn sh(containerd: &Containerd, line: &str) {
    let mut sh = containerd.inside.command("sh");
    sh.args(["-c", line]);
    program(sh).output().ended_with(0);
}

fn read(containerd: &Containerd, path: impl AsRef<Path>) -> String {
    fs::read_to_string(containerd.inside.path(path)).unwrap_or_default()
}

/// Waits until it says that the node is ready.
fn is_ready(containerd: &Containerd, script: &mut Child) {
    let deadline = Instant::now() + LIMIT;
    while !containerd.inside.path("/run/test/deployed").exists() {
        let said = || read(containerd, LOG);
        assert!(script.try_wait().unwrap().is_none(), "it has ended: {}", said());
        assert!(Instant::now() < deadline, "it does not get ready: {}", said());
        thread::sleep(Duration::from_millis(50));
    }
}

fn a_node(containerd: &Containerd) {
    sh(containerd, NODE);
    let before = read(containerd, CONFIG);
    systemctl(containerd, 0);
    let log = File::create(containerd.inside.path(LOG)).unwrap();
    let mut running = script(containerd);
    running.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let mut running = running.spawn().unwrap();
    is_ready(containerd, &mut running);
    assert!(read(containerd, CONFIG).contains(HANDLER));
    assert_eq!(read(containerd, "/run/test/asked"), "restart containerd\n");
    let installed =
        containerd.inside.path("/run/test/node/usr/local/bin/containerd-shim-ampoule-v2");
    assert_eq!(fs::read(installed).unwrap(), fs::read(stage().join("bin/ampoule")).unwrap());
    // As systemd would: it takes what it finds.
    containerd.kill();
    containerd.start_again();
    let own = containerd.inside.processes();
    let own = own.iter().find(|process| process.args.iter().any(|arg| arg == SCRIPT)).unwrap();
    containerd.inside.kill("TERM", own.pid);
    assert!(running.wait().unwrap().success());
    assert!(!read(containerd, CONFIG).contains("io.containerd.ampoule.v2"));
    assert_eq!(read(containerd, "/run/test/asked").lines().count(), 2);
    assert!(!containerd.inside.path("/run/test/deployed").exists());

    // A node on which containerd cannot be restarted, and one without KVM, are left as they were.
    let bare = read(containerd, CONFIG);
    systemctl(containerd, 1);
    fails(containerd).says(&["containerd was not restarted"]);
    assert_eq!(read(containerd, CONFIG), bare);
    sh(containerd, "mount -t tmpfs dev /run/test/node/dev");
    fails(containerd).says(&["/dev/kvm", "this node cannot run sandboxes"]);
    assert_eq!(read(containerd, CONFIG), bare);

    sh(containerd, "umount --recursive --lazy /run/test/node");
    fs::write(containerd.inside.path(CONFIG), before).unwrap();
}
