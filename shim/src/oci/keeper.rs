//! `create` and `run`: the process that stands for a container and runs its sandbox.
//!
//! ```text
//!  create ── fork ──▶ keeper: VM boots, container parked ──▶ serves control.sock ──▶ ends with the container's code
//!     └─ waits ◀──────── a byte: it is there ─────┘
//! ```

use std::sync::Arc;

use super::{
    Host, OciError, Result, cgroup,
    cli::{CreateArgs, RunArgs},
    containers::Record,
    create::{self, Plan},
    exec::Streamed,
    namespaces, pid_file,
    place::{End, Place},
    view::View,
};
use crate::{
    commands::run::detach::{self, Background, Side},
    error::Report,
    event_loop::event_loop,
    signals::Signals,
    timestamp::Timestamp,
};

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

pub fn create(args: &CreateArgs, host: &Arc<Host>) -> Result<u8> {
    begin(args, host, Manner { detached: true, started: false, kept: true })
}

pub fn run(args: &RunArgs, host: &Arc<Host>) -> Result<u8> {
    let kept = args.keep || args.detach;
    begin(&args.create, host, Manner { detached: args.detach, started: true, kept })
}

fn begin(args: &CreateArgs, host: &Arc<Host>, manner: Manner) -> Result<u8> {
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
    namespaces::stand_in(&network, |view| {
        let runtime = event_loop().map_err(|e| OciError::Host("start the event loop", e))?;
        let kept = runtime.block_on(keep(args, plan, host, manner, background, view));
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
    host: &Arc<Host>,
    manner: Manner,
    background: Option<Background>,
    view: Option<View>,
) -> Result<u8> {
    let mut claim = host.containers.claim(record(&args.id, &plan))?;
    if manner.kept || plan.block_io.is_some() {
        let cgroup = cgroup::enter(&plan.bundle.spec, host.systemd_cgroup)?;
        claim.cgroup(cgroup.clone());
        // Before anything is there that it would be too late for.
        plan.block_io.as_ref().map_or(Ok(()), |limits| limits.set(cgroup.as_deref()))?;
    }
    let has_terminal = plan.bundle.terminal();
    // From here on signals are ours: what was begun is ended in order.
    let mut signals = Signals::listen().map_err(|e| OciError::Host("listen for signals", e))?;
    let made = tokio::select! {
        biased;
        made = Place::make(&mut plan, host, claim.folder()) => made,
        _ = signals.end() => Err(OciError::Interrupted),
    };
    if made.is_err() {
        plan.hooks.stopped().await;
    }
    let (place, streams) = made?;
    view.map_or(Ok(()), |view| view.serve(claim.folder(), plan.config.sandbox.boot_timeout))?;
    let streams =
        Streamed::begin(streams, has_terminal, args.console_socket.as_deref(), manner.detached)?;
    if manner.started {
        place.start(&plan).await?;
        plan.hooks.started(std::process::id()).await?;
    }
    pid_file::write(args.pid_file.as_deref())?;
    claim.created()?;
    if let Some(background) = background {
        background.stay().map_err(|e| OciError::Host("go to the background", e))?;
    }
    let end = place.attend(&plan, &mut signals).await?;
    place.drained(streams.outputs, &end, &mut signals).await;
    drop(streams.terminal);
    tell(&end, host, has_terminal);
    place.shut_down().await;
    if !manner.kept {
        plan.hooks.stopped().await;
        claim.forget();
    }
    let code = end.ended.code;
    place.finish(end.ended).await;
    drop(claim);
    Ok(code)
}

fn record(id: &str, plan: &Plan) -> Record {
    let bundle = &plan.bundle;
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
        sandbox: plan.joins.as_ref().map(|joins| joins.sandbox.id.to_string()),
        boot_timeout: plan.config.sandbox.boot_timeout,
        complete: false,
    }
}

/// Why it ended, if its VM ended it: where the container's own errors go, and to the caller's log.
fn tell(end: &End, host: &Host, has_terminal: bool) {
    let Some(death) = end.death.as_deref().filter(|death| !death.is_orderly()) else { return };
    if has_terminal {
        host.log.write(&Report::new("run", death, end.ended.code).message);
    } else {
        host.log.failed("run", death, end.ended.code);
    }
}
