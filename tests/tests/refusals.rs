//! What runs short around a sandbox or is taken from it: memory, room, descriptors, names, readers, its process. The
//! sandbox lives on, or ends with a reason and leaves nothing. (What needs no VM is in the shim's tests.)

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use ampoule_shim::{
    commands::RunError,
    error::Report,
    sandbox::{Sandbox, SandboxConfig},
};
use ampoule_tests::{
    Ampoule, Outcome, ampoule, assert_nothing_left, detached, processes_of, root, run, sandbox,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The error of a command line with `--json`.
fn error(out: &Outcome) -> serde_json::Value {
    let text = out.error();
    let line = text.lines().find(|line| line.starts_with("{\"error\":"));
    let json = line.and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    json.unwrap_or_else(|| panic!("no error: {text}"))["error"].clone()
}

/// The same command line with so many descriptors.
fn with_descriptors(limit: u32, mut ampoule: Ampoule) -> Ampoule {
    let mut shell = Command::new("sh");
    let script = format!("ulimit -n {limit}; exec \"$0\" \"$@\"");
    shell.args(["-c", &script]).arg(ampoule.command.get_program());
    shell.args(ampoule.command.get_args());
    shell.envs(ampoule.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    ampoule.command = shell;
    ampoule
}

/// Each of these fails for its descriptors, until one works; how many failed.
fn until_it_works(sweep: impl Iterator<Item = Outcome>) -> (usize, Outcome) {
    for (failed, out) in sweep.enumerate() {
        if out.code == 0 {
            return (failed, out);
        }
        let error = error(&out.ended_with(125));

        assert!(error["message"].to_string().contains("Too many open files"), "{error}");
        assert!(error["hint"].to_string().contains("ulimit -n"), "{error}");
    }
    panic!("none works");
}

#[tokio::test]
async fn a_vm_with_too_little_memory_is_refused_and_told_so() {
    for memory_mib in [20, 63] {
        let config = SandboxConfig { memory_mib, ..sandbox::config("small") };
        let Err(error) = Sandbox::create(config).await else {
            panic!("{memory_mib} MiB are enough")
        };
        let report = Report::new("run", &RunError::Sandbox(error), 125);

        assert!(report.hint.as_deref().is_some_and(|hint| hint.contains("--memory")), "{report}");
    }
}

#[test]
fn a_disk_that_is_full_in_the_guest_is_the_containers_error() {
    let sandbox = detached(["--scratch-size", "16m", "alpine", "sleep", "600"]);
    let filled = sandbox.sh("dd if=/dev/zero of=/x bs=1M count=64").ended_with(1);
    filled.says(&["No space left on device"]);
    assert_eq!(sandbox.sh("rm /x && echo again > /y && cat /y").ended_with(0).text(), "again");

    // A second run of the name is refused, and does it no harm.
    let out = ampoule(["--json", "run", "--name", &sandbox.0, "alpine", "true"]).output();
    assert_eq!(error(&out.ended_with(125))["object"], sandbox.0);

    // Nobody reads what an exec writes: it waits, and others are served.
    let unread = ampoule(["exec", &sandbox.0, "yes"]).spawn();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(sandbox.sh("echo served").ended_with(0).text(), "served");
    unread.signal(Signal::KILL);
    unread.finish().ended_with(137);

    // With too few descriptors a command works or says so; none tells that the sandbox is dead.
    let name = sandbox.0.as_str();
    for words in
        [&["ps"][..], &["inspect", name], &["exec", name, "true"], &["kill", "-s", "CONT", name]]
    {
        let sweep = (6..64)
            .map(|limit| with_descriptors(limit, ampoule([&["--json"], words].concat())).output());
        let (failed, works) = until_it_works(sweep);
        assert!(failed > 0, "{words:?}");
        let is_alive = works.text().contains("running") || !["ps", "inspect"].contains(&words[0]);
        assert!(is_alive, "{works:?}");
    }

    // Its process is killed: the VM goes with it, it is told, and its name is free.
    let pid = sandbox.record()["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    let killed = Instant::now();
    while !processes_of(&sandbox.0).is_empty() {
        assert!(killed.elapsed() < Duration::from_secs(2), "the VMM outlives its shim");
        thread::sleep(Duration::from_millis(10));
    }
    let ps = ampoule(["ps", "-a"]).output().ended_with(0).text();
    let line = ps.lines().find(|line| line.starts_with(&sandbox.0)).expect("it is listed");
    assert!(line.ends_with("dead"), "{line}");
    sandbox.verb("rm").ended_with(0);
    assert_nothing_left(&sandbox.0);
}

/// A store of its own in a file system of this size.
struct SmallStore(PathBuf, #[expect(dead_code, reason = "it goes with it")] TempDir);

impl SmallStore {
    fn new(size: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().to_path_buf();
        let options = format!("size={size}");
        let mut mount = Command::new("mount");
        assert!(
            mount
                .args(["-t", "tmpfs", "-o", &options, "none"])
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        for part in ["images", "rootfs"] {
            fs::create_dir(path.join(part)).unwrap();
        }
        let name = "docker.io%library%alpine:latest.json";
        fs::copy(root().join("images").join(name), path.join("images").join(name)).unwrap();
        let record = fs::read_to_string(path.join("images").join(name)).unwrap();
        for entry in fs::read_dir(root().join("rootfs")).unwrap().flatten() {
            let file = entry.file_name();
            if record.contains(file.to_str().unwrap().trim_end_matches(".erofs")) {
                fs::copy(entry.path(), path.join("rootfs").join(file)).unwrap();
            }
        }
        Self(path, folder)
    }
}

impl Drop for SmallStore {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_under_a_sandbox_is_the_containers_error_too() {
    let store = SmallStore::new("24m");
    let command = |args: &[&str]| ampoule(args).env("AMPOULE_ROOT", &store.0);
    let script = "dd if=/dev/zero of=/x bs=64k count=800 conv=fsync; echo wrote $?; while :; do echo on; sleep 0.1; done";
    let run =
        ["run", "-d", "--boot-timeout", "100", "--name", "roomless", "alpine", "sh", "-c", script];
    command(&run).output().ended_with(0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !command(&["exec", "roomless", "ls", "-l", "/x"]).output().text().contains("/x") {
        assert!(Instant::now() < deadline);
    }
    let out = command(&[
        "exec",
        "roomless",
        "sh",
        "-c",
        "dd if=/dev/zero of=/z bs=64k count=800 conv=fsync",
    ]);
    let filled = out.output();
    let alive = command(&["exec", "roomless", "echo", "alive"]).output();
    let keeper = fs::read_to_string(store.0.join("run/sandboxes/roomless/keeper.log"));
    assert_eq!(
        alive.text(),
        "alive",
        "{}{keeper:?}{}",
        alive.error(),
        command(&["inspect", "roomless"]).output().text()
    );
    filled.ended_with(1).says(&["error"]);
    command(&["stop", "-t", "1", "roomless"]).output().ended_with(0);
    command(&["rm", "roomless"]).output().ended_with(0);
    assert_nothing_left("roomless");
    assert!(fs::read_dir(store.0.join("run/sandboxes")).unwrap().next().is_none());
}

/// Memory of a process that belongs to it alone, in kB.
fn anonymous(pid: i32) -> u64 {
    let status =
        fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn output_that_nobody_reads_is_not_kept_in_memory_and_stop_works() {
    let running = run(["--memory", "32m", "alpine", "yes"]).spawn();
    let vmm = running.vmm();
    let shim = running.child.id().cast_signed();
    let deadline = Instant::now() + Duration::from_secs(100);
    // The pipe is full when it writes no more.
    let up = || {
        ampoule(["ps"])
            .output()
            .text()
            .lines()
            .any(|l| l.starts_with(running.name()) && l.contains(" up "))
    };
    while !up() {
        assert!(Instant::now() < deadline, "it does not start");
    }
    thread::sleep(Duration::from_secs(1));
    let before = (anonymous(shim), anonymous(vmm));
    thread::sleep(Duration::from_secs(3));
    let after = (anonymous(shim), anonymous(vmm));
    assert!(
        after.0 < before.0 + 4096 && after.1 < before.1 + 16384,
        "{before:?} kB, then {after:?}"
    );
    let stopped = ampoule(["stop", "-t", "1", running.name()]).output().ended_with(0);
    assert!(stopped.took < Duration::from_secs(8), "{:?}", stopped.took);
    running.finish().ended_with(137);
}

#[test]
fn whichever_descriptor_is_refused_a_run_works_or_says_so() {
    let sweep = (6..64)
        .map(|limit| with_descriptors(limit, run(["--json", "alpine", "echo", "works"])).output());
    let (failed, works) = until_it_works(sweep);
    assert!(failed > 10, "{failed}");
    assert_eq!(works.text(), "works");
}

#[test]
fn a_run_killed_at_any_moment_leaves_nothing() {
    for milliseconds in [20, 60, 150, 400, 900] {
        let running = run(["alpine", "true"]).spawn();
        thread::sleep(Duration::from_millis(milliseconds));
        running.signal(Signal::KILL);
        let name = running.name().to_string();
        let mut child = running.child;
        child.wait().unwrap();
        let killed = Instant::now();
        while !processes_of(&name).is_empty() {
            assert!(killed.elapsed() < Duration::from_secs(2), "the VMM outlives its shim");
        }
        // Its record goes with the next list.
        ampoule(["ps"]).output().ended_with(0);
        assert_nothing_left(&name);
    }
}
