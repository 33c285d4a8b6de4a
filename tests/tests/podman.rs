//! Podman runs containers: the same tests with runc, which proves every expectation, and with ampoule.

use std::{fs, process::Command};

use ampoule_tests::{Runtime, podman::Podman, program, screen::Screen, skip};

#[test]
fn runc_life() {
    on("runc_life", Runtime::Runc, life);
}

#[test]
fn ampoule_life() {
    on("ampoule_life", Runtime::Ampoule, life);
}

#[test]
fn runc_foreground() {
    on("runc_foreground", Runtime::Runc, foreground);
}

#[test]
fn ampoule_foreground() {
    on("ampoule_foreground", Runtime::Ampoule, foreground);
}

#[test]
fn ampoule_refusals() {
    on("ampoule_refusals", Runtime::Ampoule, refusals);
}

fn on(name: &str, runtime: Runtime, test: fn(&Podman)) {
    match Podman::new(runtime) {
        Ok(podman) => test(&podman),
        Err(why) => skip(name, &why),
    }
}

/// A workload that ends by TERM with 43.
const POLITE: &str = "trap 'echo bye; exit 43' TERM; echo up; while :; do sleep 0.1; done";

fn life(podman: &Podman) {
    let run =
        ["-d", "--name", "c", "--env", "A=a", "--memory", "128m", "alpine", "sh", "-c", POLITE];
    podman.run(&run).output().ended_with(0);
    podman.until_logged("c", "up");
    let ps = podman.does(&["ps", "--format", "{{.Names}} {{.Status}}"]).ended_with(0).text();
    assert!(ps.starts_with("c Up"), "{ps}");
    let pid = podman.inspect("c", "{{.State.Pid}}");
    assert!(fs::exists(podman.inside.path(format!("/proc/{pid}/status"))).unwrap(), "{pid}");

    let options = ["exec", "-i", "--env", "B=b", "--workdir", "/tmp", "--user", "nobody", "c"];
    let script = ["sh", "-c", "echo $A $B $PWD $(id -un); cat; echo err >&2; exit 5"];
    let exec = podman.podman(&[&options[..], &script].concat()).stdin("piped\n").output();
    let exec = exec.ended_with(5);
    assert_eq!((&*exec.text(), &*exec.error()), ("a b /tmp nobody\npiped", "err\n"));
    podman.does(&["exec", "c", "nosuch"]).ended_with(127).says(&["nosuch"]);
    podman.does(&["exec", "-d", "c", "sleep", "1000"]).ended_with(0);
    let top = podman.does(&["top", "c", "-o", "pid,args"]).ended_with(0).text();
    assert!(top.contains("sleep 1000"), "{top}");
    podman.does(&["update", "--memory", "96m", "c"]).ended_with(0);

    podman.does(&["pause", "c"]).ended_with(0);
    assert_eq!(podman.inspect("c", "{{.State.Status}}"), "paused");
    podman.does(&["unpause", "c"]).ended_with(0);
    let stats = ["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "c"];
    let stats = podman.does(&stats).ended_with(0).text();
    assert!(!stats.starts_with("0 ") && !stats.contains(" 0B /"), "{stats}");

    podman.does(&["stop", "-t", "20", "c"]).ended_with(0);
    assert_eq!(podman.inspect("c", "{{.State.Status}} {{.State.ExitCode}}"), "exited 43");
    assert_eq!(podman.does(&["logs", "c"]).ended_with(0).text(), "up\nbye");
    podman.does(&["start", "c"]).ended_with(0);
    podman.does(&["kill", "c"]).ended_with(0);
    assert_eq!(podman.does(&["wait", "c"]).ended_with(0).text(), "137");
    podman.does(&["rm", "c"]).ended_with(0);
    assert_eq!(podman.does(&["ps", "--all", "--quiet"]).ended_with(0).text(), "");
}

fn foreground(podman: &Podman) {
    let script = "cat | wc -c; echo err >&2; exit 7";
    let run = podman.run(&["--rm", "-i", "alpine", "sh", "-c", script]);
    let out = run.stdin(vec![b'x'; 1 << 20]).output().ended_with(7);
    assert_eq!((&*out.text(), &*out.error()), ("1048576", "err\n"));

    let (mut screen, slave) = Screen::new();
    let run = podman.run(&["--rm", "-it", "alpine", "sh"]).command;
    // A session of its own, so that the terminal tells podman of its size.
    let mut setsid = Command::new("setsid");
    setsid.args(["--ctty", "--wait"]).arg(run.get_program()).args(run.get_args());
    setsid.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut child = Screen::on(&slave, program(setsid));
    screen.follows_its_window(|| ());
    screen.interrupts();
    screen.types("exit 9\n");
    assert_eq!(child.wait().unwrap().code(), Some(9));

    // runc looks for the command when a container is created, ampoule when it is started.
    let code = if podman.runtime == Runtime::Runc { 127 } else { 126 };
    podman
        .run(&["--rm", "alpine", "nosuch"])
        .output()
        .ended_with(code)
        .says(&["nosuch", "not found"]);
    podman.does(&["rm", "--all"]).ended_with(0);
}

/// What a VM does not have, and what Podman would look for on the host.
fn refusals(podman: &Podman) {
    let run = |options: &[&str], words: &[&str]| {
        let run = [&["run", "--rm"], options, &["alpine", "true"]].concat();
        podman.does(&run).ended_with(126).says(words);
    };
    run(&[], &["linux.namespaces (network)", "network of `none`"]);
    run(&["--network", "host"], &["linux.namespaces (network)", "network of `none`"]);
    run(&["--network", "none", "--volume", "/etc:/x"], &["(/x)", "files of the host"]);
    run(&["--network", "none", "--device", "/dev/fuse"], &["/dev/fuse", "devices of the host"]);
    podman.run(&["-d", "--name", "c", "alpine", "sleep", "1000"]).output().ended_with(0);
    let to = podman.inside.path("/run/test/release");
    podman.does(&["cp", "c:/etc/alpine-release", "/run/test/release"]).ended_with(125);
    assert!(!fs::exists(to).unwrap());
    podman.does(&["cp", "/etc/hostname", "c:/tmp/x"]).ended_with(125);
    assert!(!fs::exists(podman.inside.path("/tmp/x")).unwrap());
    podman.does(&["top", "c"]).ended_with(125).says(&["/proc"]);
    podman.does(&["rm", "--force", "-t", "0", "c"]).ended_with(0);
}
