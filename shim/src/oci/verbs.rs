//! The short-lived verbs: each finds the container on disk, asks its keeper, and prints or returns.

use std::{
    fs::{self, File},
    io::Read,
    os::fd::OwnedFd,
    path::Path,
    time::Duration,
};

use oci_spec::runtime::Spec;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::{
    Host, OciError, Result,
    block_io::BlockIo,
    cgroup,
    cli::{DeleteArgs, KillArgs, ListArgs, PsArgs, SpecArgs, TableFormat, UpdateArgs},
    containers::Found,
    create,
};
pub use crate::control::Status;
use crate::{
    config::Config,
    control::{Connection, ControlError, Request, Response},
    event_loop::event_loop,
    sandbox::SandboxError,
    spec::{Terms, decide_resources},
    text::print,
    vm::watch,
};

/// How long a keeper may take to be gone once it has no choice.
const GONE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);
/// More than this are no resources.
const MAX_RESOURCES: u64 = 8 << 10;

/// Runs what waits for a keeper's answers.
pub fn wait_for<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = event_loop().map_err(|e| OciError::Host("start the event loop", e))?;
    runtime.block_on(work)
}

pub fn connect(found: &Found) -> Result<Connection> {
    Connection::open(&found.folder, found.record.boot_timeout)
        .map_err(|e| OciError::Control(found.id.to_string(), e))
}

/// How far a container is. What ends just now has ended.
pub async fn status(found: &Found) -> Result<Status> {
    match (found.kept, found.record.complete) {
        (false, _) => return Ok(Status::Stopped),
        (true, false) => return Ok(Status::Creating),
        (true, true) => {}
    }
    let asked = match Connection::open(&found.folder, found.record.boot_timeout) {
        Ok(connection) => connection.call(&Request::Status).await,
        Err(error) => Err(error),
    };
    match asked {
        Ok((Response::Status(status), _)) => Ok(status),
        Ok(_) => Err(OciError::Control(found.id.to_string(), ControlError::Unexpected)),
        Err(ControlError::Gone) => Ok(Status::Stopped),
        Err(error) => Err(OciError::Control(found.id.to_string(), error)),
    }
}

/// Asks a container's keeper for what it answers with nothing.
async fn ask(found: &Found, request: &Request) -> Result<()> {
    connect(found)?.ask(request).await.map_err(|error| match error {
        ControlError::Gone => OciError::NotRunning(found.id.to_string()),
        error => OciError::asked(found.id.as_str(), error),
    })
}

pub fn start(id: &str, host: &Host) -> Result<u8> {
    let found = host.containers.find(id)?;
    wait_for(async {
        match status(&found).await? {
            Status::Created => {
                let hooks = create::hooks(&found)?;
                let keeper = keeper(&found);
                let mut ran = ask(&found, &Request::Start).await;
                if ran.is_ok() {
                    ran = hooks.started(found.record.pid).await.map_err(OciError::from);
                    if ran.is_err() {
                        // As with runc, the container does not outlive a failure.
                        end(&found).await;
                    }
                }
                if ran.is_err() {
                    // It ends with that. Docker looks at once, and deletes only what its shim knows to have ended.
                    ended(keeper).await;
                }
                ran
            }
            other => Err(OciError::State { id: id.into(), verb: "start", status: other.name() }),
        }
    })?;
    Ok(0)
}

pub fn state(id: &str, host: &Host) -> Result<u8> {
    let found = host.containers.find(id)?;
    let status = wait_for(status(&found))?;
    print(&format!("{:#}\n", described(&found, status)));
    Ok(0)
}

/// The state of runtime.md, with what runc adds to it.
fn described(found: &Found, status: Status) -> Value {
    let record = &found.record;
    let pid = if status == Status::Stopped { 0 } else { record.pid };
    json!({
        "ociVersion": record.oci_version,
        "id": record.id,
        "pid": pid,
        "status": status.name(),
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "created": record.created.to_string(),
        "owner": "",
        "annotations": record.annotations,
    })
}

pub fn kill(args: &KillArgs, host: &Host) -> Result<u8> {
    let found = host.containers.find(&args.id)?;
    let signal = Request::Signal { signal: args.signal.number(), all: args.all };
    wait_for(async {
        match status(&found).await? {
            // As runc: all of none.
            Status::Stopped if args.all => Ok(()),
            Status::Stopped | Status::Creating => Err(OciError::NotRunning(args.id.clone())),
            _ => match ask(&found, &signal).await {
                // It ended while it was asked.
                Err(_) if status(&found).await? == Status::Stopped => {
                    Err(OciError::NotRunning(args.id.clone()))
                }
                asked => asked,
            },
        }
    })?;
    Ok(0)
}

pub fn delete(args: &DeleteArgs, host: &Host) -> Result<u8> {
    let found = match host.containers.find(&args.id) {
        Err(OciError::NotFound(_)) if args.force => return Ok(0),
        found => found?,
    };
    wait_for(async {
        match status(&found).await? {
            Status::Stopped => {}
            Status::Created => end(&found).await,
            _ if args.force => end(&found).await,
            other => {
                return Err(OciError::NotStopped { id: args.id.clone(), status: other.name() });
            }
        }
        gone(&found).await?;
        // Those of a bundle that is gone cannot be run.
        if let Ok(hooks) = create::hooks(&found) {
            hooks.stopped().await;
        }
        Ok(())
    })?;
    cgroup::remove(found.record.cgroup.as_deref());
    host.containers.remove(&found.id)?;
    Ok(0)
}

/// Ends a container's VM. One that ends by itself meanwhile need not be told.
async fn end(found: &Found) {
    let _ = ask(found, &Request::Shutdown).await;
}

/// Waits until a container's keeper is gone, in the end by force.
async fn gone(found: &Found) -> Result<()> {
    let slow = |why| OciError::Slow { id: found.id.to_string(), why };
    if !free(found, GONE).await {
        kill_keeper(found);
        if !free(found, GONE).await {
            return Err(slow("the process that stands for it does not end"));
        }
    }
    Ok(())
}

async fn free(found: &Found, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while found.is_kept() {
        if Instant::now() > deadline {
            return false;
        }
        sleep(PAUSE).await;
    }
    true
}

fn kill_keeper(found: &Found) {
    if let Some(keeper) = keeper(found) {
        let _ = pidfd_send_signal(&keeper, Signal::KILL);
    }
}

/// The process that stands for it, while there is one.
fn keeper(found: &Found) -> Option<OwnedFd> {
    let pid = i32::try_from(found.record.pid).ok().and_then(Pid::from_raw)?;
    let keeper = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // Only now is it sure whose process that is: while the lock is held, it is the one in the record.
    found.is_kept().then_some(keeper)
}

/// Waits until a keeper's parent is told of its end, which is later than its lock is free.
async fn ended(keeper: Option<OwnedFd>) {
    let Some(Ok(keeper)) = keeper.map(watch) else { return };
    let _ = timeout(GONE, keeper.readable()).await;
}

pub fn ps(args: &PsArgs, host: &Host) -> Result<u8> {
    let found = host.containers.find(&args.id)?;
    // Programs look for what they are told on the host: `docker top` would find others there.
    let on_host = args.format == TableFormat::Json;
    let pids = wait_for(async {
        match status(&found).await? {
            Status::Stopped | Status::Creating => {
                return Err(OciError::NotRunning(args.id.clone()));
            }
            _ if on_host => return Ok(vec![found.record.pid]),
            _ => {}
        }
        let failed = |e| OciError::Control(args.id.clone(), e);
        match connect(&found)?.call(&Request::Pids).await.map_err(failed)? {
            (Response::Pids(pids), _) => Ok(pids),
            _ => Err(failed(ControlError::Unexpected)),
        }
    })?;
    match args.format {
        TableFormat::Json => print(&format!("{}\n", json!(pids))),
        TableFormat::Table => {
            let lines = pids.iter().map(|pid| format!("{pid}\n"));
            print(&format!("PID\n{}", lines.collect::<String>()));
        }
    }
    Ok(0)
}

pub fn list(args: &ListArgs, host: &Host) -> Result<u8> {
    let all = host.containers.list()?;
    let all = wait_for(async {
        let mut states = Vec::new();
        for found in &all {
            states.push(described(found, status(found).await?));
        }
        Ok(states)
    })?;
    let text = |state: &Value, key: &str| {
        state[key].as_str().map_or_else(|| state[key].to_string(), String::from)
    };
    if args.quiet {
        all.iter().for_each(|state| print(&format!("{}\n", text(state, "id"))));
    } else if args.format == TableFormat::Json {
        print(&format!("{}\n", json!(all)));
    } else {
        let row = |cells: [&str; 5]| {
            let [id, pid, status, bundle, created] = cells;
            print(&format!("{id:<20} {pid:<8} {status:<8} {bundle:<32} {created}\n"));
        };
        row(["ID", "PID", "STATUS", "BUNDLE", "CREATED"]);
        for state in &all {
            let cells = ["id", "pid", "status", "bundle", "created"].map(|key| text(state, key));
            row(cells.each_ref().map(String::as_str));
        }
    }
    Ok(0)
}

pub fn pause(id: &str, on: bool, host: &Host) -> Result<u8> {
    let found = host.containers.find(id)?;
    let (verb, from, request) = match on {
        true => ("pause", Status::Running, Request::Pause),
        false => ("resume", Status::Paused, Request::Resume),
    };
    wait_for(async {
        match status(&found).await? {
            status if status == from => ask(&found, &request).await,
            other => Err(OciError::State { id: id.into(), verb, status: other.name() }),
        }
    })?;
    Ok(0)
}

pub fn update(args: &UpdateArgs, host: &Host) -> Result<u8> {
    let found = host.containers.find(&args.id)?;
    let path = &args.resources;
    let failed = |source| OciError::File { what: "resources", path: path.clone(), source };
    let mut resources = Vec::new();
    let read = match path == Path::new("-") {
        true => std::io::stdin().lock().take(MAX_RESOURCES).read_to_end(&mut resources),
        false => {
            File::open(path).and_then(|file| file.take(MAX_RESOURCES).read_to_end(&mut resources))
        }
    };
    read.map_err(failed)?;
    let strict = Config::load(&host.paths.config)?.strict;
    let record = &found.record;
    let cgroup = record.cgroup.as_deref().filter(|_| record.sandbox.is_none());
    let terms = Terms { strict, cgroup: cgroup.is_some() };
    let (resources, ignored) = decide_resources(&resources, terms).map_err(SandboxError::from)?;
    host.log.ignored(&ignored);
    let (block_io, resources) = BlockIo::take_json(&resources)?;
    wait_for(async {
        if matches!(status(&found).await?, Status::Stopped | Status::Creating) {
            return Err(OciError::NotRunning(args.id.clone()));
        }
        block_io.map_or(Ok(()), |limits| limits.set(cgroup))?;
        ask(&found, &Request::Update(resources)).await
    })?;
    Ok(0)
}

/// As `runc spec`: a shell in a root file system that is not written to.
pub fn spec(args: &SpecArgs) -> Result<u8> {
    let path = args.bundle.join("config.json");
    let failed = |source| OciError::File { what: "specification", path: path.clone(), source };
    let mut spec = Spec::default();
    spec.set_hostname(Some("ampoule".into()));
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(true));
    }
    let text = serde_json::to_vec_pretty(&spec).map_err(|e| failed(e.into()))?;
    let mut file = fs::File::create_new(&path).map_err(failed)?;
    std::io::Write::write_all(&mut file, &text).map_err(failed)?;
    Ok(0)
}
