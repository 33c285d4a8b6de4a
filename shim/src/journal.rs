//! What a detached container writes: to its log, and to whoever is attached to it. Each output is read by a
//! thread of its own, to its exact end.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::sync::oneshot;

use crate::{
    log::{Log, Source},
    sandbox::Streams,
    stdio::blocking,
    timestamp::Timestamp,
};

const BUFFER: usize = 64 * 1024;
/// How long somebody attached may hold the container's output back before he is let go.
const PATIENCE: Duration = Duration::from_secs(10);

/// The streams of a detached container.
#[derive(Debug)]
pub struct Journal {
    sinks: Mutex<Sinks>,
    /// Kept open: the container's input does not end when nobody is attached.
    stdin: Option<UnixStream>,
    has_stderr: bool,
}

#[derive(Debug)]
struct Sinks {
    /// None once it could not be written: a full disk does not end the container.
    log: Option<Log>,
    attached: Vec<(Source, UnixStream)>,
}

impl Journal {
    /// Begins the log in `folder` and reads both outputs into it; each receiver resolves at the end of one.
    pub fn begin(
        folder: &Path,
        streams: Streams,
    ) -> io::Result<(Arc<Self>, Vec<oneshot::Receiver<()>>)> {
        let sinks = Sinks { log: Some(Log::create(folder)?), attached: Vec::new() };
        let journal = Arc::new(Self {
            sinks: Mutex::new(sinks),
            stdin: streams.stdin.map(blocking).transpose()?,
            has_stderr: streams.stderr.is_some(),
        });
        let outputs = [(streams.stdout, Source::Stdout), (streams.stderr, Source::Stderr)];
        let outputs = outputs.into_iter().filter_map(|(stream, source)| Some((stream?, source)));
        let ends =
            outputs.map(|(stream, source)| journal.clone().follow(blocking(stream)?, source));
        let ends = ends.collect::<io::Result<_>>()?;
        Ok((journal, ends))
    }

    fn follow(
        self: Arc<Self>,
        from: UnixStream,
        source: Source,
    ) -> io::Result<oneshot::Receiver<()>> {
        let (done, ended) = oneshot::channel();
        spawn(move || {
            let mut buffer = vec![0; BUFFER];
            while let Ok(length @ 1..) = read(&from, &mut buffer) {
                self.take(source, &buffer[..length]);
            }
            self.sinks().attached.retain(|(of, _)| *of != source);
            let _ = done.send(());
        })?;
        Ok(ended)
    }

    fn take(&self, source: Source, bytes: &[u8]) {
        let mut sinks = self.sinks();
        let written = sinks.log.as_mut().map(|log| log.write(source, Timestamp::now(), bytes));
        if let Some(Err(error)) = written {
            tracing::error!(%error, "the log ends here");
            sinks.log = None;
        }
        sinks.attached.retain_mut(|(of, stream)| *of != source || stream.write_all(bytes).is_ok());
    }

    /// Connects somebody: to what is written from now on, and to the input if there is one.
    pub fn attach(self: &Arc<Self>) -> io::Result<Streams> {
        let stdin = match &self.stdin {
            Some(to) => {
                let (ours, theirs) = UnixStream::pair()?;
                let mut to = to.try_clone()?;
                spawn(move || drop(io::copy(&mut &ours, &mut to)))?;
                Some(theirs)
            }
            None => None,
        };
        let stdout = self.listen(Source::Stdout)?;
        let stderr = self.has_stderr.then(|| self.listen(Source::Stderr)).transpose()?;
        let stream = |stream: Option<UnixStream>| {
            stream
                .map(|stream| {
                    stream.set_nonblocking(true)?;
                    tokio::net::UnixStream::from_std(stream)
                })
                .transpose()
        };
        Ok(Streams {
            stdin: stream(stdin)?,
            stdout: stream(Some(stdout))?,
            stderr: stream(stderr)?,
        })
    }

    fn listen(&self, source: Source) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_write_timeout(Some(PATIENCE))?;
        ours.shutdown(Shutdown::Read)?;
        self.sinks().attached.push((source, ours));
        Ok(theirs)
    }

    fn sinks(&self) -> std::sync::MutexGuard<'_, Sinks> {
        self.sinks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(mut from: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("journal".into()).stack_size(256 * 1024).spawn(work).map(drop)
}
