//! The calls, through a client on a socket, on a sandbox whose VMM is a shell script.

use containerd_shim_protos::{
    api::{CreateTaskRequest, ShutdownRequest},
    protobuf::well_known_types::any::Any,
    sandbox_api::*,
    sandbox_async::SandboxClient,
    shim_async::TaskClient,
};
use serde_json::json;
use ttrpc::{Code, r#async::Server, context::Context};

use super::*;
use crate::{
    paths::{Environment, Paths},
    publisher::Publisher,
    sandbox::tests::{Bed, FOREVER, bed, running},
    task::{
        TasksConfig,
        anchor::{Anchor, HostNetwork},
        testing::served,
    },
};

const SOON: Duration = Duration::from_secs(10);

struct Shim {
    tasks: Arc<Tasks>,
    sandbox: SandboxClient,
    task: TaskClient,
    bundle: tempfile::TempDir,
    _server: Server,
}

fn context() -> Context {
    Context::default()
}

fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

/// A request about a sandbox.
macro_rules! about {
    ($request:ident, $id:expr) => {
        &$request { sandbox_id: $id.into(), ..Default::default() }
    };
}

impl Shim {
    async fn new() -> Self {
        let bundle = tempfile::tempdir().unwrap();
        let mut paths = Paths::new(&Environment::default());
        paths.config.clear();
        paths.kernel = "/no/such/kernel".into();
        paths.vmm = "/no/such/vmm".into();
        let config = TasksConfig {
            id: "s".parse().unwrap(),
            namespace: "ns".into(),
            bundle: bundle.path().into(),
            paths,
            debug: false,
        };
        let tasks = Tasks::new(config, Publisher::new(None, "ns".into()));
        let (server, client) = served(&tasks).await;
        let (sandbox, task) = (SandboxClient::new(client.clone()), TaskClient::new(client));
        Self { tasks, sandbox, task, bundle, _server: server }
    }

    fn request(&self) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "s".into(),
            bundle_path: self.bundle.path().to_str().unwrap().into(),
            ..Default::default()
        }
    }

    async fn create(&self) {
        self.sandbox.create_sandbox(context(), &self.request()).await.unwrap();
    }

    /// As StartSandbox does with a VM that it has booted.
    async fn boot(&self) -> Bed {
        let bed = bed(FOREVER).await;
        running(&bed.sandbox, "s").await;
        let anchor = Anchor::new(&HostNetwork::Host).unwrap();
        let pod = Arc::new(Pod::new(bed.sandbox.clone(), anchor, "s".parse().unwrap()));
        let mut slot = self.tasks.pod.lock().await;
        self.tasks.adopt(&pod).unwrap();
        *slot = Some(pod);
        bed
    }

    async fn status(&self) -> SandboxStatusResponse {
        let request =
            SandboxStatusRequest { verbose: true, ..about!(SandboxStatusRequest, "s").clone() };
        self.sandbox.sandbox_status(context(), &request).await.unwrap()
    }

    async fn stop(&self) -> ttrpc::Result<StopSandboxResponse> {
        self.sandbox.stop_sandbox(context(), about!(StopSandboxRequest, "s")).await
    }

    fn wait(&self) -> tokio::task::JoinHandle<WaitSandboxResponse> {
        let client = self.sandbox.clone();
        tokio::spawn(async move {
            client.wait_sandbox(context(), about!(WaitSandboxRequest, "s")).await.unwrap()
        })
    }

    /// The daemon is to end.
    async fn is_over(&self) -> bool {
        timeout(SOON, self.tasks.wait_for_shutdown()).await.is_ok()
    }
}

#[tokio::test]
async fn what_was_not_made_is_not_found() {
    let shim = Shim::new().await;
    let client = &shim.sandbox;
    let not_found = [
        code(client.start_sandbox(context(), about!(StartSandboxRequest, "s")).await),
        code(client.platform(context(), about!(PlatformRequest, "s")).await),
        code(client.stop_sandbox(context(), about!(StopSandboxRequest, "s")).await),
        code(client.wait_sandbox(context(), about!(WaitSandboxRequest, "s")).await),
        code(client.sandbox_status(context(), about!(SandboxStatusRequest, "s")).await),
        code(client.ping_sandbox(context(), about!(PingRequest, "s")).await),
        code(client.sandbox_metrics(context(), about!(SandboxMetricsRequest, "s")).await),
    ];
    assert_eq!(not_found, [Code::NOT_FOUND; 7]);
    shim.create().await;
    let shutdown = about!(ShutdownSandboxRequest, "other");
    assert_eq!(code(client.shutdown_sandbox(context(), shutdown).await), Code::NOT_FOUND);
    // After a CreateSandbox that failed containerd says nothing else.
    let shim = Shim::new().await;
    shim.sandbox.shutdown_sandbox(context(), about!(ShutdownSandboxRequest, "s")).await.unwrap();
    assert!(shim.is_over().await);
}

#[tokio::test]
async fn a_sandbox_lives_until_it_is_stopped_and_its_daemon_until_it_is_shut_down() {
    let shim = Shim::new().await;
    let client = &shim.sandbox;
    shim.create().await;
    assert_eq!(code(client.create_sandbox(context(), &shim.request()).await), Code::ALREADY_EXISTS);
    let status = shim.status().await;
    assert_eq!((&*status.state, status.pid), ("SANDBOX_NOTREADY", 0));
    assert_eq!((&*status.info["vcpus"], &*status.info["memory"]), ("1", "536870912"));
    let ping = about!(PingRequest, "s");
    assert_eq!(code(client.ping_sandbox(context(), ping).await), Code::FAILED_PRECONDITION);
    let member = CreateTaskRequest { id: "c".into(), bundle: "/none".into(), ..Default::default() };
    assert_eq!(code(shim.task.create(context(), &member).await), Code::FAILED_PRECONDITION);
    // Into the host's network, where no VM can be; it may be tried again.
    let start = about!(StartSandboxRequest, "s");
    for _ in 0..2 {
        assert_eq!(code(client.start_sandbox(context(), start).await), Code::INVALID_ARGUMENT);
    }

    let wait = shim.wait();
    let _bed = shim.boot().await;
    assert_eq!(code(client.start_sandbox(context(), start).await), Code::FAILED_PRECONDITION);
    let status = shim.status().await;
    assert_eq!((&*status.sandbox_id, &*status.state), ("s", "SANDBOX_READY"));
    assert!(status.pid > 0 && status.created_at.is_some() && status.exited_at.is_none());
    let platform = client.platform(context(), about!(PlatformRequest, "s")).await.unwrap().platform;
    assert_eq!((&*platform.os, &*platform.architecture), ("linux", "amd64"));
    client.ping_sandbox(context(), ping).await.unwrap();
    let metrics = about!(SandboxMetricsRequest, "s");
    let metrics = client.sandbox_metrics(context(), metrics).await.unwrap().metrics.unwrap();
    assert_eq!(metrics.id, "s");
    assert!(metrics.data.type_url.starts_with("io.containerd.cgroups.v"), "{metrics}");
    // Neither the end of tasks nor their Shutdown is the sandbox's.
    shim.task.shutdown(context(), &ShutdownRequest::new()).await.unwrap();
    assert!(!shim.tasks.clone().retire().await && !wait.is_finished());

    shim.stop().await.unwrap();
    let end = wait.await.unwrap();
    assert_eq!(end.exit_status, 0);
    let status = shim.status().await;
    assert_eq!((&*status.state, status.pid), ("SANDBOX_NOTREADY", 0));
    assert_eq!(status.exited_at, end.exited_at);
    shim.stop().await.unwrap();
    assert_eq!(code(shim.task.create(context(), &member).await), Code::FAILED_PRECONDITION);
    let metrics = about!(SandboxMetricsRequest, "s");
    assert_eq!(code(client.sandbox_metrics(context(), metrics).await), Code::NOT_FOUND);
    shim.task.shutdown(context(), &ShutdownRequest::new()).await.unwrap();
    assert!(!*shim.tasks.over.borrow());
    client.shutdown_sandbox(context(), about!(ShutdownSandboxRequest, "s")).await.unwrap();
    assert!(shim.is_over().await);
}

#[tokio::test]
async fn a_vm_that_dies_ends_its_sandbox() {
    let shim = Shim::new().await;
    shim.create().await;
    let bed = shim.boot().await;
    let (first, second) = (shim.wait(), shim.wait());
    bed.sandbox.shutdown().await;
    for wait in [first, second] {
        assert_eq!(timeout(SOON, wait).await.unwrap().unwrap().exit_status, 137);
    }
    assert!(shim.tasks.pod.lock().await.is_none());
    shim.stop().await.unwrap();
}

#[tokio::test]
async fn a_sandbox_ends_with_the_process_that_holds_its_namespaces() {
    let shim = Shim::new().await;
    shim.create().await;
    let bed = shim.boot().await;
    let wait = shim.wait();
    bed.sandbox.signal(&ProcessId::init("s".parse().unwrap()), 9, false).await.unwrap();
    assert_eq!(timeout(SOON, wait).await.unwrap().unwrap().exit_status, 137);
    assert!(bed.sandbox.has_ended());
    assert_eq!(shim.status().await.state, "SANDBOX_NOTREADY");
}

#[tokio::test]
async fn one_that_was_never_started_is_stopped_at_once() {
    let shim = Shim::new().await;
    shim.create().await;
    shim.stop().await.unwrap();
    assert_eq!(timeout(SOON, shim.wait()).await.unwrap().unwrap().exit_status, 0);
    let start = about!(StartSandboxRequest, "s");
    let started = shim.sandbox.start_sandbox(context(), start).await;
    assert_eq!(code(started), Code::FAILED_PRECONDITION);
}

/// A field of a message: its number and content.
fn field(number: u8, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    [&[number << 3 | 2, u8::try_from(content.len()).unwrap()], content].concat()
}

#[test]
fn a_pod_of_cri_is_as_large_as_its_containers_together() {
    let bundle = tempfile::tempdir().unwrap();
    let mut paths = Paths::new(&Environment::default());
    paths.config.clear();
    let resources = [8, 0xa0, 0x8d, 6, 16, 0xc0, 0x9a, 12, 32, 0x80, 0x80, 0x80, 0x80, 1];
    let sysctl = [field(1, "net.ipv4.ip_forward"), field(2, "1")].concat();
    // 65536 of them, from 100000 on: of the pod's own, and with mode NODE of the host's.
    let mapping = [8, 0xa0, 0x8d, 6, 24, 0x80, 0x80, 4];
    let users = [field(2, mapping), field(3, mapping)].concat();
    let security = |users| field(2, field(1, field(5, users)));
    let linux = [security(users.clone()), field(3, sysctl), field(5, resources)].concat();
    let hosts = field(8, security([vec![8, 2], users].concat()));
    let spoof = [field(1, "io.kubernetes.cri.sandbox-memory"), field(2, "1")].concat();
    let config = [field(2, "web"), field(7, spoof), field(8, linux)].concat();
    let options = Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: config.clone(),
        ..Default::default()
    };
    let request = || CreateSandboxRequest {
        bundle_path: bundle.path().to_str().unwrap().into(),
        options: Some(options.clone()).into(),
        netns_path: "/run/netns/n".into(),
        ..Default::default()
    };
    let plan = |request| Plan::new("s".parse().unwrap(), request, &paths);
    let made = plan(request()).unwrap();
    assert_eq!((made.pod.size.vcpus, made.pod.size.memory), (2, 256 << 20));
    assert_eq!(made.pod.hostname, "web");
    assert_eq!(made.pod.network, HostNetwork::Path("/run/netns/n".into()));
    assert_eq!(made.sysctls["net.ipv4.ip_forward"], "1");
    let maps = made.users.map(|users| [users.uids, users.gids].concat()).unwrap();
    let maps = maps.iter().map(|map| (map.container_id(), map.host_id(), map.size()));
    assert_eq!(maps.collect::<Vec<_>>(), [(0, 100_000, 65_536); 2]);
    assert!(made.pod.own_users);
    let mut of_host = request();
    of_host.options.as_mut().unwrap().value = hosts;
    assert!(!plan(of_host).unwrap().pod.own_users);

    // What `start` was given counts too, and a specification where there is one.
    let toml = bundle.path().join("c.toml");
    std::fs::write(&toml, "sandbox.boot_timeout = 17\n").unwrap();
    let value = field(2, toml.to_str().unwrap());
    let runtime = Any { type_url: crate::task::OPTIONS.into(), value, ..Default::default() };
    let runtime = containerd_shim_protos::protobuf::Message::write_to_bytes(&runtime).unwrap();
    std::fs::write(bundle.path().join("options"), runtime).unwrap();
    let spec = json!({ "ociVersion": "1.1.0", "hostname": "spec",
        "linux": { "namespaces": [{ "type": "network" }] } });
    std::fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
    let mut bare = request();
    bare.options = None.into();
    bare.netns_path.clear();
    let made = plan(bare).unwrap();
    assert_eq!((&*made.pod.hostname, made.pod.size.memory), ("spec", 512 << 20));
    assert_eq!(made.pod.network, HostNetwork::New);
    let timeouts = [made, plan(request()).unwrap()].map(|plan| plan.pod.settings.boot_timeout);
    assert_eq!(timeouts, [17, 17]);

    let mut broken = request();
    broken.options.as_mut().unwrap().value = config[..config.len() - 1].into();
    assert!(plan(broken).unwrap_err().to_string().contains("options"));
    let mut rootfs = request();
    rootfs.rootfs.push(Default::default());
    assert!(plan(rootfs).unwrap_err().to_string().contains("rootfs"));
}
