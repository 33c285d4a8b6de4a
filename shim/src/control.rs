//! The socket of a running sandbox, `control.sock` in its folder, on which any later command reaches it.
//!
//! One packet is one message. A connection speaks of one process: the container's first, or, after
//! [`Request::Exec`], [`Request::Console`] or [`Request::Join`], that one. Streams travel as descriptors ([`Response::Streams`]): the ends of a process's
//! own vsock streams, so that no byte of an exec takes the way over the process that runs the sandbox.
//! Only the user whose sandbox it is, and root, are answered.

mod client;
mod server;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use ampoule_vmm_api::{Channel, ChannelError};
use rustix::{
    fs::{Mode, OFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::unix::AsyncFd;

use crate::{error::Failure, registry::Ended, vm::watch};
pub use client::{Connection, ControlError};
pub use server::{Container, End, Joined, Members, Phase, Server};

/// What a command asks for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Prepares a further process, of which the connection speaks from then on: `Streams`.
    Exec(ExecRequest),
    /// Prepares a shell in the guest itself likewise, with a terminal of this width and height if any: `Streams`.
    Console(Option<(u16, u16)>),
    /// Prepares a further process, as OCI describes it in the file that comes along, likewise; it ends with the
    /// connection.
    ExecProcess,
    /// Prepares a further container in the sandbox, of which the connection speaks from then on, and with which it ends;
    /// it has a socket of its own too: `Streams`.
    Join(Member),
    /// A stream to a file server of the container in the guest, whose numbers begin with this one (`ViewRequest` of the agent's):
    /// `Streams`, of which it is the first.
    View(u64),
    /// Lets that process run: `Done`.
    Start,
    /// Waits for the process's end: `Ended`; for a first process, when its sandbox is gone.
    Wait,
    /// To the process, or to every process of the container: `Done`.
    Signal { signal: u32, all: bool },
    /// Gives the process's terminal a size in characters: `Done`.
    Resize { width: u16, height: u16 },
    /// To be connected to a detached container: `Streams`.
    Attach,
    /// `Stats`
    Stats,
    /// How far the container is: `Status`
    Status,
    /// The container's processes: `Pids`
    Pids,
    /// Freezes the container's processes: `Done`.
    Pause,
    /// Lets them go on: `Done`.
    Resume,
    /// Gives the container other limits, OCI's resources as JSON: `Done`.
    Update(Vec<u8>),
    /// Ends the VM, and with it everything: `Done`, at once.
    Shutdown,
}

/// A process to be run beside the first, with that one's settings where nothing is said.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    pub args: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    /// Width and height in characters, if it gets a terminal.
    pub terminal: Option<(u16, u16)>,
    pub stdin: bool,
    pub output: bool,
}

/// A container that is to share another one's sandbox.
#[derive(Debug, Serialize, Deserialize)]
pub struct Member {
    pub id: String,
    /// Where its `config.json` is.
    pub bundle: PathBuf,
    /// Of its socket.
    pub folder: PathBuf,
    /// Of this container of the sandbox are the namespaces that it names by path.
    pub joins: String,
}

/// The answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    Done,
    /// Which descriptors come along, in this order.
    Streams {
        stdin: bool,
        stdout: bool,
        stderr: bool,
    },
    Ended(Ended),
    Stats(Stats),
    Status(Status),
    /// As the guest numbers them.
    Pids(Vec<u32>),
    Failed(Failure),
}

/// How far a container is, in OCI's words (runtime.md, State).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    Creating,
    #[default]
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// What a container uses, by its cgroup; bytes, microseconds, counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    pub memory: u64,
    pub memory_peak: u64,
    pub memory_limit: u64,
    pub cpu_us: u64,
    pub processes: u64,
}

/// One end of a connection.
#[derive(Debug)]
struct Peer(AsyncFd<Channel>);

impl Peer {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(watch(Channel::from_fd(socket))?))
    }

    /// The next message and its descriptors. Cancel-safe.
    async fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.get_inner().recv() {
                Err(e) if e.would_block() => ready.clear_ready(),
                other => return other,
            }
        }
    }

    /// All or nothing, and at once: who does not read its few answers does not get them.
    fn send<T: Serialize>(&self, message: &T, fds: &[impl AsFd]) -> Result<(), ChannelError> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.0.get_ref().send(message, &fds)
    }
}

/// A socket, and its address in `folder`: however long that path is, by its descriptor it is short enough for
/// a socket's address.
fn socket(folder: &Path) -> io::Result<(OwnedFd, OwnedFd, SocketAddrUnix)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())?;
    let path = format!("/proc/self/fd/{}/control.sock", folder.as_raw_fd());
    Ok((socket, folder, SocketAddrUnix::new(path)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_reached_however_long_its_path_is() {
        let top = tempfile::tempdir().unwrap();
        let folder = top.path().join("x".repeat(200));
        std::fs::create_dir(&folder).unwrap();
        let (listener, _folder, address) = socket(&folder).unwrap();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let connection = Connection::open(&folder, 30).unwrap();
        let accepted = rustix::net::accept_with(&listener, SocketFlags::NONBLOCK).unwrap();
        let peer = Peer::new(accepted).unwrap();
        connection.send(&Request::Wait).unwrap();
        let (request, fds) = peer.receive::<Request>().await.unwrap();
        assert!(matches!(request, Request::Wait) && fds.is_empty());
        peer.send(&Response::Streams { stdin: true, stdout: false, stderr: false }, &[listener])
            .unwrap();
        let (response, fds) = connection.receive().await.unwrap();
        assert!(matches!(response, Response::Streams { stdin: true, .. }) && fds.len() == 1);
        drop(peer);
        assert!(matches!(connection.receive().await, Err(ControlError::Gone)));
    }
}
