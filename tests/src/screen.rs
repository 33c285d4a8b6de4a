//! A pseudo-terminal with its user.

use std::{
    fs::File,
    io::{Read, Write},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags, open},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::Ampoule;

/// Types, and reads the screen.
pub struct Screen {
    master: File,
    seen: Arc<Mutex<String>>,
}

impl Screen {
    pub fn new() -> (Self, File) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).expect("a terminal");
        unlockpt(&master).expect("a terminal");
        let name = ptsname(&master, Vec::new()).expect("a terminal");
        let slave = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("a terminal");
        let screen = Self::of(master.into());
        screen.resize(80, 24);
        (screen, File::from(slave))
    }

    /// Of the controlling end of a terminal.
    pub fn of(master: File) -> Self {
        let seen = Arc::new(Mutex::new(String::new()));
        let (mut reader, shared) = (master.try_clone().expect("a terminal"), seen.clone());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                shared.lock().expect("a terminal").push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        Self { master, seen }
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).expect("a terminal");
    }

    pub fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("a terminal");
    }

    /// Waits until the screen shows `word`, and forgets everything up to it.
    pub fn shows(&self, word: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut seen = self.seen.lock().expect("a terminal");
            if let Some(at) = seen.find(word) {
                seen.drain(..at + word.len());
                return;
            }
            assert!(Instant::now() < deadline, "no {word:?} on the screen: {seen:?}");
            drop(seen);
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Checks the terminal of a shell that was started on it: it is one, has its size, and follows the window;
    /// `resized` passes a change on.
    pub fn follows_its_window(&mut self, resized: impl FnOnce()) {
        self.types("test -t 0 && test -t 1 && echo is-a-$((1+1))-tty\n");
        self.shows("is-a-2-tty");
        self.types("until stty size | grep \"^$((20+4)) 80\"; do sleep 0.1; done\n");
        self.shows("24 80");
        self.resize(132, 43);
        resized();
        self.types("until stty size | grep \"^$((40+3)) 132\"; do sleep 0.1; done\n");
        self.shows("43 132");
    }

    /// Presses Ctrl-C in a shell: it ends the command there, not the shell.
    pub fn interrupts(&mut self) {
        self.types("sleep 1000\n");
        thread::sleep(Duration::from_millis(500));
        self.types("\x03");
        self.types("echo still-$((1+2))-here\n");
        self.shows("still-3-here");
    }

    /// Starts a command on the terminal.
    pub fn on(slave: &File, ampoule: Ampoule) -> Child {
        let mut command = ampoule.command;
        command
            .stdin(slave.try_clone().expect("a terminal"))
            .stdout(slave.try_clone().expect("a terminal"))
            .stderr(Stdio::from(slave.try_clone().expect("a terminal")));
        command.spawn().expect("a terminal")
    }
}
