//! Connections that somebody makes in the network namespace on the host whose network the guest has, to the guest's own
//! addresses: the host passes them on, each by a vsock stream.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ampoule_agent_api::agent::ConnectRequest;
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::{inside, messages::ip};
use crate::plan::{StepError, at, refuse};

const STEP: &str = "connect";
/// For a server of the guest's to be reached: it is on the same kernel.
const LIMIT: Duration = Duration::from_secs(5);

/// Returns when the server, in the network namespace of a process or in this one, has taken the connection, which then
/// lives as long as both ends want it.
pub async fn connect(
    request: &ConnectRequest,
    process: Option<u32>,
    mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<(), StepError> {
    let address = address(request)?;
    let mut server = dial(address, process).await.map_err(at(STEP, address))?;
    tokio::spawn(async move {
        // Whichever end breaks it, the other one is told.
        let _ = copy_bidirectional(&mut stream, &mut server).await;
    });
    Ok(())
}

fn address(request: &ConnectRequest) -> Result<SocketAddr, StepError> {
    let port = u16::try_from(request.port).ok();
    match (ip(&request.ip), port) {
        (Some(ip), Some(port)) => Ok((ip, port).into()),
        _ => Err(refuse(STEP, "address", "it is none")),
    }
}

/// Who dials the loopback means a server on this machine, by whichever family: whom the host has accepted cannot try the
/// other one any more.
async fn dial(address: SocketAddr, process: Option<u32>) -> io::Result<TcpStream> {
    let connect = |address| async move {
        let socket = match process {
            Some(process) => {
                inside(process, || Ok(socket(address))).map_err(io::Error::other)??
            }
            None => socket(address)?,
        };
        timeout(LIMIT, socket.connect(address)).await.map_err(io::Error::from)?
    };
    let other: IpAddr = match address.ip() {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Ipv4Addr::LOCALHOST.into(),
        _ => return connect(address).await,
    };
    match connect(address).await {
        Ok(server) => Ok(server),
        Err(error) => connect((other, address.port()).into()).await.map_err(|_| error),
    }
}

/// Of the namespace that it is made in.
fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, UnixStream},
    };

    use super::*;

    fn request(ip: IpAddr, port: u16) -> ConnectRequest {
        let ip = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        ConnectRequest { ip, port: port.into(), ..Default::default() }
    }

    #[tokio::test]
    async fn a_server_is_reached_by_either_loopback_address() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            connect(&request(ip, port), None, theirs).await.unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            ours.write_all(b"question").await.unwrap();
            ours.shutdown().await.unwrap();
            let mut asked = String::new();
            server.read_to_string(&mut asked).await.unwrap();
            server.write_all(b"answer").await.unwrap();
            drop(server);
            let mut answered = String::new();
            ours.read_to_string(&mut answered).await.unwrap();
            assert_eq!((&*asked, &*answered), ("question", "answer"));
        }
        drop(listener);
        let request = request(Ipv4Addr::LOCALHOST.into(), port);
        let refused = connect(&request, None, tokio::io::empty()).await;
        assert!(refused.unwrap_err().to_string().contains("Connection refused"));
    }

    #[tokio::test]
    async fn what_is_no_address_is_refused() {
        for (ip, port) in [(vec![127, 0, 0, 1], 70_000), (vec![127, 0, 0], 80), (vec![], 80)] {
            let request = ConnectRequest { ip, port, ..Default::default() };
            assert!(connect(&request, None, tokio::io::empty()).await.is_err());
        }
    }
}
