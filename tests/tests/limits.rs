//! Limits hit the container, and the VM and its host go on.

use std::time::Duration;

use ampoule_tests::run;

#[test]
fn the_memory_limit_kills_the_container_and_says_so() {
    let greedy = ["dd", "if=/dev/zero", "of=/dev/null", "bs=128M", "count=1"];
    let out = run(["--memory", "64m", "alpine", "--"].iter().chain(&greedy)).output();
    assert_eq!(out.code, 137, "{}", out.error());
    out.says(&["memory limit"]);
}

#[test]
fn a_fork_bomb_meets_the_pids_limit() {
    let bomb = "i=0; while [ $i -lt 200 ]; do sleep 30 & i=$((i+1)); done; echo all";
    let out = run(["--pids-limit", "32", "alpine", "--", "sh", "-c", bomb]).output();
    assert_ne!(out.text(), "all");
    out.says(&["Resource temporarily unavailable"]);
    let tree = "b() { b | b & }; b; sleep 2; echo survived";
    let out = run(["--pids-limit", "64", "alpine", "--", "sh", "-c", tree]).output();
    assert!(out.took < Duration::from_secs(60));
}

#[test]
fn shares_of_a_cpu_are_a_quota() {
    let out = run(["--cpus", "0.5", "alpine", "--", "cat", "/sys/fs/cgroup/cpu.max"]).output();
    assert_eq!(out.ended_with(0).text(), "50000 100000");
}
