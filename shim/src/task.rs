//! containerd's tasks: the containers of one sandbox, as its Task service sees them. In reading order:
//!
//! - [`service`]: the calls, in both of the API's versions
//! - [`container`], [`process`]: what there is, and how far it is
//! - [`create`], [`bundle`], [`size`], [`binds`]: from a bundle to a container in a VM
//! - [`pod`], [`anchor`]: the VM they share, and its process on the host
//! - [`sandbox`]: the VM on its own, as containerd 2 asks for it
//! - [`exec`], [`delete`]: further processes, and the end of all
//! - [`events`]: what the sandbox tells, on its way to containerd
//! - [`stdio`], [`streaming`]: a process's streams, and those of them that containerd opens at our socket
//! - [`stats`], [`error`], [`fields`]: numbers, codes, messages
//!
//! The first container boots the VM, others join it. When the last one has ended and its output has been passed
//! on, the VM goes, without being asked; what is left then is known here. The daemon goes when containerd says
//! so and nothing is left. Where containerd has made the sandbox by itself ([`sandbox`]), it decides all that.

mod anchor;
mod binds;
mod bundle;
mod container;
mod create;
mod delete;
mod error;
mod events;
mod exec;
mod fields;
mod pod;
mod process;
mod sandbox;
mod service;
mod settings;
mod size;
mod stats;
mod stdio;
mod streaming;
#[cfg(test)]
mod testing;

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::{Mutex, mpsc, watch};

use crate::{
    id::Id,
    paths::Paths,
    publisher::Publisher,
    sandbox::{Event, ProcessId},
};
pub use anchor::HostNetwork;
pub use binds::{Binds, binds};
pub use bundle::{Bundle, BundleError};
use container::{Container, Table};
pub use error::TaskError;
use pod::Pod;
use process::{Process, Status};
use sandbox::Made;
pub use service::services;
pub use settings::{OPTIONS, settings};
pub use size::Size;
use stdio::within;
use streaming::Streaming;

/// How long the end of a VM is waited for.
const GONE: Duration = Duration::from_secs(2);
/// How long an end is kept back, so that its process's output is read before.
const READ: Duration = Duration::from_secs(5);

type Result<T> = std::result::Result<T, TaskError>;

/// What the tasks of a sandbox are made with.
#[derive(Clone, Debug)]
pub struct TasksConfig {
    /// Of the sandbox: its first container's, or what its containers are grouped by.
    pub id: Id,
    /// containerd's.
    pub namespace: String,
    /// Folder of the first container.
    pub bundle: PathBuf,
    pub paths: Paths,
    pub debug: bool,
}

/// The tasks of one sandbox.
pub struct Tasks {
    config: TasksConfig,
    publisher: Publisher,
    table: Table,
    /// The one that new containers join. Locked while it boots.
    pod: Mutex<Option<Arc<Pod>>>,
    sandbox: Made,
    /// What containerd opens at our socket that is no call.
    pub streaming: Arc<Streaming>,
    over: watch::Sender<bool>,
}

impl Tasks {
    pub fn new(config: TasksConfig, publisher: Publisher) -> Arc<Self> {
        let over = watch::Sender::new(false);
        Arc::new(Self {
            config,
            publisher,
            table: Table::default(),
            pod: Mutex::default(),
            sandbox: Made::default(),
            streaming: Arc::default(),
            over,
        })
    }

    /// Ends when Shutdown was called and no task is left: from then on no Create succeeds.
    pub async fn wait_for_shutdown(&self) {
        // We have the sender.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
        if let Some(pod) = self.pod.lock().await.take() {
            let _ = tokio::time::timeout(GONE, pod.sandbox.shutdown()).await;
        }
    }

    /// Lets the daemon end, if no task is left.
    fn shut_down(&self) {
        if !self.sandbox.is_there() && self.table.close() {
            self.over.send_replace(true);
        }
    }

    fn process(&self, container: &str, exec: &str) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.table.get(container)?;
        let process = container.process(exec)?;
        Ok((container, process))
    }

    /// Passes on what a sandbox tells, to its end.
    async fn follow(self: Arc<Self>, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            let Some(ProcessId { container, exec }) = events::subject(&event) else { continue };
            let exec = exec.as_ref().map_or("", Id::as_str);
            // Nobody is told of what was given up.
            let Ok((container, process)) = self.process(container.as_str(), exec) else { continue };
            let reading = process.reading().filter(|_| matches!(event, Event::Exited { .. }));
            let tasks = self.clone();
            match reading {
                // No other process waits for that.
                Some(reading) => drop(tokio::spawn(async move {
                    within(READ, reading).await;
                    tasks.pass_on(&event, &container, &process);
                })),
                None => tasks.pass_on(&event, &container, &process),
            }
        }
    }

    fn pass_on(self: Arc<Self>, event: &Event, container: &Container, process: &Process) {
        events::pass_on(event, container, process, &self.publisher);
        if matches!(process.status(), Status::Stopped(_)) && process.id.exec.is_none() {
            tokio::spawn(self.retire());
        }
    }

    /// Ends the VM if nothing needs it any more, once all output has been passed on; says whether it is gone.
    async fn retire(self: Arc<Self>) -> bool {
        let mut slot = self.pod.lock().await;
        if self.sandbox.is_there() || !self.table.is_idle() {
            return false;
        }
        // Whoever comes from now on boots another.
        let pod = slot.take();
        drop(slot);
        let containers = self.table.all();
        for container in &containers {
            container.init.drained().await;
        }
        if let Some(pod) = pod {
            pod.sandbox.end().await;
        }
        true
    }
}
