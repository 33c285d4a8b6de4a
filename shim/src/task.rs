//! containerd's Task services.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{ConnectRequest, ConnectResponse, Empty, ShutdownRequest},
    shim_async::{Task, create_task},
};
use tokio::sync::Notify;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::{id::Id, paths::Paths, publisher::Publisher};

/// The service's name for containerd 2; the messages are the same.
const V3: &str = "containerd.task.v3.Task";
const V2: &str = "containerd.task.v2.Task";

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
    finished: Notify,
}

impl Tasks {
    pub fn new(_config: TasksConfig, _publisher: Publisher) -> Arc<Self> {
        Arc::new(Self { finished: Notify::new() })
    }

    /// Ends when Shutdown was called and no task is left: from then on no Create succeeds.
    pub async fn wait_for_shutdown(&self) {
        self.finished.notified().await;
    }
}

/// The services by name, for [`ttrpc::r#async::Server::register_service`].
pub fn services(tasks: Arc<Tasks>) -> HashMap<String, Service> {
    let service = Arc::new(TaskService(tasks));
    let mut services = create_task(service.clone());
    services.extend(create_task(service).remove(V3).map(|v2| (V2.to_string(), v2)));
    services
}

struct TaskService(Arc<Tasks>);

#[async_trait]
impl Task for TaskService {
    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let shim_pid = std::process::id();
        Ok(ConnectResponse { shim_pid, task_pid: shim_pid, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.0.finished.notify_one();
        Ok(Empty::new())
    }
}
