//! DNS at 127.0.0.11, where Docker has it for a user-defined network: each query goes to the host by a vsock stream, from
//! where Docker's own server is asked. The container's programs find it as they would on the host.
//!
//! On the stream each query and each answer is a number of 4 bytes that tells them apart, and a DNS message as TCP has it,
//! after its length in 2 bytes (RFC 1035, 4.2.2).

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

const ADDRESS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);
/// How long the host may take.
const LIMIT: Duration = Duration::from_secs(20);
/// How long a TCP connection may be idle.
const IDLE: Duration = Duration::from_secs(30);
/// Queries under way, and TCP connections; further ones wait.
const AT_ONCE: usize = 64;
/// A longer answer does not go by UDP (RFC 1035, 4.2.1): who asked is told to ask by TCP.
const MAX_UDP: usize = 512;
/// Of a DNS message's header.
const HEADER: usize = 12;

/// Bound, but not served yet.
#[derive(Debug)]
pub struct Sockets {
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
}

impl Sockets {
    /// In the network namespace of this thread.
    pub fn bind() -> io::Result<Self> {
        let (udp, tcp) =
            (std::net::UdpSocket::bind(ADDRESS)?, std::net::TcpListener::bind(ADDRESS)?);
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        Ok(Self { udp, tcp })
    }

    /// Serves them in the background, as long as there is the stream.
    pub fn serve<S: AsyncRead + AsyncWrite + Send + 'static>(self, stream: S) -> io::Result<()> {
        let (udp, tcp) = (UdpSocket::from_std(self.udp)?, TcpListener::from_std(self.tcp)?);
        let (answers, queries) = tokio::io::split(stream);
        let host = Arc::new(Host {
            queries: tokio::sync::Mutex::new(Box::pin(queries)),
            waiting: Mutex::default(),
            next: AtomicU32::new(0),
        });
        let room = Arc::new(Semaphore::new(AT_ONCE));
        let answered = host.clone().answers(Box::pin(answers));
        tokio::spawn(async move {
            tokio::select! {
                _ = datagrams(udp, &host, &room) => {}
                _ = connections(tcp, &host, &room) => {}
                _ = answered => {}
            }
        });
        Ok(())
    }
}

/// Who is asked.
struct Host {
    queries: tokio::sync::Mutex<std::pin::Pin<Box<dyn AsyncWrite + Send>>>,
    waiting: Mutex<HashMap<u32, oneshot::Sender<Vec<u8>>>>,
    next: AtomicU32,
}

impl Host {
    /// `None` if there is no answer in time.
    async fn ask(&self, query: &[u8]) -> Option<Vec<u8>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.waiting().insert(number, sender);
        let asked = async {
            let whole = [&number.to_be_bytes()[..], &framed(query)].concat();
            self.queries.lock().await.write_all(&whole).await.ok()?;
            answer.await.ok()
        };
        let answer = timeout(LIMIT, asked).await.ok().flatten();
        self.waiting().remove(&number);
        answer
    }

    /// Hands answers to those who wait for them.
    async fn answers(self: Arc<Self>, mut stream: impl AsyncRead + Unpin) -> io::Result<()> {
        loop {
            let number = stream.read_u32().await?;
            let answer = message(&mut stream).await?;
            if let Some(waits) = self.waiting().remove(&number) {
                let _ = waits.send(answer);
            }
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u32, oneshot::Sender<Vec<u8>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn permit(room: &Arc<Semaphore>) -> io::Result<OwnedSemaphorePermit> {
    room.clone().acquire_owned().await.map_err(io::Error::other)
}

async fn datagrams(socket: UdpSocket, host: &Arc<Host>, room: &Arc<Semaphore>) -> io::Result<()> {
    let socket = Arc::new(socket);
    let mut buffer = [0; 4096];
    loop {
        let permit = permit(room).await?;
        // An error is that of an earlier answer: nobody was there any more.
        let Ok((len, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let (socket, host, query) = (socket.clone(), host.clone(), buffer[..len].to_vec());
        tokio::spawn(async move {
            if let Some(answer) = host.ask(&query).await.and_then(fit) {
                let _ = socket.send_to(&answer, peer).await;
            }
            drop(permit);
        });
    }
}

async fn connections(
    listener: TcpListener,
    host: &Arc<Host>,
    room: &Arc<Semaphore>,
) -> io::Result<()> {
    loop {
        let permit = permit(room).await?;
        let accepted: io::Result<(TcpStream, SocketAddr)> = listener.accept().await;
        let Ok((mut stream, _)) = accepted else { continue };
        let host = host.clone();
        tokio::spawn(async move {
            while let Ok(Ok(query)) = timeout(IDLE, message(&mut stream)).await {
                let Some(answer) = host.ask(&query).await else { break };
                if !matches!(timeout(IDLE, stream.write_all(&framed(&answer))).await, Ok(Ok(()))) {
                    break;
                }
            }
            drop(permit);
        });
    }
}

async fn message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}

/// What goes by UDP: of a longer answer the question alone, marked as cut off (TC).
fn fit(mut answer: Vec<u8>) -> Option<Vec<u8>> {
    if answer.len() <= MAX_UDP {
        return Some(answer);
    }
    let mut end = HEADER;
    loop {
        match *answer.get(end)? {
            0 => break,
            label => end += 1 + usize::from(label),
        }
    }
    // The root label, type and class.
    answer.truncate(end + 5);
    answer[2] |= 0x02;
    answer[6..HEADER].fill(0);
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A question for `a.bc`, and an answer as long as is wished.
    fn dns(len: usize) -> Vec<u8> {
        let header = [0xab, 0xcd, 0x81, 0x80, 0, 1, 0, 9, 0, 9, 0, 9];
        let mut message = [&header[..], b"\x01a\x02bc\x00\x00\x01\x00\x01"].concat();
        message.resize(len.max(message.len()), 7);
        message
    }

    #[test]
    fn what_is_too_long_for_udp_is_cut_off_after_the_question() {
        assert_eq!(fit(dns(512)), Some(dns(512)));
        let mut question = dns(0);
        question[2] |= 2;
        question[6..12].fill(0);
        assert_eq!(fit(dns(513)), Some(question));
        assert_eq!(fit(vec![200; 600]), None);
    }

    #[tokio::test]
    async fn queries_by_either_protocol_go_to_the_host_and_answers_back() {
        let any = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        let sockets = Sockets {
            udp: std::net::UdpSocket::bind(any).unwrap(),
            tcp: std::net::TcpListener::bind(any).unwrap(),
        };
        sockets.udp.set_nonblocking(true).unwrap();
        sockets.tcp.set_nonblocking(true).unwrap();
        let (udp, tcp) = (sockets.udp.local_addr().unwrap(), sockets.tcp.local_addr().unwrap());
        let (guest, mut host) = tokio::io::duplex(1 << 20);
        sockets.serve(guest).unwrap();
        // Answers come in another order.
        tokio::spawn(async move {
            let mut asked = Vec::new();
            for _ in 0..2 {
                asked.push((host.read_u32().await.unwrap(), message(&mut host).await.unwrap()));
            }
            for (number, query) in asked.iter().rev() {
                host.write_u32(*number).await.unwrap();
                let len = if query[1] == 1 { 600 } else { 60_000 };
                host.write_all(&framed(&[query.as_slice(), &dns(len)[2..]].concat()))
                    .await
                    .unwrap();
            }
            std::future::pending::<()>().await;
        });
        let client = UdpSocket::bind(any).await.unwrap();
        client.send_to(&[0xab, 1], udp).await.unwrap();
        let mut stream = TcpStream::connect(tcp).await.unwrap();
        stream.write_all(&framed(&[0xab, 2])).await.unwrap();
        let by_tcp = timeout(LIMIT, message(&mut stream)).await.unwrap().unwrap();
        assert_eq!((by_tcp.len(), by_tcp[1]), (60_000, 2));
        let mut by_udp = [0; 600];
        let len = timeout(LIMIT, client.recv(&mut by_udp)).await.unwrap().unwrap();
        assert_eq!((len, by_udp[1], by_udp[2] & 2), (dns(0).len(), 1, 2));
    }
}
