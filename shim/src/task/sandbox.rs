//! A sandbox without containers, as containerd 2's Sandbox service makes it (sandboxer "shim"): the VM first, and
//! what it is to run later, as tasks that join it.
//!
//! ```text
//!   CreateSandbox ┌─────────┐ StartSandbox ┌───────┐ StopSandbox, or the VM's end ┌─────────┐
//!  ──────────────▶│ Created │─────────────▶│ Ready │─────────────────────────────▶│ Stopped │
//!                 └─────────┘              └───────┘                              └─────────┘
//!                      └───────────────────── StopSandbox ──────────────────────────▲
//! ```
//!
//! - [`service`]: the calls
//! - [`plan`], [`pod_config`]: what a sandbox is made from, in containerd's words and in CRI's
//! - [`files`]: what its containers know names by, and their shared memory
//! - [`pause`]: what holds the pod's namespaces
//!
//! From CreateSandbox to ShutdownSandbox the VM and the daemon stay, whatever tasks there are; without these calls
//! both follow the tasks.

mod files;
mod pause;
mod plan;
mod pod_config;
mod service;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use tokio::{sync::watch, time::timeout};

use super::{GONE, Result, Tasks, error::TaskError, pod::Pod};
use crate::{
    id::Id,
    sandbox::{BootRecord, ProcessId},
};
pub use files::PodFiles;
use plan::Plan;
pub use service::services;

/// For StopSandbox to do what it has to, where containerd says nothing.
const STOP: Duration = Duration::from_secs(10);
/// 128 + SIGKILL: the end of a sandbox that nobody asked for.
const KILLED: u32 = 137;

#[derive(Clone, Debug)]
enum Phase {
    Created(Arc<Plan>),
    Ready(Arc<Pod>),
    Stopped(End),
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Created(_) => "created",
            Self::Ready(_) => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// How a sandbox ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    status: u32,
    at: SystemTime,
}

#[derive(Clone, Debug)]
struct State {
    id: Id,
    phase: Phase,
    /// When it became ready.
    since: Option<SystemTime>,
    /// Its end is asked for.
    stopping: bool,
    files: PodFiles,
}

impl State {
    fn refuse(&self, wanted: &'static str) -> TaskError {
        TaskError::State { id: format!("sandbox {}", self.id), is: self.phase.name(), wanted }
    }

    fn pod(&self) -> Result<&Arc<Pod>> {
        match &self.phase {
            Phase::Ready(pod) => Ok(pod),
            Phase::Created(_) => Err(self.refuse("running")),
            Phase::Stopped(_) => Err(TaskError::Ended(format!("sandbox {}", self.id))),
        }
    }

    fn end(&self) -> Option<End> {
        match self.phase {
            Phase::Stopped(end) => Some(end),
            _ => None,
        }
    }
}

/// The sandbox that the service made, if it made one.
#[derive(Debug, Default)]
pub struct Made(watch::Sender<Option<State>>);

impl Made {
    pub fn is_there(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Whether a container that finds no VM is to boot one: not where the service boots it, which here has just ended.
    pub fn leaves_the_vm_to_containers(&self) -> Result<()> {
        let ended = |state: &State| Err(TaskError::Ended(format!("sandbox {}", state.id)));
        self.0.borrow().as_ref().map_or(Ok(()), ended)
    }

    /// A sandbox that was made before its containers takes them while it runs.
    pub fn admits_containers(&self) -> Result<()> {
        match &*self.0.borrow() {
            Some(state) if !matches!(state.phase, Phase::Ready(_)) => Err(state.refuse("running")),
            _ => Ok(()),
        }
    }

    /// What its containers get besides what they ask for.
    pub fn files(&self) -> PodFiles {
        self.0.borrow().as_ref().map(|state| state.files.clone()).unwrap_or_default()
    }

    fn get(&self, id: &str) -> Result<State> {
        let found = self.0.borrow().clone().filter(|state| state.id.as_str() == id);
        found.ok_or_else(|| TaskError::NotFound(format!("sandbox {id:?}")))
    }

    /// Changes the sandbox's state, if that is still to be changed.
    fn change(&self, change: impl FnOnce(&mut State) -> bool) -> bool {
        self.0.send_if_modified(|state| state.as_mut().is_some_and(change))
    }

    fn end(&self, status: u32) {
        self.change(|state| {
            let new = state.end().is_none();
            if new {
                state.phase = Phase::Stopped(End { status, at: SystemTime::now() });
            }
            new
        });
    }

    async fn ended(&self) -> End {
        let mut state = self.0.subscribe();
        let ended = state.wait_for(|state| state.as_ref().is_some_and(|s| s.end().is_some())).await;
        let end = ended.ok().and_then(|state| state.as_ref()?.end());
        // We have the sender.
        end.unwrap_or(End { status: KILLED, at: SystemTime::now() })
    }
}

impl Tasks {
    /// Decides what the sandbox will be.
    async fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<()> {
        let id: Id = request.sandbox_id.parse()?;
        let paths = self.config.paths.clone();
        let planned = {
            let id = id.clone();
            tokio::task::spawn_blocking(move || Plan::new(id, request, &paths)).await
        };
        let plan = planned.map_err(|e| TaskError::Host("plan the sandbox", e.into()))??;
        // A VM that a container has booted is a sandbox too.
        let slot = self.pod.lock().await;
        let made = slot.is_none()
            && self.table.is_empty()
            && self.sandbox.0.send_if_modified(|state| {
                let new = state.is_none();
                if new {
                    *state = Some(State {
                        id: id.clone(),
                        since: None,
                        stopping: false,
                        files: plan.files.clone(),
                        phase: Phase::Created(Arc::new(plan)),
                    });
                }
                new
            });
        if made {
            Ok(())
        } else {
            Err(TaskError::Exists(format!("the sandbox of this shim, for {id}")))
        }
    }

    /// Boots it. Returns the state it then is in.
    async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<State> {
        let mut slot = self.pod.lock().await;
        let state = self.sandbox.get(id)?;
        let Phase::Created(plan) = &state.phase else { return Err(state.refuse("created")) };
        let stopped = || TaskError::Ended(format!("sandbox {id}"));
        let pod = tokio::select! {
            pod = self.boot(plan.pod.clone(), Vec::new(), None) => pod?,
            _ = self.sandbox.ended() => return Err(stopped()),
        };
        let paused = tokio::select! {
            paused = pause::start(&pod, plan) => paused,
            _ = self.sandbox.ended() => Err(stopped()),
        };
        let ready = paused.and_then(|()| self.adopt(&pod).ok_or_else(stopped));
        if let Err(error) = ready {
            let _ = timeout(GONE, pod.sandbox.shutdown()).await;
            return Err(error);
        }
        *slot = Some(pod);
        drop(slot);
        self.sandbox.get(id)
    }

    /// From now on the sandbox is this pod, unless it was stopped meanwhile.
    fn adopt(self: &Arc<Self>, pod: &Arc<Pod>) -> Option<()> {
        let adopted = self.sandbox.change(|state| {
            let new = matches!(state.phase, Phase::Created(_));
            if new {
                state.phase = Phase::Ready(pod.clone());
                state.since = Some(SystemTime::now());
            }
            new
        });
        adopted.then(|| drop(tokio::spawn(self.clone().watch(pod.clone()))))
    }

    /// Waits for the end of the sandbox's VM, and lets nobody join it from then on. Without the process that holds
    /// the namespaces nobody could: its end is the VM's.
    async fn watch(self: Arc<Self>, pod: Arc<Pod>) {
        let pause = ProcessId::init(pod.first.clone());
        let stopping = || self.sandbox.0.borrow().as_ref().is_some_and(|state| state.stopping);
        tokio::select! {
            _ = pod.sandbox.ended() => {}
            // A guest that is told to switch itself off still has disks to write when it ends.
            Ok(exit) = pod.sandbox.wait(&pause) => {
                if exit.death.is_none() && !stopping() {
                    tracing::error!(status = exit.status, "the pod's first process ended, and so the sandbox");
                    pod.sandbox.shutdown().await;
                }
            }
        }
        pod.sandbox.ended().await;
        let asked = stopping();
        *self.pod.lock().await = None;
        self.sandbox.end(if asked { 0 } else { KILLED });
    }

    /// Ends the VM and everything in it. What has ended already, or never began, is stopped.
    async fn stop_sandbox(&self, id: &str, limit: Duration) -> Result<()> {
        let state = self.sandbox.get(id)?;
        let pod = match &state.phase {
            Phase::Stopped(_) => return Ok(()),
            Phase::Created(_) => {
                // Unless it has just become ready.
                self.sandbox.change(|state| {
                    let new = matches!(state.phase, Phase::Created(_));
                    if new {
                        state.phase = Phase::Stopped(End { status: 0, at: SystemTime::now() });
                    }
                    new
                });
                match self.sandbox.get(id)?.phase {
                    Phase::Ready(pod) => pod,
                    _ => return Ok(()),
                }
            }
            Phase::Ready(pod) => pod.clone(),
        };
        self.sandbox.change(|state| !std::mem::replace(&mut state.stopping, true));
        // What is kept is on the host's disks when the guest says so.
        if pod.sandbox.keeps() && timeout(limit, pod.sandbox.power_off()).await.is_err() {
            tracing::warn!("the guest has not written its disks in time");
        }
        let ended = async {
            pod.sandbox.shutdown().await;
            self.sandbox.ended().await;
        };
        let slow =
            |_| TaskError::Slow { what: format!("stop sandbox {id}"), seconds: GONE.as_secs() };
        timeout(GONE, ended).await.map_err(slow)
    }

    /// Ends the sandbox and the daemon. Without a sandbox it is the Shutdown of tasks.
    async fn shutdown_sandbox(&self, id: &str) -> Result<()> {
        if !self.sandbox.is_there() {
            self.shut_down();
            return Ok(());
        }
        if let Err(error) = self.stop_sandbox(id, STOP).await {
            match error {
                TaskError::Slow { .. } => tracing::error!(%error, "its VM ends with this process"),
                error => return Err(error),
            }
        }
        self.table.close_for_good();
        self.over.send_replace(true);
        Ok(())
    }

    /// What is known of a sandbox's guest.
    async fn boot_record(&self, state: &State) -> Option<BootRecord> {
        state.pod().ok()?.sandbox.boot_record().await.ok()
    }
}

#[cfg(test)]
mod tests;
