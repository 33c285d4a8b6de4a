//! A command's end of a sandbox's socket.

use std::{io, os::fd::OwnedFd, path::Path, time::Duration};

use ampoule_vmm_api::ChannelError;
use rustix::io::Errno;
use tokio::{net::UnixStream, time::timeout};

use super::{ExecRequest, Member, Peer, Request, Response, socket};
use crate::{error::Failure, pace::Pace, registry::Ended, sandbox::Streams};

/// How long an answer usually may take that waits for nothing but the guest: more than the agent is given.
const LIMIT: Duration = Duration::from_secs(65);

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("control socket: it does not run (any more)")]
    Gone,
    #[error("control socket: it did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("control socket: an answer to another question: is it of another version of ampoule?")]
    Unexpected,
    #[error("the command line is too long")]
    TooLong,
    #[error("control socket")]
    Io(#[from] io::Error),
    #[error("control socket")]
    Channel(#[source] ChannelError),
    /// What the sandbox answered.
    #[error("{0}")]
    Failed(Failure),
}

impl From<ChannelError> for ControlError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Closed => Self::Gone,
            ChannelError::TooLong(_) => Self::TooLong,
            other => Self::Channel(other),
        }
    }
}

type Result<T> = std::result::Result<T, ControlError>;

/// A connection. What it speaks of is told in [`super`].
#[derive(Debug)]
pub struct Connection {
    peer: Peer,
    limit: Duration,
}

impl Connection {
    /// Connects to the sandbox of this folder, which has this boot timeout in seconds.
    pub fn open(folder: &Path, boot_timeout: u16) -> Result<Self> {
        let limit = Pace::of(Duration::from_secs(boot_timeout.into())).limit(LIMIT);
        let connect = || -> io::Result<OwnedFd> {
            let (socket, _folder, address) = socket(folder)?;
            rustix::net::connect(&socket, &address)?;
            Ok(socket)
        };
        match connect() {
            Ok(socket) => Ok(Self { peer: Peer::new(socket)?, limit }),
            Err(e)
                if [Errno::NOENT, Errno::CONNREFUSED]
                    .contains(&Errno::from_io_error(&e).unwrap_or(Errno::IO)) =>
            {
                Err(ControlError::Gone)
            }
            Err(e) => Err(e.into()),
        }
    }

    pub fn send(&self, request: &Request) -> Result<()> {
        Ok(self.peer.send(request, &[] as &[OwnedFd])?)
    }

    /// The next answer, whenever it comes. Cancel-safe.
    pub async fn receive(&self) -> Result<(Response, Vec<OwnedFd>)> {
        match self.peer.receive().await? {
            (Response::Failed(failure), _) => Err(ControlError::Failed(failure)),
            answer => Ok(answer),
        }
    }

    /// A request and its answer.
    pub async fn call(&self, request: &Request) -> Result<(Response, Vec<OwnedFd>)> {
        self.send(request)?;
        self.answer().await
    }

    async fn answer(&self) -> Result<(Response, Vec<OwnedFd>)> {
        timeout(self.limit, self.receive()).await.unwrap_or(Err(ControlError::Silent(self.limit)))
    }

    /// The same where there is nothing to answer.
    pub async fn ask(&self, request: &Request) -> Result<()> {
        match self.call(request).await? {
            (Response::Done, _) => Ok(()),
            _ => Err(ControlError::Unexpected),
        }
    }

    /// Prepares a further process.
    pub async fn exec(&self, exec: ExecRequest) -> Result<Streams> {
        self.streams(&Request::Exec(exec)).await
    }

    /// Prepares a shell in the guest itself.
    pub async fn console(&self, size: Option<(u16, u16)>) -> Result<Streams> {
        self.streams(&Request::Console(size)).await
    }

    pub async fn attach(&self) -> Result<Streams> {
        self.streams(&Request::Attach).await
    }

    /// A stream to a file server of the container in the guest.
    pub async fn view(&self, first: u64) -> Result<UnixStream> {
        self.streams(&Request::View(first)).await?.stdin.ok_or(ControlError::Unexpected)
    }

    /// Prepares a further process, described by the OCI's JSON in a file. It ends with the connection.
    pub async fn exec_process(&self, process: &OwnedFd) -> Result<Streams> {
        self.peer.send(&Request::ExecProcess, &[process])?;
        received(self.answer().await?)
    }

    /// Prepares a further container in the sandbox, which may take its time. It ends with the connection.
    pub async fn join(&self, member: Member) -> Result<Streams> {
        self.send(&Request::Join(member))?;
        received(self.receive().await?)
    }

    async fn streams(&self, request: &Request) -> Result<Streams> {
        received(self.call(request).await?)
    }

    /// The end that was asked for with [`Request::Wait`]; other answers are passed over.
    pub async fn ended(&self) -> Result<Ended> {
        loop {
            match self.receive().await {
                Ok((Response::Ended(ended), _)) => return Ok(ended),
                // Of a signal or a size that came too late.
                Ok(_) | Err(ControlError::Failed(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The streams of an answer.
fn received((answer, fds): (Response, Vec<OwnedFd>)) -> Result<Streams> {
    let Response::Streams { stdin, stdout, stderr } = answer else {
        return Err(ControlError::Unexpected);
    };
    let mut fds = fds.into_iter();
    let mut stream = |there: bool| -> Result<Option<UnixStream>> {
        if !there {
            return Ok(None);
        }
        let stream =
            std::os::unix::net::UnixStream::from(fds.next().ok_or(ControlError::Unexpected)?);
        stream.set_nonblocking(true)?;
        Ok(Some(UnixStream::from_std(stream)?))
    };
    Ok(Streams { stdin: stream(stdin)?, stdout: stream(stdout)?, stderr: stream(stderr)? })
}
