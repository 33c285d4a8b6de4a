//! Delete: the end of an exec, of a container, of the VM below the last one.

use std::{sync::Arc, time::Duration};

use super::{
    Result, Tasks,
    container::Container,
    error::TaskError,
    process::{Process, Status},
    stdio::within,
};
use crate::{
    rootfs,
    sandbox::{Exit, Refused, SandboxError},
};

/// How long what has been written is passed on after the end, if somebody reads slowly, or nobody does.
const DRAIN: Duration = Duration::from_secs(10);
/// How long the end of a VM may take, whose guest may have disks to write before.
const SWITCHED_OFF: Duration = Duration::from_secs(35);
/// How long a killed process may take to end.
const KILLED: Duration = Duration::from_secs(10);

/// What is told of a process that is no more.
#[derive(Debug, Default)]
pub struct Deleted {
    pub pid: u32,
    pub exit: Option<Exit>,
}

impl Tasks {
    pub async fn delete(self: &Arc<Self>, container: &str, exec: &str) -> Result<Deleted> {
        let (container, process) = self.process(container, exec)?;
        let pid = container.pid();
        if process.id.exec.is_some() {
            let exit = self.delete_exec(&container, &process).await?;
            return Ok(Deleted { pid, exit });
        }
        match process.status() {
            // As runc: what was not started may go.
            Status::Created => self.end(&container).await?,
            Status::Stopped(_) => {}
            Status::Deleted(_) => return Err(TaskError::NotFound(process.id.to_string())),
            Status::Creating | Status::Running | Status::Paused => {
                return Err(process.refuse("stopped"));
            }
        }
        drain(&container, &process).await;
        if self.clone().retire().await {
            // With the VM goes all it had.
            end_vm(&container).await;
        }
        self.delete_from_sandbox(&container).await?;
        container.has_gone().await;
        let exit = process.status().exit().cloned();
        self.table.remove(&container.id);
        self.clone().retire().await;
        Ok(Deleted { pid, exit })
    }

    async fn delete_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<Option<Exit>> {
        let status = process.status();
        if !process.is_planned() {
            if !status.is_over() {
                return Err(process.refuse("stopped"));
            }
            drain(container, process).await;
            delete(container, process).await?;
        }
        if let Some(exec) = &process.id.exec {
            container.remove(exec);
        }
        Ok(status.exit().cloned())
    }

    /// Ends a container that may run.
    pub(super) async fn end(&self, container: &Arc<Container>) -> Result<()> {
        let init = &container.init;
        // It may have ended by itself; then there is nothing to kill.
        let _ = container.pod()?.sandbox.signal(&init.id, libc::SIGKILL as u32, true).await;
        let limit = container.pace().limit(KILLED);
        let ended = tokio::time::timeout(limit, init.until(Status::is_over)).await;
        let what = init.id.to_string();
        ended.map(drop).map_err(|_| TaskError::Slow { what, seconds: limit.as_secs() })
    }

    /// The sandbox forgets a container and gives its disks back.
    pub(super) async fn delete_from_sandbox(&self, container: &Arc<Container>) -> Result<()> {
        let Some(place) = container.place.get() else { return Ok(()) };
        delete(container, &container.init).await?;
        if place.attached && !place.pod.sandbox.has_ended() {
            rootfs::detach(&place.rootfs, &place.pod.sandbox).await;
        }
        Ok(())
    }
}

/// Waits for a process's output to be passed on, and ends that.
async fn drain(container: &Container, process: &Process) {
    let limit = container.pace().limit(DRAIN);
    if !within(limit, process.drained()).await {
        tracing::warn!(process = %process.id, "nobody reads its output: the rest is dropped");
    }
    process.disconnect();
}

async fn end_vm(container: &Container) {
    if let Ok(pod) = container.pod() {
        let limit = container.pace().limit(SWITCHED_OFF);
        let _ = tokio::time::timeout(limit, pod.sandbox.end()).await;
    }
}

/// Has the sandbox forget a process, and waits until its event is on its way.
async fn delete(container: &Container, process: &Process) -> Result<()> {
    let sandbox = &container.pod()?.sandbox;
    let result = match sandbox.delete(&process.id).await {
        // The VM died meanwhile, and the agent is not needed any more.
        Err(SandboxError::Gone(_)) => sandbox.delete(&process.id).await,
        result => result,
    };
    match result {
        Ok(()) => {
            process.until(|status| matches!(status, Status::Deleted(_))).await;
            Ok(())
        }
        Err(SandboxError::Refused(Refused::NotFound(_))) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
