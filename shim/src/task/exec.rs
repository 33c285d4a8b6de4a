//! Exec and Start: a further process is only noted when it is asked for, and made when it is started.

use std::{sync::Arc, time::SystemTime};

use containerd_shim_protos::{
    api::ExecProcessRequest, events::task::TaskExecAdded, topics::TASK_EXEC_ADDED_EVENT_TOPIC,
};
use oci_spec::runtime::Process as OciProcess;

use super::{
    Result, Tasks,
    container::Container,
    error::TaskError,
    process::{Process, Status},
    stdio::{Opened, Owner, Wanted},
};
use crate::{
    id::Id,
    sandbox::{ExecConfig, Exit, ProcessId, SandboxError, StartFailure},
    spec::decide,
};

impl Tasks {
    pub fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.table.get(&request.id)?;
        let exec: Id = request.exec_id.parse()?;
        match container.init.status() {
            Status::Created | Status::Running => {}
            _ => return Err(container.init.refuse("running")),
        }
        let wrong = |e| TaskError::Invalid(format!("process of exec {exec}: {e}"));
        let mut json = serde_json::from_slice(&request.spec.value).map_err(wrong)?;
        let ignored = decide(&mut json, "process", container.terms());
        container.log_ignored(&ignored.map_err(SandboxError::from)?);
        let mut process: OciProcess = serde_json::from_value(json).map_err(wrong)?;
        // As runc: the request decides.
        process.set_terminal(Some(request.terminal));
        let wanted = Wanted {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let id = ProcessId::exec(container.id.clone(), exec.clone());
        container.add(exec.clone(), Process::exec(id, wanted, process))?;
        let event = TaskExecAdded {
            container_id: container.id.to_string(),
            exec_id: exec.to_string(),
            ..Default::default()
        };
        self.publisher.publish(TASK_EXEC_ADDED_EVENT_TOPIC, event);
        Ok(())
    }

    /// Lets a created process run its workload; returns its pid.
    pub async fn start(self: &Arc<Self>, container: &str, exec: &str) -> Result<u32> {
        let (container, process) = self.process(container, exec)?;
        if process.id.exec.is_none() {
            let pod = container.pod()?;
            pod.sandbox.attach_network(&container.id).await?;
            pod.sandbox.start(&process.id).await?;
        } else {
            let plan = process.take_plan().ok_or_else(|| process.refuse("created"))?;
            if let Err(error) = self.start_exec(&container, &process, plan).await {
                failed(&process, &error);
                return Err(error);
            }
        }
        // Its event is on its way then.
        process.until(|status| !matches!(status, Status::Creating | Status::Created)).await;
        if process.id.exec.is_none() {
            self.has_started(&container).await?;
        }
        Ok(container.pid())
    }

    async fn has_started(&self, container: &Arc<Container>) -> Result<()> {
        let hooks = container.hooks.get().ok_or_else(|| container.init.refuse("created"))?;
        if let Err(error) = hooks.started(container.pid()).await {
            self.end(container).await?;
            return Err(error.into());
        }
        Ok(())
    }

    async fn start_exec(
        &self,
        container: &Container,
        process: &Process,
        plan: OciProcess,
    ) -> Result<()> {
        let sandbox = &container.pod()?.sandbox;
        let owner = Owner { id: container.id.as_str(), namespace: &self.config.namespace };
        let opened = Opened::open(&process.wanted, owner, &self.streaming, sandbox.pace()).await?;
        let Some(id) = process.id.exec.clone() else { return Err(process.refuse("an exec")) };
        let created = sandbox
            .create_exec(ExecConfig {
                container: container.id.clone(),
                id,
                process: plan,
                stdio: opened.streams(),
            })
            .await?;
        process.connected(opened.connect(created.streams));
        Ok(sandbox.start(&process.id).await?)
    }
}

/// An exec that could not be started has ended: with docker's codes for a command that is missing.
fn failed(process: &Process, error: &TaskError) {
    let status = match error {
        TaskError::Sandbox(SandboxError::Start { source, .. }) => match source {
            StartFailure::NotFound(_) => 127,
            StartFailure::NotExecutable(_) => 126,
        },
        _ => 255,
    };
    if !process.status().is_over() {
        let exit = Exit { status, oom_kills: 0, at: SystemTime::now(), death: None };
        process.set(Status::Stopped(exit));
    }
}
