//! The calls, on tasks of a sandbox whose VMM is a shell script and whose agent answers from a script of ours.

use containerd_shim_protos::{
    protobuf::MessageField, protobuf::well_known_types::any::Any, shim_async::TaskClient,
};
use serde_json::json;
use ttrpc::{Code, r#async::Server, context::Context};

use super::*;
use crate::{
    hooks::Hooks,
    paths::{Environment, Paths},
    publisher::Publisher,
    sandbox::{
        ProcessId,
        tests::{Bed, FOREVER, bed, container},
    },
    task::{
        TasksConfig,
        anchor::{Anchor, HostNetwork},
        container::Place,
        pod::Pod,
        stdio::Wanted,
        testing::served,
    },
};

/// The answer to a call, or its code.
type Coded<T> = std::result::Result<T, Code>;

struct Shim {
    tasks: Arc<Tasks>,
    client: TaskClient,
    _server: Server,
    bed: Option<Bed>,
}

fn context() -> Context {
    Context::default()
}

impl Shim {
    async fn new() -> Self {
        let config = TasksConfig {
            id: "g".parse().unwrap(),
            namespace: "ns".into(),
            bundle: "/b".into(),
            paths: Paths::new(&Environment::default()),
            debug: false,
        };
        let tasks = Tasks::new(config, Publisher::new(None, "ns".into()));
        let (server, client) = served(&tasks).await;
        let client = TaskClient::new(client);
        Self { tasks, client, _server: server, bed: None }
    }

    /// A created container "c", in a sandbox that is there.
    async fn with_container() -> Self {
        Self::with_hooks(Hooks::default()).await
    }

    async fn with_hooks(hooks: Hooks) -> Self {
        let mut shim = Self::new().await;
        let bed = shim.bed.insert(bed(FOREVER).await);
        let sandbox = bed.sandbox.clone();
        let (_, none) = tokio::sync::mpsc::unbounded_channel();
        let events = std::mem::replace(&mut bed.events, none);
        let anchor = Anchor::new(&HostNetwork::Host).unwrap();
        let pod = Arc::new(Pod::new(sandbox, anchor, "c".parse().unwrap()));
        *shim.tasks.pod.lock().await = Some(pod.clone());
        tokio::spawn(shim.tasks.clone().follow(events));
        let init = Process::init(ProcessId::init("c".parse().unwrap()), Wanted::default());
        let made = Container::new("c".parse().unwrap(), "/b".into(), Vec::new(), init);
        let made = Arc::new(made);
        shim.tasks.table.reserve(made.clone()).unwrap();
        let rootfs = container("c").rootfs;
        let place = Place { pod: pod.clone(), rootfs, attached: false, strict: true };
        made.place.set(place).unwrap();
        made.hooks.set(hooks).unwrap();
        pod.sandbox.create_container(container("c")).await.unwrap();
        made.init.until(|status| *status == Status::Created).await;
        shim
    }

    async fn state(&self) -> Coded<StateResponse> {
        let request = StateRequest { id: "c".into(), ..Default::default() };
        self.client.state(context(), &request).await.map_err(code)
    }

    async fn kill(&self, exec_id: &str) -> Coded<Empty> {
        let request = KillRequest {
            id: "c".into(),
            exec_id: exec_id.into(),
            signal: 9,
            ..Default::default()
        };
        self.client.kill(context(), &request).await.map_err(code)
    }

    async fn exec(&self, exec_id: &str, process: &str) -> Coded<Empty> {
        let spec = Any { value: process.into(), ..Default::default() };
        let request = ExecProcessRequest {
            id: "c".into(),
            exec_id: exec_id.into(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.client.exec(context(), &request).await.map_err(code)
    }

    async fn start(&self, exec_id: &str) -> Coded<StartResponse> {
        let request =
            StartRequest { id: "c".into(), exec_id: exec_id.into(), ..Default::default() };
        self.client.start(context(), &request).await.map_err(code)
    }

    async fn delete(&self, exec_id: &str) -> Coded<DeleteResponse> {
        let request =
            DeleteRequest { id: "c".into(), exec_id: exec_id.into(), ..Default::default() };
        self.client.delete(context(), &request).await.map_err(code)
    }

    async fn shutdown(&self) {
        self.client.shutdown(context(), &ShutdownRequest::new()).await.unwrap();
    }
}

fn code(error: ttrpc::Error) -> Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

const SH: &str = r#"{ "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } }"#;

#[tokio::test]
async fn all_services_are_served() {
    let shim = Shim::new().await;
    let mut names: Vec<_> = services(shim.tasks).into_keys().collect();
    names.sort();
    assert_eq!(names, ["containerd.runtime.sandbox.v1.Sandbox", V2, V3]);
}

#[tokio::test]
async fn what_is_not_there_is_not_found_and_what_is_wrong_is_said_to_be() {
    let shim = Shim::new().await;
    assert_eq!(shim.state().await.unwrap_err(), Code::NOT_FOUND);
    assert_eq!(shim.kill("").await.unwrap_err(), Code::NOT_FOUND);
    assert_eq!(shim.start("").await.unwrap_err(), Code::NOT_FOUND);
    assert_eq!(shim.delete("").await.unwrap_err(), Code::NOT_FOUND);
    assert_eq!(shim.exec("e", SH).await.unwrap_err(), Code::NOT_FOUND);
    let create = |id: &str, checkpoint: &str| CreateTaskRequest {
        id: id.into(),
        bundle: "/no/such/bundle".into(),
        checkpoint: checkpoint.into(),
        ..Default::default()
    };
    for request in [create("../x", ""), create("c", ""), create("c", "/checkpoint")] {
        let error = shim.client.create(context(), &request).await.unwrap_err();
        assert_eq!(code(error), Code::INVALID_ARGUMENT);
    }
    let error = shim.client.checkpoint(context(), &CheckpointTaskRequest::new()).await.unwrap_err();
    assert_eq!(code(error), Code::UNIMPLEMENTED);
    // Before its first task, and after a Create that failed, the shim answers and may be told to go.
    let connected = shim.client.connect(context(), &ConnectRequest::new()).await.unwrap();
    assert_eq!((connected.shim_pid, connected.task_pid), (std::process::id(), 0));
    shim.shutdown().await;
    shim.tasks.wait_for_shutdown().await;
}

#[tokio::test]
async fn a_task_lives_and_ends() {
    let shim = Shim::with_container().await;
    let created = shim.state().await.unwrap();
    assert_eq!(created.status.enum_value(), Ok(containerd_shim_protos::api::Status::CREATED));
    assert!(created.pid > 0);
    assert_eq!(shim.start("").await.unwrap().pid, created.pid);
    assert_eq!(shim.start("").await.unwrap_err(), Code::FAILED_PRECONDITION);
    assert_eq!(shim.delete("").await.unwrap_err(), Code::FAILED_PRECONDITION);
    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let client = shim.client.clone();
            tokio::spawn(async move {
                let request = WaitRequest { id: "c".into(), ..Default::default() };
                client.wait(context(), &request).await.unwrap().exit_status
            })
        })
        .collect();
    // Not while there is a task.
    shim.shutdown().await;
    shim.kill("").await.unwrap();
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), 137);
    }
    let stopped = shim.state().await.unwrap();
    assert_eq!(stopped.status.enum_value(), Ok(containerd_shim_protos::api::Status::STOPPED));
    assert_eq!((stopped.exit_status, stopped.pid), (137, created.pid));
    assert_eq!(shim.kill("").await.unwrap_err(), Code::NOT_FOUND);
    assert_eq!(shim.exec("e", SH).await.unwrap_err(), Code::FAILED_PRECONDITION);
    let request = PidsRequest { id: "c".into(), ..Default::default() };
    let pids = shim.client.pids(context(), &request).await.unwrap();
    assert_eq!(pids.processes.len(), 1);
    let deleted = shim.delete("").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (137, created.pid));
    assert_eq!(deleted.exited_at, stopped.exited_at);
    assert_eq!(shim.state().await.unwrap_err(), Code::NOT_FOUND);
    shim.shutdown().await;
    shim.tasks.wait_for_shutdown().await;
}

#[tokio::test]
async fn an_exec_is_made_when_it_is_started() {
    let shim = Shim::with_container().await;
    let pid = shim.start("").await.unwrap().pid;
    assert_eq!(shim.exec("e", "{").await.unwrap_err(), Code::INVALID_ARGUMENT);
    shim.exec("e", SH).await.unwrap();
    assert_eq!(shim.exec("e", SH).await.unwrap_err(), Code::ALREADY_EXISTS);
    assert_eq!(shim.kill("e").await.unwrap_err(), Code::FAILED_PRECONDITION);
    let request =
        CloseIORequest { id: "c".into(), exec_id: "e".into(), stdin: true, ..Default::default() };
    shim.client.close_io(context(), &request).await.unwrap();
    let request = ResizePtyRequest {
        id: "c".into(),
        exec_id: "e".into(),
        width: 80,
        height: 24,
        ..Default::default()
    };
    shim.client.resize_pty(context(), &request).await.unwrap();
    assert_eq!(shim.start("e").await.unwrap().pid, pid);
    assert_eq!(shim.start("e").await.unwrap_err(), Code::FAILED_PRECONDITION);
    assert_eq!(shim.delete("e").await.unwrap_err(), Code::FAILED_PRECONDITION);
    shim.kill("e").await.unwrap();
    let request = WaitRequest { id: "c".into(), exec_id: "e".into(), ..Default::default() };
    assert_eq!(shim.client.wait(context(), &request).await.unwrap().exit_status, 137);
    assert_eq!(shim.delete("e").await.unwrap().exit_status, 137);
    assert_eq!(shim.delete("e").await.unwrap_err(), Code::NOT_FOUND);
    // One that is never started goes as it came.
    shim.exec("f", SH).await.unwrap();
    assert_eq!(shim.delete("f").await.unwrap().exit_status, 0);
}

#[tokio::test]
async fn a_container_that_was_not_started_can_be_deleted() {
    let shim = Shim::with_container().await;
    assert_eq!(shim.delete("").await.unwrap().exit_status, 137);
    assert_eq!(shim.delete("").await.unwrap_err(), Code::NOT_FOUND);
}

#[tokio::test]
async fn hooks_run_after_the_start_and_after_the_end() {
    let bundle = tempfile::tempdir().unwrap();
    let hooks = |poststart: &str| {
        let shell = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
        let hooks = json!({ "poststart": shell(poststart), "poststop": shell("echo stop >> log") });
        let mut spec =
            serde_json::from_value(json!({ "ociVersion": "1.2.0", "hooks": hooks })).unwrap();
        Hooks::take(&mut spec, &"c".parse().unwrap(), bundle.path()).unwrap()
    };
    let log = || std::fs::read_to_string(bundle.path().join("log")).unwrap_or_default();
    let shim = Shim::with_hooks(hooks("echo start >> log")).await;
    shim.start("").await.unwrap();
    assert_eq!(log(), "start\n");
    shim.kill("").await.unwrap();
    let request = WaitRequest { id: "c".into(), ..Default::default() };
    shim.client.wait(context(), &request).await.unwrap();
    assert_eq!(log(), "start\n");
    shim.delete("").await.unwrap();
    assert_eq!(log(), "start\nstop\n");

    let shim = Shim::with_hooks(hooks("exit 3")).await;
    assert_eq!(shim.start("").await.unwrap_err(), Code::INTERNAL);
    let ended = shim.state().await.unwrap();
    assert_eq!(ended.status.enum_value(), Ok(containerd_shim_protos::api::Status::STOPPED));
}
