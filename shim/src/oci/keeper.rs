//! `create` and `run`: the process that stands for a container and runs its sandbox.
//!
//! ```text
//!  create ── fork ──▶ keeper: VM boots, container parked ──▶ serves control.sock ──▶ ends with the container's code
//!     └─ waits ◀──────── a byte: it is there ─────┘
//! ```

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::sleep};

use super::{
    Host, OciError, Result, cgroup,
    cli::{CreateArgs, RunArgs},
    containers::Record,
    create::{self, Parked, Plan},
    exec::Streamed,
    namespaces, pid_file,
};
use crate::{
    commands::run::detach::{self, Background, Side},
    control::{Container, Phase, Server},
    error::Report,
    event_loop::event_loop,
    registry::Ended,
    sandbox::{Exit, ProcessId, Sandbox},
    signals::{Signals, Wish},
    task::Bundle,
    terminal,
    timestamp::Timestamp,
};

/// How long what a dead VM left in the streams may take to be written out.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What becomes of the process that was called.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Manner {
    /// It returns as soon as the container is there.
    detached: bool,
    /// The command runs without being asked for.
    started: bool,
    /// The state is left when the container has ended.
    kept: bool,
}

pub fn create(args: &CreateArgs, host: &Host) -> Result<u8> {
    begin(args, host, Manner { detached: true, started: false, kept: true })
}

pub fn run(args: &RunArgs, host: &Host) -> Result<u8> {
    let kept = args.keep || args.detach;
    begin(&args.create, host, Manner { detached: args.detach, started: true, kept })
}

fn begin(args: &CreateArgs, host: &Host, manner: Manner) -> Result<u8> {
    refuse_descriptors(args.preserve_fds)?;
    let bundle = create::read_bundle(&args.bundle)?;
    check_terminal(create::process(&bundle)?.terminal() == Some(true), args, manner)?;
    let forked = manner.detached.then(detach::fork).transpose();
    let background = match forked.map_err(|e| OciError::Host("go to the background", e))? {
        Some(Side::Parent(0)) => return Ok(0),
        // The child has said why.
        Some(Side::Parent(_)) => return Ok(super::FAILURE),
        Some(Side::Child(background)) => Some(background),
        None => None,
    };
    let plan = create::plan(&args.id, bundle, host)?;
    let network = plan.network.clone();
    namespaces::stand_in(&network, || {
        let runtime = event_loop().map_err(|e| OciError::Host("start the event loop", e))?;
        let kept = runtime.block_on(keep(args, plan, host, manner, background));
        // A thread that reads standard input cannot be called back.
        runtime.shutdown_background();
        kept
    })
}

pub fn refuse_descriptors(count: u32) -> Result<()> {
    match count {
        0 => Ok(()),
        _ => Err(OciError::refused(
            "--preserve-fds",
            "descriptors of the host cannot be passed into a VM",
        )),
    }
}

fn check_terminal(wanted: bool, args: &CreateArgs, manner: Manner) -> Result<()> {
    match (wanted, &args.console_socket) {
        (true, None) if manner.detached => Err(OciError::refused(
            "process.terminal",
            "cannot allocate tty without --console-socket, as nobody stays here to have it",
        )),
        (true, Some(_)) if !manner.detached => {
            Err(OciError::refused("--console-socket", "cannot be used by who does not detach"))
        }
        (false, Some(_)) => Err(OciError::refused(
            "--console-socket",
            "the process is to have no terminal (process.terminal)",
        )),
        _ => Ok(()),
    }
}

async fn keep(
    args: &CreateArgs,
    mut plan: Plan,
    host: &Host,
    manner: Manner,
    background: Option<Background>,
) -> Result<u8> {
    let mut claim = host.containers.claim(record(&args.id, &plan.bundle))?;
    if manner.kept {
        claim.cgroup(cgroup::enter(&plan.bundle.spec)?);
    }
    let id = plan.id.clone();
    let first = create::process(&plan.bundle)?.clone();
    let has_terminal = plan.bundle.terminal();
    // From here on signals are ours: what was begun is ended in order.
    let mut signals = Signals::listen().map_err(|e| OciError::Host("listen for signals", e))?;
    let parked = tokio::select! {
        biased;
        parked = create::create(&mut plan, host) => parked,
        _ = signals.end() => Err(OciError::Interrupted),
    };
    if parked.is_err() {
        plan.hooks.stopped().await;
    }
    let Parked { sandbox, created } = parked?;
    let process = ProcessId::init(id.clone());
    let container = Arc::new(Container {
        sandbox: sandbox.clone(),
        id,
        process: first,
        journal: None,
        hermetic: false,
        config: host.paths.config.clone(),
        phase: Phase::default(),
    });
    let server = Server::start(claim.folder(), container.clone())
        .map_err(|e| OciError::Host("open the control socket", e))?;
    let streams = Streamed::begin(
        created.streams,
        has_terminal,
        args.console_socket.as_deref(),
        manner.detached,
    )?;
    if manner.started {
        container.start().await?;
        plan.hooks.started(std::process::id()).await?;
    }
    pid_file::write(args.pid_file.as_deref())?;
    claim.created()?;
    if let Some(background) = background {
        background.stay().map_err(|e| OciError::Host("go to the background", e))?;
    }
    let exit = attend(&sandbox, &process, &mut signals).await?;
    container.ended();
    drained(&sandbox, streams.outputs, exit.death.is_some()).await;
    drop(streams.terminal);
    tell(&exit, host, has_terminal);
    sandbox.shutdown().await;
    if !manner.kept {
        plan.hooks.stopped().await;
        claim.forget();
    }
    let code = exit.status;
    server.finish(Ended::from(exit)).await;
    drop(claim);
    Ok(code)
}

fn record(id: &str, bundle: &Bundle) -> Record {
    Record {
        oci_version: bundle.spec.version().clone(),
        id: id.into(),
        pid: std::process::id(),
        bundle: bundle.path.clone(),
        rootfs: bundle.root(),
        created: Timestamp::now(),
        owner: rustix::process::geteuid().as_raw(),
        annotations: bundle.spec.annotations().clone().unwrap_or_default(),
        cgroup: None,
        complete: false,
    }
}

/// Passes signals on until the process has ended.
async fn attend(sandbox: &Sandbox, process: &ProcessId, signals: &mut Signals) -> Result<Exit> {
    let end = sandbox.wait(process);
    tokio::pin!(end);
    loop {
        tokio::select! {
            exit = &mut end => return Ok(exit?),
            wish = signals.next() => {
                let (sandbox, process) = (sandbox.clone(), process.clone());
                // One that fails does so because the process or its VM has just ended, which the wait sees.
                tokio::spawn(async move {
                    match wish {
                        Wish::Forward(signal) => {
                            let _ = sandbox.signal(&process, signal.unsigned_abs(), false).await;
                        }
                        Wish::Resize => if let Some((width, height)) = terminal::size() {
                            let _ = sandbox.resize(&process, width, height).await;
                        }
                    }
                });
            }
        }
    }
}

/// Waits until all output has been written out. A slow reader may take its time while the VM lives.
async fn drained(sandbox: &Sandbox, outputs: Vec<oneshot::Receiver<()>>, dead: bool) {
    let all = async {
        for output in outputs {
            let _ = output.await;
        }
    };
    let too_late = async {
        if !dead {
            sandbox.ended().await;
        }
        sleep(LAST_WORDS).await;
    };
    tokio::select! {
        () = all => {}
        () = too_late => {}
    }
}

/// Why it ended, if its VM ended it: where the container's own errors go, and to the caller's log.
fn tell(exit: &Exit, host: &Host, has_terminal: bool) {
    let Some(death) = exit.death.as_deref().filter(|death| !death.is_orderly()) else { return };
    if has_terminal {
        host.log.write(&Report::new("run", death, exit.status).message);
    } else {
        host.log.failed("run", death, exit.status);
    }
}
