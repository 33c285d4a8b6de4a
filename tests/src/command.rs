//! One `ampoule` command line, run to its end.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::{
    root, scaled, stage,
    traces::{assert_nothing_left, processes_of, temporary},
};

/// No command of these tests takes longer, even in the bed; with dozens at once there, it does.
fn limit() -> Duration {
    Duration::from_secs(scaled(120, 1800) as u64)
}

/// What a command did.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code, or 128 + signal.
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub took: Duration,
}

impl Outcome {
    /// Standard output as text, without the last line end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_string()
    }

    pub fn error(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails the test unless the command ended with `code`; for chaining.
    #[track_caller]
    pub fn ended_with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.text(), self.error());
        self
    }

    /// Fails the test unless the error names every one of `words`.
    #[track_caller]
    pub fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.error().contains(word), "no {word:?} in: {}", self.error());
        }
        self
    }
}

/// A command line being put together.
pub struct Ampoule {
    pub command: Command,
    stdin: Vec<u8>,
    /// The sandbox's name, when it is a `run`.
    name: Option<String>,
}

/// `ampoule ARGS...`
pub fn ampoule<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ampoule {
    let mut command = Command::new(stage().join("bin/ampoule"));
    command.args(args).env("AMPOULE_ROOT", root());
    Ampoule { command, stdin: Vec::new(), name: None }
}

/// Any other command.
pub fn program(command: Command) -> Ampoule {
    Ampoule { command, stdin: Vec::new(), name: None }
}

/// `ampoule run --name UNIQUE ARGS...`
pub fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ampoule {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("t{}-{}x", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    // The bed is slow, and slower still when the machine under it has other work.
    let mut all: Vec<OsString> =
        ["run", "--boot-timeout", "100", "--name", &name].map(OsString::from).into();
    all.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
    let temporary = temporary(&name);
    fs::create_dir_all(&temporary).expect("a folder");
    Ampoule { name: Some(name), ..ampoule(all).env("TMPDIR", temporary) }
}

/// A sandbox in the background; what is left of it when the test ends is removed by force.
pub struct Detached(pub String);

/// `ampoule run -d --name UNIQUE ARGS...`
#[track_caller]
pub fn detached<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Detached {
    detach(in_background(args))
}

/// The same, with its configuration below `config`.
#[track_caller]
pub fn detached_with<S: AsRef<OsStr>>(
    config: &Path,
    args: impl IntoIterator<Item = S>,
) -> Detached {
    detach(in_background(args).env("XDG_CONFIG_HOME", config))
}

fn in_background<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ampoule {
    run([OsString::from("-d")].into_iter().chain(args.into_iter().map(|a| a.as_ref().to_owned())))
}

#[track_caller]
fn detach(mut ampoule: Ampoule) -> Detached {
    let name = ampoule.name.take().expect("a run");
    let out = ampoule.output().ended_with(0);
    assert_eq!(out.text(), name);
    Detached(name)
}

impl Detached {
    /// `ampoule VERB NAME`
    pub fn verb(&self, verb: &str) -> Outcome {
        ampoule([verb, &self.0]).output()
    }

    /// `ampoule exec NAME sh -c SCRIPT`
    pub fn sh(&self, script: &str) -> Outcome {
        ampoule(["exec", &self.0, "sh", "-c", script]).output()
    }

    /// Waits until its log contains `word`.
    #[track_caller]
    pub fn logged(&self, word: &str) {
        let deadline = Instant::now() + limit();
        while !self.verb("logs").text().contains(word) {
            assert!(Instant::now() < deadline, "no {word:?} in the log");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// `ampoule inspect NAME`
    pub fn record(&self) -> serde_json::Value {
        let out = self.verb("inspect").ended_with(0);
        let mut all: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).expect("JSON");
        all.pop().expect("one record")
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        ampoule(["rm", "-f", &self.0]).output();
        if !thread::panicking() {
            assert_nothing_left(&self.0);
        }
    }
}

impl Ampoule {
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Starts it with pipes; the test does the rest.
    pub fn spawn(mut self) -> Running {
        let child = self
            .command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{:?}: {error}", self.command));
        let line = format!("{:?}", self.command);
        Running { child, line, name: self.name, began: Instant::now() }
    }

    /// Runs it to its end and checks that nothing of the sandbox is left.
    #[track_caller]
    pub fn output(mut self) -> Outcome {
        let stdin = std::mem::take(&mut self.stdin);
        let mut running = self.spawn();
        let mut pipe = running.child.stdin.take().expect("piped");
        thread::spawn(move || pipe.write_all(&stdin));
        running.finish()
    }
}

/// A command that runs.
pub struct Running {
    pub child: Child,
    line: String,
    name: Option<String>,
    began: Instant,
}

impl Running {
    /// The sandbox's name.
    pub fn name(&self) -> &str {
        self.name.as_deref().expect("a run")
    }

    /// The PID of the sandbox's VMM, once it is there.
    pub fn vmm(&self) -> i32 {
        let deadline = Instant::now() + limit();
        loop {
            if let [pid, ..] = processes_of(self.name())[..] {
                return pid;
            }
            assert!(Instant::now() < deadline, "no VMM of {}", self.name());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Reads standard output until it contains `word`.
    pub fn wait_for(&mut self, word: &str) {
        let stdout = self.child.stdout.as_mut().expect("piped");
        let mut seen = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&seen).contains(word) {
            match stdout.read(&mut byte) {
                Ok(1) => seen.push(byte[0]),
                _ => self.ended_early(word, &seen),
            }
        }
    }

    fn ended_early(&mut self, word: &str, seen: &[u8]) -> ! {
        let _ = self.child.kill();
        let mut errors = Vec::new();
        let _ = self.child.stderr.take().expect("piped").read_to_end(&mut errors);
        let [seen, errors] = [seen, &errors].map(String::from_utf8_lossy);
        panic!("ended before {word:?} after {:?}: {seen}\n{errors}", self.began.elapsed());
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("it runs");
    }

    /// Waits for the end, within the bound, and checks that nothing of the sandbox is left.
    #[track_caller]
    pub fn finish(mut self) -> Outcome {
        drop(self.child.stdin.take());
        let stdout = drain(self.child.stdout.take());
        let stderr = drain(self.child.stderr.take());
        let asked = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            if asked.elapsed() > limit() {
                let _ = self.child.kill();
                panic!("still running after {:?}: {}", limit(), self.line);
            }
            thread::sleep(Duration::from_millis(5));
        };
        let took = self.began.elapsed();
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        if let Some(name) = &self.name {
            assert_nothing_left(name);
        }
        Outcome {
            code,
            stdout: stdout.join().expect("the reader"),
            stderr: stderr.join().expect("the reader"),
            took,
        }
    }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}
