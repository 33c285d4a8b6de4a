//! A container of a test's own from a bundle, driven by an OCI runtime's command line: runc's, and ampoule's likewise.

use std::{
    env, fs,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, waitpid};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Ampoule, Outcome, Runtime, assert_nothing_left, program, root};

/// No step of these tests takes longer, even in the bed.
const LIMIT: Duration = Duration::from_secs(90);

/// A bundle of Alpine in a folder of its own. When it is dropped nothing may be left of its container.
pub struct Bundle {
    pub runtime: Runtime,
    pub id: String,
    folder: TempDir,
}

impl Bundle {
    /// `args` is the container's command; `change` is made to what the runtime's `spec` writes. Says why there is none.
    pub fn new(
        runtime: Runtime,
        args: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Result<Self, String> {
        let tar = env::var_os("AMPOULE_ALPINE_TAR").ok_or("AMPOULE_ALPINE_TAR is not set")?;
        let bundle = Self::empty(runtime);
        fs::create_dir(bundle.path("rootfs")).expect("a folder");
        let mut unpack = Command::new("tar");
        unpack.arg("-xf").arg(tar).arg("-C").arg(bundle.path("rootfs"));
        program(unpack).output().ended_with(0);
        let folder = bundle.path("").display().to_string();
        bundle.verb(&["spec", "--bundle", &folder]).output().ended_with(0);
        let config = bundle.path("config.json");
        let mut spec: Value =
            serde_json::from_slice(&fs::read(&config).expect("a file")).expect("JSON");
        spec["process"]["args"] = json!(args);
        spec["process"]["terminal"] = json!(false);
        spec["root"]["readonly"] = json!(false);
        spec["linux"]["cgroupsPath"] = json!(format!("/{}", bundle.id));
        change(&mut spec);
        fs::write(&config, spec.to_string()).expect("a file");
        // What the runtime leaves behind, which stands for a container, becomes this process's child.
        set_child_subreaper(Some(getpid())).expect("a subreaper");
        Ok(bundle)
    }

    fn empty(runtime: Runtime) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("o{}-{}x", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self { runtime, id, folder: tempfile::tempdir().expect("a folder") }
    }

    /// A further bundle on the same root file system.
    pub fn beside(&self, mut spec: Value) -> Self {
        let bundle = Self::empty(self.runtime);
        spec["root"]["path"] = json!(self.path("rootfs"));
        spec["linux"]["cgroupsPath"] = json!(format!("/{}", bundle.id));
        fs::write(bundle.path("config.json"), spec.to_string()).expect("a file");
        bundle
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("AMPOULE_ROOT", root()).current_dir(self.folder.path());
        command
    }

    /// `RUNTIME ARGS...` in the bundle.
    pub fn verb<'a>(&self, args: impl IntoIterator<Item = &'a &'a str>) -> Ampoule {
        let mut command = self.command(&self.runtime.program().display().to_string());
        command.args(args);
        program(command)
    }

    /// `RUNTIME VERB ID`
    #[track_caller]
    pub fn does(&self, verb: &str) {
        self.verb(&[verb, &self.id]).output().ended_with(0);
    }

    /// A line for the shell, in which `$R` is the runtime and `$I` the container: for what leaves a process behind that
    /// has the streams.
    pub fn sh(&self, line: &str) -> Outcome {
        let mut command = self.command("sh");
        command.args(["-c", line]).env("R", self.runtime.program()).env("I", &self.id);
        program(command).output()
    }

    pub fn state(&self) -> Value {
        let out = self.verb(&["state", &self.id]).output().ended_with(0);
        serde_json::from_slice(&out.stdout).expect("JSON")
    }

    pub fn status(&self) -> String {
        self.state()["status"].as_str().expect("a status").into()
    }

    /// The process of a pid file.
    pub fn pid(&self, file: &str) -> Pid {
        let pid = self.text(file).parse().ok().and_then(Pid::from_raw);
        pid.unwrap_or_else(|| panic!("{file}: {:?}", self.text(file)))
    }

    /// Waits for the end of a process that a verb has left to this one; its exit code.
    #[track_caller]
    pub fn ended(&self, pid: Pid) -> i32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some((_, status)) = waitpid(Some(pid), WaitOptions::NOHANG).expect("our child") {
                return status.exit_status().expect("an exit code");
            }
            assert!(Instant::now() < deadline, "{pid:?} does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a file holds `word`.
    #[track_caller]
    pub fn shows(&self, file: &str, word: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.text(file).contains(word) {
            assert!(Instant::now() < deadline, "no {word:?} in {file}: {}", self.text(file));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let out = self.verb(&["delete", "--force", &self.id]).output();
        if !thread::panicking() {
            out.ended_with(0);
            assert_nothing_left(&self.id);
        }
    }
}
