//! The sandbox's end of its socket, served beside its container by the process that runs it.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ampoule_agent_api::agent::StatsResponse;
use async_trait::async_trait;
use oci_spec::runtime::Process;
use rustix::net::{SocketFlags, accept_with, bind, listen, sockopt::socket_peercred};
use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

use super::{ExecRequest, Member, Peer, Request, Response, Stats, Status, socket};
use crate::{
    config::{Config, ConfigError},
    error::Failure,
    id::Id,
    journal::Journal,
    registry::Ended,
    run_spec::{RunSpecError, exec_process},
    sandbox::{ConsoleConfig, ExecConfig, ProcessId, Sandbox, SandboxError, Stdio, Streams},
    vm::watch as watch_fd,
};

/// Most connections at a time; each costs a task and a descriptor.
const MAX_CONNECTIONS: usize = 256;
/// How long those who wait for the end may take to be told of it.
const FAREWELL: Duration = Duration::from_secs(1);
const SIGKILL: u32 = 9;
/// More than this is no process.
const MAX_PROCESS: u64 = 16 << 20;
/// Processes that are told of: what a message has room for.
const MAX_PIDS: usize = 2000;

/// What is served.
pub struct Container {
    pub sandbox: Sandbox,
    pub id: Id,
    /// The first process, whose settings an exec inherits.
    pub process: Process,
    /// What a detached container writes; none in the foreground.
    pub journal: Option<Arc<Journal>>,
    /// Nothing is run beside the first process.
    pub hermetic: bool,
    /// Files that say whether there may be consoles.
    pub config: Vec<PathBuf>,
    /// Who makes further containers in the sandbox, if there may be any.
    pub members: Option<Arc<dyn Members>>,
    /// The sandbox is another container's.
    pub is_member: bool,
    /// How far it is.
    pub phase: Phase,
}

/// Makes further containers in a sandbox.
#[async_trait]
pub trait Members: Send + Sync {
    /// # Errors
    /// Why there is none, and nothing of it.
    async fn join(
        &self,
        member: Member,
    ) -> Result<Joined, Box<dyn std::error::Error + Send + Sync>>;
}

/// A further container, served by a [`Server`] of its own.
pub struct Joined {
    pub container: Arc<Container>,
    pub streams: Streams,
    pub end: End,
}

/// How far a container is, kept by whoever changes it.
#[derive(Debug, Default)]
pub struct Phase(Mutex<Status>);

impl Phase {
    pub fn running() -> Self {
        Self(Mutex::new(Status::Running))
    }

    fn get(&self) -> Status {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end is the end.
    fn set(&self, status: Status) {
        let mut phase = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase != Status::Stopped {
            *phase = status;
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error("it is hermetic: nothing is run beside its command")]
    Hermetic,
    #[error("its VM was made for it alone: containers share one in a pod (`podman pod create`)")]
    NoMembers,
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("consoles are off: `console = true` at the top of {} turns them on", path.display())]
    ConsolesOff { path: PathBuf },
    #[error("draw a random name")]
    Random(#[source] io::Error),
    #[error("a process was to come along")]
    NoProcess,
    #[error("process")]
    Process(#[source] io::Error),
    #[error(transparent)]
    Spec(#[from] RunSpecError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// How a container has ended, once it has.
pub type End = watch::Receiver<Option<Ended>>;

/// The listening socket and its connections.
pub struct Server {
    accepting: JoinHandle<()>,
    end: watch::Sender<Option<Ended>>,
}

impl Server {
    /// Listens in the sandbox's folder.
    pub fn start(folder: &Path, container: Arc<Container>) -> io::Result<Self> {
        let (listener, _folder, address) = socket(folder)?;
        bind(&listener, &address)?;
        listen(&listener, 64)?;
        let listener = watch_fd(listener)?;
        let (end, ended) = watch::channel(None);
        let accepting = tokio::spawn(accept(listener, container, ended));
        Ok(Self { accepting, end })
    }

    pub fn end(&self) -> End {
        self.end.subscribe()
    }

    /// Tells everyone who waits how the container ended, and closes.
    pub async fn finish(mut self, ended: Ended) {
        self.end.send_replace(Some(ended));
        if timeout(FAREWELL, &mut self.accepting).await.is_err() {
            self.accepting.abort();
        }
    }
}

/// Takes connections until the end, then sees those off that are there.
async fn accept(listener: AsyncFd<OwnedFd>, container: Arc<Container>, end: End) {
    let mut ended = end.clone();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = over(&mut ended) => break,
            Some(_) = connections.join_next() => {}
            socket = next(&listener) => match socket {
                Ok(peer) if connections.len() < MAX_CONNECTIONS => {
                    connections.spawn(converse(peer, container.clone(), end.clone()));
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "control socket");
                    // Out of descriptors, perhaps: not at once again.
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn over(end: &mut End) {
    let _ = end.wait_for(Option::is_some).await;
}

/// The next connection of somebody who may.
async fn next(listener: &AsyncFd<OwnedFd>) -> io::Result<Peer> {
    let own = rustix::process::geteuid();
    loop {
        let mut ready = listener.readable().await?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = ready.try_io(|l| Ok(accept_with(l.get_ref(), flags)?)) else { continue };
        let socket = socket?;
        let user = socket_peercred(&socket)?.uid;
        if user == own || user.is_root() {
            return Peer::new(socket);
        }
    }
}

/// Serves a connection until the client goes, or the sandbox has ended and everything is answered.
async fn converse(peer: Peer, mut container: Arc<Container>, mut end: End) {
    let mut ended = end.clone();
    let mut process = ProcessId::init(container.id.clone());
    let (mut started, mut held) = (false, false);
    let mut calls = JoinSet::new();
    loop {
        let response = tokio::select! {
            biased;
            Some(Ok(response)) = calls.join_next() => peer.send(&response, &[] as &[OwnedFd]),
            request = peer.receive::<Request>() => match request {
                Ok((
                    request @ (Request::Exec(_) | Request::ExecProcess | Request::Console(_)),
                    files,
                )) if process.exec.is_none() => {
                    held = matches!(request, Request::ExecProcess);
                    let prepared = match request {
                        Request::Exec(exec) => container.exec(exec).await,
                        Request::ExecProcess => container.exec_process(files).await,
                        Request::Console(size) => container.console(size).await,
                        _ => continue,
                    };
                    let (response, streams) = match prepared {
                        Ok((exec, streams)) => {
                            process = exec;
                            (said(&streams), streams)
                        }
                        Err(error) => (failed(&error), Streams::default()),
                    };
                    send_streams(&peer, response, streams)
                }
                Ok((Request::Join(member), _)) if !held && process.exec.is_none() => {
                    let (response, streams) = match container.join(member).await {
                        Ok(joined) => {
                            process = ProcessId::init(joined.container.id.clone());
                            (container, held) = (joined.container, true);
                            (end, ended) = (joined.end.clone(), joined.end);
                            (said(&joined.streams), joined.streams)
                        }
                        Err(error) => (failed(&*error), Streams::default()),
                    };
                    send_streams(&peer, response, streams)
                }
                Ok((Request::View(first), _)) => {
                    let (response, streams) = container.view(first).await;
                    send_streams(&peer, response, streams)
                }
                Ok((Request::Attach, _)) => {
                    let (response, streams) = container.attach();
                    send_streams(&peer, response, streams)
                }
                Ok((request, _)) => {
                    started |= matches!(request, Request::Start);
                    let (container, process, end) = (container.clone(), process.clone(), end.clone());
                    calls.spawn(async move { container.answer(request, process, end).await });
                    Ok(())
                }
                Err(_) => break,
            },
            () = over(&mut ended), if calls.is_empty() => break,
        };
        if response.is_err() {
            break;
        }
    }
    if process.exec.is_some() {
        tokio::spawn(async move { container.forget(&process, started && !held).await });
    } else if held {
        let _ = container.sandbox.signal(&process, SIGKILL, true).await;
    }
}

fn said(streams: &Streams) -> Response {
    Response::Streams {
        stdin: streams.stdin.is_some(),
        stdout: streams.stdout.is_some(),
        stderr: streams.stderr.is_some(),
    }
}

fn send_streams(
    peer: &Peer,
    response: Response,
    streams: Streams,
) -> Result<(), ampoule_vmm_api::ChannelError> {
    let fds: Vec<UnixStream> =
        [streams.stdin, streams.stdout, streams.stderr].into_iter().flatten().collect();
    peer.send(&response, &fds)
}

fn failed(error: &(dyn std::error::Error + 'static)) -> Response {
    Response::Failed(Failure::of(error))
}

fn refused(why: &str) -> Response {
    Response::Failed(Failure::refused(why))
}

/// The console stays in the record: a message has no room for all that a guest may have said.
fn tell(ended: Ended) -> Response {
    Response::Ended(Ended { console: Vec::new(), ..ended })
}

fn done(result: Result<(), SandboxError>) -> Response {
    result.map_or_else(|error| failed(&error), |()| Response::Done)
}

impl Container {
    async fn answer(&self, request: Request, process: ProcessId, mut end: End) -> Response {
        match request {
            Request::Start if process.exec.is_none() => done(self.start().await),
            Request::Start => done(self.sandbox.start(&process).await),
            Request::Wait if process.exec.is_none() => {
                match end.wait_for(Option::is_some).await.ok().and_then(|end| end.clone()) {
                    Some(ended) => tell(ended),
                    None => refused("the sandbox is gone"),
                }
            }
            Request::Wait => match self.sandbox.wait(&process).await {
                Ok(exit) => tell(exit.into()),
                Err(error) => failed(&error),
            },
            Request::Signal { signal, all } => {
                done(self.sandbox.signal(&process, signal, all).await)
            }
            Request::Resize { width, height } => {
                done(self.sandbox.resize(&process, width, height).await)
            }
            Request::Stats => match self.sandbox.stats(&self.id).await {
                Ok(stats) => Response::Stats(stats.into()),
                Err(error) => failed(&error),
            },
            Request::Status => Response::Status(self.phase.get()),
            Request::Pids => match self.sandbox.pids(&self.id).await {
                Ok(found) => {
                    let pids = found.processes.iter().map(|process| process.pid);
                    Response::Pids(pids.take(MAX_PIDS).collect())
                }
                Err(error) => failed(&error),
            },
            Request::Pause => done(self.freeze(true).await),
            Request::Resume => done(self.freeze(false).await),
            Request::Update(resources) => done(self.sandbox.update(&self.id, &resources).await),
            Request::Shutdown if self.is_member => {
                done(self.sandbox.signal(&process, SIGKILL, true).await)
            }
            Request::Shutdown => {
                self.sandbox.shutdown().await;
                Response::Done
            }
            Request::Exec(_)
            | Request::ExecProcess
            | Request::Console(_)
            | Request::Join(_)
            | Request::View(_)
            | Request::Attach => refused("a connection is for one process"),
        }
    }

    /// Lets the first process run.
    pub async fn start(&self) -> Result<(), SandboxError> {
        self.sandbox.start(&ProcessId::init(self.id.clone())).await?;
        self.phase.set(Status::Running);
        Ok(())
    }

    /// The first process has ended.
    pub fn ended(&self) {
        self.phase.set(Status::Stopped);
    }

    async fn freeze(&self, on: bool) -> Result<(), SandboxError> {
        match on {
            true => self.sandbox.pause(&self.id).await?,
            false => self.sandbox.resume(&self.id).await?,
        }
        self.phase.set(if on { Status::Paused } else { Status::Running });
        Ok(())
    }

    /// Prepares a further process that comes as a whole, with all its streams.
    async fn exec_process(&self, files: Vec<OwnedFd>) -> Result<(ProcessId, Streams), ExecError> {
        let id = self.new_process()?;
        let file = File::from(files.into_iter().next().ok_or(ExecError::NoProcess)?);
        let mut json = Vec::new();
        file.take(MAX_PROCESS).read_to_end(&mut json).map_err(ExecError::Process)?;
        let process: Process =
            serde_json::from_slice(&json).map_err(|e| ExecError::Process(e.into()))?;
        let stderr = process.terminal() != Some(true);
        let stdio = Stdio { stdin: true, stdout: true, stderr };
        self.create_exec(id, process, stdio).await
    }

    /// Prepares a further process.
    async fn exec(&self, exec: ExecRequest) -> Result<(ProcessId, Streams), ExecError> {
        let id = self.new_process()?;
        let stdio = Stdio {
            stdin: exec.stdin,
            stdout: exec.output,
            stderr: exec.output && exec.terminal.is_none(),
        };
        let process = exec_process(&self.process, exec)?;
        self.create_exec(id, process, stdio).await
    }

    async fn create_exec(
        &self,
        id: Id,
        process: Process,
        stdio: Stdio,
    ) -> Result<(ProcessId, Streams), ExecError> {
        let config = ExecConfig { container: self.id.clone(), id: id.clone(), process, stdio };
        let created = self.sandbox.create_exec(config).await?;
        Ok((ProcessId::exec(self.id.clone(), id), created.streams))
    }

    /// Prepares a shell in the guest itself, if the configuration allows that now.
    async fn console(&self, size: Option<(u16, u16)>) -> Result<(ProcessId, Streams), ExecError> {
        let id = self.new_process()?;
        if !Config::load(&self.config)?.console {
            let path = self.config.last().cloned().unwrap_or_default();
            return Err(ExecError::ConsolesOff { path });
        }
        let config = ConsoleConfig { container: self.id.clone(), id: id.clone(), size };
        let created = self.sandbox.create_console(config).await?;
        Ok((ProcessId::exec(self.id.clone(), id), created.streams))
    }

    async fn join(
        &self,
        member: Member,
    ) -> Result<Joined, Box<dyn std::error::Error + Send + Sync>> {
        match &self.members {
            Some(members) => members.join(member).await,
            None => Err(ExecError::NoMembers.into()),
        }
    }

    /// The id of a further process.
    fn new_process(&self) -> Result<Id, ExecError> {
        match self.hermetic {
            true => Err(ExecError::Hermetic),
            false => Id::random().map_err(ExecError::Random),
        }
    }

    /// Sees an exec to its end that nobody asks for any more. One that was never started is ended.
    async fn forget(&self, process: &ProcessId, started: bool) {
        if !started {
            let _ = self.sandbox.signal(process, SIGKILL, false).await;
        }
        if self.sandbox.wait(process).await.is_ok() {
            let _ = self.sandbox.delete(process).await;
        }
    }

    async fn view(&self, first: u64) -> (Response, Streams) {
        match self.sandbox.view(&self.id, first).await {
            Ok(stream) => {
                let streams = Streams { stdin: Some(stream), ..Default::default() };
                (said(&streams), streams)
            }
            Err(error) => (failed(&error), Streams::default()),
        }
    }

    fn attach(&self) -> (Response, Streams) {
        let Some(journal) = &self.journal else {
            let text = "it runs in the foreground: its streams are those of its `ampoule run`";
            return (refused(text), Streams::default());
        };
        match journal.attach() {
            Ok(streams) => (said(&streams), streams),
            Err(error) => (refused(&format!("attach: {error}")), Streams::default()),
        }
    }
}

impl From<StatsResponse> for Stats {
    fn from(stats: StatsResponse) -> Self {
        Self {
            memory: stats.memory_current,
            memory_peak: stats.memory_peak,
            memory_limit: stats.memory_max,
            cpu_us: stats.cpu_stat.get("usage_usec").copied().unwrap_or(0),
            processes: stats.pids_current,
        }
    }
}
