//! The terminal of a process on the host: a pair of which the caller gets the controlling end over a socket of
//! its own, and we the other for our standard streams. It is raw: the guest has the terminal that cooks.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, open},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, openpt, ptsname, unlockpt},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

use super::{OciError, Result};

/// A terminal that has been sent away, to be made our own.
#[derive(Debug)]
pub struct Console(OwnedFd);

impl Console {
    /// Makes one and sends its controlling end to the socket.
    pub fn send(socket: &Path) -> Result<Self> {
        let failed = |source: io::Error| OciError::File {
            what: "console socket",
            path: socket.into(),
            source,
        };
        let stream = UnixStream::connect(socket).map_err(failed)?;
        let (controller, terminal, name) =
            pair().map_err(|e| OciError::Host("make a terminal", e))?;
        let rights = [controller.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        message.push(SendAncillaryMessage::ScmRights(&rights));
        let name = name.to_string_lossy().into_owned();
        sendmsg(&stream, &[IoSlice::new(name.as_bytes())], &mut message, SendFlags::empty())
            .map_err(|e| failed(e.into()))?;
        Ok(Self(terminal))
    }

    /// Makes it our standard streams, and our session's terminal, so that we hear of its size. To be called by
    /// the leader of a session without one.
    pub fn enter(self) -> io::Result<()> {
        ioctl_tiocsctty(&self.0)?;
        dup2_stdin(&self.0)?;
        dup2_stdout(&self.0)?;
        dup2_stderr(&self.0)?;
        Ok(())
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd, PathBuf)> {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&controller)?;
    let name = ptsname(&controller, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = open(&*name, flags, Mode::empty())?;
    let mut raw = tcgetattr(&terminal)?;
    raw.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &raw)?;
    Ok((controller, terminal, PathBuf::from(name.to_string_lossy().into_owned())))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixListener};

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    #[test]
    fn the_controlling_end_arrives_and_bytes_pass_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let console = Console::send(&path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut received = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 64];
        let mut buffers = [io::IoSliceMut::new(&mut name)];
        recvmsg(&stream, &mut buffers, &mut received, RecvFlags::empty()).unwrap();
        let controller = received.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        });
        let mut controller = std::fs::File::from(controller.unwrap());
        controller.write_all(b"\x03a\r").unwrap();
        let mut bytes = [0; 3];
        rustix::io::read(&console.0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\x03a\r");
        assert!(name.starts_with(b"/dev/pts/"));
    }

    #[test]
    fn a_socket_that_is_not_there_is_named() {
        let error = Console::send(Path::new("/no/such/socket")).unwrap_err();
        assert!(error.to_string().contains("/no/such/socket"), "{error}");
    }
}
