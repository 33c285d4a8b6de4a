//! The standard streams of a process: each is one vsock stream to a port the host named, joined by a
//! pump to one pipe, or to the one terminal.
//!
//! - A pump holds at most [`CHUNK`] bytes and reads no more until they are gone: the writer waits.
//! - Output ends when the last writer has closed it, after its last byte; then the stream is closed for
//!   writing, and kept until the host closes it too.
//! - Input ends when the host half-closes the stream: exact, nothing sent before is lost. A terminal has
//!   no end of input of its own: as with docker, the workload sees none.

use std::{
    fs::OpenOptions,
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use ampoule_agent_api::agent::Stdio;
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    pipe::{PipeFlags, pipe_with},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf, unix::AsyncFd},
    sync::Notify,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_vsock::VsockStream;

use crate::{
    dial, pace,
    plan::{StepError, at},
};

/// Most bytes between a pipe and its stream.
const CHUNK: usize = 64 * 1024;
/// How long the host usually may take to accept a stream.
pub const CONNECT: Duration = Duration::from_secs(10);
/// How long nothing must have come after a request to close stdin: what was sent before it, on a stream
/// of its own, may still be under way.
const CLOSE: Duration = Duration::from_millis(50);
/// How long an ended output stream waits for the host to close its side.
const LINGER: Duration = Duration::from_secs(30);

/// The streams of a process, connected. `None` where the process has /dev/null.
pub struct Streams {
    stdin: Option<VsockStream>,
    stdout: Option<VsockStream>,
    stderr: Option<VsockStream>,
}

/// The pumps of a process. They end by themselves; dropping this ends what is left of them.
#[derive(Default)]
pub struct Pumps {
    tasks: JoinSet<io::Result<()>>,
    stdin_close: Arc<Notify>,
}

/// What the process gets as descriptors 0, 1 and 2.
pub type ChildEnds = [OwnedFd; 3];

impl Streams {
    /// Connects to the ports the host named.
    pub async fn connect(ports: &Stdio) -> Result<Self, StepError> {
        let (stdin, stdout, stderr) =
            tokio::try_join!(dial(ports.stdin), dial(ports.stdout), dial(ports.stderr))?;
        Ok(Self { stdin, stdout, stderr })
    }

    /// Pipes for a process without a terminal, and the pumps behind them.
    pub fn through_pipes(self) -> io::Result<(ChildEnds, Pumps)> {
        let mut pumps = Pumps::default();
        let stdin = match self.stdin {
            Some(host) => {
                let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
                pumps.input(host, NonBlocking::new(write)?);
                read
            }
            None => null()?,
        };
        let mut output = |stream: Option<VsockStream>| match stream {
            Some(host) => {
                let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
                pumps.output(NonBlocking::new(read)?, host);
                Ok::<_, io::Error>(write)
            }
            None => null(),
        };
        let ends = [stdin, output(self.stdout)?, output(self.stderr)?];
        Ok((ends, pumps))
    }

    /// The pumps of a terminal.
    pub fn through_terminal(self, master: &OwnedFd) -> io::Result<Pumps> {
        let mut pumps = Pumps::default();
        if let Some(host) = self.stdin {
            pumps.input(host, NonBlocking::new(master.try_clone()?)?);
        }
        match self.stdout {
            Some(host) => pumps.output(NonBlocking::new(master.try_clone()?)?, host),
            None => pumps.discard(NonBlocking::new(master.try_clone()?)?),
        }
        Ok(pumps)
    }
}

impl Pumps {
    /// Ends stdin after what has been sent before.
    pub fn close_stdin(&self) {
        self.stdin_close.notify_one();
    }

    fn input(&mut self, host: VsockStream, pipe: NonBlocking) {
        self.tasks.spawn(feed(host, pipe, self.stdin_close.clone()));
    }

    fn output(&mut self, pipe: NonBlocking, host: VsockStream) {
        self.tasks.spawn(drain(pipe, host));
    }

    fn discard(&mut self, mut pipe: NonBlocking) {
        self.tasks.spawn(async move {
            tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await.map(drop)
        });
    }
}

/// The read end of nothing, and a sink.
pub fn null() -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

/// Port 0 is none.
pub async fn dial(port: u32) -> Result<Option<VsockStream>, StepError> {
    if port == 0 {
        return Ok(None);
    }
    let object = || format!("host port {port}");
    let stream = dial::connect(port, pace::limit(CONNECT)).await;
    Ok(Some(stream.map_err(at("stdio", object()))?))
}

/// Host to process, until either has enough.
async fn feed(
    mut host: impl AsyncRead + Unpin,
    mut pipe: NonBlocking,
    close: Arc<Notify>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut closing = false;
    loop {
        let n = tokio::select! {
            n = host.read(&mut buffer) => n?,
            () = close.notified(), if !closing => {
                closing = true;
                continue;
            }
            () = sleep(CLOSE), if closing => 0,
            _ = pipe.abandoned() => 0,
        };
        if n == 0 {
            return Ok(());
        }
        pipe.write_all(&buffer[..n]).await?;
    }
}

/// Process to host, to the last byte.
async fn drain(
    mut pipe: NonBlocking,
    mut host: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = pipe.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        host.write_all(&buffer[..n]).await?;
    }
    drop(pipe);
    host.shutdown().await?;
    let _ = timeout(LINGER, host.read(&mut buffer)).await;
    Ok(())
}

/// A pipe end or a terminal's master in the runtime.
struct NonBlocking(AsyncFd<OwnedFd>);

impl NonBlocking {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::ERROR;
        // SAFETY: the descriptor is moved in, and is not replaced.
        Ok(Self(unsafe { AsyncFd::register_with_interest(fd, interest)? }))
    }

    /// Returns when no process can read this pipe any more.
    async fn abandoned(&self) -> io::Result<()> {
        self.0.ready(Interest::ERROR).await.map(drop)
    }
}

impl AsyncRead for NonBlocking {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let space = buffer.initialize_unfilled();
            match ready.try_io(|fd| rustix::io::read(fd, &mut *space).map_err(io::Error::from)) {
                Ok(Ok(n)) => {
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                // A terminal's way of saying that nobody has it open any more.
                Ok(Err(e)) if e.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Poll::Ready(Err(e)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for NonBlocking {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            match ready.try_io(|fd| rustix::io::write(fd, bytes).map_err(io::Error::from)) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Dropping it closes it.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    fn pipes() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC).unwrap()
    }

    #[tokio::test]
    async fn output_arrives_whole_and_ends_once() {
        let (read, write) = pipes();
        let (host, mut far) = UnixStream::pair().unwrap();
        let pump = tokio::spawn(drain(NonBlocking::new(read).unwrap(), host));
        let data: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
        let sent = data.clone();
        let writer = std::thread::spawn(move || {
            io::Write::write_all(&mut std::fs::File::from(write), &sent).unwrap();
        });
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        writer.join().unwrap();
        assert!(got == data);
        drop(far);
        pump.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn input_ends_with_the_half_close_after_its_last_byte() {
        let (read, write) = pipes();
        let (host, mut far) = UnixStream::pair().unwrap();
        let pump = tokio::spawn(feed(host, NonBlocking::new(write).unwrap(), Arc::default()));
        far.write_all(b"last words").await.unwrap();
        far.shutdown().await.unwrap();
        pump.await.unwrap().unwrap();
        let mut got = String::new();
        io::Read::read_to_string(&mut std::fs::File::from(read), &mut got).unwrap();
        assert_eq!(got, "last words");
    }

    #[tokio::test]
    async fn close_stdin_delivers_what_has_arrived() {
        let (read, write) = pipes();
        let (host, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"arrived").await.unwrap();
        let close = Arc::new(Notify::new());
        close.notify_one();
        feed(host, NonBlocking::new(write).unwrap(), close).await.unwrap();
        let mut got = String::new();
        io::Read::read_to_string(&mut std::fs::File::from(read), &mut got).unwrap();
        assert_eq!(got, "arrived");
    }

    #[tokio::test]
    async fn an_idle_input_ends_when_nobody_can_read_it() {
        let (read, write) = pipes();
        let (host, _far) = UnixStream::pair().unwrap();
        let pump = tokio::spawn(feed(host, NonBlocking::new(write).unwrap(), Arc::default()));
        tokio::task::yield_now().await;
        drop(read);
        timeout(Duration::from_secs(5), pump).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_slow_host_makes_the_writer_wait() {
        let (read, write) = pipes();
        let (host, _far) = UnixStream::pair().unwrap();
        let _pump = tokio::spawn(drain(NonBlocking::new(read).unwrap(), host));
        let mut pipe = NonBlocking::new(write).unwrap();
        let flood = async {
            let mut total = 0;
            while total < 64 << 20 {
                total += pipe.write(&[0; CHUNK]).await.unwrap();
            }
        };
        timeout(Duration::from_millis(300), flood).await.unwrap_err();
    }
}
