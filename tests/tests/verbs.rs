//! The verbs of every day: sandboxes in the background, and what later commands do with them.

use std::{
    fs,
    time::{Duration, Instant},
};

use ampoule_tests::{Detached, ampoule, detached, root, run};
use rustix::process::{Pid, Signal, kill_process};

/// A workload that ends by TERM with 43.
const POLITE: &str = "trap 'exit 43' TERM; echo ready; while :; do sleep 0.1; done";
/// One that TERM does not end.
const STUBBORN: &str = "trap '' TERM; echo ready; while :; do sleep 0.1; done";

fn sh(script: &str) -> Detached {
    detached(["alpine", "sh", "-c", script])
}

/// Waits until the log of a sandbox contains `word`.
fn logged(sandbox: &Detached, word: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !sandbox.verb("logs").text().contains(word) {
        assert!(Instant::now() < deadline, "no {word:?} in the log");
    }
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
    ampoule_tests::assert_nothing_left(&sandbox.0);
}

#[test]
fn ps_filters_by_label_and_speaks_json() {
    let sandbox = detached(["--label", "tier=web", "-l", "x", "alpine", "sleep", "600"]);
    for (label, there) in [("tier=web", true), ("tier", true), ("x", true), ("tier=db", false)] {
        let out = ampoule(["ps", "-q", "--label", label]).output().ended_with(0);
        assert_eq!(out.text().lines().any(|name| name == sandbox.0), there, "{label}");
    }
    let out = ampoule(["ps", "--json"]).output().ended_with(0);
    let all: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).unwrap();
    let own = all.iter().find(|record| record["name"] == *sandbox.0).unwrap();
    assert_eq!((&own["status"], &own["labels"]["tier"]), (&"running".into(), &"web".into()));
}

#[test]
fn stop_asks_by_the_stop_signal_and_then_kills() {
    let sandbox = sh(POLITE);
    logged(&sandbox, "ready");
    sandbox.verb("stop").ended_with(0);
    assert_eq!(sandbox.verb("wait").text(), "43");
    sandbox.verb("stop").ended_with(0);

    let script = "trap 'exit 44' USR1; echo ready; while :; do sleep 0.1; done";
    let sandbox = detached(["--stop-signal", "USR1", "alpine", "sh", "-c", script]);
    logged(&sandbox, "ready");
    sandbox.verb("stop").ended_with(0);
    assert_eq!(sandbox.verb("wait").text(), "44");

    let sandbox = detached(["--stop-timeout", "2", "alpine", "sh", "-c", STUBBORN]);
    logged(&sandbox, "ready");
    let stopped = sandbox.verb("stop").ended_with(0);
    assert!(stopped.took > Duration::from_secs(2), "{:?}", stopped.took);
    assert_eq!(sandbox.verb("wait").text(), "137");
}

#[test]
fn kill_sends_any_signal_and_by_default_kill() {
    let script = "trap 'echo got it' USR2; echo ready; while :; do sleep 0.1; done";
    let sandbox = sh(script);
    logged(&sandbox, "ready");
    ampoule(["kill", "-s", "SIGUSR2", &sandbox.0]).output().ended_with(0);
    logged(&sandbox, "got it");
    sandbox.verb("kill").ended_with(0);
    assert_eq!(sandbox.record()["ended"]["code"], 137);
    sandbox.verb("kill").ended_with(125).says(&["does not run"]);
}

#[test]
fn rm_refuses_what_runs_unless_it_is_forced() {
    let sandbox = sh(STUBBORN);
    sandbox.verb("rm").ended_with(125).says(&["it runs", "-f"]);
    ampoule(["rm", "-f", &sandbox.0]).output().ended_with(0);
    ampoule_tests::assert_nothing_left(&sandbox.0);
}

#[test]
fn exec_runs_a_command_beside_the_first() {
    let sandbox = detached(["-e", "A=1", "-w", "/tmp", "alpine", "sleep", "600"]);
    let out = sandbox.sh("echo $A $PWD; echo err >&2; exit 5").ended_with(5);
    assert_eq!((&out.stdout[..], &out.stderr[..]), (&b"1 /tmp\n"[..], &b"err\n"[..]));
    let args = ["exec", "-e", "A=2", "-w", "/", "-u", "nobody", &sandbox.0, "sh", "-c"];
    let script = "echo $A $PWD $(id -u)";
    let out = ampoule(args.iter().chain([&script])).output().ended_with(0);
    assert_eq!(out.text(), "2 / 65534");
    ampoule(["exec", &sandbox.0, "no-such"]).output().ended_with(127).says(&["not found"]);
    ampoule(["exec", &sandbox.0, "/etc"]).output().ended_with(126);
    let sent: Vec<u8> =
        (0..8_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let out = ampoule(["exec", "-i", &sandbox.0, "cat"]).stdin(sent.clone()).output().ended_with(0);
    assert!(out.stdout == sent, "the bytes differ");
    ampoule(["exec", "-d", &sandbox.0, "sh", "-c", "echo x > /tmp/d"]).output().ended_with(0);
    let look = "for i in 1 2 3 4 5 6 7 8 9; do [ -s /tmp/d ] && exit 0; sleep 0.2; done; exit 1";
    sandbox.sh(look).ended_with(0);
}

#[test]
fn exec_reaches_a_sandbox_in_the_foreground() {
    let mut running = run(["alpine", "sh", "-c", POLITE]).spawn();
    running.wait_for("ready");
    let name = running.name().to_string();
    let out = ampoule(["exec", &name, "echo", "hi"]).output().ended_with(0);
    assert_eq!(out.text(), "hi");
    ampoule(["logs", &name]).output().ended_with(125).says(&["foreground"]);
    let waiting = ampoule(["wait", &name]).spawn();
    ampoule(["stop", &name]).output().ended_with(0);
    running.finish().ended_with(43);
    let waited = waiting.finish();
    assert!(waited.text() == "43", "{waited:?}");
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
fn logs_follow_until_the_end() {
    let sandbox = sh("for i in 1 2 3 4; do echo line $i; sleep 0.5; done");
    let out = ampoule(["logs", "-f", &sandbox.0]).output().ended_with(0);
    assert_eq!(out.text(), "line 1\nline 2\nline 3\nline 4");
    let out = ampoule(["logs", "-n", "2", &sandbox.0]).output().ended_with(0);
    assert_eq!(out.text(), "line 3\nline 4");
    let out = ampoule(["logs", "-t", "-n", "1", &sandbox.0]).output().ended_with(0).text();
    assert!(out.starts_with("20") && out.ends_with("Z line 4"), "{out}");
}

#[test]
fn attach_reads_writes_and_ends_with_the_container() {
    let sandbox = detached(["-i", "alpine", "sh", "-c", "read x; echo got $x; exit 3"]);
    let out = ampoule(["attach", &sandbox.0]).stdin("word\n").output().ended_with(3);
    assert_eq!(out.text(), "got word");
    assert_eq!(sandbox.verb("logs").text(), "got word");
}

#[test]
fn stats_tell_of_the_guest_and_of_the_host() {
    let sandbox = detached(["--memory", "64m", "alpine", "sh", "-c", "while :; do :; done"]);
    let out = ampoule(["stats", "--json", &sandbox.0]).output().ended_with(0);
    let all: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(all[0]["guest"]["memory_limit"], 64 << 20);
    assert!(all[0]["guest"]["cpu_percent"].as_f64().unwrap() > 20.0, "{all:?}");
    assert!(all[0]["host"]["memory"].as_u64().unwrap() > 10 << 20, "{all:?}");
    assert!(all[0]["host"]["cpu_us"].as_u64().unwrap() > 0, "{all:?}");
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

#[test]
fn names_are_found_by_their_beginning() {
    let sandbox = detached(["alpine", "sleep", "600"]);
    let out = ampoule(["exec", &sandbox.0[..sandbox.0.len() - 1], "echo", "hi"]).output();
    assert!(out.text() == "hi" || out.error().contains("write more"), "{out:?}");
    ampoule(["exec", "no-such-sandbox", "true"]).output().ended_with(125).says(&["ampoule ps"]);
}

#[test]
fn a_list_can_be_watched_and_the_command_line_completed() {
    let sandbox = detached(["alpine", "sleep", "600"]);
    let mut watching = ampoule(["ps", "--watch"]).spawn();
    watching.wait_for(&sandbox.0);
    watching.wait_for(&sandbox.0);
    watching.signal(Signal::INT);
    watching.finish().ended_with(130);
    for shell in ["bash", "zsh", "fish"] {
        let out = ampoule(["completion", shell]).output().ended_with(0);
        assert!(out.text().contains("stop-timeout"), "{shell}");
    }
}

#[test]
fn files_are_copied_in_and_out_and_a_hostile_container_stays_inside() {
    let sandbox = detached(["alpine", "sleep", "600"]);
    let here = tempfile::tempdir().unwrap();
    let path = |name: &str| here.path().join(name).display().to_string();
    let there = |name: &str| format!("{}:{name}", sandbox.0);
    let cp = |from: &str, to: &str| ampoule(["cp", from, to]).output();
    fs::create_dir_all(path("folder/deep")).unwrap();
    fs::write(path("folder/deep/file"), b"\0bytes\xff").unwrap();
    cp(&path("folder"), &there("/tmp")).ended_with(0);
    cp(&path("folder/deep/file"), &there("/tmp/renamed")).ended_with(0);
    sandbox.sh("cmp /tmp/folder/deep/file /tmp/renamed").ended_with(0);
    cp(&there("/tmp/folder"), &path("back")).ended_with(0);
    assert_eq!(fs::read(path("back/deep/file")).unwrap(), b"\0bytes\xff");
    cp(&there("/tmp/renamed"), &path("")).ended_with(0);
    assert_eq!(fs::read(path("renamed")).unwrap(), b"\0bytes\xff");
    cp(&there("/no-such"), &path("")).ended_with(125).says(&["no-such"]);
    cp(&path("no-such"), &there("/tmp")).ended_with(125).says(&["source"]);
    cp("a", "b").ended_with(125).says(&["NAME:PATH"]);

    // A tar whose stream is a link that leads out of where it is unpacked, and a file behind that link.
    let script = "mkdir -p /e /usr/local/sbin; cd /e; ln -s .. x; tar -cf /link x; rm x; mkdir x; \
        echo evil > x/evil; tar -cf /file x/evil; (head -c 512 /link; cat /file) > /stream; \
        printf '#!/bin/sh\\ncat /stream\\n' > /usr/local/sbin/tar; chmod +x /usr/local/sbin/tar";
    sandbox.sh(script).ended_with(0);
    cp(&there("/e/x"), &path("taken")).ended_with(125);
    let names: Vec<_> =
        fs::read_dir(here.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(names.iter().all(|name| name != "evil"), "{names:?}");
    assert!(names.iter().all(|name| !name.to_string_lossy().starts_with(".ampoule")), "{names:?}");
}
