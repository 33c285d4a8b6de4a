//! startContainer hooks: programs of the container that run before its command, with the rights it will have.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio, id},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use crate::{
    oci::{Hook, Spec},
    plan::{Fault, StepError, at, refuse},
};

/// How long a hook may take that sets no limit itself.
const LIMIT: Duration = Duration::from_secs(30);
/// How often it is looked whether one has ended.
const BEAT: Duration = Duration::from_millis(5);
/// What is told of what a failed one said.
const MAX_TEXT: u64 = 1024;

/// One that is ready to run.
pub struct Prepared {
    name: String,
    hook: Hook,
    /// What it reads, and what it writes: files, for whom nobody has to wait.
    input: File,
    said: File,
}

/// Inside the container's root and PID namespace; `id` is the container's.
pub fn prepare(spec: &Spec, container: &str) -> Result<Vec<Prepared>, StepError> {
    let state = json!({
        "ociVersion": spec.oci_version,
        "id": container,
        "status": "created",
        "pid": id(),
        "bundle": "/",
    });
    let state = state.to_string();
    let hooks = spec.hooks.start_container.iter().enumerate();
    hooks.map(|(n, hook)| Prepared::new(n, hook.clone(), &state)).collect()
}

impl Prepared {
    fn new(n: usize, hook: Hook, state: &str) -> Result<Self, StepError> {
        let name = format!("startContainer[{n}] ({})", hook.path);
        if !hook.path.starts_with('/') {
            return Err(refuse("hook", name, "not an absolute path"));
        }
        if hook.timeout == Some(0) {
            return Err(refuse("hook", name, "a timeout of 0"));
        }
        let scratch = || memfd_create("hook", MemfdFlags::CLOEXEC).map(File::from);
        let (mut input, said) =
            scratch().and_then(|input| Ok((input, scratch()?))).map_err(at("hook", &name))?;
        input
            .write_all(state.as_bytes())
            .and_then(|()| input.rewind())
            .map_err(at("hook", &name))?;
        Ok(Self { name, hook, input, said })
    }

    /// Waits for its end.
    pub fn run(self) -> Result<(), StepError> {
        let Self { name, hook, input, said } = self;
        let failed = || at("hook", &name);
        let (stdout, stderr) = (said.try_clone(), said.try_clone());
        let mut command = Command::new(&hook.path);
        command
            .env_clear()
            .envs(hook.env.iter().map(|entry| entry.split_once('=').unwrap_or((entry, ""))))
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(stdout.map_err(failed())?))
            .stderr(Stdio::from(stderr.map_err(failed())?));
        if let Some((arg0, others)) = hook.args.split_first() {
            command.arg0(arg0).args(others);
        }
        let mut child = command.spawn().map_err(failed())?;
        let limit = hook.timeout.map_or(LIMIT, Duration::from_secs);
        let began = Instant::now();
        let problem = loop {
            match child.try_wait().map_err(failed())? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => break format!("{status}{}", told(said)),
                None if began.elapsed() >= limit => {
                    // The container goes with us, and all that is left of the hook.
                    let _ = child.kill();
                    break format!("not done within {} s", limit.as_secs());
                }
                None => thread::sleep(BEAT),
            }
        };
        Err(StepError::new(Fault::Internal, "hook", name, problem))
    }
}

fn told(mut said: File) -> String {
    let mut text = Vec::new();
    let read = said.rewind().and_then(|()| said.take(MAX_TEXT).read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text);
    match read {
        Ok(1..) if !text.trim().is_empty() => format!(": {}", text.trim()),
        _ => String::new(),
    }
}
