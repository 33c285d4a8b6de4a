//! A process's streams between the guest and where containerd wants them.
//!
//! ```text
//!  open(): the caller's FIFOs, files or logger       connect(): each with its stream of the guest
//!  ┌──────────┐                                      ┌────┐ end of all outputs
//!  │  Opened  │─────────────────────────────────────▶│ Io │───────────────────▶ drained
//!  └──────────┘                                      └────┘
//! ```
//!
//! - [`fifo`]: FIFOs, held open by us from both ends: a client may go and come back
//! - [`logger`]: a program that takes the output (`binary://`)
//!
//! An output ends with the last process that has it open in the guest; what was written before is passed on
//! first, and only then the caller's FIFO is closed. Input ends by CloseIO, and by nothing else.

mod fifo;
mod logger;
mod uri;

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    fs::File,
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    sync::watch,
    task::JoinSet,
};

use crate::sandbox::{Stdio, Streams};
use fifo::Input;
pub use fifo::Keeper;
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

type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// The caller's ends.
#[derive(Default)]
pub struct Opened {
    stdin: Option<Input>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

impl Opened {
    pub async fn open(wanted: &Wanted, owner: Owner<'_>) -> Result<Self, StdioError> {
        let mut opened = Self::default();
        match uri::parse("stdin", &wanted.stdin)? {
            Target::Nowhere => {}
            Target::Path(path) => {
                let failed =
                    |source| StdioError::Open { stream: "stdin", path: path.clone(), source };
                opened.stdin = Some(Input::open(&path).map_err(failed)?);
            }
            Target::File(_) | Target::Logger(_) => {
                return Err(uri::refused("stdin", &wanted.stdin, "not a FIFO"));
            }
        }
        let stderr = if wanted.terminal { "" } else { &wanted.stderr };
        if let Target::Logger(command) = uri::parse("stdout", &wanted.stdout)? {
            let mut logger = Logger::start(&command, owner).await?;
            opened.stdout = logger.stdout.take().map(|sink| Box::new(sink) as Sink);
            if wanted.stdout == stderr {
                opened.stderr = logger.stderr.take().map(|sink| Box::new(sink) as Sink);
            }
            opened.logger = Some(logger);
        } else {
            opened.stdout = output("stdout", &wanted.stdout)?;
        }
        if opened.stderr.is_none() {
            opened.stderr = output("stderr", stderr)?;
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
        let mut feed = JoinSet::new();
        let keeper = match (self.stdin, streams.stdin) {
            (Some(input), Some(stream)) => {
                let (reader, keeper) = input.split();
                feed.spawn(pass_on_input(reader, stream));
                Some(keeper)
            }
            _ => None,
        };
        let mut outputs = JoinSet::new();
        let pairs = [(streams.stdout, self.stdout), (streams.stderr, self.stderr)];
        for (stream, sink) in pairs {
            if let (Some(stream), Some(sink)) = (stream, sink) {
                outputs.spawn(pass_on_output(stream, sink));
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
        Io { keeper, drained, _feed: feed, outputs: outputs.abort_handle() }
    }
}

/// The copying of a process's streams. Dropping it ends that, whatever is still under way.
#[derive(Debug)]
pub struct Io {
    keeper: Option<Keeper>,
    drained: watch::Receiver<bool>,
    _feed: JoinSet<()>,
    outputs: tokio::task::AbortHandle,
}

impl Io {
    /// From now on the process's input ends when the last client has closed it.
    pub fn close_stdin(&mut self) {
        self.keeper = None;
    }

    /// Tells when all output has been passed on.
    pub fn drained(&self) -> impl Future<Output = ()> + use<> {
        let mut drained = self.drained.clone();
        // The other end is dropped only when the copying was given up.
        async move { drop(drained.wait_for(|drained| *drained).await) }
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

fn output(stream: &'static str, text: &str) -> Result<Option<Sink>, StdioError> {
    let target = uri::parse(stream, text)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| StdioError::Open { stream, path, source }
    };
    Ok(match &target {
        Target::Nowhere => None,
        Target::Path(path) if is_file(path) => {
            Some(Box::new(append(path, false).map_err(failed(path))?))
        }
        Target::Path(path) => Some(Box::new(fifo::output(path).map_err(failed(path))?)),
        Target::File(path) => Some(Box::new(append(path, true).map_err(failed(path))?)),
        Target::Logger(_) => {
            return Err(uri::refused(stream, text, "a logger takes both outputs, or stdout"));
        }
    })
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
async fn pass_on_output(from: UnixStream, mut to: Sink) {
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
