//! What can go wrong with a container or a process, and what it is called on the wire.

use ttrpc::Code;

use crate::{
    container::State,
    plan::{Fault, StepError},
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("container {0}: there is none")]
    NoContainer(String),
    #[error("process {0}: there is none")]
    NoProcess(String),
    #[error("{0}: already exists")]
    Exists(String),
    #[error("id {0:?}: not a plain name")]
    Id(String),
    #[error("container {id}: it is {state:?}")]
    State { id: String, state: State },
    #[error("process: already started")]
    Started,
    #[error("process: still running")]
    Running,
    #[error("process: already finished")]
    Ended,
    #[error("process: has no terminal")]
    NoTerminal,
    #[error(transparent)]
    Step(#[from] StepError),
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess(_) | Self::Ended => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State { .. } | Self::Started | Self::Running | Self::NoTerminal => {
                Code::FAILED_PRECONDITION
            }
            Self::Id(_) => Code::INVALID_ARGUMENT,
            Self::Step(step) => match step.fault {
                Fault::Spec => Code::INVALID_ARGUMENT,
                _ => Code::INTERNAL,
            },
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
