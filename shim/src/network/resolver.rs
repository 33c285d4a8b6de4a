//! A DNS server that frames do not reach. The guest's agent answers at 127.0.0.11, and asks it over a vsock stream.
//!
//! It is Docker's for the names of a user-defined network, which is at that address of the container's network namespace on
//! the host and nowhere else; or ours, which knows the names of a list of destinations.
//!
//! On the stream each query and each answer is a number of 4 bytes that tells them apart, and a DNS message as TCP has it,
//! after its length in 2 bytes (RFC 1035, 4.2.2).

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    sync::{Mutex, Semaphore},
    time::timeout,
};

use super::egress::Names;

/// Where Docker's is.
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);
/// A loopback address answers or refuses at once.
const LOOK: Duration = Duration::from_secs(1);
/// Who asked has given up by then.
const LIMIT: Duration = Duration::from_secs(20);
/// Further queries wait in the stream.
const AT_ONCE: usize = 32;

/// Where it is for the guest.
pub const ADDRESS: Ipv4Addr = *SERVER.ip();

#[derive(Debug)]
pub enum Resolver {
    /// Docker's, in a network namespace.
    Docker(File),
    Listed(Names),
}

impl Resolver {
    /// Docker's, if there is one in this thread's network namespace.
    pub fn find() -> Option<Self> {
        std::net::TcpStream::connect_timeout(&SERVER.into(), LOOK).ok()?;
        Some(Self::Docker(File::open("/proc/thread-self/ns/net").ok()?))
    }

    /// Answers what comes by the stream until that ends: with a thread, which stays in the namespace.
    pub fn serve(self, stream: UnixStream) -> io::Result<()> {
        let stream = stream.into_std()?;
        let serve = move || {
            let server = self.server()?;
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().max_blocking_threads(AT_ONCE).build()?;
            let served =
                runtime.block_on(async { serve(UnixStream::from_std(stream)?, server).await });
            // Nobody waits for what is still being looked up.
            runtime.shutdown_background();
            served
        };
        thread::Builder::new().name("resolver".into()).spawn(move || {
            // It ends with the VM.
            let _: io::Result<()> = serve();
        })?;
        Ok(())
    }

    fn server(self) -> io::Result<Server> {
        match self {
            Self::Docker(namespace) => {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), kind)?;
                Ok(Server::Docker)
            }
            Self::Listed(names) => Ok(Server::Listed(names.into())),
        }
    }
}

/// What a thread asks.
#[derive(Clone)]
enum Server {
    Docker,
    Listed(Arc<Names>),
}

impl Server {
    /// The answer, if there is one.
    async fn ask(&self, query: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Docker => ask(SERVER, query).await.ok(),
            Self::Listed(names) => names.answer(query).await,
        }
    }
}

async fn serve(stream: UnixStream, server: Server) -> io::Result<()> {
    let (mut queries, answers) = stream.into_split();
    let answers = Arc::new(Mutex::new(answers));
    let room = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
        let number = queries.read_u32().await?;
        let mut query = vec![0; queries.read_u16().await?.into()];
        queries.read_exact(&mut query).await?;
        let (answers, server) = (answers.clone(), server.clone());
        tokio::spawn(async move {
            // Without an answer who asked asks again.
            if let Ok(Some(answer)) = timeout(LIMIT, server.ask(&query)).await {
                let len = (answer.len() as u16).to_be_bytes();
                let whole = [&number.to_be_bytes()[..], &len, &answer].concat();
                let _ = answers.lock().await.write_all(&whole).await;
            }
            drop(permit);
        });
    }
}

/// Asks by TCP, where no answer is too long.
async fn ask(server: SocketAddrV4, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&[&(query.len() as u16).to_be_bytes(), query].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use rustix::thread::UnshareFlags;

    use super::*;

    /// A DNS server where Docker's is, in a network namespace of its own: it answers with what it was asked, backwards.
    fn server() -> Option<std::net::TcpListener> {
        // SAFETY: CLONE_FILES, the flag that is not safe, is not given; this thread ends with the test.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.ok()?;
        std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().ok()?;
        assert!(Resolver::find().is_none());
        std::net::TcpListener::bind(SERVER).ok()
    }

    fn answers(listener: &std::net::TcpListener) -> io::Result<()> {
        use std::io::{Read, Write};
        for stream in listener.incoming() {
            let (mut stream, mut len) = (stream?, [0; 2]);
            if stream.read_exact(&mut len).is_err() {
                // Only looked whether it is there.
                continue;
            }
            let mut query = vec![0; u16::from_be_bytes(len).into()];
            stream.read_exact(&mut query)?;
            query.reverse();
            stream.write_all(&[&len[..], &query].concat())?;
        }
        Ok(())
    }

    #[test]
    fn queries_of_a_stream_are_answered_by_the_server_of_the_namespace() {
        let found = thread::spawn(|| {
            let listener = server()?;
            let serving = listener.try_clone().ok()?;
            thread::spawn(move || answers(&serving));
            Resolver::find()
        });
        let Some(resolver) = found.join().unwrap() else {
            return eprintln!("skipped: no network namespace can be made here (root is needed)");
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            resolver.serve(theirs).unwrap();
            for (number, query) in [(7, vec![1, 2, 3]), (8, vec![5; 0xffff])] {
                ours.write_u32(number).await.unwrap();
                ours.write_u16(query.len() as u16).await.unwrap();
                ours.write_all(&query).await.unwrap();
                assert_eq!(ours.read_u32().await.unwrap(), number);
                let mut answer = vec![0; ours.read_u16().await.unwrap().into()];
                ours.read_exact(&mut answer).await.unwrap();
                assert!(answer.iter().rev().eq(&query), "{}", query.len());
            }
        });
    }
}
