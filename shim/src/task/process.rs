//! A process as containerd sees it: what it was made with, and how far it is.
//!
//! ```text
//!  Creating ──▶ Created ──▶ Running ◀──▶ Paused
//!                  └───────────┴───────────┴──▶ Stopped ──▶ Deleted
//! ```
//!
//! Only what the sandbox tells ([`super::events`]) changes a status, and whoever waits for one hears of it when
//! its event is on its way to containerd. An exec has no counterpart in the sandbox until it is started.

use std::sync::{Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api;
use oci_spec::runtime::{BoxBuilder, Process as OciProcess};
use tokio::sync::watch;

use super::{
    error::TaskError,
    stdio::{Io, Wanted},
};
use crate::sandbox::{Exit, ProcessId};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped(Exit),
    Deleted(Option<Exit>),
}

impl Status {
    pub fn exit(&self) -> Option<&Exit> {
        match self {
            Self::Stopped(exit) | Self::Deleted(Some(exit)) => Some(exit),
            _ => None,
        }
    }

    pub fn is_over(&self) -> bool {
        matches!(self, Self::Stopped(_) | Self::Deleted(_))
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
            Self::Deleted(_) => "deleted",
        }
    }

    pub fn api(&self) -> api::Status {
        match self {
            Self::Creating => api::Status::UNKNOWN,
            Self::Created => api::Status::CREATED,
            Self::Running => api::Status::RUNNING,
            Self::Paused => api::Status::PAUSED,
            Self::Stopped(_) | Self::Deleted(_) => api::Status::STOPPED,
        }
    }
}

/// The copying of a process's streams, once there is any. Input may be at its end before that.
#[derive(Debug, Default)]
struct Connection {
    io: Option<Io>,
    stdin_closed: bool,
}

#[derive(Debug)]
pub struct Process {
    pub id: ProcessId,
    pub wanted: Wanted,
    status: watch::Sender<Status>,
    connection: Mutex<Connection>,
    /// Of an exec, until it is started.
    plan: Mutex<Option<OciProcess>>,
}

impl Process {
    /// A container's first one, which the sandbox is about to make.
    pub fn init(id: ProcessId, wanted: Wanted) -> Self {
        let status = watch::Sender::new(Status::Creating);
        Self { id, wanted, status, connection: Mutex::default(), plan: Mutex::default() }
    }

    pub fn exec(id: ProcessId, wanted: Wanted, process: OciProcess) -> Self {
        let status = watch::Sender::new(Status::Created);
        let plan = Mutex::new(Some(process));
        Self { id, wanted, status, connection: Mutex::default(), plan }
    }

    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    pub fn set(&self, status: Status) {
        self.status.send_replace(status);
    }

    /// Waits until the status is as wished; it never goes back to what it was.
    pub async fn until(&self, wished: impl FnMut(&Status) -> bool) -> Status {
        let mut status = self.status.subscribe();
        match status.wait_for(wished).await {
            Ok(status) => status.clone(),
            // We are the sender.
            Err(_) => self.status(),
        }
    }

    pub fn refuse(&self, wanted: &'static str) -> TaskError {
        TaskError::State { id: self.id.to_string(), is: self.status().name(), wanted }
    }

    /// Takes the plan of an exec that is to be started.
    pub fn take_plan(&self) -> Option<OciProcess> {
        lock(&self.plan).take()
    }

    /// Not known to the sandbox yet.
    pub fn is_planned(&self) -> bool {
        lock(&self.plan).is_some()
    }

    /// Keeps the copying of its streams.
    pub fn connected(&self, mut io: Io) {
        let mut connection = lock(&self.connection);
        if connection.stdin_closed {
            io.close_stdin();
        }
        connection.io = Some(io);
    }

    /// A client that has little to say may be done before the process is made.
    pub fn close_stdin(&self) {
        let mut connection = lock(&self.connection);
        connection.stdin_closed = true;
        if let Some(io) = &mut connection.io {
            io.close_stdin();
        }
    }

    /// Before it is started, the size is one to be made with; says whether that is so.
    pub fn plan_size(&self, width: u16, height: u16) -> bool {
        let mut plan = lock(&self.plan);
        let Some(plan) = plan.as_mut() else { return false };
        let size = BoxBuilder::default().width(width).height(height).build();
        plan.set_console_size(size.ok());
        true
    }

    /// Tells when all output has been passed on, or the passing on was given up.
    pub fn drained(&self) -> impl Future<Output = ()> + use<> {
        let drained = lock(&self.connection).io.as_ref().map(Io::drained);
        async move {
            if let Some(drained) = drained {
                drained.await;
            }
        }
    }

    /// Tells when all of a container's output has been read, of which containerd would cancel the rest when it hears of
    /// the end.
    pub fn reading(&self) -> Option<impl Future<Output = ()> + use<>> {
        let connection = lock(&self.connection);
        let io = connection.io.as_ref().filter(|io| io.is_cancelled_by_the_end());
        io.filter(|_| self.id.exec.is_none()).map(Io::drained)
    }

    /// Ends the passing on, whatever is still under way.
    pub fn disconnect(&self) {
        lock(&self.connection).io = None;
    }
}

/// A lock is held for moments, and by nobody who panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
