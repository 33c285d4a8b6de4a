//! Passes messages of FUSE between the kernel and a file server in the guest.
//!
//! ```text
//!             a request                      nobody uses a file any more
//!  alone ──────────────────▶ connected ──────────────────────────────────▶ alone
//!    ▲                           │  the guest is silent, breaks off or says what is no answer
//!    └──────── pause ────────────┘  (all that is waited for is EIO)
//! ```
//!
//! The guest may send what it likes. What reaches the kernel is one answer of a bounded length to a request that waits for it;
//! what that says is the kernel's to check, for which a file server is anybody. Whoever waits is answered in bounded time.

use std::{
    collections::HashMap,
    future::Future,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ampoule_fsd_api::abi::{IN_HEADER, MAX_MESSAGE, OUT_HEADER, opcode};
use rustix::io::{Errno, read, write};
use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{pace::Pace, vm::watch};

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A request, at most.
    pub answer: Duration,
    /// In which no guest is asked after it has failed.
    pub pause: Duration,
    /// Without a request, before the kernel is to forget what nobody uses.
    pub idle: Duration,
}

impl Times {
    pub fn of(pace: Pace) -> Self {
        let usual = Duration::from_secs(30);
        let (pause, idle) = (Duration::from_secs(5), Duration::from_secs(5));
        Self { answer: pace.limit(usual), pause, idle }
    }
}

/// After as many files likewise: the guest holds each that the kernel knows.
const MANY: u64 = 8192;
/// Requests that the guest may have at a time; others stay with the kernel.
const MOST: usize = 64;
/// Numbers of a connection: so many files are not looked up in its time.
const NUMBERS: u32 = 40;

/// One request of the kernel's.
struct Request<'a>(&'a [u8]);

impl Request<'_> {
    fn word(&self, at: usize) -> u32 {
        self.0.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u32::from_ne_bytes(*word))
    }

    fn number(&self, at: usize) -> u64 {
        number(self.0, at)
    }

    fn opcode(&self) -> u32 {
        self.word(4)
    }

    fn unique(&self) -> u64 {
        self.number(8)
    }

    fn is_forgetting(&self) -> bool {
        matches!(self.opcode(), opcode::FORGET | opcode::BATCH_FORGET)
    }

    /// What is answered here, if it is.
    fn own_answer(&self, connected: bool) -> Option<Result<(), Errno>> {
        match self.opcode() {
            // What is under way comes to its end soon enough.
            opcode::INTERRUPT => Some(Err(Errno::NOSYS)),
            opcode::DESTROY => Some(Ok(())),
            opcode::RELEASE | opcode::RELEASEDIR if !connected => Some(Ok(())),
            _ => None,
        }
    }

    /// Look-ups that the kernel takes back of files with numbers from `first` on.
    fn forgotten(&self, first: u64) -> u64 {
        let of = |node: usize, count: usize| match self.number(node) >= first {
            true => self.number(count),
            false => 0,
        };
        match self.opcode() {
            opcode::FORGET => of(16, IN_HEADER),
            opcode::BATCH_FORGET => {
                let entries = (IN_HEADER + 8..self.0.len().saturating_sub(15)).step_by(16);
                let entries = entries.take(self.word(IN_HEADER) as usize);
                entries.map(|at| of(at, at + 8)).fold(0, u64::saturating_add)
            }
            _ => 0,
        }
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |number| u64::from_ne_bytes(*number))
}

/// `connect` finds a file server whose numbers begin with what it is given; `forget` has the kernel forget, and may block.
pub struct Relay<C, F> {
    device: AsyncFd<OwnedFd>,
    times: Times,
    connect: C,
    forget: Arc<F>,
    is_forgetting: Arc<AtomicBool>,
    connections: u64,
    not_before: Option<Instant>,
}

impl<C, F, S, E> Relay<C, F>
where
    C: FnMut(u64) -> S,
    S: Future<Output = Result<UnixStream, E>>,
    E: std::error::Error,
    F: Fn() -> Result<(), Errno> + Send + Sync + 'static,
{
    pub fn new(device: OwnedFd, times: Times, connect: C, forget: F) -> io::Result<Self> {
        Ok(Self {
            device: watch(device)?,
            times,
            connect,
            forget: Arc::new(forget),
            is_forgetting: Arc::default(),
            connections: 0,
            not_before: None,
        })
    }

    /// As long as the file system is there.
    pub async fn run(mut self) {
        while let Ok(ready) = self.device.readable().await {
            drop(ready);
            let mut message = vec![0; MAX_MESSAGE];
            match self.take(&mut message) {
                Ok(Some(length)) => {
                    message.truncate(length);
                    self.first(message).await;
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    }

    /// The next request, if there is one now; an error if there will be none.
    fn take(&self, message: &mut [u8]) -> Result<Option<usize>, Errno> {
        match read(self.device.get_ref(), message) {
            Ok(..IN_HEADER) => Err(Errno::NODEV),
            Ok(length) => Ok(Some(length)),
            // Somebody who was interrupted has taken it back.
            Err(Errno::NOENT | Errno::INTR) => Ok(None),
            Err(Errno::AGAIN) => {
                self.wait_anew();
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Until the descriptor says again that there is something.
    fn wait_anew(&self) {
        let again = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
        let _ = self.device.try_io(tokio::io::Interest::READABLE, |_| again());
    }

    fn answer(&self, unique: u64, result: Result<(), Errno>) {
        let mut answer = [0; OUT_HEADER];
        let error = result.map_or_else(|e| -e.raw_os_error(), |()| 0);
        answer[..4].copy_from_slice(&(OUT_HEADER as u32).to_ne_bytes());
        answer[4..8].copy_from_slice(&error.to_ne_bytes());
        answer[8..].copy_from_slice(&unique.to_ne_bytes());
        // Who waited may have gone.
        let _ = write(self.device.get_ref(), &answer);
    }

    /// A request while there is no file server.
    async fn first(&mut self, message: Vec<u8>) {
        let request = Request(&message);
        if request.is_forgetting() {
            return;
        }
        let unique = request.unique();
        if let Some(answer) = request.own_answer(false) {
            return self.answer(unique, answer);
        }
        if self.not_before.is_some_and(|end| Instant::now() < end) {
            return self.answer(unique, Err(Errno::IO));
        }
        self.connections += 1;
        let first = self.connections << NUMBERS;
        let connecting = (self.connect)(first);
        let why = match timeout_at(Instant::now() + self.times.answer, connecting).await {
            Ok(Ok(stream)) => match Link::new(self, stream, first).serve(message).await {
                Ok(()) => return,
                Err(error) => error.to_string(),
            },
            Ok(Err(error)) => {
                self.answer(unique, Err(Errno::IO));
                error.to_string()
            }
            Err(_) => {
                self.answer(unique, Err(Errno::IO));
                "it did not connect in time".into()
            }
        };
        tracing::debug!(error = why, "the files of the container are not to be seen");
        self.not_before = Some(Instant::now() + self.times.pause);
    }

    /// Has the kernel forget, one time at a time.
    fn forget(&self) {
        if self.is_forgetting.swap(true, Ordering::Relaxed) {
            return;
        }
        let (forget, done) = (self.forget.clone(), self.is_forgetting.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = forget() {
                tracing::debug!(%error, "the kernel goes on to know a container's files");
            }
            done.store(false, Ordering::Relaxed);
        });
    }
}

/// Why there is no file server any more.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the guest did not answer in time")]
    Silent,
    #[error("the guest's stream ended")]
    Ended,
    #[error("the guest said what is no answer")]
    NoAnswer,
    #[error("the file system is gone")]
    Device(#[source] Errno),
}

/// A connection to a file server.
struct Link<'a, C, F> {
    relay: &'a Relay<C, F>,
    stream: UnixStream,
    first: u64,
    /// What is being sent, and how much of it has been.
    out: Vec<u8>,
    sent: usize,
    /// The beginning of an answer.
    answer: Vec<u8>,
    received: usize,
    /// By their numbers: until when, and what.
    waiting: HashMap<u64, (Instant, u32)>,
    /// When it was asked last.
    asked: Instant,
    /// Look-ups that the kernel has not taken back, and those of them since it was to forget.
    known: u64,
    new: u64,
    open: u64,
    /// Since it was asked last the kernel was to forget.
    is_settled: bool,
}

impl<'a, C, F, S, E> Link<'a, C, F>
where
    C: FnMut(u64) -> S,
    S: Future<Output = Result<UnixStream, E>>,
    E: std::error::Error,
    F: Fn() -> Result<(), Errno> + Send + Sync + 'static,
{
    fn new(relay: &'a Relay<C, F>, stream: UnixStream, first: u64) -> Self {
        Self {
            relay,
            stream,
            first,
            out: Vec::new(),
            sent: 0,
            answer: vec![0; MAX_MESSAGE],
            received: 0,
            waiting: HashMap::new(),
            asked: Instant::now(),
            known: 0,
            new: 0,
            open: 0,
            is_settled: false,
        }
    }

    /// Until nobody uses a file any more. All that is waited for then is answered.
    async fn serve(mut self, message: Vec<u8>) -> Result<(), Broken> {
        self.pass_on(message);
        let served = self.pass_all().await;
        for unique in self.waiting.keys() {
            self.relay.answer(*unique, Err(Errno::IO));
        }
        served
    }

    async fn pass_all(&mut self) -> Result<(), Broken> {
        while !self.is_over() {
            let sending = !self.out.is_empty();
            let is_idle = !sending && self.waiting.is_empty();
            let limit = match self.waiting.values().map(|(end, _)| *end).min() {
                Some(end) => end,
                None if sending => self.asked + self.relay.times.answer,
                None => self.asked + self.relay.times.idle,
            };
            let relay = self.relay;
            tokio::select! {
                ready = self.stream.writable(), if sending => {
                    ready.map_err(|_| Broken::Ended)?;
                    self.send()?;
                }
                ready = self.stream.readable() => {
                    ready.map_err(|_| Broken::Ended)?;
                    self.receive()?;
                }
                ready = relay.device.readable(), if !sending && self.waiting.len() < MOST => {
                    drop(ready.map_err(|_| Broken::Device(Errno::IO))?);
                    self.take()?;
                }
                () = sleep_until(limit), if !is_idle => return Err(Broken::Silent),
                () = sleep_until(limit), if is_idle && !self.is_settled => {
                    self.is_settled = true;
                    relay.forget();
                }
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        let is_used = (self.known, self.open) != (0, 0) || !self.waiting.is_empty();
        self.is_settled && !is_used && self.out.is_empty()
    }

    fn take(&mut self) -> Result<(), Broken> {
        let mut message = vec![0; MAX_MESSAGE];
        if let Some(length) = self.relay.take(&mut message).map_err(Broken::Device)? {
            message.truncate(length);
            self.pass_on(message);
        }
        Ok(())
    }

    fn pass_on(&mut self, message: Vec<u8>) {
        let request = Request(&message);
        if let Some(answer) = request.own_answer(true) {
            return self.relay.answer(request.unique(), answer);
        }
        let now = Instant::now();
        let opcode = request.opcode();
        if matches!(opcode, opcode::RELEASE | opcode::RELEASEDIR)
            && request.number(IN_HEADER) >= self.first
        {
            self.open = self.open.saturating_sub(1);
        }
        if request.is_forgetting() {
            self.known = self.known.saturating_sub(request.forgotten(self.first));
        } else {
            self.waiting.insert(request.unique(), (now + self.relay.times.answer, opcode));
            self.is_settled = false;
        }
        self.asked = now;
        (self.out, self.sent) = (message, 0);
    }

    fn send(&mut self) -> Result<(), Broken> {
        match self.stream.try_write(&self.out[self.sent..]) {
            Ok(count) => self.sent += count,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Err(Broken::Ended),
        }
        if self.sent == self.out.len() {
            self.out = Vec::new();
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Broken> {
        match self.stream.try_read(&mut self.answer[self.received..]) {
            Ok(0) => return Err(Broken::Ended),
            Ok(count) => self.received += count,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(_) => return Err(Broken::Ended),
        }
        let mut from = 0;
        while let Some(length) = self.answer[from..self.received].first_chunk() {
            let length = u32::from_ne_bytes(*length) as usize;
            if !(OUT_HEADER..=MAX_MESSAGE).contains(&length) {
                return Err(Broken::NoAnswer);
            }
            if from + length > self.received {
                break;
            }
            self.deliver(from, length);
            from += length;
        }
        self.answer.copy_within(from..self.received, 0);
        self.received -= from;
        Ok(())
    }

    /// One answer, to a request that waits for it. A number of none is a notification, which is not the guest's to make.
    fn deliver(&mut self, from: usize, length: usize) {
        let answer = &self.answer[from..from + length];
        let unique = number(answer, 8);
        let Some((_, opcode)) = self.waiting.remove(&unique) else { return };
        let error = number(answer, 0).wrapping_shr(32) as u32 as i32;
        // To others the kernel does not listen, and who waits goes on waiting.
        let is_answer = error == 0 || (-511..0).contains(&error) && length == OUT_HEADER;
        let passed = is_answer && write(self.relay.device.get_ref(), answer).is_ok();
        if !passed {
            return self.relay.answer(unique, Err(Errno::IO));
        }
        if error != 0 {
            return;
        }
        match opcode {
            opcode::LOOKUP
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::LINK
            | opcode::CREATE
            | opcode::TMPFILE
                if number(answer, OUT_HEADER) != 0 =>
            {
                self.known += 1;
                self.new += 1;
            }
            _ => {}
        }
        if matches!(opcode, opcode::OPEN | opcode::OPENDIR | opcode::CREATE | opcode::TMPFILE) {
            self.open += 1;
        }
        if self.new >= MANY {
            self.new = 0;
            self.relay.forget();
        }
    }
}

#[cfg(test)]
mod tests;
