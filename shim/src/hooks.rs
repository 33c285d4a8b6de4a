//! Hooks of an OCI spec that are programs of the host. They run in the shim's own namespaces and get the state of their
//! container on their standard input. Its pid is the container's process on the host, which is in the network namespace
//! of the sandbox: that is what such hooks are for most of the time.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    fs::File,
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use oci_spec::runtime::{Hook, Spec};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    process::{Pid, Signal, kill_process_group},
};
use serde_json::{Value, json};
use tokio::{process::Command, sync::OnceCell, time::timeout};

use crate::{
    descriptors,
    id::Id,
    spec::{HOST_HOOKS, SpecError},
};

/// How long a hook may take that sets no limit itself.
const LIMIT: Duration = Duration::from_secs(30);
/// How long a killed one may take to end.
const KILLED: Duration = Duration::from_secs(5);
/// What is told of what a failed one said.
const MAX_TEXT: u64 = 1024;

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("{0}")]
    Run(Name, #[source] io::Error),
    #[error("{name}: {status}{said}")]
    Failed { name: Name, status: ExitStatus, said: String },
    #[error("{name}: not done within {} s; its field `timeout` sets the limit", limit.as_secs())]
    Slow { name: Name, limit: Duration },
}

/// Which one.
#[derive(Clone, Debug)]
pub struct Name {
    list: &'static str,
    n: usize,
    path: PathBuf,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hooks.{}[{}] ({})", self.list, self.n, self.path.display())
    }
}

/// A container's.
#[derive(Debug, Default)]
pub struct Hooks {
    lists: BTreeMap<&'static str, Vec<Hook>>,
    /// All of it that does not change.
    state: Value,
    bundle: PathBuf,
    stopped: OnceCell<()>,
}

impl Hooks {
    /// Takes them out of a spec: whoever has them runs them. In one that still has some they are refused.
    pub fn take(spec: &mut Spec, id: &Id, bundle: &Path) -> Result<Self, SpecError> {
        let state = json!({
            "ociVersion": spec.version(),
            "id": id.as_str(),
            "bundle": bundle,
            "annotations": spec.annotations().clone().unwrap_or_default(),
        });
        let mut hooks = serde_json::to_value(spec.hooks())?;
        let mut lists = BTreeMap::new();
        for name in HOST_HOOKS {
            let Some(list) = hooks.get_mut(name).map(Value::take) else { continue };
            let list: Vec<Hook> = serde_json::from_value(list)?;
            check(name, &list)?;
            lists.insert(name, list);
        }
        spec.set_hooks(serde_json::from_value(hooks)?);
        Ok(Self { lists, state, bundle: bundle.into(), stopped: OnceCell::new() })
    }

    /// When the container's process on the host is there, and before the container is made in its sandbox. Of a sandbox's
    /// first container, before that is booted: what they do to its network is the guest's.
    pub async fn create(&self, pid: u32) -> Result<(), HookError> {
        self.run("prestart", "creating", Some(pid)).await?;
        self.run("createRuntime", "creating", Some(pid)).await
    }

    /// When the command has been started. As with runc, the container does not outlive a failure.
    pub async fn started(&self, pid: u32) -> Result<(), HookError> {
        self.run("poststart", "running", Some(pid)).await
    }

    /// When the container is gone. Happens once, and a failure is nobody's but the log's.
    pub async fn stopped(&self) {
        let run = async || {
            if let Err(error) = self.run("poststop", "stopped", None).await {
                tracing::warn!(error = crate::error::chain_text(&error), "a hook failed");
            }
        };
        self.stopped.get_or_init(run).await;
    }

    async fn run(
        &self,
        list: &'static str,
        status: &str,
        pid: Option<u32>,
    ) -> Result<(), HookError> {
        let mut state = self.state.clone();
        for (n, hook) in self.lists.get(list).into_iter().flatten().enumerate() {
            state["status"] = status.into();
            if let Some(pid) = pid {
                state["pid"] = pid.into();
            }
            self.run_one(hook, Name { list, n, path: hook.path().clone() }, &state).await?;
        }
        Ok(())
    }

    async fn run_one(&self, hook: &Hook, name: Name, state: &Value) -> Result<(), HookError> {
        let failed = |e| HookError::Run(name.clone(), e);
        let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
        let limit = limit.map_or(LIMIT, Duration::from_secs);
        // Files, for whom nobody has to wait: what a hook leaves in the background keeps pipes open.
        let mut input = scratch().map_err(failed)?;
        input.write_all(state.to_string().as_bytes()).map_err(failed)?;
        input.rewind().map_err(failed)?;
        let said = scratch().map_err(failed)?;
        let (stdout, stderr) = (said.try_clone(), said.try_clone());
        let mut command = Command::new(hook.path());
        command
            .env_clear()
            .envs(variables(hook))
            .current_dir(&self.bundle)
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(stdout.map_err(failed)?))
            .stderr(Stdio::from(stderr.map_err(failed)?))
            .process_group(0)
            .kill_on_drop(true);
        if let Some((arg0, others)) = hook.args().as_deref().and_then(<[String]>::split_first) {
            command.arg0(arg0).args(others);
        }
        // SAFETY: between fork and exec it makes one system call.
        unsafe { command.pre_exec(descriptors::give_back) };
        let mut child = command.spawn().map_err(failed)?;
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        match timeout(limit, child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(HookError::Failed { name, status, said: told(said) }),
            Ok(Err(e)) => Err(failed(e)),
            Err(_) => {
                if let Some(group) = group {
                    let _ = kill_process_group(group, Signal::KILL);
                }
                let _ = timeout(KILLED, child.wait()).await;
                Err(HookError::Slow { name, limit })
            }
        }
    }
}

fn check(name: &str, list: &[Hook]) -> Result<(), SpecError> {
    for (n, hook) in list.iter().enumerate() {
        let invalid = |field: &str, why| {
            Err(SpecError::Invalid { field: format!("hooks.{name}[{n}].{field}"), why })
        };
        if !hook.path().is_absolute() {
            return invalid("path", "not an absolute path");
        }
        if hook.timeout().is_some_and(|seconds| seconds <= 0) {
            return invalid("timeout", "not more than 0 seconds");
        }
    }
    Ok(())
}

fn variables(hook: &Hook) -> HashMap<&str, &str> {
    let env = hook.env().iter().flatten();
    env.map(|entry| entry.split_once('=').unwrap_or((entry, ""))).collect()
}

fn scratch() -> io::Result<File> {
    Ok(memfd_create("hook", MemfdFlags::CLOEXEC)?.into())
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

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::error::chain_text;

    fn hooks(hooks: Value, bundle: &Path) -> Result<Hooks, SpecError> {
        let spec = json!({ "ociVersion": "1.2.0", "annotations": { "a": "b" }, "hooks": hooks });
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let taken = Hooks::take(&mut spec, &"c".parse().unwrap(), bundle)?;
        let left = serde_json::to_value(spec.hooks()).unwrap();
        assert!(HOST_HOOKS.iter().all(|name| left.get(*name).is_none_or(Value::is_null)), "{left}");
        Ok(taken)
    }

    fn shell(script: &str) -> Value {
        json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=x=y"] })
    }

    #[tokio::test]
    async fn they_run_in_their_order_with_the_state_and_their_environment_alone() {
        let bundle = tempfile::tempdir().unwrap();
        let log =
            |word: &str| shell(&format!("echo {word} $A $HOME >> log; cat >> log; echo >> log"));
        let hooks = hooks(
            json!({
                "prestart": [log("first")],
                "createRuntime": [log("second"), log("third")],
                "poststart": [log("fourth")],
                "poststop": [log("fifth")],
                "startContainer": [{ "path": "/guests" }],
            }),
            bundle.path(),
        );
        let hooks = hooks.unwrap();
        hooks.create(7).await.unwrap();
        hooks.started(7).await.unwrap();
        tokio::join!(hooks.stopped(), hooks.stopped());
        let log = fs::read_to_string(bundle.path().join("log")).unwrap();
        let lines: Vec<_> = log.lines().collect();
        assert_eq!(lines.len(), 10, "{log}");
        let words = ["first", "second", "third", "fourth", "fifth"];
        let states = ["creating", "creating", "creating", "running", "stopped"];
        for (n, (word, status)) in words.iter().zip(states).enumerate() {
            assert_eq!(lines[2 * n], format!("{word} x=y"));
            let state: Value = serde_json::from_str(lines[2 * n + 1]).unwrap();
            let mut expected = json!({
                "ociVersion": "1.2.0", "id": "c", "bundle": bundle.path(), "annotations": { "a": "b" }, "status": status,
            });
            if status != "stopped" {
                expected["pid"] = 7.into();
            }
            assert_eq!(state, expected);
        }
    }

    #[tokio::test]
    async fn the_first_failure_ends_the_list_and_says_what_the_hook_said() {
        let bundle = tempfile::tempdir().unwrap();
        let list =
            json!([shell("true"), shell("echo 'no luck' >&2; exit 3"), shell("touch later")]);
        let hooks = hooks(json!({ "createRuntime": list }), bundle.path()).unwrap();
        let error = hooks.create(1).await.unwrap_err();
        assert_eq!(chain_text(&error), "hooks.createRuntime[1] (/bin/sh): exit status: 3: no luck");
        assert!(!bundle.path().join("later").exists());
    }

    #[tokio::test]
    async fn one_that_is_missing_or_does_not_end_is_named() {
        let bundle = tempfile::tempdir().unwrap();
        let missing = json!({ "prestart": [{ "path": "/no/such/hook" }] });
        let error = hooks(missing, bundle.path()).unwrap().create(1).await.unwrap_err();
        assert!(chain_text(&error).starts_with("hooks.prestart[0] (/no/such/hook): No such file"));
        let mut slow = shell("sleep 1000 & wait");
        slow["timeout"] = 1.into();
        let hooks = hooks(json!({ "poststart": [slow] }), bundle.path()).unwrap();
        let error = hooks.started(1).await.unwrap_err();
        assert!(error.to_string().contains("not done within 1 s"), "{error}");
        // In the background it may stay, and keeps nobody waiting.
        hooks.stopped().await;
    }

    #[test]
    fn what_is_no_hook_is_refused() {
        for (hook, field) in [
            (json!({ "path": "bin/x" }), "hooks.poststop[0].path"),
            (json!({ "path": "/bin/x", "timeout": 0 }), "hooks.poststop[0].timeout"),
        ] {
            let refused = hooks(json!({ "poststop": [hook] }), Path::new("/b")).unwrap_err();
            assert!(refused.to_string().starts_with(field), "{refused}");
        }
    }
}
