//! What `ampoule run` runs: an image's configuration and the user's options as one OCI runtime spec, with
//! docker's defaults. Pure.

use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

use crate::{
    capabilities::default_capabilities, control::ExecRequest, image::ImageConfig,
    seccomp::default_profile,
};

/// Search path of a workload whose image names none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Period of a CPU quota in microseconds.
const CPU_PERIOD: u64 = 100_000;
/// Longest host name Linux takes, in bytes (HOST_NAME_MAX).
const MAX_HOSTNAME: usize = 64;

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// Replaces the image's command, not its entrypoint; empty keeps it.
    pub command: Vec<String>,
    /// `NAME=value` each; the last one of a name wins.
    pub env: Vec<String>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    /// With its size in characters, width and height, if there is a terminal.
    pub terminal: Option<(u16, u16)>,
    pub hostname: String,
    /// Limit in bytes.
    pub memory: u64,
    /// Quota in thousandths of a CPU; none if all CPUs of the VM are the container's.
    pub milli_cpus: Option<u32>,
    /// 0 is no limit.
    pub pids_limit: u32,
    pub read_only: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum RunSpecError {
    #[error("the image names no command: give one after the image")]
    NoCommand,
    #[error("working directory {0:?}: not an absolute path")]
    Workdir(String),
    #[error("default spec")]
    Json(#[from] serde_json::Error),
}

/// Makes the spec.
pub fn run_spec(image: &ImageConfig, options: &RunOptions) -> Result<Spec, RunSpecError> {
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let namespaces = namespaces.map(|kind| json!({ "type": kind }));
    Ok(serde_json::from_value(json!({
        "ociVersion": "1.1.0",
        "hostname": hostname(&options.hostname),
        "root": { "path": "rootfs", "readonly": options.read_only },
        "process": process(image, options)?,
        "mounts": mounts(),
        "linux": {
            "namespaces": namespaces,
            "resources": resources(options),
            "seccomp": default_profile()?,
            "maskedPaths": [
                "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug",
                "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
            ],
            "readonlyPaths":
                ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }))?)
}

/// A sandbox's name as a host name.
pub fn hostname(name: &str) -> &str {
    &name[..name.len().min(MAX_HOSTNAME)]
}

fn process(image: &ImageConfig, options: &RunOptions) -> Result<Value, RunSpecError> {
    let cwd = options.workdir.as_deref().unwrap_or(&image.working_dir);
    let cwd = if cwd.is_empty() { "/" } else { absolute(cwd)? };
    let mut process = json!({
        "terminal": options.terminal.is_some(),
        // The agent looks names and numbers up in the container's own files.
        "user": { "uid": 0, "gid": 0, "username": options.user.as_deref().unwrap_or(&image.user) },
        "args": args(image, &options.command)?,
        "env": env(image, options),
        "cwd": cwd,
        "capabilities": default_capabilities(),
    });
    if let Some((width, height)) = options.terminal {
        process["consoleSize"] = json!({ "width": width, "height": height });
    }
    Ok(process)
}

/// A further process: the first one's settings, and what the user says of this one.
pub fn exec_process(first: &Process, exec: ExecRequest) -> Result<Process, RunSpecError> {
    let mut json = serde_json::to_value(first)?;
    let mut env = first.env().clone().unwrap_or_default();
    if exec.terminal.is_some() && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".into());
    }
    exec.env.iter().for_each(|entry| set(&mut env, entry));
    json["args"] = exec.args.into();
    json["env"] = env.into();
    json["terminal"] = exec.terminal.is_some().into();
    json["consoleSize"] = match exec.terminal {
        Some((width, height)) => json!({ "width": width, "height": height }),
        None => Value::Null,
    };
    if let Some(cwd) = exec.workdir {
        json["cwd"] = absolute(&cwd)?.into();
    }
    if let Some(user) = exec.user {
        json["user"] = json!({ "uid": 0, "gid": 0, "username": user });
    }
    Ok(serde_json::from_value(json)?)
}

fn absolute(cwd: &str) -> Result<&str, RunSpecError> {
    if cwd.starts_with('/') { Ok(cwd) } else { Err(RunSpecError::Workdir(cwd.into())) }
}

fn args(image: &ImageConfig, command: &[String]) -> Result<Vec<String>, RunSpecError> {
    let command = if command.is_empty() { &image.cmd } else { command };
    let args: Vec<String> = image.entrypoint.iter().chain(command).cloned().collect();
    if args.is_empty() { Err(RunSpecError::NoCommand) } else { Ok(args) }
}

/// Defaults, then the image's, then the user's: of one name the last wins. HOME is the agent's: it knows the
/// user.
fn env(image: &ImageConfig, options: &RunOptions) -> Vec<String> {
    let hostname = format!("HOSTNAME={}", hostname(&options.hostname));
    let mut defaults = vec![PATH.to_string(), hostname];
    if options.terminal.is_some() {
        defaults.push("TERM=xterm".into());
    }
    let mut env = Vec::new();
    defaults.iter().chain(&image.env).chain(&options.env).for_each(|entry| set(&mut env, entry));
    env
}

/// Sets a variable, in its place if it is there already.
fn set(env: &mut Vec<String>, entry: &str) {
    let name = entry.split('=').next();
    match env.iter_mut().find(|e| e.split('=').next() == name) {
        Some(earlier) => *earlier = entry.to_string(),
        None => env.push(entry.to_string()),
    }
}

fn mounts() -> Value {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": source, "options": options });
    json!([
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/sys/fs/cgroup",
            "cgroup2",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"]
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]
        ),
    ])
}

fn resources(options: &RunOptions) -> Value {
    let mut resources = json!({
        "devices": devices(),
        "memory": { "limit": options.memory },
        "pids": { "limit": options.pids_limit },
    });
    if let Some(milli) = options.milli_cpus {
        let quota = u64::from(milli) * CPU_PERIOD / 1000;
        resources["cpu"] = json!({ "quota": quota, "period": CPU_PERIOD });
    }
    resources
}

/// Nodes of any device may be made; opened may be only the harmless ones.
fn devices() -> Value {
    let allow = |kind: &str, major: Option<u32>, minor: Option<u32>, access: &str| {
        let mut rule = json!({ "allow": true, "type": kind, "access": access });
        for (name, number) in [("major", major), ("minor", minor)] {
            if let Some(number) = number {
                rule[name] = number.into();
            }
        }
        rule
    };
    json!([
        { "allow": false, "access": "rwm" },
        allow("c", None, None, "m"),
        allow("b", None, None, "m"),
        // null, zero, full, random, urandom
        allow("c", Some(1), Some(3), "rwm"),
        allow("c", Some(1), Some(5), "rwm"),
        allow("c", Some(1), Some(7), "rwm"),
        allow("c", Some(1), Some(8), "rwm"),
        allow("c", Some(1), Some(9), "rwm"),
        // tty, console, ptmx, pts
        allow("c", Some(5), Some(0), "rwm"),
        allow("c", Some(5), Some(1), "rwm"),
        allow("c", Some(5), Some(2), "rwm"),
        allow("c", Some(136), None, "rwm"),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::guest_spec;

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["serve".into()],
            env: vec!["PATH=/bin".into(), "LANG=C".into()],
            user: "www".into(),
            working_dir: "/srv".into(),
            ..Default::default()
        }
    }

    fn json(image: &ImageConfig, options: &RunOptions) -> Value {
        serde_json::to_value(run_spec(image, options).unwrap()).unwrap()
    }

    #[test]
    fn the_image_says_what_the_user_does_not() {
        let options = RunOptions { hostname: "box".into(), ..Default::default() };
        let spec = json(&image(), &options);
        for (pointer, value) in [
            ("/process/args", json!(["/entry", "serve"])),
            ("/process/cwd", json!("/srv")),
            ("/process/user/username", json!("www")),
            ("/process/env", json!(["PATH=/bin", "HOSTNAME=box", "LANG=C"])),
            ("/process/terminal", json!(false)),
            ("/hostname", json!("box")),
        ] {
            assert_eq!(spec.pointer(pointer), Some(&value), "{pointer}");
        }
    }

    #[test]
    fn the_user_wins_over_the_image() {
        let options = RunOptions {
            command: vec!["ls".into(), "-l".into()],
            env: vec!["LANG=de".into(), "A=b=c".into(), "TERM=dumb".into()],
            workdir: Some("/tmp".into()),
            user: Some("7:8".into()),
            terminal: Some((80, 24)),
            milli_cpus: Some(500),
            memory: 64 << 20,
            pids_limit: 9,
            read_only: true,
            ..Default::default()
        };
        let spec = json(&image(), &options);
        for (pointer, value) in [
            ("/process/args", json!(["/entry", "ls", "-l"])),
            ("/process/cwd", json!("/tmp")),
            ("/process/user/username", json!("7:8")),
            ("/process/env", json!(["PATH=/bin", "HOSTNAME=", "TERM=dumb", "LANG=de", "A=b=c"])),
            ("/process/consoleSize", json!({ "width": 80, "height": 24 })),
            ("/linux/resources/cpu", json!({ "quota": 50_000, "period": 100_000 })),
            ("/linux/resources/memory/limit", json!(64 << 20)),
            ("/linux/resources/pids/limit", json!(9)),
            ("/root/readonly", json!(true)),
        ] {
            assert_eq!(spec.pointer(pointer), Some(&value), "{pointer}");
        }
    }

    #[test]
    fn a_run_needs_a_command_and_an_absolute_folder() {
        let none = run_spec(&ImageConfig::default(), &RunOptions::default());
        assert!(matches!(none, Err(RunSpecError::NoCommand)));
        let relative = RunOptions { workdir: Some("tmp".into()), ..Default::default() };
        assert!(matches!(run_spec(&image(), &relative), Err(RunSpecError::Workdir(_))));
    }

    #[test]
    fn an_exec_is_as_the_first_process_but_for_what_is_said() {
        let options = RunOptions { user: Some("www".into()), ..Default::default() };
        let spec = run_spec(&image(), &options).unwrap();
        let first = spec.process().as_ref().unwrap();
        let args = vec!["ls".to_string()];
        let plain = exec_process(first, ExecRequest { args: args.clone(), ..Default::default() });
        let plain = plain.unwrap();
        assert_eq!(
            (plain.args(), plain.cwd(), plain.user()),
            (&Some(args.clone()), first.cwd(), first.user())
        );
        let full = ExecRequest {
            args,
            env: vec!["LANG=de".into(), "A=1".into()],
            workdir: Some("/tmp".into()),
            user: Some("7".into()),
            terminal: Some((80, 24)),
            stdin: true,
            output: true,
        };
        let full = serde_json::to_value(exec_process(first, full).unwrap()).unwrap();
        assert_eq!(full["env"], json!(["PATH=/bin", "HOSTNAME=", "LANG=de", "TERM=xterm", "A=1"]));
        assert_eq!((&full["cwd"], &full["user"]["username"]), (&json!("/tmp"), &json!("7")));
        assert_eq!(full["consoleSize"], json!({ "width": 80, "height": 24 }));
        let relative = ExecRequest { workdir: Some("tmp".into()), ..Default::default() };
        assert!(matches!(exec_process(first, relative), Err(RunSpecError::Workdir(_))));
    }

    #[test]
    fn what_is_made_here_passes_the_conversion() {
        let options = RunOptions { command: vec!["sh".into()], ..Default::default() };
        let spec = run_spec(&image(), &options).unwrap();
        let guest = guest_spec(&spec).unwrap();
        assert_eq!(guest.mounts().as_ref().unwrap().len(), 7);
        assert_eq!(guest.process(), spec.process());
    }
}
