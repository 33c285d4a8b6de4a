//! Who connects to an address of a pod within its network namespace on the host, as containerd does to the loopback there
//! for `kubectl port-forward`, finds nobody: its servers are the guest's, and what is sent so is no frame of an interface.
//! Here all such connections arrive at one socket, to which the kernel is told to lead them by a program that it asks
//! (BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9). Each is passed on to the same address of the guest, by a vsock stream.
//!
//! They are the host's: a guest cannot make one, nor choose where it goes.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use ampoule_agent_api::bpf::{
    ADD, CALL, EXIT, Instruction, JUMP_EQUAL, Kind, LOAD_LONG, MAP, MOVE, MOVE_REGISTER, Program,
    STORE_WORD, map_of, op,
};
use tokio::{io::copy_bidirectional, net::TcpStream, sync::Semaphore, task::JoinSet, time::sleep};

use super::{NetworkError, Result, inside};
use crate::{id::Id, sandbox::Sandbox};

/// Further connections wait.
const AT_ONCE: usize = 64;
/// After an error of this process, such as no free descriptor.
const PAUSE: Duration = Duration::from_millis(100);

/// The kernel's functions for programs (enum bpf_func_id).
const MAP_LOOKUP: u32 = 1;
const SOCKET_RELEASE: u32 = 86;
const SOCKET_ASSIGN: u32 = 124;
/// The verdict: to go on, with the socket that was assigned if one was.
const PASS: u32 = 1;

// What the registers hold.
const RESULT: u8 = 0;
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const THIRD: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const STACK: u8 = 10;

/// All connections to the addresses of a namespace, until it is dropped.
#[derive(Debug)]
pub struct Loopback {
    listener: TcpListener,
    _link: OwnedFd,
}

impl Loopback {
    /// That of a network namespace. Blocks, for milliseconds.
    pub fn open(namespace: &File) -> Result<Self> {
        let failed = |e| NetworkError::Host("be asked for the sockets of a network namespace", e);
        inside(namespace, || Self::open_own().map_err(failed))
    }

    /// That of this thread's.
    pub(super) fn open_own() -> io::Result<Self> {
        // The first one is of both families, where there are both.
        let any: [SocketAddr; 2] =
            [(Ipv6Addr::UNSPECIFIED, 0).into(), (Ipv4Addr::UNSPECIFIED, 0).into()];
        let listener = TcpListener::bind(&any[..])?;
        listener.set_nonblocking(true)?;
        let map = map_of(&listener)?;
        let program = Program::load(Kind::SocketLookup, &lead_to(&map))?;
        let link = program.link(File::open("/proc/thread-self/ns/net")?.as_fd())?;
        Ok(Self { listener, _link: link })
    }

    /// Passes connections on, to whose network it is. Dropping the future ends them.
    pub async fn serve(self, sandbox: &Sandbox, container: Option<&Id>) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        let room = Arc::new(Semaphore::new(AT_ONCE));
        let mut connections = JoinSet::new();
        loop {
            let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
            while connections.try_join_next().is_some() {}
            let Ok((client, _)) = listener.accept().await else {
                sleep(PAUSE).await;
                continue;
            };
            let (sandbox, container) = (sandbox.clone(), container.cloned());
            connections.spawn(async move {
                pass_on(client, &sandbox, container.as_ref()).await;
                drop(permit);
            });
        }
    }
}

async fn pass_on(mut client: TcpStream, sandbox: &Sandbox, container: Option<&Id>) {
    let Ok(address) = dialled(&client) else { return };
    match sandbox.connect(address, container).await {
        Ok(mut server) => drop(copy_bidirectional(&mut client, &mut server).await),
        Err(error) => {
            tracing::debug!(%address, %error, "nobody of the guest's takes a connection");
            // A reset: the nearest to a refusal that is left.
            let _ = client.set_zero_linger();
        }
    }
}

/// Where the client believes to be connected to.
fn dialled(client: &TcpStream) -> io::Result<SocketAddr> {
    let address = client.local_addr()?;
    Ok((address.ip().to_canonical(), address.port()).into())
}

/// The program that leads to the socket in a map. What does not fit that, such as datagrams, goes on as without it.
fn lead_to(map: &OwnedFd) -> [Instruction; 17] {
    let map = map.as_raw_fd().cast_unsigned();
    [
        op(MOVE_REGISTER, CONTEXT, FIRST, 0, 0),
        // The key, 0, is on the stack.
        op(STORE_WORD, STACK, 0, -4, 0),
        op(MOVE_REGISTER, SECOND, STACK, 0, 0),
        op(ADD, SECOND, 0, 0, (-4i32).cast_unsigned()),
        op(LOAD_LONG, FIRST, MAP, 0, map),
        op(0, 0, 0, 0, 0),
        op(CALL, 0, 0, 0, MAP_LOOKUP),
        op(JUMP_EQUAL, RESULT, 0, 7, 0),
        op(MOVE_REGISTER, SOCKET, RESULT, 0, 0),
        op(MOVE_REGISTER, FIRST, CONTEXT, 0, 0),
        op(MOVE_REGISTER, SECOND, SOCKET, 0, 0),
        op(MOVE, THIRD, 0, 0, 0),
        op(CALL, 0, 0, 0, SOCKET_ASSIGN),
        op(MOVE_REGISTER, FIRST, SOCKET, 0, 0),
        op(CALL, 0, 0, 0, SOCKET_RELEASE),
        op(MOVE, RESULT, 0, 0, PASS),
        op(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use std::{net::TcpStream, process::Command, thread};

    use rustix::thread::UnshareFlags;

    use super::*;

    /// In a network namespace of its own: who was asked for, by address, and whether nobody is any more in the end.
    fn connects() -> Option<io::Result<Vec<(SocketAddr, SocketAddr)>>> {
        // SAFETY: CLONE_FILES, the flag that is not safe, is not given; this thread ends with the test.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.ok()?;
        Command::new("ip").args(["link", "set", "lo", "up"]).status().ok()?;
        Some((|| {
            let loopback = Loopback::open_own()?;
            loopback.listener.set_nonblocking(false)?;
            let mut found = Vec::new();
            for address in ["127.0.0.1:80", "[::1]:80", "127.9.9.9:65535"] {
                let address: SocketAddr = address.parse().unwrap();
                let client = TcpStream::connect(address)?;
                let (server, _) = loopback.listener.accept()?;
                let server = server.local_addr()?;
                found.push((address, (server.ip().to_canonical(), server.port()).into()));
                assert_eq!(client.peer_addr()?, address);
            }
            drop(loopback);
            let nobody = TcpStream::connect("127.0.0.1:80").unwrap_err();
            assert_eq!(nobody.kind(), io::ErrorKind::ConnectionRefused);
            Ok(found)
        })())
    }

    #[test]
    fn connections_to_every_port_of_a_namespace_arrive_with_their_address() {
        match thread::spawn(connects).join().unwrap() {
            None => eprintln!("skipped: no network namespace can be made here (root is needed)"),
            Some(Err(why)) => eprintln!("skipped: this kernel takes no such program: {why}"),
            Some(Ok(found)) => found.iter().for_each(|(dialled, found)| assert_eq!(dialled, found)),
        }
    }
}
