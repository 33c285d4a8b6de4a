//! The owner task between a VMM that is a shell script and an agent that answers from a script of ours.

use std::{collections::HashMap, fs, os::unix::fs::PermissionsExt, sync::Mutex};

use ampoule_agent_api::{
    agent::{
        ContainerRequest, CreateContainerRequest, CreateExecRequest, CreateResponse, Empty,
        SignalRequest, StartResponse, WaitResponse, WriteOutRequest, WriteOutResponse,
        start_response::Failure,
    },
    agent_ttrpc,
};
use ampoule_vmm_api::console::ConsoleReader;
use async_trait::async_trait;
use futures_util::stream::{self, StreamExt};
use serde_json::json;
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use super::*;
use crate::vm::{Cause, Vm};

/// Processes end when they are signalled. A workload called "missing" cannot be started.
#[derive(Default)]
struct FakeAgent(Mutex<HashMap<String, watch::Sender<u32>>>);

impl FakeAgent {
    fn end(&self, key: &str) -> watch::Receiver<u32> {
        let mut ends = self.0.lock().unwrap();
        ends.entry(key.into()).or_insert_with(|| watch::channel(0).0).subscribe()
    }
}

#[async_trait]
impl agent_ttrpc::Agent for FakeAgent {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateResponse> {
        if request.container_id == "unmountable" {
            let status =
                ttrpc::get_status(ttrpc::Code::INTERNAL, "mount: /dev/vdb: Invalid argument");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        Ok(CreateResponse { pid: 7, ..Default::default() })
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        _: CreateExecRequest,
    ) -> ttrpc::Result<CreateResponse> {
        Ok(CreateResponse { pid: 8, ..Default::default() })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        process: ProcessRequest,
    ) -> ttrpc::Result<StartResponse> {
        let mut response = StartResponse::new();
        if process.container_id == "missing" {
            response.failure = Failure::NOT_FOUND.into();
            response.message = "exec: nope: not found".into();
        }
        Ok(response)
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let key = request.container_id + &request.exec_id;
        self.end(&key);
        self.0.lock().unwrap()[&key].send_replace(128 + request.signal);
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, process: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let mut end = self.end(&(process.container_id + &process.exec_id));
        let status = *end.wait_for(|status| *status != 0).await.unwrap();
        Ok(WaitResponse { status, ..Default::default() })
    }

    /// Some write nothing, others would take a share.
    async fn write_out(
        &self,
        _: &TtrpcContext,
        request: WriteOutRequest,
    ) -> ttrpc::Result<WriteOutResponse> {
        assert!(request.has_start && request.share.is_none());
        let files = if request.container_id == "idle" { 0 } else { 1 };
        Ok(WriteOutResponse { files, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        Ok(PidsResponse::new())
    }

    async fn delete(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }
}

pub struct Bed {
    pub sandbox: Sandbox,
    pub events: mpsc::UnboundedReceiver<Event>,
    server: Server,
    _folder: tempfile::TempDir,
}

/// A sandbox whose VMM runs `script`.
pub async fn bed(script: &str) -> Bed {
    let folder = tempfile::tempdir().unwrap();
    let exe = folder.path().join("vmm");
    fs::write(&exe, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&exe, fs::Permissions::from_mode(0o755)).unwrap();
    let (console, memory) = ConsoleReader::new().unwrap();
    ampoule_vmm_api::console::ConsoleWriter::new(memory).unwrap().write(b"last words\n");
    let vm = Vm::spawn(&exe, "test", console).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let connections = stream::iter([Ok(theirs)]).chain(stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(agent_ttrpc::create_agent(Arc::new(FakeAgent::default())));
    server.start().await.unwrap();
    let booted = boot::Booted {
        vm,
        agent: Agent::new(ours, Pace::default()),
        record: BootRecord::default(),
        spare_slots: vec![2],
        network: None,
        told: None,
        shares: shares::Shares::new(None),
    };
    let (sandbox, events) = Sandbox::owned(booted);
    Bed { sandbox, events, server, _folder: folder }
}

pub fn container(id: &str) -> ContainerConfig {
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": "/" },
    });
    ContainerConfig {
        id: id.parse().unwrap(),
        spec: serde_json::from_value(spec).unwrap(),
        rootfs: RootFs {
            lowers: vec![Lower {
                slot: 1,
                kind: "erofs".into(),
                devices: Vec::new(),
                mapped: false,
            }],
            upper: Upper::Tmpfs,
            devices: Vec::new(),
            owners: None,
        },
        upper: None,
        stdio: Stdio { stdin: false, stdout: true, stderr: true },
        files: Vec::new(),
        binds: Vec::new(),
        shares: Vec::new(),
        joins: None,
        init: false,
        fixed: Fixed::default(),
    }
}

fn init(id: &str) -> ProcessId {
    ProcessId::init(id.parse().unwrap())
}

pub async fn running(sandbox: &Sandbox, id: &str) {
    sandbox.create_container(container(id)).await.unwrap();
    sandbox.start(&init(id)).await.unwrap();
}

pub const FOREVER: &str = "exec sleep 100";

#[tokio::test]
async fn a_container_lives_and_ends() {
    let mut bed = bed(FOREVER).await;
    let (sandbox, c) = (&bed.sandbox, init("c"));
    let created = sandbox.create_container(container("c")).await.unwrap();
    assert_eq!(created.pid, 7);
    assert!(created.streams.stdin.is_none() && created.streams.stdout.is_some());
    sandbox.start(&c).await.unwrap();
    let waiter = tokio::spawn({
        let (sandbox, c) = (sandbox.clone(), c.clone());
        async move { sandbox.wait(&c).await }
    });
    sandbox.signal(&c, 9, false).await.unwrap();
    assert_eq!(waiter.await.unwrap().unwrap().status, 137);
    assert_eq!(sandbox.wait(&c).await.unwrap().status, 137);
    sandbox.delete(&c).await.unwrap();
    let again = sandbox.wait(&c).await.unwrap_err();
    assert!(matches!(again, SandboxError::Refused(Refused::NotFound(_))), "{again}");
    assert!(matches!(bed.events.recv().await, Some(Event::Created { pid: 7, .. })));
    assert!(matches!(bed.events.recv().await, Some(Event::Started { .. })));
    assert!(matches!(bed.events.recv().await, Some(Event::Exited { .. })));
    assert!(matches!(bed.events.recv().await, Some(Event::Deleted { .. })));
}

#[tokio::test]
async fn an_end_is_told_when_what_was_written_is_on_the_host_or_stays_on_its_disk() {
    let bed = bed(FOREVER).await;
    let folder = tempfile::tempdir().unwrap();
    for id in ["idle", "busy"] {
        let disk = folder.path().join(id);
        fs::write(&disk, "").unwrap();
        let upper = HostUpper::open(folder.path(), true, disk.clone()).unwrap();
        let mut config = ContainerConfig { upper: Some(upper), ..container(id) };
        config.rootfs.upper = Upper::Kept(2);
        bed.sandbox.create_container(config).await.unwrap();
        bed.sandbox.start(&init(id)).await.unwrap();
        assert!(bed.sandbox.keeps());
        bed.sandbox.signal(&init(id), 9, false).await.unwrap();
        assert_eq!(bed.sandbox.wait(&init(id)).await.unwrap().status, 137);
        let is_left = id == "busy";
        assert_eq!((disk.exists(), bed.sandbox.keeps()), (is_left, is_left), "{id}");
    }
    bed.sandbox.delete(&init("busy")).await.unwrap();
    assert!(!bed.sandbox.keeps(), "the agent has unmounted it");
}

#[tokio::test]
async fn a_dead_vm_ends_its_processes_with_137_and_the_reason() {
    let mut bed = bed("echo broken >&2; sleep 0.5; exit 3").await;
    running(&bed.sandbox, "c").await;
    let exit = bed.sandbox.wait(&init("c")).await.unwrap();
    let death = exit.death.unwrap();
    assert_eq!(exit.status, 137);
    assert_eq!(death.to_string(), "ampoule-vmm ended with code 3: broken");
    assert_eq!(death.console, ["last words"]);
    // What is over stays known; what is new is refused for the same reason.
    assert_eq!(bed.sandbox.wait(&init("c")).await.unwrap().status, 137);
    let refused = bed.sandbox.create_container(container("d")).await.unwrap_err();
    assert!(matches!(refused, SandboxError::Gone(d) if d == death));
    bed.sandbox.delete(&init("c")).await.unwrap();
    let mut last = None;
    for _ in 0..5 {
        last = bed.events.recv().await;
    }
    assert!(matches!(last, Some(Event::Deleted { .. })));
}

#[tokio::test]
async fn a_lost_agent_ends_the_vm() {
    let mut bed = bed(FOREVER).await;
    running(&bed.sandbox, "c").await;
    bed.server.shutdown().await.unwrap();
    drop(bed.server);
    let exit = bed.sandbox.wait(&init("c")).await.unwrap();
    let death = exit.death.unwrap();
    assert!(matches!(&death.cause, Cause::GivenUp(why) if why.contains("broke")), "{death}");
}

#[tokio::test]
async fn failures_of_a_container_leave_the_sandbox_up() {
    let bed = bed(FOREVER).await;
    let error = bed.sandbox.create_container(container("unmountable")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "create container unmountable: mount: /dev/vdb: Invalid argument"
    );
    bed.sandbox.create_container(container("missing")).await.unwrap();
    let error = bed.sandbox.start(&init("missing")).await.unwrap_err();
    assert!(matches!(
        error,
        SandboxError::Start { source: StartFailure::NotFound(ref text), .. } if text == "exec: nope: not found"
    ));
    assert_eq!(bed.sandbox.wait(&init("missing")).await.unwrap().status, 127);
    running(&bed.sandbox, "c").await;
    let twice = bed.sandbox.create_container(container("c")).await.unwrap_err();
    assert!(matches!(twice, SandboxError::Refused(Refused::Exists(_))), "{twice}");
}

#[tokio::test]
async fn a_shutdown_ends_a_vmm_that_does_not_listen() {
    let bed = bed(FOREVER).await;
    running(&bed.sandbox, "c").await;
    let began = std::time::Instant::now();
    let death = bed.sandbox.shutdown().await;
    assert_eq!(death.cause, Cause::Killed(libc::SIGKILL));
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(bed.sandbox.wait(&init("c")).await.unwrap().status, 137);
}
