//! A terminal: what an interactive user sees.

use ampoule_tests::{ampoule, detached, detached_with, run, screen::Screen};
use rustix::termios::tcgetattr;

#[test]
fn a_terminal_is_one_inside_follows_the_window_and_is_given_back() {
    let (mut screen, slave) = Screen::new();
    let before = tcgetattr(&slave).unwrap();
    let mut child = Screen::on(&slave, run(["-it", "alpine", "--", "sh"]));
    let pid = rustix::process::Pid::from_child(&child);
    screen.follows_its_window(|| {
        rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    });
    // A key for the workload, not a signal for ampoule.
    screen.interrupts();
    screen.types("exit 5\n");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    let after = tcgetattr(&slave).unwrap();
    assert_eq!(before.local_modes, after.local_modes);
    assert_eq!(before.input_modes, after.input_modes);
    assert_eq!(before.output_modes, after.output_modes);
}

#[test]
fn t_without_a_terminal_on_stdin_is_an_error_with_a_reason() {
    let out = run(["-it", "alpine", "--", "true"]).stdin("x").output().ended_with(125);
    out.says(&["terminal"]);
}

#[test]
fn exec_and_attach_have_a_terminal_too_and_attach_can_be_left() {
    let sandbox = detached(["-it", "alpine", "sh"]);
    let (mut screen, slave) = Screen::new();
    let before = tcgetattr(&slave).unwrap();
    let mut exec = Screen::on(&slave, ampoule(["exec", "-it", &sandbox.0, "sh"]));
    screen.types("test -t 0 && stty size && exit 6\n");
    screen.shows("24 80");
    assert_eq!(exec.wait().unwrap().code(), Some(6));
    let mut attach = Screen::on(&slave, ampoule(["attach", &sandbox.0]));
    screen.types("stty size; echo a-$((1+1))\n");
    screen.shows("24 80");
    screen.shows("a-2");
    screen.types("\x10\x11");
    assert_eq!(attach.wait().unwrap().code(), Some(0));
    assert_eq!(before.local_modes, tcgetattr(&slave).unwrap().local_modes);
    let mut attach = Screen::on(&slave, ampoule(["attach", &sandbox.0]));
    screen.types("exit 4\n");
    assert_eq!(attach.wait().unwrap().code(), Some(4));
    assert_eq!(sandbox.verb("wait").text(), "4");
}

#[test]
fn a_console_is_a_shell_in_the_guest_once_it_is_turned_on() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("ampoule/config.toml");
    let sandbox = detached_with(folder.path(), ["--seed", "7", "alpine", "sleep", "600"]);
    let console = |script: &str| ampoule(["console", &sandbox.0]).stdin(script).output();
    console("true\n").ended_with(125).says(&["off", "console = true", config.to_str().unwrap()]);
    std::fs::create_dir(folder.path().join("ampoule")).unwrap();
    std::fs::write(&config, "console = true\n").unwrap();
    let script =
        "cat /proc/1/comm; id -u; ls /run/ampoule; grep CapEff /proc/self/status; exit 3\n";
    let out = console(script).ended_with(3).text();
    let expected = format!("ampoule-agent\n0\n{}\nCapEff:\t000001ffffffffff", sandbox.0);
    assert_eq!(out, expected);
    let (mut screen, slave) = Screen::new();
    let mut child = Screen::on(&slave, ampoule(["console", &sandbox.0]));
    screen.types("test -t 0 && stty size; pidof ampoule-agent\n");
    screen.shows("24 80");
    screen.shows("1");
    screen.types("exit 4\n");
    assert_eq!(child.wait().unwrap().code(), Some(4));
    // The container sees nothing of it, and a further process draws from the seed as well.
    let out = sandbox.sh("ls -d /proc/[0-9]* | wc -l; head -c 8 /dev/urandom | wc -c").text();
    assert!(
        out.ends_with("\n8") && out.split('\n').next().unwrap().parse::<u32>().unwrap() < 6,
        "{out}"
    );
}
