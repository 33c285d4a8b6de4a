//! Why a verb failed. Callers tell what became of a container by some of runc's words, which are the same here:
//! "container does not exist", "container not running", "exists"; [`crate::sandbox::StartFailure`] has others.

use std::{io, path::PathBuf};

use crate::{
    config::ConfigError,
    control::ControlError,
    device::DeviceError,
    hooks::HookError,
    network::NetworkError,
    rootfs::RootFsError,
    run_spec::RunSpecError,
    sandbox::SandboxError,
    task::{BundleError, TaskError},
};

#[derive(Debug, thiserror::Error)]
pub enum OciError {
    #[error("container {id:?}: the id {source}")]
    Id { id: String, source: crate::id::BadId },
    #[error("container {0}: container does not exist")]
    NotFound(String),
    #[error("container {0}: container with given ID already exists")]
    Exists(String),
    #[error("container {0}: container not running")]
    NotRunning(String),
    #[error("container {id}: cannot {verb} a container that is {status}")]
    State { id: String, verb: &'static str, status: &'static str },
    #[error("container {id}: cannot delete container that is not stopped: {status}")]
    NotStopped { id: String, status: &'static str },
    #[error("container {id}: {why}")]
    Slow { id: String, why: &'static str },
    #[error("{what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("bundle")]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    RootFs(#[from] RootFsError),
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("{0}")]
    Network(&'static str, #[source] NetworkError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error("process")]
    Process(#[from] RunSpecError),
    /// What is asked for is not what a sandbox can have.
    #[error("{object}: {why}")]
    Refused { object: String, why: String },
    #[error("container {0}")]
    Control(String, #[source] ControlError),
    #[error(transparent)]
    Answered(ControlError),
    #[error("{0}")]
    Systemd(String, #[source] io::Error),
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    #[error("interrupted")]
    Interrupted,
}

impl OciError {
    /// Why a keeper did not do what it was asked for. What it answers names the container itself.
    pub fn asked(id: &str, error: ControlError) -> Self {
        match error {
            ControlError::Failed(_) => Self::Answered(error),
            error => Self::Control(id.into(), error),
        }
    }

    pub fn refused(object: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Refused { object: object.into(), why: why.into() }
    }
}
