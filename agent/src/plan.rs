//! What the agent and the runner of a process (`ampoule-agent init`) say to each other.
//!
//! The runner is started with its [`Plan`] in a memory file and a packet socket, on which it answers
//! [`Report::Prepared`] (with descriptors, if there are any) or [`Report::Failed`], waits for
//! [`Order::Start`], and then either sends [`Report::Failed`] once more or becomes the workload, which
//! closes the socket. Everything is close-on-exec; the workload sees none of it.

use std::{
    fmt::Display,
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::{OwnedFd, RawFd},
    path::PathBuf,
};

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::oci::{Personality, Process, Seccomp, Spec};

/// The argument that makes the binary a runner.
pub const RUNNER: &str = "init";
/// The runner's end of the packet socket.
pub const CHANNEL_FD: RawFd = 3;
/// The memory file with the [`Plan`].
pub const PLAN_FD: RawFd = 4;
/// For an exec: a pidfd of the container's init, whose namespaces it joins.
pub const TARGET_FD: RawFd = 5;
/// For the first process of a container with a seed: the mount of its /dev/random, detached.
pub const RANDOM_FD: RawFd = 6;
/// Longest message of a failure: a packet holds it.
const MAX_TEXT: usize = 8 * 1024;

#[derive(Debug, Serialize, Deserialize)]
pub enum Plan {
    /// Make a container and run its first process.
    Init(Box<Init>),
    /// Run one more process in a container.
    Exec(Box<Exec>),
    /// Run a process in the guest itself.
    Console(Box<Process>),
    /// Be the file server of a container.
    View(View),
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Init {
    /// The container's.
    pub id: String,
    pub spec: Spec,
    /// Where the root file system is mounted in the guest.
    pub rootfs: PathBuf,
    /// Where its scratch disk is, if it has one.
    pub scratch: PathBuf,
    /// A PID 1 of ours stays before the workload.
    pub init: bool,
    /// Random numbers come from the agent: [`RANDOM_FD`] is there.
    pub seeded: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    pub process: Process,
    /// The container's profile.
    pub seccomp: Option<Seccomp>,
    pub personality: Option<Personality>,
    /// The container is in a user namespace that is not the guest's.
    pub user_namespace: bool,
    /// It is in a time namespace that is not the guest's.
    pub time_namespace: bool,
    /// Random numbers come from the agent.
    pub seeded: bool,
}

/// Its standard input is the stream that it serves.
#[derive(Debug, Serialize, Deserialize)]
pub struct View {
    /// Whose root it is: the container's init.
    pub pid: u32,
    /// With which its numbers begin.
    pub first: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// To a first process with mapped mounts, before it is prepared: they come along, detached.
    Mounts,
    Start,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// Goes on as another process, which is in the user namespace that it joined: its pidfd comes along.
    Joined,
    /// Parked just before the workload. The terminal's master comes along, then the listener of getrandom(2).
    Prepared,
    Failed {
        fault: Fault,
        message: String,
    },
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// The spec asks for what cannot be.
    Spec,
    /// The command does not exist.
    NotFound,
    /// The command exists but cannot be executed.
    NotExecutable,
    /// Anything else.
    Internal,
}

impl Fault {
    /// What shells and docker say of such a process.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable => 126,
            Self::Spec | Self::Internal => 125,
        }
    }
}

/// A step of the agent or the runner that failed: "step: object: cause". One text, because it crosses
/// processes.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    pub fault: Fault,
    message: String,
}

impl StepError {
    pub fn new(
        fault: Fault,
        step: &'static str,
        object: impl Display,
        cause: impl Display,
    ) -> Self {
        Self { fault, message: format!("{step}: {object}: {cause}") }
    }

    /// A failure that another process reported.
    pub fn relayed(fault: Fault, message: String) -> Self {
        Self { fault, message }
    }
}

/// For `map_err`: names what failed, and on which object.
pub fn at<E: Into<io::Error>>(
    step: &'static str,
    object: impl Display,
) -> impl FnOnce(E) -> StepError {
    move |error| StepError::new(Fault::Internal, step, object, cause(error.into()))
}

/// Says that the spec is at fault.
pub fn refuse(step: &'static str, object: impl Display, cause: impl Display) -> StepError {
    StepError::new(Fault::Spec, step, object, cause)
}

/// The text of an error number, as strerror(3) has it.
pub fn cause(error: io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

impl From<StepError> for Report {
    fn from(error: StepError) -> Self {
        let StepError { fault, mut message } = error;
        message.truncate(message.floor_char_boundary(MAX_TEXT));
        Self::Failed { fault, message }
    }
}

impl Plan {
    /// Puts the plan into a memory file, for the runner's [`PLAN_FD`].
    pub fn write(&self) -> io::Result<OwnedFd> {
        let bytes = postcard::to_stdvec(self).map_err(io::Error::other)?;
        let mut file = File::from(memfd_create("plan", MemfdFlags::CLOEXEC)?);
        file.write_all(&bytes)?;
        file.rewind()?;
        Ok(file.into())
    }

    /// The runner's side.
    pub fn read(file: OwnedFd) -> io::Result<Self> {
        let mut bytes = Vec::new();
        File::from(file).read_to_end(&mut bytes)?;
        postcard::from_bytes(&bytes).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_survives_the_memory_file() {
        let spec = Spec {
            hostname: "box".into(),
            process: Process { args: vec!["a".repeat(1 << 20)], ..Default::default() },
            ..Default::default()
        };
        let plan = Plan::Init(Box::new(Init {
            id: "c".into(),
            spec: spec.clone(),
            rootfs: "/run/x".into(),
            scratch: "/run/ampoule/c/scratch".into(),
            init: true,
            seeded: false,
        }));
        match Plan::read(plan.write().unwrap()).unwrap() {
            Plan::Init(init) => {
                assert_eq!(init.spec, spec);
                assert_eq!(init.rootfs, PathBuf::from("/run/x"));
            }
            other => panic!("became {other:?}"),
        }
    }

    #[test]
    fn a_failure_reads_step_object_cause_and_fits_a_packet() {
        let error = at("mount", "/proc")(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.to_string(), "mount: /proc: Permission denied");
        let long = refuse("exec", "ä".repeat(MAX_TEXT), "x");
        match Report::from(long) {
            Report::Failed { message, .. } => assert!(message.len() <= MAX_TEXT),
            other => panic!("became {other:?}"),
        }
    }
}
