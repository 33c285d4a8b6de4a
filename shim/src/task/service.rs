//! The calls of containerd's Task service. Each finds its container or process, says what is to be done, and
//! turns the answer into a message.
//!
//! Versions 2 and 3 of the API differ in the service's name alone: their messages are the same bytes.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim::oci::ProcessDetails,
    shim_async::{Task, create_task},
};
use ttrpc::r#async::{Service, TtrpcContext};

use super::{
    Result, Tasks,
    container::Container,
    error::TaskError,
    events::exited_at,
    process::{Process, Status},
    sandbox, stats,
};
use crate::spec::decide_resources;

const V2: &str = "containerd.task.v2.Task";
const V3: &str = "containerd.task.v3.Task";
/// containerd's namespace of Docker, which looks for the pids of a task among the processes of the host.
const DOCKERS: &str = "moby";

/// The services by name, for [`ttrpc::r#async::Server::register_service`]: these two, and those beside them.
pub fn services(tasks: Arc<Tasks>) -> HashMap<String, Service> {
    let service = Arc::new(TaskService(tasks.clone()));
    let mut services = create_task(service.clone());
    services.extend(create_task(service).remove(V3).map(|v2| (V2.to_string(), v2)));
    services.extend(sandbox::services(tasks));
    services
}

struct TaskService(Arc<Tasks>);

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.0.create(request).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self.0.start(&request.id, &request.exec_id).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let deleted = self.0.delete(&request.id, &request.exec_id).await?;
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.as_ref().map_or(0, |exit| exit.status.into()),
            exited_at: exited_at(deleted.exit.as_ref()),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.0.exec(request)?;
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let (container, process) = self.0.process(&request.id, &request.exec_id)?;
        Ok(state(&container, &process))
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let (_, process) = self.0.process(&request.id, &request.exec_id)?;
        let status = process.until(Status::is_over).await;
        Ok(WaitResponse {
            exit_status: status.exit().map_or(0, |exit| exit.status.into()),
            exited_at: exited_at(status.exit()),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let (container, process) = self.0.process(&request.id, &request.exec_id)?;
        self.0.kill(&container, &process, request.signal, request.all).await?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.0.table.get(&request.id)?;
        let processes = match self.0.config.namespace.as_str() {
            DOCKERS => on_host(&container),
            _ => pids(&container).await?,
        };
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.0.live(&request.id)?;
        let metrics = stats::of_container(&container).await?;
        Ok(StatsResponse { stats: Some(metrics).into(), ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.0.live(&request.id)?;
        container.pod()?.sandbox.pause(&container.id).await.map_err(TaskError::from)?;
        container.init.until(|status| *status != Status::Running).await;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.0.live(&request.id)?;
        container.pod()?.sandbox.resume(&container.id).await.map_err(TaskError::from)?;
        container.init.until(|status| *status != Status::Paused).await;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.0.live(&request.id)?;
        let decided = decide_resources(&request.resources.value, container.terms());
        let (resources, ignored) = decided.map_err(|e| TaskError::Sandbox(e.into()))?;
        container.log_ignored(&ignored);
        let updated = container.pod()?.sandbox.update(&container.id, &resources).await;
        updated.map_err(TaskError::from)?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let (container, process) = self.0.process(&request.id, &request.exec_id)?;
        let characters = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let (width, height) = (characters(request.width), characters(request.height));
        if !process.plan_size(width, height) {
            let sandbox = &container.pod()?.sandbox;
            sandbox.resize(&process.id, width, height).await.map_err(TaskError::from)?;
        }
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.0.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(TaskError::Unsupported("checkpoint").into())
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        // For a shim whose task is not there yet, this is how containerd asks whether it listens.
        let task_pid = self.0.table.get(&request.id).map_or(0, |container| container.pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.0.shut_down();
        Ok(Empty::new())
    }
}

impl Tasks {
    /// A container whose processes there are.
    fn live(&self, id: &str) -> Result<Arc<Container>> {
        let container = self.table.get(id)?;
        match container.init.status().is_over() {
            true => Err(TaskError::Ended(container.init.id.to_string())),
            false => Ok(container),
        }
    }

    async fn kill(
        &self,
        container: &Container,
        process: &Process,
        signal: u32,
        all: bool,
    ) -> Result<()> {
        if process.status().is_over() {
            return Err(TaskError::Ended(process.id.to_string()));
        }
        if process.is_planned() {
            return Err(process.refuse("running"));
        }
        Ok(container.pod()?.sandbox.signal(&process.id, signal, all).await?)
    }
}

fn state(container: &Container, process: &Process) -> StateResponse {
    let (status, wanted) = (process.status(), process.wanted.clone());
    StateResponse {
        id: container.id.to_string(),
        exec_id: process.id.exec.as_ref().map(ToString::to_string).unwrap_or_default(),
        bundle: container.bundle.to_string_lossy().into_owned(),
        pid: container.pid(),
        status: status.api().into(),
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        terminal: wanted.terminal,
        exit_status: status.exit().map_or(0, |exit| exit.status.into()),
        exited_at: exited_at(status.exit()),
        ..Default::default()
    }
}

fn on_host(container: &Container) -> Vec<ProcessInfo> {
    vec![ProcessInfo { pid: container.pid(), ..Default::default() }]
}

/// The guest's processes, by their pids there. containerd takes a task without any for one that is lost, so
/// one that has ended, or is about to, still has its process on the host.
async fn pids(container: &Container) -> Result<Vec<ProcessInfo>> {
    if container.init.status().is_over() {
        return Ok(on_host(container));
    }
    let found = container.pod()?.sandbox.pids(&container.id).await?;
    if found.processes.is_empty() {
        return Ok(on_host(container));
    }
    let info = found.processes.into_iter().map(|process| {
        let mut info = ProcessInfo { pid: process.pid, ..Default::default() };
        if !process.exec_id.is_empty() {
            let details = ProcessDetails { exec_id: process.exec_id, ..Default::default() };
            info.info = stats::any(&details).ok().into();
        }
        info
    });
    Ok(info.collect())
}

#[cfg(test)]
mod tests;
