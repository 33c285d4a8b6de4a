//! Pods as a kubelet runs them: CRI over containerd's socket.

mod messages;
mod streams;

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use prost::Message;
use tonic::Status;

use crate::containerd::{Containerd, LIMIT, Version};
pub use messages::*;
pub use streams::{Ended, Streams};

/// Where pods' logs go, inside.
const LOGS: &str = "/run/test/pods";

/// And their volumes.
const VOLUMES: &str = "/run/test/volumes";

/// A pod that was started.
pub struct Pod<'a> {
    containerd: &'a Containerd,
    pub id: String,
    config: PodSandboxConfig,
}

macro_rules! method {
    ($name:literal) => {
        concat!("/runtime.v1.RuntimeService/", $name)
    };
}

/// Waits until containerd takes pods.
fn is_up(containerd: &Containerd) {
    #[derive(Clone, PartialEq, Message)]
    struct Condition {
        #[prost(string, tag = "1")]
        kind: String,
        #[prost(bool, tag = "2")]
        holds: bool,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Conditions {
        #[prost(message, repeated, tag = "1")]
        all: Vec<Condition>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Answer {
        #[prost(message, optional, tag = "1")]
        status: Option<Conditions>,
    }
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = containerd.grpc.call::<_, Answer>("k8s.io", method!("Status"), ());
        let status = answer.expect("CRI").status.unwrap_or_default();
        if status.all.iter().all(|condition| condition.holds) {
            return;
        }
        assert!(Instant::now() < deadline, "not ready: {status:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

impl<'a> Pod<'a> {
    /// Starts a pod with the runtime's handler.
    pub fn run(containerd: &'a Containerd, name: &str, namespaces: NamespaceOption) -> Self {
        Self::run_by(containerd.runtime.name(), containerd, name, namespaces)
    }

    /// Starts a pod with this handler.
    pub fn run_by(
        handler: &str,
        containerd: &'a Containerd,
        name: &str,
        namespaces: NamespaceOption,
    ) -> Self {
        is_up(containerd);
        let context = LinuxSandboxSecurityContext { namespace_options: Some(namespaces) };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: containerd.id(name),
                namespace: "tests".into(),
            }),
            hostname: name.into(),
            log_directory: format!("{LOGS}/{name}"),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", containerd.id(name)),
                security_context: Some(context),
            }),
            ..Default::default()
        };
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let answer = containerd.grpc.call::<_, Id>("k8s.io", method!("RunPodSandbox"), request);
        Self { containerd, id: answer.expect("a pod").id, config }
    }

    fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.containerd.grpc.call("k8s.io", method, request)
    }

    pub fn status(&self) -> PodSandboxStatusResponse {
        let request = StatusRequest { id: self.id.clone(), verbose: true };
        self.call(method!("PodSandboxStatus"), request).expect("a status")
    }

    /// A hostPath of the pod's, as this side reaches it.
    pub fn volume(&self) -> PathBuf {
        self.containerd.inside.path(format!("{VOLUMES}/{}", self.id))
    }

    /// A container's `/dev/termination-log` on the host.
    pub fn termination_log(&self, name: &str) -> PathBuf {
        self.containerd.inside.path(format!("{VOLUMES}/{}-{name}", self.id))
    }

    /// The pod's volume twice, for writing and for reading, from containerd 2 on an image, and the file a container says its last words in, as the
    /// kubelet has them.
    fn mounts(&self, name: &str) -> Vec<Mount> {
        fs::create_dir_all(self.volume()).expect("a folder");
        fs::write(self.termination_log(name), "").expect("a file");
        let is_newest = self.containerd.version == Version::V2_1;
        let context = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let users = context.and_then(|context| context.namespace_options.as_ref()?.users.clone());
        let maps = users.clone().filter(|_| is_newest).unwrap_or_default();
        let mount = |host_path: String, container_path: &str, readonly| Mount {
            container_path: container_path.into(),
            host_path,
            readonly,
            uid_mappings: maps.uids.clone(),
            gid_mappings: maps.gids.clone(),
            image: None,
        };
        let volume = format!("{VOLUMES}/{}", self.id);
        let mut mounts = vec![
            mount(volume.clone(), "/volume", false),
            mount(volume.clone(), "/config", true),
            mount(format!("{volume}-{name}"), "/dev/termination-log", false),
        ];
        if is_newest && users.is_none() {
            let image = Some(ImageSpec { image: "docker.io/local/alpine:latest".into() });
            mounts.push(Mount { image, ..mount(String::new(), "/image", true) });
        }
        mounts
    }

    /// A container of Alpine: `sh -c SCRIPT`. Its log is `NAME-ATTEMPT.log`.
    pub fn container_of(
        &self,
        name: &str,
        attempt: u32,
        memory: i64,
        script: &str,
    ) -> ContainerConfig {
        let context = self.config.linux.clone().and_then(|linux| linux.security_context);
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt }),
            image: Some(ImageSpec { image: "docker.io/local/alpine:latest".into() }),
            command: ["sh", "-c", script].map(String::from).into(),
            mounts: self.mounts(name),
            log_path: format!("{name}-{attempt}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources { memory_limit_in_bytes: memory }),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: context.and_then(|context| context.namespace_options),
                }),
            }),
            ..Default::default()
        }
    }

    /// Creates and starts one.
    pub fn start(&self, name: &str, attempt: u32, memory: i64, script: &str) -> String {
        self.start_this(self.container_of(name, attempt, memory, script))
    }

    pub fn start_this(&self, config: ContainerConfig) -> String {
        self.try_start(config, self.config.clone()).expect("a container")
    }

    /// Starts a container that says, as the pod does not, whom its users are; returns why it cannot be.
    pub fn refuses_users(&self, name: &str, users: UserNamespace) -> Status {
        let (mut config, mut pod) = (self.container_of(name, 0, 0, "exit 0"), self.config.clone());
        let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let options = context.and_then(|context| context.namespace_options.as_mut());
        options.expect("options").users = Some(users.clone());
        let context = pod.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let options = context.and_then(|context| context.namespace_options.as_mut());
        options.expect("options").users = Some(users);
        self.try_start(config, pod).expect_err("users of others")
    }

    fn try_start(&self, config: ContainerConfig, pod: PodSandboxConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod),
        };
        let id = self.call::<_, Id>(method!("CreateContainer"), request)?.id;
        let request = Id { id: id.clone() };
        self.call::<_, ()>(method!("StartContainer"), request)?;
        Ok(id)
    }

    pub fn container(&self, id: &str) -> ContainerStatus {
        let request = StatusRequest { id: id.into(), verbose: false };
        let answer = self.call::<_, ContainerStatusResponse>(method!("ContainerStatus"), request);
        answer.expect("a status").status.expect("a status")
    }

    /// Waits until a container has exited.
    #[track_caller]
    pub fn exited(&self, id: &str) -> ContainerStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.container(id);
            if status.state == 2 {
                return status;
            }
            assert!(Instant::now() < deadline, "{status:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// `sh -c SCRIPT` in a container.
    pub fn exec(&self, id: &str, script: &str, timeout: i64) -> Result<ExecSyncResponse, Status> {
        let cmd = ["sh", "-c", script].map(String::from).into();
        self.call(method!("ExecSync"), ExecSyncRequest { container_id: id.into(), cmd, timeout })
    }

    /// `kubectl exec -i`, or with a terminal `-it`, of `sh -c SCRIPT`.
    pub fn exec_streams(&self, id: &str, tty: bool, script: &str) -> Streams {
        self.exec_streams_by("v4.channel.k8s.io", id, tty, script)
    }

    /// The same by a version of the protocol.
    pub fn exec_streams_by(
        &self,
        protocol: &'static str,
        id: &str,
        tty: bool,
        script: &str,
    ) -> Streams {
        let request = ExecRequest {
            container_id: id.into(),
            cmd: ["sh", "-c", script].map(String::from).into(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let address = self.call::<_, Address>(method!("Exec"), request).expect("an address");
        Streams::dial(self, &address.url, protocol)
    }

    /// `kubectl attach -i`, or `-it`.
    pub fn attach(&self, id: &str, tty: bool) -> Streams {
        let container_id = id.into();
        let request = AttachRequest { container_id, stdin: true, tty, stdout: true, stderr: !tty };
        let address = self.call::<_, Address>(method!("Attach"), request).expect("an address");
        Streams::dial(self, &address.url, "v4.channel.k8s.io")
    }

    /// `kubectl port-forward`, one connection.
    pub fn port_forward(&self, port: u16) -> Streams {
        let request =
            PortForwardRequest { pod_sandbox_id: self.id.clone(), port: vec![port.into()] };
        let address = self.call::<_, Address>(method!("PortForward"), request);
        let url = format!("{}?port={port}", address.expect("an address").url);
        Streams::dial(self, &url, "v4.channel.k8s.io")
    }

    /// What a script prints that does not fail.
    #[track_caller]
    pub fn sh(&self, id: &str, script: &str) -> String {
        let done = self.exec(id, script, 60).expect("an exec");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        assert_eq!(done.exit_code, 0, "{script}: {} {}", text(&done.stdout), text(&done.stderr));
        text(&done.stdout)
    }

    /// CPU time (ns) and memory (bytes) of a container.
    pub fn stats(&self, id: &str) -> (u64, u64) {
        let request = Id { id: id.into() };
        let answer = self.call::<_, ContainerStatsResponse>(method!("ContainerStats"), request);
        let stats = answer.expect("stats").stats.expect("stats");
        let total =
            |usage: Option<Usage>| usage.and_then(|u| u.total).map_or(0, |total| total.value);
        (total(stats.cpu), total(stats.memory))
    }

    /// How many descriptors the pod's shim has open.
    pub fn descriptors(&self) -> usize {
        let inside = &self.containerd.inside;
        let processes = inside.processes();
        let shim = processes.iter().find(|process| {
            process.program().starts_with("containerd-shim") && process.args.contains(&self.id)
        });
        let pid = shim.unwrap_or_else(|| panic!("no shim of {} in {processes:?}", self.id)).pid;
        fs::read_dir(inside.path(format!("/proc/{pid}/fd"))).expect("descriptors").count()
    }

    /// Lines of a container's log: stream and text.
    pub fn log(&self, name: &str, attempt: u32) -> Vec<(String, String)> {
        let path = format!("{}/{name}-{attempt}.log", self.config.log_directory);
        let text = fs::read_to_string(self.containerd.inside.path(path)).expect("a log");
        let words = |line: &str| {
            let mut words = line.splitn(4, ' ').skip(1);
            let stream = words.next().unwrap_or_default().to_owned();
            (stream, words.nth(1).unwrap_or_default().to_owned())
        };
        text.lines().map(words).collect()
    }

    /// Waits until a container's log has a line.
    #[track_caller]
    pub fn logs(&self, name: &str, attempt: u32, text: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.log(name, attempt).iter().any(|(_, line)| line == text) {
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", self.log(name, attempt));
            thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn stop_container(&self, id: &str, timeout: i64) {
        let request = StopContainerRequest { id: id.into(), timeout };
        self.call::<_, ()>(method!("StopContainer"), request).expect("it stops");
    }

    pub fn remove_container(&self, id: &str) {
        let request = Id { id: id.into() };
        self.call::<_, ()>(method!("RemoveContainer"), request).expect("it is removed");
    }

    pub fn stop(&self) {
        let request = Id { id: self.id.clone() };
        self.call::<_, ()>(method!("StopPodSandbox"), request).expect("it stops");
    }

    pub fn remove(&self) {
        let request = Id { id: self.id.clone() };
        self.call::<_, ()>(method!("RemovePodSandbox"), request).expect("it is removed");
        // The kubelet's own part: it stays when something is left inside.
        let parent = self.config.linux.as_ref().map_or("", |linux| &linux.cgroup_parent);
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(&parent[1..]));
        }
        let _ = fs::remove_dir(format!("/sys/fs/cgroup{parent}"));
    }
}
