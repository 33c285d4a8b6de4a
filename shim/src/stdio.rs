//! The user's standard streams on one side, a process's vsock streams on the other.
//!
//! Each direction is one thread with blocking reads and writes: files, pipes and terminals alike work, nothing
//! is made non-blocking that others share, and a reader that is slow stops the writer in the guest and nobody
//! else. The end of an output's thread is the exact end of that stream.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use tokio::sync::oneshot;

use crate::{budget::Budget, clock, sandbox::Streams};

const BUFFER: usize = 64 * 1024;
const STACK: usize = 128 * 1024;

/// Which of our own streams an output goes to.
#[derive(Clone, Copy, Debug)]
enum Output {
    Stdout,
    Stderr,
}

/// When the first byte of standard output arrived: CLOCK_MONOTONIC in nanoseconds, 0 if none yet.
pub type FirstByte = Arc<AtomicU64>;

/// Told when the user types [`DETACH`]. Dropped when the input ends without it.
pub type Leave = oneshot::Sender<()>;

/// Ctrl-P Ctrl-Q, as docker's.
const DETACH: [u8; 2] = [0x10, 0x11];

/// Connects a process's streams to ours, as far as the outputs' common budget goes; each receiver resolves at the end of an output.
pub fn connect(
    streams: Streams,
    first: &FirstByte,
    budget: Option<&Arc<Budget>>,
    leave: Option<Leave>,
) -> io::Result<Vec<oneshot::Receiver<()>>> {
    if let Some(stdin) = streams.stdin {
        feed(stdin, leave)?;
    }
    let outputs = [(streams.stdout, Output::Stdout), (streams.stderr, Output::Stderr)];
    let outputs = outputs.into_iter().filter_map(|(stream, output)| Some((stream?, output)));
    outputs.map(|(stream, output)| drain(stream, output, first.clone(), budget.cloned())).collect()
}

/// Feeds our standard input to `stream` until either ends, or the user leaves. The thread is left to itself: a
/// read of a terminal cannot be taken back, and ends with the process.
fn feed(stream: tokio::net::UnixStream, leave: Option<Leave>) -> io::Result<()> {
    let stream = blocking(stream)?;
    spawn("stdin", move || {
        let mut keys = DetachKeys::default();
        let seen = |bytes: &[u8]| match leave.is_some() && keys.typed(bytes) {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(bytes.len()),
        };
        let copied = copy(rustix::stdio::stdin(), stream.as_fd(), seen);
        if copied.is_err_and(|e| e.kind() == io::ErrorKind::Interrupted) {
            let _ = leave.map(|leave| leave.send(()));
        }
        let _ = stream.shutdown(Shutdown::Write);
    })
}

/// Looks for [`DETACH`] in what is typed, a few bytes at a time. The first key is passed on all the same: a
/// program may have a use for it.
#[derive(Default)]
struct DetachKeys {
    first: bool,
}

impl DetachKeys {
    fn typed(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().any(|byte| {
            let both = self.first && *byte == DETACH[1];
            self.first = *byte == DETACH[0];
            both
        })
    }
}

/// Copies `stream` to one of our outputs. The receiver resolves at the end of the stream, or when our output
/// is closed: the stream is closed then too, so that the workload meets a broken pipe as it would here.
fn drain(
    stream: tokio::net::UnixStream,
    output: Output,
    first: FirstByte,
    budget: Option<Arc<Budget>>,
) -> io::Result<oneshot::Receiver<()>> {
    let stream = blocking(stream)?;
    let (done, ended) = oneshot::channel();
    spawn("output", move || {
        let to = match output {
            Output::Stdout => rustix::stdio::stdout(),
            Output::Stderr => rustix::stdio::stderr(),
        };
        let _ = copy(stream.as_fd(), to, |bytes| {
            note(&first, output);
            Ok(budget.as_ref().map_or(bytes.len(), |budget| budget.take(bytes.len())))
        });
        drop(stream);
        let _ = done.send(());
    })?;
    Ok(ended)
}

fn note(first: &FirstByte, output: Output) {
    if matches!(output, Output::Stdout) && first.load(Ordering::Relaxed) == 0 {
        first.store(clock::now_ns(), Ordering::Relaxed);
    }
}

/// Out of the event loop, for a thread.
pub fn blocking(stream: tokio::net::UnixStream) -> io::Result<UnixStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).stack_size(STACK).spawn(work).map(drop)
}

/// Copies until the end of `from` or an error; `seen` hears of every piece before it is written and says how much of it
/// may be: what is less than all is the last.
fn copy(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    mut seen: impl FnMut(&[u8]) -> io::Result<usize>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = retry(from, PollFlags::IN, || rustix::io::read(from, &mut buffer[..]))?;
        if n == 0 {
            return Ok(());
        }
        let allowed = seen(&buffer[..n])?.min(n);
        let mut rest = &buffer[..allowed];
        while !rest.is_empty() {
            let written = retry(to, PollFlags::OUT, || rustix::io::write(to, rest))?;
            rest = &rest[written..];
        }
        if allowed < n {
            return Ok(());
        }
    }
}

/// Repeats a call that was interrupted, or, on a descriptor somebody made non-blocking, that has to wait.
fn retry<T>(
    fd: BorrowedFd<'_>,
    ready: PollFlags,
    mut call: impl FnMut() -> Result<T, Errno>,
) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(&fd, ready)], None);
            }
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_copy_is_whole_over_descriptors_that_are_non_blocking() {
        let (mut write, from) = UnixStream::pair().unwrap();
        let (to, mut read) = UnixStream::pair().unwrap();
        from.set_nonblocking(true).unwrap();
        to.set_nonblocking(true).unwrap();
        let sent: Vec<u8> =
            (0..3_000_000_u32).map(|i| i.wrapping_mul(2_654_435_761) as u8).collect();
        let expected = sent.clone();
        thread::spawn(move || write.write_all(&sent));
        let copier = thread::spawn(move || {
            let mut pieces = 0;
            let count = |bytes: &[u8]| {
                pieces += bytes.len();
                Ok(bytes.len())
            };
            copy(from.as_fd(), to.as_fd(), count).unwrap();
            pieces
        });
        let mut received = Vec::new();
        read.read_to_end(&mut received).unwrap();
        assert!(received == expected);
        assert_eq!(copier.join().unwrap(), expected.len());
    }

    #[test]
    fn a_closed_output_ends_the_copy() {
        let (mut write, from) = UnixStream::pair().unwrap();
        let (to, read) = UnixStream::pair().unwrap();
        drop(read);
        write.write_all(b"x").unwrap();
        let error = copy(from.as_fd(), to.as_fd(), |bytes| Ok(bytes.len())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn the_detach_keys_are_found_in_pieces_and_only_together() {
        for (typed, found) in [
            (&[&b"\x10\x11"[..]][..], true),
            (&[b"abc\x10", b"\x11"], true),
            (&[b"\x10\x10\x11"], true),
            (&[b"\x11\x10"], false),
            (&[b"\x10a\x11"], false),
        ] {
            let mut keys = DetachKeys::default();
            assert_eq!(typed.iter().any(|bytes| keys.typed(bytes)), found, "{typed:?}");
        }
    }
}
