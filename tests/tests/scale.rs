//! Many sandboxes on one host: one after the other, at once, alive together. With `AMPOULE_SCALE=full` there are 100 and
//! 50 of them (`make test` then gives the bed more memory), without it as many as every `make test` can afford.

use std::{
    io::Write,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ampoule_tests::{Footprint, ampoule, detached, run, scaled};

/// How many start at the same moment.
const AT_ONCE: usize = 10;
/// Memory that may be gone after a number of runs: the kernel's own caches, of which not all count as available.
const SLACK: u64 = 48 << 20;

/// The tests of this file compare the whole host: one at a time, and after a first sandbox, which leaves caches warm.
fn alone() -> MutexGuard<'static, bool> {
    static WARM: Mutex<bool> = Mutex::new(false);
    let mut warm = WARM.lock().unwrap_or_else(PoisonError::into_inner);
    if !*warm {
        run(["alpine", "true"]).output().ended_with(0);
        *warm = true;
    }
    warm
}

#[test]
fn sandboxes_in_a_row_leave_the_host_as_it_was() {
    let _alone = alone();
    let witness = detached(["--memory", "64m", "alpine", "sleep", "3600"]);
    let before = Footprint::now();
    for _ in 0..scaled(10, 100) {
        assert_eq!(run(["alpine", "echo", "hi"]).output().ended_with(0).text(), "hi");
    }
    before.assert_unchanged(SLACK);
    assert_eq!(witness.sh("echo hi").ended_with(0).text(), "hi");
}

#[test]
fn sandboxes_start_at_once_and_live_together() {
    let _alone = alone();
    let before = Footprint::now();
    let count = scaled(12, 50);
    let mut alive = Vec::new();
    while alive.len() < count {
        let batch = AT_ONCE.min(count - alive.len());
        // Ten boots share what one usually has.
        let options = ["--boot-timeout", "900", "-i", "--memory", "64m", "alpine"];
        let workload = options.iter().chain(&["--", "sh", "-c", "echo ready; cat"]);
        let mut batch: Vec<_> = (0..batch).map(|_| run(workload.clone()).spawn()).collect();
        batch.iter_mut().for_each(|sandbox| sandbox.wait_for("ready"));
        alive.extend(batch);
    }
    let listed = ampoule(["ps", "-q"]).output().ended_with(0).text();
    for (number, sandbox) in alive.iter_mut().enumerate() {
        assert!(listed.lines().any(|name| name == sandbox.name()), "{listed}");
        let mut stdin = sandbox.child.stdin.as_ref().unwrap();
        writeln!(stdin, "word {number}").unwrap();
        sandbox.wait_for(&format!("word {number}\n"));
    }
    alive.into_iter().for_each(|sandbox| drop(sandbox.finish().ended_with(0)));
    before.assert_unchanged(SLACK);
}
