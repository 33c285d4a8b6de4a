//! What a Task call fails with, and the one place where that becomes a gRPC code.

use std::{io, path::PathBuf, sync::Arc};

use ttrpc::Code;

use super::{anchor::AnchorError, bundle::BundleError, stdio::StdioError};
use crate::{
    agent::AgentError,
    commands::FAILURE,
    cpus::CpusError,
    device::DeviceError,
    error::Report,
    hooks::HookError,
    id::BadId,
    network::NetworkError,
    rootfs::RootFsError,
    sandbox::{Refused, SandboxError},
    share::ShareError,
    text::one_line,
    vm::Death,
};

/// Longest text of an error that containerd is given.
const MAX_TEXT: usize = 4000;
/// Last lines of a dead guest's console that go with it.
const CONSOLE_LINES: usize = 5;

/// Some texts end as containerd's own do, which tells its clients the kind of an error by its code and, from 2.0 on, nothing
/// but the text as we say it.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("{0}: not found")]
    NotFound(String),
    #[error("{0}: already exists")]
    Exists(String),
    #[error("{id}: {is}, not {wanted}")]
    State { id: String, is: &'static str, wanted: &'static str },
    #[error("{0}: has ended already: not found")]
    Ended(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}: not supported")]
    Unsupported(&'static str),
    /// The daemon is on its way out.
    #[error("the shim is shutting down")]
    Leaving,
    #[error("{what}: not done within {seconds} s")]
    Slow { what: String, seconds: u64 },
    #[error(transparent)]
    Id(#[from] BadId),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error("root file system")]
    RootFs(#[from] RootFsError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error("the task's process on the host")]
    Anchor(#[from] AnchorError),
    #[error("linux.namespaces (network)")]
    Network(#[from] NetworkError),
    #[error("{}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl TaskError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::Ended(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Invalid(_)
            | Self::Id(_)
            | Self::Bundle(_)
            | Self::Share(_)
            | Self::Device(_)
            | Self::Stdio(_)
            | Self::Network(NetworkError::Hosts | NetworkError::Refused { .. }) => {
                Code::INVALID_ARGUMENT
            }
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Leaving => Code::UNAVAILABLE,
            Self::Slow { .. } => Code::DEADLINE_EXCEEDED,
            Self::RootFs(_)
            | Self::Anchor(_)
            | Self::Network(_)
            | Self::Hook(_)
            | Self::File { .. }
            | Self::Host(..) => Code::INTERNAL,
            Self::Sandbox(error) => sandbox_code(error),
        }
    }
}

fn sandbox_code(error: &SandboxError) -> Code {
    match error {
        SandboxError::Refused(Refused::NotFound(_)) => Code::NOT_FOUND,
        SandboxError::Refused(Refused::Exists(_)) => Code::ALREADY_EXISTS,
        SandboxError::Refused(Refused::State { .. }) => Code::FAILED_PRECONDITION,
        SandboxError::Refused(Refused::NoSlot) => Code::RESOURCE_EXHAUSTED,
        // The caller's spec, or a command that its image does not have.
        SandboxError::Spec(_) | SandboxError::Json(_) | SandboxError::Start { .. } => {
            Code::INVALID_ARGUMENT
        }
        SandboxError::Gone(_) | SandboxError::Agent(AgentError::Disconnected { .. }) => {
            Code::UNAVAILABLE
        }
        SandboxError::Disk(_) | SandboxError::Agent(AgentError::Timeout { .. }) => {
            Code::DEADLINE_EXCEEDED
        }
        // A guest's word for it, but it can only fail its own calls.
        SandboxError::Agent(AgentError::Refused { code, .. }) => match code {
            Code::NOT_FOUND
            | Code::ALREADY_EXISTS
            | Code::FAILED_PRECONDITION
            | Code::INVALID_ARGUMENT => *code,
            _ => Code::INTERNAL,
        },
        SandboxError::Network(NetworkError::Hosts | NetworkError::Refused { .. }) => {
            Code::INVALID_ARGUMENT
        }
        SandboxError::Cpus(CpusError::Bind(_)) => Code::INTERNAL,
        SandboxError::Cpus(_) => Code::INVALID_ARGUMENT,
        SandboxError::Boot(_)
        | SandboxError::Died { .. }
        | SandboxError::Vm(_)
        | SandboxError::Network(_)
        | SandboxError::Shares(_) => Code::INTERNAL,
    }
}

/// A dead guest's last words belong to the reason: nobody sees its console otherwise.
fn death(error: &TaskError) -> Option<&Arc<Death>> {
    match error {
        TaskError::Sandbox(SandboxError::Died { source, .. } | SandboxError::Gone(source)) => {
            Some(source)
        }
        _ => None,
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        let report = Report::new("", &error, FAILURE);
        let mut text = report.message;
        let console = death(&error).map(|death| death.console.as_slice()).unwrap_or_default();
        let last = &console[console.len().saturating_sub(CONSOLE_LINES)..];
        if !last.is_empty() {
            text = format!("{text}; guest console: {}", last.join(" | "));
        }
        if let Some(hint) = report.hint {
            text = format!("{text}; hint: {hint}");
        }
        Self::RpcStatus(ttrpc::get_status(error.code(), one_line(&text, MAX_TEXT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::{ProcessId, StartFailure};

    fn status(error: impl Into<TaskError>) -> (Code, String) {
        match ttrpc::Error::from(error.into()) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_string()),
            other => panic!("not a status: {other}"),
        }
    }

    #[test]
    fn every_known_reason_has_its_code() {
        let process = || ProcessId::init("c".parse().unwrap());
        let agent = |code| {
            SandboxError::Agent(AgentError::Refused {
                call: "start c".into(),
                code,
                message: "x".into(),
            })
        };
        let state = Refused::State { process: process(), is: "running", wanted: "stopped" };
        for (error, code) in [
            (SandboxError::from(Refused::NotFound(process())), Code::NOT_FOUND),
            (Refused::Exists(process()).into(), Code::ALREADY_EXISTS),
            (state.into(), Code::FAILED_PRECONDITION),
            (Refused::NoSlot.into(), Code::RESOURCE_EXHAUSTED),
            (SandboxError::Gone(Arc::new(Death::lost())), Code::UNAVAILABLE),
            (agent(Code::FAILED_PRECONDITION), Code::FAILED_PRECONDITION),
            // Never what containerd would take for "try another version of the API".
            (agent(Code::UNIMPLEMENTED), Code::INTERNAL),
        ] {
            let text = error.to_string();
            assert_eq!(status(error).0, code, "{text}");
        }
        assert_eq!(status(TaskError::Unsupported("checkpoint")).0, Code::UNIMPLEMENTED);
    }

    #[test]
    fn a_command_that_is_missing_is_named() {
        let source = StartFailure::NotFound("exec: nope: no such file or directory".into());
        let error = SandboxError::Start { process: ProcessId::init("c".parse().unwrap()), source };
        let (code, text) = status(error);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.contains("exec: nope: no such file or directory; hint: is it"), "{text}");
    }

    #[test]
    fn a_dead_guest_is_quoted() {
        let mut death = Death::lost();
        death.console = (0..9).map(|n| format!("line {n}")).collect();
        let (_, text) = status(SandboxError::Gone(Arc::new(death)));
        assert!(
            text.ends_with("guest console: line 4 | line 5 | line 6 | line 7 | line 8"),
            "{text}"
        );
    }
}
