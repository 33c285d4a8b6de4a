//! `ampoule run -d`: the program forks before it does anything else. The child runs the sandbox as it would in
//! the foreground and, once the workload runs, leaves the terminal; the parent waits for just that.

use std::{
    fs::OpenOptions,
    io::{self, PipeReader, PipeWriter, Read, Write, pipe},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::{
    process::{Pid, WaitOptions, chdir, setsid, waitpid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use crate::commands::FAILURE;

/// Which of the two we are.
pub(crate) enum Side {
    /// The one the user waits for; its exit code.
    Parent(u8),
    /// The one that runs the sandbox.
    Child(Background),
}

/// The way to the background.
pub(crate) struct Background(PipeWriter);

/// Forks. To be called while the program has only one thread.
pub(crate) fn fork() -> io::Result<Side> {
    let (reader, writer) = pipe()?;
    // SAFETY: there is no other thread whose locks or memory the child could find in the middle of something,
    // so that it may go on as the parent would.
    match unsafe { libc::fork() } {
        ..0 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child(Background(writer))),
        pid => {
            drop(writer);
            Ok(Side::Parent(wait(reader, pid)))
        }
    }
}

/// A byte says that the workload runs; without it, the child has ended and said why. It keeps its own bounds.
fn wait(mut reader: PipeReader, pid: i32) -> u8 {
    if reader.read_exact(&mut [0]).is_ok() {
        return 0;
    }
    let ended = waitpid(Pid::from_raw(pid), WaitOptions::empty());
    let code = ended.ok().flatten().and_then(|(_, status)| status.exit_status());
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILURE)
}

impl Background {
    /// Leaves the user's terminal, working directory and streams, and tells the parent. What goes wrong from
    /// now on is written to `keeper.log` in the sandbox's folder.
    ///
    /// # Errors
    /// Also if the parent is gone: then nobody knows of the sandbox.
    pub fn enter(mut self, folder: &Path) -> io::Result<()> {
        let log = folder.join("keeper.log");
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(log)?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        setsid()?;
        chdir("/")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        self.0.write_all(&[0])?;
        dup2_stderr(&log)?;
        Ok(())
    }

    /// Leaves only the working directory, and tells the parent: the streams are the container's.
    ///
    /// # Errors
    /// Likewise.
    pub fn stay(mut self) -> io::Result<()> {
        chdir("/")?;
        self.0.write_all(&[0])
    }
}
