//! A process's streams between the guest and where containerd wants them.
//!
//! ```text
//!  open(): the caller's FIFOs, files, streams or     connect(): each with its stream of the guest
//!  logger
//!  ┌──────────┐                                      ┌────┐ end of all outputs
//!  │  Opened  │─────────────────────────────────────▶│ Io │───────────────────▶ drained
//!  └──────────┘                                      └────┘
//! ```
//!
//! - [`fifo`]: FIFOs, held open by us from both ends: a client may go and come back
//! - [`logger`]: a program that takes the output (`binary://`)
//! - [`stream`]: streams that the caller opens at our socket (`ttrpc+unix://`)
//!
//! An output ends with the last process that has it open in the guest; what was written before is passed on
//! first, and only then the caller's FIFO is closed. Input ends by CloseIO, and by nothing else.

mod fifo;
mod logger;
mod stream;
mod uri;

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    fs::File,
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    sync::{oneshot, watch},
    task::JoinSet,
};

use super::streaming::{Clients, Streaming};
use crate::{
    pace::Pace,
    sandbox::{Stdio, Streams},
};
use logger::Logger;
use uri::Target;

const BUFFER: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    #[error("{stream} {}", path.display())]
    Open { stream: &'static str, path: PathBuf, source: io::Error },
    #[error("{stream} {uri:?}: {why}")]
    Uri { stream: &'static str, uri: String, why: &'static str },
    #[error("logger {}", path.display())]
    Logger { path: PathBuf, source: io::Error },
}

/// Where a process's streams go, in containerd's words: paths or URIs; empty is nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// For whom a logger is started.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    pub id: &'a str,
    pub namespace: &'a str,
}

enum Source {
    Fifo(fifo::Input),
    Stream(Clients),
}

enum Sink {
    Written(Box<dyn AsyncWrite + Send + Unpin>),
    Stream(Clients),
}

impl Sink {
    fn written(to: impl AsyncWrite + Send + Unpin + 'static) -> Self {
        Self::Written(Box::new(to))
    }
}

/// The caller's ends.
#[derive(Default)]
pub struct Opened {
    stdin: Option<Source>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

impl Opened {
    pub async fn open(
        wanted: &Wanted,
        owner: Owner<'_>,
        streaming: &Arc<Streaming>,
        pace: Pace,
    ) -> Result<Self, StdioError> {
        let mut opened = Self { stdin: input(&wanted.stdin, streaming)?, ..Self::default() };
        let stderr = if wanted.terminal { "" } else { &wanted.stderr };
        if let Target::Logger(command) = uri::parse("stdout", &wanted.stdout)? {
            let mut logger = Logger::start(&command, owner, pace).await?;
            opened.stdout = logger.stdout.take().map(Sink::written);
            if wanted.stdout == stderr {
                opened.stderr = logger.stderr.take().map(Sink::written);
            }
            opened.logger = Some(logger);
        } else {
            opened.stdout = output("stdout", &wanted.stdout, streaming)?;
        }
        if opened.stderr.is_none() {
            opened.stderr = output("stderr", stderr, streaming)?;
        }
        Ok(opened)
    }

    /// The streams that are needed of the guest.
    pub fn streams(&self) -> Stdio {
        Stdio {
            stdin: self.stdin.is_some(),
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
        }
    }

    /// Begins to copy.
    pub fn connect(self, streams: Streams) -> Io {
        let (open, closing) = oneshot::channel();
        let mut others = JoinSet::new();
        match (self.stdin, streams.stdin) {
            (Some(Source::Fifo(input)), Some(stream)) => {
                let (reader, keeper) = input.split();
                others.spawn(pass_on_input(reader, stream));
                others.spawn(async move {
                    let _ = closing.await;
                    drop(keeper);
                });
            }
            (Some(Source::Stream(clients)), Some(stream)) => {
                others.spawn(stream::pass_on_input(clients, closing, stream));
            }
            _ => {}
        }
        let mut outputs = JoinSet::new();
        let mut cancelled = false;
        let pairs = [(streams.stdout, self.stdout), (streams.stderr, self.stderr)];
        for (stream, sink) in pairs {
            match (stream, sink) {
                (Some(stream), Some(Sink::Written(sink))) => {
                    outputs.spawn(pass_on_output(stream, sink));
                }
                (Some(stream), Some(Sink::Stream(clients))) => {
                    cancelled = true;
                    let (told, drained) = oneshot::channel();
                    others.spawn(stream::pass_on_output(stream, clients, told));
                    outputs.spawn(async move { drop(drained.await) });
                }
                _ => {}
            }
        }
        let (ended, drained) = watch::channel(false);
        let logger = self.logger;
        let outputs = tokio::spawn(async move {
            while outputs.join_next().await.is_some() {}
            if let Some(logger) = logger {
                logger.finish().await;
            }
            ended.send_replace(true);
        });
        let outputs = outputs.abort_handle();
        Io { open: Some(open), drained, cancelled, _others: others, outputs }
    }
}

/// The copying of a process's streams. Dropping it ends that, whatever is still under way.
#[derive(Debug)]
pub struct Io {
    /// While it is there, the input does not end.
    open: Option<oneshot::Sender<()>>,
    drained: watch::Receiver<bool>,
    cancelled: bool,
    /// The input, and outputs whose clients may come again.
    _others: JoinSet<()>,
    outputs: tokio::task::AbortHandle,
}

impl Io {
    /// From now on the process's input ends when the last client has closed it.
    pub fn close_stdin(&mut self) {
        self.open = None;
    }

    /// Tells when all output has been passed on.
    pub fn drained(&self) -> impl Future<Output = ()> + use<> {
        let mut drained = self.drained.clone();
        // The other end is dropped only when the copying was given up.
        async move { drop(drained.wait_for(|drained| *drained).await) }
    }

    /// Whether the caller stops reading when it hears that the process has ended: it cancels its streams then.
    pub fn is_cancelled_by_the_end(&self) -> bool {
        self.cancelled
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        self.outputs.abort();
    }
}

/// Waits, but no longer than `limit`; says whether it was long enough.
pub async fn within(limit: Duration, drained: impl Future<Output = ()>) -> bool {
    tokio::time::timeout(limit, drained).await.is_ok()
}

fn input(text: &str, streaming: &Arc<Streaming>) -> Result<Option<Source>, StdioError> {
    const STREAM: &str = "stdin";
    Ok(match uri::parse(STREAM, text)? {
        Target::Nowhere => None,
        Target::Path(path) => {
            let failed = |source| StdioError::Open { stream: STREAM, path: path.clone(), source };
            Some(Source::Fifo(fifo::Input::open(&path).map_err(failed)?))
        }
        Target::Stream(id) => Some(Source::Stream(taken(STREAM, text, streaming.take(&id))?)),
        Target::File(_) | Target::Logger(_) => {
            return Err(uri::refused(STREAM, text, "not a FIFO"));
        }
    })
}

fn output(
    stream: &'static str,
    text: &str,
    streaming: &Arc<Streaming>,
) -> Result<Option<Sink>, StdioError> {
    let target = uri::parse(stream, text)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| StdioError::Open { stream, path, source }
    };
    Ok(match &target {
        Target::Nowhere => None,
        Target::Path(path) if is_file(path) => {
            Some(Sink::written(append(path, false).map_err(failed(path))?))
        }
        Target::Path(path) => Some(Sink::written(fifo::output(path).map_err(failed(path))?)),
        Target::File(path) => Some(Sink::written(append(path, true).map_err(failed(path))?)),
        Target::Stream(id) => Some(Sink::Stream(taken(stream, text, streaming.take(id))?)),
        Target::Logger(_) => {
            return Err(uri::refused(stream, text, "a logger takes both outputs, or stdout"));
        }
    })
}

fn taken(
    stream: &'static str,
    text: &str,
    clients: Option<Clients>,
) -> Result<Clients, StdioError> {
    clients.ok_or_else(|| uri::refused(stream, text, "it is another process's already"))
}

fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file())
}

fn append(path: &Path, create: bool) -> io::Result<File> {
    if let (true, Some(folder)) = (create, path.parent()) {
        fs::create_dir_all(folder)?;
    }
    Ok(File::from_std(OpenOptions::new().append(true).create(create).open(path)?))
}

async fn pass_on_input(from: impl AsyncRead + Unpin, mut to: UnixStream) {
    let _ = copy(from, &mut to).await;
    // The end of the process's input.
    let _ = to.shutdown().await;
}

/// A sink that fails closes the stream: the workload meets a broken pipe, as it would without us.
async fn pass_on_output(from: UnixStream, mut to: impl AsyncWrite + Unpin) {
    let _ = copy(from, &mut to).await;
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.flush().await;
        }
        to.write_all(&buffer[..n]).await?;
    }
}

#[cfg(test)]
mod tests;
