//! A program that takes a process's output: `binary://PATH?KEY=VALUE&...`.
//!
//! It finds the output as descriptors 3 and 4, and closes 5 (or writes to it) when it is ready; before that no
//! process is started. As `binary-v2` it has to write. CONTAINER_ID and CONTAINER_NAMESPACE are its whole
//! environment (containerd, docs/logging).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    process::Stdio,
    time::Duration,
};

use rustix::{
    io::fcntl_dupfd_cloexec,
    pipe::{PipeFlags, pipe_with},
};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::{Receiver, Sender},
    process::{Child, Command},
    time::timeout,
};

use super::{Owner, StdioError, uri};
use crate::{descriptors, pace::Pace};

/// How long a logger usually may take to be ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to end after the last output.
const FINISH: Duration = Duration::from_secs(12);
/// Descriptors are first put above those they are to become.
const SPARE: RawFd = 10;

/// Dropping it kills the program.
pub struct Logger {
    child: Child,
    pub stdout: Option<Sender>,
    pub stderr: Option<Sender>,
}

impl Logger {
    pub async fn start(
        command: &uri::Command,
        owner: Owner<'_>,
        pace: Pace,
    ) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Logger { path: command.path.clone(), source };
        let late = |_| failed(io::Error::new(io::ErrorKind::TimedOut, "not ready in time"));
        let (child, [stdout, stderr], ready) = spawn(command, owner).map_err(failed)?;
        let mut ready = Receiver::from_owned_fd(ready).map_err(failed)?;
        let limit = pace.limit(READY);
        let said = timeout(limit, ready.read(&mut [0])).await.map_err(late)?.map_err(failed)?;
        if command.speaks && said == 0 {
            return Err(failed(io::Error::other("it did not say that it is ready")));
        }
        Ok(Self {
            child,
            stdout: Some(Sender::from_owned_fd(stdout).map_err(failed)?),
            stderr: Some(Sender::from_owned_fd(stderr).map_err(failed)?),
        })
    }

    /// Waits for it, now that its input has ended.
    pub async fn finish(mut self) {
        drop((self.stdout.take(), self.stderr.take()));
        let _ = timeout(FINISH, self.child.wait()).await;
    }
}

/// Returns our ends of the outputs and of the ready pipe.
fn spawn(command: &uri::Command, owner: Owner<'_>) -> io::Result<(Child, [OwnedFd; 2], OwnedFd)> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC);
    let ((stdout_read, stdout), (stderr_read, stderr), (ready, ready_write)) =
        (pipe()?, pipe()?, pipe()?);
    let theirs = [&stdout_read, &stderr_read, &ready_write];
    let spare = theirs.map(|fd| fcntl_dupfd_cloexec(fd, SPARE));
    let [three, four, five] = spare;
    let (three, four, five) = (three?, four?, five?);
    let numbers = [(three.as_raw_fd(), 3), (four.as_raw_fd(), 4), (five.as_raw_fd(), 5)];
    let mut program = Command::new(&command.path);
    program.args(&command.arguments).env_clear().kill_on_drop(true);
    program.env("CONTAINER_ID", owner.id).env("CONTAINER_NAMESPACE", owner.namespace);
    program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let rearrange = move || {
        for (from, to) in numbers {
            // SAFETY: dup2(2) takes plain numbers; in the child nothing else knows 3, 4 and 5.
            if unsafe { libc::dup2(from, to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        descriptors::give_back()
    };
    // SAFETY: between fork and exec the closure makes system calls and nothing else.
    unsafe { program.pre_exec(rearrange) };
    Ok((program.spawn()?, [stdout, stderr], ready))
}
