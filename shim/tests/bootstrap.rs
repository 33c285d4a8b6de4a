//! `containerd-shim-ampoule-v2` as containerd runs it, up to where a VM would be needed.

#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write, pipe},
    os::unix::{
        fs::{FileTypeExt, OpenOptionsExt, PermissionsExt},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::{
    api::{DeleteResponse, ShutdownRequest, StateRequest},
    bootstrap_api::{BootstrapParams, BootstrapResult},
    shim_async::{Client, TaskClient},
    types::introspection::RuntimeInfo,
};
use protobuf::Message;
use rustix::process::{Pid, Signal, getsid, kill_process};
use serde_json::json;
use tempfile::TempDir;
use ttrpc::{Code, context, proto::Request};

const LIMIT: Duration = Duration::from_secs(20);
const NAMESPACE: &str = "test";

fn shim() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ampoule"));
    command.arg0("/usr/local/bin/containerd-shim-ampoule-v2");
    command
}

/// The folders of a containerd, and of the shims it starts; those that still run at the end are killed.
struct Containerd(TempDir);

impl Containerd {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("bundles")).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// With a log that has a reader, and annotations if there is a specification at all.
    fn bundle(&self, id: &str, annotations: Option<serde_json::Value>) -> Bundle<'_> {
        let path = self.path("bundles").join(id);
        fs::create_dir_all(path.join("rootfs")).unwrap();
        let log = path.join("log");
        assert!(Command::new("mkfifo").arg(&log).status().unwrap().success());
        let mut options = OpenOptions::new();
        let log = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(log).unwrap();
        if let Some(annotations) = annotations {
            let spec = json!({ "ociVersion": "1.1.0", "annotations": annotations });
            fs::write(path.join("config.json"), spec.to_string()).unwrap();
        }
        Bundle { containerd: self, id: id.into(), path, log }
    }

    fn alone(&self, id: &str) -> Bundle<'_> {
        self.bundle(id, Some(json!({})))
    }

    fn daemons(&self) -> Vec<Pid> {
        let bundles = fs::read_dir(self.path("bundles")).unwrap().flatten();
        let pids = bundles.filter_map(|b| fs::read_to_string(b.path().join("shim.pid")).ok());
        pids.filter_map(|pid| Pid::from_raw(pid.parse().unwrap())).collect()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for pid in self.daemons() {
            if lives(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

struct Bundle<'a> {
    containerd: &'a Containerd,
    id: String,
    path: PathBuf,
    log: File,
}

impl Bundle<'_> {
    fn command(&self, action: &str) -> Command {
        let mut command = shim();
        let address = self.containerd.path("containerd.sock");
        command.args(["-namespace", NAMESPACE, "-address"]).arg(address);
        command.args(["-publish-binary", "/usr/bin/containerd", "-id", &self.id]);
        if action == "delete" {
            command.arg("-bundle").arg(&self.path);
        }
        command.arg(action).current_dir(&self.path).env("MAX_SHIM_VERSION", "2");
        command.env("TTRPC_ADDRESS", self.containerd.path("containerd.sock.ttrpc"));
        command
    }

    /// Both outputs, read to their end, as containerd does.
    fn combined(&self, action: &str, input: &[u8]) -> (bool, Vec<u8>) {
        let (mut reader, writer) = pipe().unwrap();
        let mut command = self.command(action);
        command.stdin(Stdio::piped()).stdout(writer.try_clone().unwrap()).stderr(writer);
        let mut child = command.spawn().unwrap();
        // It has the other ends.
        drop(command);
        child.stdin.take().unwrap().write_all(input).unwrap();
        let mut output = Vec::new();
        reader.read_to_end(&mut output).unwrap();
        (child.wait().unwrap().success(), output)
    }

    /// `start` as containerd 2.3 says it; sockets are in a folder of the test's.
    fn start(&self) -> String {
        let params = BootstrapParams {
            instance_id: self.id.clone(),
            namespace: NAMESPACE.into(),
            containerd_grpc_address: self.containerd.path("containerd.sock").display().to_string(),
            socket_dir: Some(self.containerd.path("s").display().to_string()),
            ..Default::default()
        };
        let (success, output) = self.combined("start", &params.write_to_bytes().unwrap());
        assert!(success, "{}", String::from_utf8_lossy(&output));
        let result = BootstrapResult::parse_from_bytes(&output).unwrap();
        assert_eq!((result.version, &*result.protocol), (3, "ttrpc"));
        assert_eq!(fs::read_to_string(self.path.join("address")).unwrap(), result.address);
        result.address
    }

    fn daemon(&self) -> Pid {
        let pid = fs::read_to_string(self.path.join("shim.pid")).unwrap();
        Pid::from_raw(pid.parse().unwrap()).unwrap()
    }

    fn delete(&self) -> (DeleteResponse, Output) {
        let began = Instant::now();
        let output = self.command("delete").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(began.elapsed() < Duration::from_secs(5));
        (DeleteResponse::parse_from_bytes(&output.stdout).unwrap(), output)
    }

    /// As for a container whose end nobody saw, and without a word.
    fn deletes_quietly(&self) {
        let (response, output) = self.delete();
        assert_eq!((response.pid, response.exit_status), (0, 137));
        let at: SystemTime = response.exited_at.clone().unwrap().into();
        assert!(at.elapsed().unwrap() < LIMIT);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }

    fn logged(&self) -> String {
        let mut bytes = Vec::new();
        let _ = (&self.log).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn socket(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap())
}

fn lives(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap_or_default();
    // A zombie has only to be waited for.
    stat.rsplit(')').next().is_some_and(|rest| !matches!(rest.trim().get(..1), None | Some("Z")))
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        sleep(Duration::from_millis(2));
    }
}

/// Calls a daemon.
fn call<T>(address: &str, call: impl AsyncFnOnce(Client) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { call(Client::connect(address).await.unwrap()).await })
}

fn state(address: &str) -> Code {
    let request = StateRequest { id: "nobody".into(), ..Default::default() };
    let state = call(address, async |client| {
        TaskClient::new(client).state(context::with_duration(LIMIT), &request).await
    });
    match state.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

fn shut_down(address: &str) {
    let request = ShutdownRequest { id: "nobody".into(), ..Default::default() };
    call(address, async |client| {
        TaskClient::new(client).shutdown(context::with_duration(LIMIT), &request).await.unwrap();
    });
}

#[test]
fn a_daemon_serves_both_versions_until_it_is_shut_down() {
    let containerd = Containerd::new();
    let bundle = containerd.alone("c1");
    let address = bundle.start();
    let daemon = bundle.daemon();
    for version in ["v2", "v3"] {
        let request = Request {
            service: format!("containerd.task.{version}.Task"),
            method: "State".into(),
            timeout_nano: LIMIT.as_nanos().try_into().unwrap(),
            payload: StateRequest { id: "c1".into(), ..Default::default() }
                .write_to_bytes()
                .unwrap(),
            ..Default::default()
        };
        let status = call(&address, async |client| client.request(request).await.unwrap_err());
        let ttrpc::Error::RpcStatus(status) = status else { panic!("{status}") };
        assert_eq!(status.code(), Code::NOT_FOUND, "{version}: {}", status.message());
    }
    let process = PathBuf::from(format!("/proc/{}", daemon.as_raw_pid()));
    for descriptor in 0..3 {
        let target = fs::read_link(process.join(format!("fd/{descriptor}"))).unwrap();
        assert_eq!(target, Path::new("/dev/null"));
    }
    assert_eq!(getsid(Some(daemon)).unwrap(), daemon);
    assert_eq!(fs::read_link(process.join("cwd")).unwrap(), Path::new("/"));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let socket = socket(&address);
    assert!(fs::metadata(socket).unwrap().file_type().is_socket());
    assert_eq!((mode(socket), mode(socket.parent().unwrap())), (0o600, 0o700));
    let began = Instant::now();
    shut_down(&address);
    wait_until("the daemon ends", || !lives(daemon));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(!socket.exists());
    assert_eq!(bundle.logged(), "");
    bundle.deletes_quietly();
}

/// The answer to older containerds has the address in the folder that all shims share.
#[test]
fn older_containerds_read_a_plain_address() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: /run/containerd/s is root's");
        return;
    }
    let containerd = Containerd::new();
    let bundle = containerd.alone("c1");
    let (success, output) = bundle.combined("start", b"");
    let address = String::from_utf8(output).unwrap();
    assert!(success && address.starts_with("unix:///run/containerd/s/"), "{address:?}");
    assert_eq!(address.trim_end(), address);
    assert_eq!(state(&address), Code::NOT_FOUND);
    shut_down(&address);
    wait_until("the socket goes", || !socket(&address).exists());
}

#[test]
fn a_pod_has_one_daemon_which_outlives_its_members_delete() {
    let containerd = Containerd::new();
    let pod = json!({ "io.kubernetes.cri.sandbox-id": "pod" });
    let sandbox = containerd.bundle("pod", Some(pod.clone()));
    let address = sandbox.start();
    let members: Vec<Bundle<'_>> =
        (0..5).map(|n| containerd.bundle(&format!("m{n}"), Some(pod.clone()))).collect();
    std::thread::scope(|scope| {
        for member in &members {
            scope.spawn(|| assert_eq!(member.start(), address));
        }
    });
    assert_eq!(containerd.daemons(), [sandbox.daemon()]);
    for member in &members {
        member.deletes_quietly();
    }
    assert!(lives(sandbox.daemon()));
    assert_eq!(state(&address), Code::NOT_FOUND);
    // That of the first ends a daemon without tasks, of which containerd knows nothing any more.
    sandbox.deletes_quietly();
    wait_until("the daemon ends", || !lives(sandbox.daemon()));
    assert!(!socket(&address).exists());
}

#[test]
fn a_container_of_the_same_name_gets_a_daemon_of_its_own() {
    let containerd = Containerd::new();
    let bundle = containerd.alone("c1");
    for _ in 0..5 {
        let address = bundle.start();
        let daemon = bundle.daemon();
        shut_down(&address);
        assert_eq!(bundle.start(), address);
        assert_ne!(bundle.daemon(), daemon);
        assert_eq!(state(&address), Code::NOT_FOUND);
        shut_down(&address);
        wait_until("both end", || !lives(daemon) && !lives(bundle.daemon()));
        assert!(!socket(&address).exists());
    }
}

#[test]
fn what_a_killed_or_stuck_daemon_leaves_is_cleared_away() {
    let containerd = Containerd::new();
    let pod = json!({ "io.kubernetes.cri.sandbox-id": "pod" });
    let sandbox = containerd.bundle("pod", Some(pod.clone()));
    let member = containerd.bundle("m1", Some(pod));
    let address = sandbox.start();
    assert_eq!(member.start(), address);
    kill_process(sandbox.daemon(), Signal::KILL).unwrap();
    wait_until("it is dead", || UnixStream::connect(socket(&address)).is_err());
    // A task was made, whose pid containerd knows: the end is that one's.
    fs::write(member.path.join("init.pid"), "4711").unwrap();
    let (response, output) = member.delete();
    assert_eq!((response.pid, response.exit_status, output.stderr.len()), (4711, 137, 0));
    let at: SystemTime = response.exited_at.clone().unwrap().into();
    assert!(at.elapsed().unwrap() < LIMIT);
    assert!(!socket(&address).exists());
    sandbox.deletes_quietly();

    assert_eq!(sandbox.start(), address);
    kill_process(sandbox.daemon(), Signal::STOP).unwrap();
    let (response, output) = member.delete();
    assert_eq!(response.exit_status, 137);
    assert!(String::from_utf8_lossy(&output.stderr).contains("did not answer"), "{output:?}");
    assert!(lives(sandbox.daemon()));
    let (_, output) = sandbox.delete();
    assert!(String::from_utf8_lossy(&output.stderr).contains("was killed"), "{output:?}");
    assert!(!lives(sandbox.daemon()) && !socket(&address).exists());
}

#[test]
fn a_host_that_shuts_down_ends_it() {
    let containerd = Containerd::new();
    let bundle = containerd.alone("c1");
    let address = bundle.start();
    // Its handlers are there when it serves.
    state(&address);
    kill_process(bundle.daemon(), Signal::TERM).unwrap();
    wait_until("it ends", || !lives(bundle.daemon()));
    assert!(!socket(&address).exists());
    let log = bundle.logged();
    assert!(log.starts_with("ampoule c1: ") && log.contains("SIGTERM"), "{log}");
}

#[test]
fn mistakes_are_one_line_and_leave_nothing() {
    let containerd = Containerd::new();
    let bundle = containerd.bundle("c1", None);
    fs::write(bundle.path.join("config.json"), "{").unwrap();
    let (success, output) = bundle.combined("start", b"");
    let text = String::from_utf8(output).unwrap();
    assert!(!success && text.contains("config.json") && text.lines().count() == 1, "{text}");
    assert!(containerd.daemons().is_empty());
    for (words, part) in [
        (&["-namespace", NAMESPACE, "-id", "../x", "start"][..], "-id"),
        (&["-id", "c1", "start"], "-namespace"),
        (&["-namespace", NAMESPACE, "-id", "c1", "stop"], "stop"),
        (&["-namespace", NAMESPACE, "-id", "c1"], "containerd starts this"),
    ] {
        let output = shim().args(words).stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && text.contains(part), "{text}");
        assert_eq!((text.lines().count(), output.stdout.len()), (1, 0));
    }
}

#[test]
fn it_says_what_it_is() {
    let output = shim().arg("-info").stdin(Stdio::null()).output().unwrap();
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.ampoule.v2");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    assert!(info.annotations["containerd.io/runtime-allow-mounts"].contains("erofs"));
    let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
    // containerd looks for it without asking whether `linux` is there.
    let linux = &features["linux"];
    assert_eq!(linux["mountExtensions"]["idmap"]["enabled"], true);
    assert!(linux["namespaces"].as_array().unwrap().contains(&"user".into()));
    assert_eq!(output.stderr, b"");
    for flag in ["-v", "-version"] {
        let output = shim().arg(flag).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}");
    }
}
