//! `exec`: the process that stands for a further one in a container, as a client of the container's keeper.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::fd::OwnedFd,
    path::Path,
};

use oci_spec::runtime::Process;
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::sync::oneshot;

use super::{
    Host, OciError, Result,
    cli::ExecArgs,
    console::Console,
    containers::Found,
    create,
    keeper::refuse_descriptors,
    pid_file,
    verbs::{Status, connect, status},
};
use crate::{
    commands::{
        exec::{NEVER_ENOUGH, attend, drained},
        run::detach::{self, Background, Side},
    },
    config::Config,
    control::{ControlError, ExecRequest, Request},
    event_loop::event_loop,
    run_spec::exec_process,
    sandbox::{SandboxError, Streams},
    signals::Signals,
    spec::{Terms, decide},
    stdio::{self, FirstByte},
    terminal::{self, RawTerminal},
};

/// More than this is no process.
const MAX_SIZE: u64 = 16 << 20;

pub fn exec(args: &ExecArgs, host: &Host) -> Result<u8> {
    refuse_descriptors(args.preserve_fds)?;
    let found = host.containers.find(&args.id)?;
    let process = process(args, &found, host)?;
    let detached = args.detach;
    let forked = detached.then(detach::fork).transpose();
    let background = match forked.map_err(|e| OciError::Host("go to the background", e))? {
        Some(Side::Parent(0)) => return Ok(0),
        // The child has said why.
        Some(Side::Parent(_)) => return Ok(super::EXEC_FAILURE),
        Some(Side::Child(background)) => Some(background),
        None => None,
    };
    let runtime = event_loop().map_err(|e| OciError::Host("start the event loop", e))?;
    let ended = runtime.block_on(stand(args, &found, process, background));
    // A thread that reads standard input cannot be called back.
    runtime.shutdown_background();
    ended
}

async fn stand(
    args: &ExecArgs,
    found: &Found,
    process: Process,
    background: Option<Background>,
) -> Result<u8> {
    let failed = |e| OciError::Control(found.id.to_string(), e);
    match status(found).await? {
        Status::Running => {}
        other => {
            return Err(OciError::State {
                id: args.id.clone(),
                verb: "exec in",
                status: other.name(),
            });
        }
    }
    let connection = connect(found)?;
    let mut signals = Signals::listen().map_err(|e| OciError::Host("listen for signals", e))?;
    let has_terminal = process.terminal() == Some(true);
    let file = sealed(&process).map_err(|e| OciError::Host("pass the process on", e))?;
    let streams = connection.exec_process(&file).await.map_err(failed)?;
    let detached = background.is_some();
    let streams = Streamed::begin(streams, has_terminal, args.console_socket.as_deref(), detached)?;
    let started = connection.ask(&Request::Start).await;
    started.map_err(|e| OciError::asked(found.id.as_str(), e))?;
    if let (true, Some((width, height))) = (has_terminal, terminal::size()) {
        let _ = connection.ask(&Request::Resize { width, height }).await;
    }
    pid_file::write(args.pid_file.as_deref())?;
    if let Some(background) = background {
        background.stay().map_err(|e| OciError::Host("go to the background", e))?;
    }
    let ended = match attend(&connection, &mut signals, NEVER_ENOUGH).await {
        Ok(ended) => ended.code,
        // With the sandbox everything ends.
        Err(ControlError::Gone) => 137,
        Err(error) => return Err(failed(error)),
    };
    drained(streams.outputs, &mut signals).await;
    drop(streams.terminal);
    Ok(ended)
}

/// What is to be run, of a file or of the container's own process with other arguments.
fn process(args: &ExecArgs, found: &Found, host: &Host) -> Result<Process> {
    let mut process = match &args.process {
        Some(path) => read(path, host)?,
        None => {
            let bundle = create::read_bundle(&found.record.bundle)?;
            let request = ExecRequest {
                args: args.command.clone(),
                env: args.env.clone(),
                workdir: args.cwd.as_ref().map(|cwd| cwd.to_string_lossy().into_owned()),
                user: args.user.clone(),
                terminal: args.tty.then(|| terminal::size().unwrap_or((0, 0))),
                stdin: true,
                output: true,
            };
            exec_process(create::process(&bundle)?, request)?
        }
    };
    if args.tty {
        process.set_terminal(Some(true));
    }
    if process.terminal() == Some(true) && args.detach && args.console_socket.is_none() {
        let why = "cannot allocate tty without --console-socket, as nobody stays here to have it";
        return Err(OciError::refused("process.terminal", why));
    }
    Ok(process)
}

fn read(path: &Path, host: &Host) -> Result<Process> {
    let failed = |source| OciError::File { what: "process", path: path.into(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_SIZE).read_to_end(&mut bytes).map_err(failed)?;
    let wrong = |source| OciError::Json { path: path.into(), source };
    let mut process = serde_json::from_slice(&bytes).map_err(wrong)?;
    let strict = Config::load(&host.paths.config)?.strict;
    let ignored = decide(&mut process, "process", Terms { strict, cgroup: false })
        .map_err(SandboxError::from)?;
    host.log.ignored(&ignored);
    serde_json::from_value(process).map_err(wrong)
}

/// A process as a file without a name: it is too long for a message.
fn sealed(process: &Process) -> std::io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("process", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(process)?)?;
    file.rewind()?;
    Ok(file.into())
}

/// A process's streams, connected to ours, or to a terminal whose controlling end the caller has.
pub struct Streamed {
    /// Each resolves at the end of an output.
    pub outputs: Vec<oneshot::Receiver<()>>,
    pub terminal: Option<RawTerminal>,
}

impl Streamed {
    pub fn begin(
        streams: Streams,
        has_terminal: bool,
        socket: Option<&Path>,
        detached: bool,
    ) -> Result<Self> {
        if detached {
            let left = rustix::process::setsid().map(drop).map_err(Into::into);
            left.map_err(|e| OciError::Host("leave the session", e))?;
        }
        let mut raw = None;
        match (has_terminal, socket) {
            (true, Some(socket)) => {
                let console = Console::send(socket)?;
                console.enter().map_err(|e| OciError::Host("enter the terminal", e))?;
            }
            (true, None) if terminal::is_terminal() => {
                let entered = RawTerminal::enter();
                raw = Some(entered.map_err(|e| OciError::Host("make the terminal raw", e))?);
            }
            _ => {}
        }
        let outputs = stdio::connect(streams, &FirstByte::default(), None, None);
        let outputs = outputs.map_err(|e| OciError::Host("attach the standard streams", e))?;
        Ok(Self { outputs, terminal: raw })
    }
}
