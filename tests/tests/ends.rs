//! The ends of sandboxes in the background: their own, `stop`, `kill`, `rm`, `wait`, and the loss of their process.

use std::{
    fs,
    time::{Duration, Instant},
};

use ampoule_tests::{Detached, ampoule, assert_nothing_left, detached, root, run};
use rustix::process::{Pid, Signal, kill_process};

/// A workload that ends by TERM with 43.
const POLITE: &str = "trap 'exit 43' TERM; echo ready; while :; do sleep 0.1; done";
/// One that TERM does not end.
const STUBBORN: &str = "trap '' TERM; echo ready; while :; do sleep 0.1; done";

fn sh(script: &str) -> Detached {
    detached(["alpine", "sh", "-c", script])
}

#[test]
fn a_detached_sandbox_runs_on_and_its_end_is_kept() {
    let sandbox = sh("echo out; echo err >&2; printf last; sleep 3; exit 7");
    let ps = ampoule(["ps"]).output().ended_with(0).text();
    let line = ps.lines().find(|line| line.starts_with(&sandbox.0)).expect("it is listed");
    assert!(line.contains("alpine") && line.contains("up "), "{line}");
    assert_eq!(sandbox.verb("wait").ended_with(0).text(), "7");
    let logs = sandbox.verb("logs").ended_with(0);
    assert_eq!((&logs.stdout[..], &logs.stderr[..]), (&b"out\nlast"[..], &b"err\n"[..]));
    assert!(!ampoule(["ps"]).output().text().contains(&sandbox.0));
    let ps = ampoule(["ps", "-a"]).output().ended_with(0).text();
    assert!(ps.contains("exited (7)"), "{ps}");
    let record = sandbox.record();
    assert_eq!((&record["status"], &record["ended"]["code"]), (&"exited".into(), &7.into()));
    let again = ampoule(["run", "--name", &sandbox.0, "alpine", "true"]).output().ended_with(125);
    again.says(&[&sandbox.0, "ampoule rm"]);
    assert_eq!(sandbox.verb("rm").ended_with(0).text(), sandbox.0);
    sandbox.verb("logs").ended_with(125).says(&["there is none"]);
}

#[test]
fn a_detached_run_that_cannot_start_says_so_and_leaves_nothing() {
    run(["-d", "alpine", "no-such-command"]).output().ended_with(127).says(&["not found"]);
    run(["-d", "no-such-image", "true"]).output().ended_with(125).says(&["no-such-image"]);
}

#[test]
fn with_rm_nothing_is_kept() {
    let sandbox = detached(["--rm", "alpine", "sh", "-c", "read x; exit 9"]);
    // Its input is empty: it ends at once.
    let waited = sandbox.verb("wait");
    assert!(waited.text() == "9" || waited.error().contains("there is none"), "{waited:?}");
    assert_nothing_left(&sandbox.0);
}

#[test]
fn stop_asks_by_the_stop_signal_and_then_kills() {
    let sandbox = sh(POLITE);
    sandbox.logged("ready");
    sandbox.verb("stop").ended_with(0);
    assert_eq!(sandbox.verb("wait").text(), "43");
    sandbox.verb("stop").ended_with(0);

    let script = "trap 'exit 44' USR1; echo ready; while :; do sleep 0.1; done";
    let sandbox = detached(["--stop-signal", "USR1", "alpine", "sh", "-c", script]);
    sandbox.logged("ready");
    sandbox.verb("stop").ended_with(0);
    assert_eq!(sandbox.verb("wait").text(), "44");

    let sandbox = detached(["--stop-timeout", "2", "alpine", "sh", "-c", STUBBORN]);
    sandbox.logged("ready");
    let stopped = sandbox.verb("stop").ended_with(0);
    assert!(stopped.took > Duration::from_secs(2), "{:?}", stopped.took);
    assert_eq!(sandbox.verb("wait").text(), "137");
}

#[test]
fn kill_sends_any_signal_and_by_default_kill() {
    let script = "trap 'echo got it' USR2; echo ready; while :; do sleep 0.1; done";
    let sandbox = sh(script);
    sandbox.logged("ready");
    ampoule(["kill", "-s", "SIGUSR2", &sandbox.0]).output().ended_with(0);
    sandbox.logged("got it");
    sandbox.verb("kill").ended_with(0);
    assert_eq!(sandbox.record()["ended"]["code"], 137);
    sandbox.verb("kill").ended_with(125).says(&["does not run"]);
}

#[test]
fn rm_refuses_what_runs_unless_it_is_forced() {
    let sandbox = sh(STUBBORN);
    sandbox.verb("rm").ended_with(125).says(&["it runs", "-f"]);
    ampoule(["rm", "-f", &sandbox.0]).output().ended_with(0);
    assert_nothing_left(&sandbox.0);
}

#[test]
fn an_exec_whose_sandbox_ends_ends_with_it() {
    let sandbox = detached(["alpine", "sleep", "600"]);
    let mut exec = ampoule(["exec", &sandbox.0, "sh", "-c", "echo ready; sleep 600"]).spawn();
    exec.wait_for("ready");
    sandbox.verb("kill").ended_with(0);
    exec.finish().ended_with(137);
}

#[test]
fn a_sandbox_whose_process_was_killed_is_dead_and_cleared_away() {
    let sandbox = detached(["alpine", "sleep", "600"]);
    let pid = sandbox.record()["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while sandbox.record()["status"] != "dead" {
        assert!(Instant::now() < deadline, "{}", sandbox.record());
    }
    sandbox.verb("exec").ended_with(125);
    sandbox.verb("wait").ended_with(125).says(&["killed"]);
    assert!(ampoule(["ps", "-a"]).output().text().contains("dead"));
    // The next one of the name takes its place, and in the foreground leaves nothing.
    let args = ["run", "--boot-timeout", "100", "--name", &sandbox.0, "alpine", "true"];
    ampoule(args).output().ended_with(0);
    assert!(!fs::exists(root().join("run/sandboxes").join(&sandbox.0)).unwrap());
}
