//! A terminal: what an interactive user sees.

use std::{
    fs::File,
    io::{Read, Write},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use ampoule_tests::{Ampoule, ampoule, detached, detached_with, run};
use rustix::{
    fs::{Mode, OFlags, open},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcgetattr, tcsetwinsize},
};

/// A pseudo-terminal with its user: types, and reads the screen.
struct Screen {
    master: File,
    seen: Arc<Mutex<String>>,
}

impl Screen {
    fn new() -> (Self, File) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let master = File::from(master);
        let seen = Arc::new(Mutex::new(String::new()));
        let (mut reader, shared) = (master.try_clone().unwrap(), seen.clone());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                shared.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        let screen = Self { master, seen };
        screen.resize(80, 24);
        (screen, File::from(slave))
    }

    fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
    }

    fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen shows `word`, and forgets everything up to it.
    fn shows(&self, word: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut seen = self.seen.lock().unwrap();
            if let Some(at) = seen.find(word) {
                seen.drain(..at + word.len());
                return;
            }
            assert!(Instant::now() < deadline, "no {word:?} on the screen: {seen:?}");
            drop(seen);
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Starts a command on the terminal.
fn on(slave: &File, ampoule: Ampoule) -> Child {
    let mut command = ampoule.command;
    command
        .stdin(slave.try_clone().unwrap())
        .stdout(slave.try_clone().unwrap())
        .stderr(Stdio::from(slave.try_clone().unwrap()));
    command.spawn().unwrap()
}

#[test]
fn a_terminal_is_one_inside_follows_the_window_and_is_given_back() {
    let (mut screen, slave) = Screen::new();
    let before = tcgetattr(&slave).unwrap();
    let mut child = on(&slave, run(["-it", "alpine", "--", "sh"]));
    screen.types("test -t 0 && test -t 1 && echo is-a-$((1+1))-tty\n");
    screen.shows("is-a-2-tty");
    screen.types("stty size\n");
    screen.shows("24 80");
    screen.resize(132, 43);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    screen.types("sleep 1; stty size\n");
    screen.shows("43 132");
    // Ctrl-C is a key for the workload, not a signal for ampoule.
    screen.types("sleep 1000\n");
    thread::sleep(Duration::from_millis(500));
    screen.types("\x03");
    screen.types("echo still-$((1+2))-here\n");
    screen.shows("still-3-here");
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
    let mut exec = on(&slave, ampoule(["exec", "-it", &sandbox.0, "sh"]));
    screen.types("test -t 0 && stty size && exit 6\n");
    screen.shows("24 80");
    assert_eq!(exec.wait().unwrap().code(), Some(6));
    let mut attach = on(&slave, ampoule(["attach", &sandbox.0]));
    screen.types("stty size; echo a-$((1+1))\n");
    screen.shows("24 80");
    screen.shows("a-2");
    screen.types("\x10\x11");
    assert_eq!(attach.wait().unwrap().code(), Some(0));
    assert_eq!(before.local_modes, tcgetattr(&slave).unwrap().local_modes);
    let mut attach = on(&slave, ampoule(["attach", &sandbox.0]));
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
    let mut child = on(&slave, ampoule(["console", &sandbox.0]));
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
