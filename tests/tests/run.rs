//! `ampoule run`: what goes in, what comes out, and how it ends.

use ampoule_tests::{ampoule, run};
use rustix::process::Signal;

/// Bytes that a text layer would spoil: every value, no line structure.
fn binary(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

#[test]
fn the_exit_code_is_the_workloads() {
    for code in [0, 1, 7] {
        run(["alpine", "--", "sh", "-c", &format!("exit {code}")]).output().ended_with(code);
    }
}

#[test]
fn a_workload_killed_by_a_signal_ends_with_128_and_the_signal() {
    run(["alpine", "--", "sh", "-c", "sh -c 'kill -SEGV $$'; exit $?"]).output().ended_with(139);
    run(["alpine", "sh", "-c", "sleep 1 & kill -USR1 $!; wait $!"]).output().ended_with(138);
}

#[test]
fn a_command_that_does_not_exist_is_127() {
    let out = run(["alpine", "--", "no-such-command"]).output().ended_with(127);
    out.says(&["no-such-command", "not found"]);
    run(["alpine", "--", "/bin/no-such-command"]).output().ended_with(127);
}

#[test]
fn a_command_that_cannot_be_executed_is_126() {
    run(["alpine", "--", "/etc/passwd"]).output().ended_with(126).says(&["/etc/passwd"]);
    run(["alpine", "--", "/etc"]).output().ended_with(126).says(&["/etc"]);
}

#[test]
fn a_bad_command_line_is_125() {
    run(["--memory", "lots", "alpine", "true"]).output().ended_with(125).says(&["lots"]);
    ampoule(["run"]).output().ended_with(125);
}

#[test]
fn stdout_and_stderr_are_kept_apart() {
    let out = run(["alpine", "--", "sh", "-c", "echo out; echo err >&2"]).output().ended_with(0);
    assert_eq!(out.stdout, b"out\n");
    assert_eq!(out.stderr, b"err\n");
}

#[test]
fn sixty_four_mebibytes_go_through_stdin_to_stdout_unharmed() {
    let sent = binary(64 << 20);
    let out = run(["-i", "alpine", "--", "cat"]).stdin(sent.clone()).output().ended_with(0);
    assert_eq!(out.stdout.len(), sent.len());
    assert!(out.stdout == sent, "the bytes differ");
}

#[test]
fn without_i_the_workload_has_no_stdin() {
    let out = run(["alpine", "--", "cat"]).stdin("never seen").output().ended_with(0);
    assert_eq!(out.text(), "");
}

#[test]
fn the_image_and_the_options_make_the_environment() {
    let script = "echo $GREETING $PWD $(id -u):$(id -g) $HOME $(hostname)";
    let args = ["-e", "GREETING=hi", "-w", "/tmp", "-u", "nobody", "alpine", "sh", "-c", script];
    let out = run(args).output().ended_with(0);
    let words: Vec<String> = out.text().split(' ').map(String::from).collect();
    assert_eq!(words[..3], ["hi", "/tmp", "65534:65534"]);
    run(["-u", "nobody-here", "alpine", "true"]).output().ended_with(125).says(&["nobody-here"]);
}

#[test]
fn the_rootfs_is_writable_and_forgotten_or_read_only() {
    let script = "echo x > /etc/x && cat /etc/x";
    assert_eq!(run(["alpine", "sh", "-c", script]).output().ended_with(0).text(), "x");
    run(["alpine", "--", "cat", "/etc/x"]).output().ended_with(1);
    let out = run(["--read-only", "alpine", "--", "touch", "/etc/x"]).output().ended_with(1);
    out.says(&["Read-only file system"]);
}

#[test]
fn sigterm_and_sigint_reach_the_workload() {
    for (signal, name, code) in [(Signal::TERM, "TERM", 43), (Signal::INT, "INT", 44)] {
        let script = format!("trap 'exit {code}' {name}; echo ready; while :; do sleep 0.1; done");
        let mut running = run(["alpine", "sh", "-c", &script]).spawn();
        running.wait_for("ready");
        running.signal(signal);
        running.finish().ended_with(code);
    }
}

#[test]
fn a_workload_that_ignores_sigterm_is_ended_by_sigkill_from_within() {
    let script = "trap '' TERM; (sleep 1; echo still here; kill -KILL $$) & echo ready; wait; wait";
    let mut running =
        run(["alpine", "--", "sh", "-c", &format!("sh -c \"{script}\"; exit $?")]).spawn();
    running.wait_for("ready");
    running.signal(Signal::TERM);
    running.finish();
}

#[test]
fn a_reader_that_goes_away_ends_a_writer() {
    let mut running = run(["alpine", "--", "yes"]).spawn();
    running.wait_for("y\n");
    drop(running.child.stdout.take());
    let out = running.finish();
    assert_ne!(out.code, 0);
}

#[test]
fn timings_name_every_span() {
    let out = run(["--timings", "alpine", "--", "echo", "hi"]).output().ended_with(0);
    assert_eq!(out.text(), "hi");
    out.says(&["t0", "t1", "t2", "t3", "t4", "t5", "t6", "t7"]);
}
