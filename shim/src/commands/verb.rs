//! What the verbs for sandboxes that are there have in common.

use std::{future::Future, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::FAILURE;
use crate::{
    control::{Connection, ControlError, Request},
    error::{exit_code, tell},
    event_loop::event_loop,
    id::Id,
    registry::{Ended, Found, Registry, RegistryError, Status},
    text::print,
};

/// How long a sandbox may take to be gone once it has no choice.
pub(super) const GONE: Duration = Duration::from_secs(10);

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum VerbError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("sandbox {0}")]
    Control(Id, #[source] ControlError),
    #[error("sandbox {0}: {1}")]
    Not(Id, &'static str),
    /// Not so, but in another way.
    #[error("sandbox {name}: {why}")]
    Refused { name: Id, why: &'static str, hint: &'static str },
    #[error("{0}")]
    Options(String),
    #[error("{what} {object}")]
    Copy { what: &'static str, object: String, source: std::io::Error },
    #[error("{0}")]
    Host(&'static str, #[source] std::io::Error),
}

impl VerbError {
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Control(_, ControlError::Failed(failure)) => failure.code,
            other => exit_code(other),
        }
    }
}

pub(super) type Result<T> = std::result::Result<T, VerbError>;

/// Runs a verb to its exit code, and prints what went wrong.
pub(super) fn run(verb: &str, work: impl Future<Output = Result<u8>>) -> u8 {
    let runtime = event_loop();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(work);
            // A thread that reads a terminal cannot be called back: the program ends without it.
            runtime.shutdown_background();
            result
        }
        Err(e) => Err(VerbError::Host("start the event loop", e)),
    };
    result.unwrap_or_else(|error| {
        tell(verb, &error, error.exit_code());
        error.exit_code()
    })
}

/// Runs a verb for each name, also after one has failed; prints the names of those done.
pub(super) fn each<F: Future<Output = Result<()>>>(
    verb: &str,
    names: &[String],
    work: impl Fn(String) -> F,
) -> u8 {
    run(verb, async {
        let mut code = 0;
        for name in names {
            match work(name.clone()).await {
                Ok(()) => print(&format!("{name}\n")),
                Err(error) => {
                    tell(verb, &error, FAILURE);
                    code = FAILURE;
                }
            }
        }
        Ok(code)
    })
}

/// Connects to a sandbox, which has to run.
pub(super) fn connect(found: &Found) -> Result<Connection> {
    match found.status {
        Status::Running => {}
        Status::Created => return Err(VerbError::Not(found.name.clone(), "it still boots")),
        Status::Exited | Status::Dead => {
            return Err(VerbError::Not(found.name.clone(), "it does not run"));
        }
    }
    Connection::open(&found.folder, found.record.boot_timeout)
        .map_err(|e| VerbError::Control(found.name.clone(), e))
}

/// Waits for the end of a sandbox, however long that takes. When it returns, the sandbox's record tells of
/// the end, or is gone.
pub(super) async fn end_of(registry: &Registry, found: &Found) -> Result<Ended> {
    if let (true, Ok(connection)) = (found.is_alive(), connect(found)) {
        let asked = connection.send(&Request::Wait);
        if let (Ok(()), Ok(ended)) = (asked, connection.ended().await) {
            return Ok(ended);
        }
    }
    // It ended before, or while it was asked.
    let now = registry.find(found.name.as_str())?;
    match (&now.record.ended, now.status) {
        (Some(ended), _) => Ok(ended.clone()),
        (None, Status::Dead) => Err(VerbError::Not(
            found.name.clone(),
            "how it ended is not known, the process that ran it was killed",
        )),
        (None, _) => connect(&now).and(Err(VerbError::Not(found.name.clone(), "it still runs"))),
    }
}

/// Ends the process that runs a sandbox, by a signal, and waits until it is gone; its VM goes with it.
pub(super) fn end_process(registry: &Registry, found: &Found, signal: Signal) -> Result<()> {
    let failed = |e: rustix::io::Errno| VerbError::Host("end the sandbox's process", e.into());
    let Some(pid) = i32::try_from(found.record.pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    // Only now is it sure whose process that is: while the name is held, it is the one in the record.
    if !registry.is_held(&found.name)? {
        return Ok(());
    }
    pidfd_send_signal(&process, signal).map_err(failed)?;
    let limit = Timespec { tv_sec: GONE.as_secs().try_into().unwrap_or(10), tv_nsec: 0 };
    match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)) {
        Ok(1..) => Ok(()),
        Ok(0) => Err(VerbError::Not(found.name.clone(), "its process does not end")),
        Err(e) => Err(failed(e)),
    }
}
