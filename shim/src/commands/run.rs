//! `ampoule run`: one container in a sandbox of its own, in the foreground or, with `-d`, in the background.

mod caps;
pub(crate) mod detach;
mod hermetic;
mod network;
mod receipt;
mod supervise;

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use oci_spec::runtime::{Process, Spec};
use tokio::sync::oneshot;

use super::{
    FAILURE,
    env::{self, FileError},
    image,
};
use crate::{
    budget::Budget,
    cli::{ContainerArgs, DeviceOption, Memory, RunArgs, SecurityOption},
    config::ConfigError,
    control::{Container, Phase, Server},
    device::{self, Device, DeviceError},
    error::{exit_code, tell},
    event_loop::event_loop,
    id::Id,
    image::{Image, ImageError, Store},
    journal::Journal,
    pace::Pace,
    paths::Paths,
    registry::{Claim, Ended, Record, Registry, RegistryError},
    rootfs::{self, Mount, RootFsError, Scratch},
    run_spec::{BlockDevice, RunOptions, RunSpecError, SeccompChoice, hostname, run_spec},
    sandbox::{
        ContainerConfig, Created, Exit, FIRST_DISK, Fixed, HostFile, ProcessId, Sandbox,
        SandboxConfig, SandboxError, Stdio, Streams, spare_disks, vm_memory_mib,
    },
    share::{Share, ShareError},
    signal_name::Signal,
    signals::Signals,
    spec::needs_scratch,
    stdio::{self, FirstByte},
    terminal::{self, RawTerminal},
    text::{complain, print},
    timestamp::Timestamp,
    timings::Timings,
    vm::Death,
};
use caps::{Cap, Caps};
use detach::{Background, Side};
use hermetic::NotHermetic;
pub use network::RunNetworkError;
use receipt::Receipt;
use supervise::Supervised;

/// Why nothing was run, or why what ran did not come to its own end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Spec(#[from] RunSpecError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    RootFs(#[from] RootFsError),
    #[error("the input is not a terminal")]
    NotATerminal,
    #[error(transparent)]
    NotHermetic(#[from] NotHermetic),
    #[error(transparent)]
    Network(#[from] RunNetworkError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A signal came before the workload ran.
    #[error("interrupted")]
    Interrupted(i32),
    #[error("{0}")]
    Cap(Cap),
    #[error("killed by the memory limit of {limit}")]
    OutOfMemory { name: Id, limit: Memory },
    #[error("sandbox {name}")]
    Died { name: Id, source: Arc<Death> },
}

impl RunError {
    /// The process's exit code, as docker's.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Interrupted(signal) => u8::try_from(128 + signal).unwrap_or(FAILURE),
            other => exit_code(other),
        }
    }
}

/// Runs, prints what went wrong, and returns the exit code.
pub fn run(args: &mut RunArgs, paths: &Paths, mut timings: Timings) -> u8 {
    let result = match args.detach.then(detach::fork).transpose() {
        Ok(Some(Side::Parent(code))) => return code,
        Ok(Some(Side::Child(background))) => begin(args, paths, &mut timings, Some(background)),
        Ok(None) => begin(args, paths, &mut timings, None),
        Err(e) => Err(RunError::Host("go to the background", e)),
    };
    let code = match result {
        Ok(end) => {
            let code = end.exit.status;
            end.explained(args.memory).iter().for_each(|error| tell("run", error, code));
            code
        }
        Err(error) => {
            if !matches!(error, RunError::Interrupted(_)) {
                tell("run", &error, error.exit_code());
            }
            error.exit_code()
        }
    };
    if let Some(format) = args.timings {
        complain(&timings.print(format));
    }
    code
}

/// Gets the image, which blocks, and runs it.
fn begin(
    args: &mut RunArgs,
    paths: &Paths,
    timings: &mut Timings,
    background: Option<Background>,
) -> Result<End, RunError> {
    if args.tty && args.interactive && !args.detach && !terminal::is_terminal() {
        return Err(RunError::NotATerminal);
    }
    hermetic::check(args)?;
    if !args.hermetic {
        network::complete(&mut args.network, paths)?;
    }
    network::check(&args.network)?;
    let image = image::obtain(args.image(), args.pull, paths)?;
    let runtime = event_loop();
    let runtime = runtime.map_err(|e| RunError::Host("start the event loop", e))?;
    runtime.block_on(run_async(args, paths, image, timings, background))
}

async fn run_async(
    args: &RunArgs,
    paths: &Paths,
    image: Image,
    timings: &mut Timings,
    background: Option<Background>,
) -> Result<End, RunError> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => Id::random().map_err(|e| RunError::Host("draw a random name", e))?,
    };
    let options = options(args, &name)?;
    let mut spec = run_spec(&image.config, &options)?;
    let shares = Share::all(&spec)?;
    let files = network::resolv_conf(&args.network, &mut spec);
    let first = spec.process().clone().unwrap_or_default();
    let caps = Caps::new(args);
    let receipt = args.receipt.as_deref();
    let receipt =
        receipt.map(|path| Receipt::begin(path, args, paths, &image, &spec)).transpose()?;
    let record = record(args, &image, &name, &first);
    let mut claim = Registry::new(&paths.state).claim(&name, record)?;
    // From here on signals are ours: what was begun is ended in order.
    let mut signals = Signals::listen().map_err(|e| RunError::Host("listen for signals", e))?;
    let (sandbox, created) = tokio::select! {
        biased;
        prepared = prepare(args, paths, &image, &name, (spec, shares, files), timings) => prepared?,
        signal = signals.end() => return Err(RunError::Interrupted(signal)),
    };
    let process = ProcessId::init(name.clone());
    let connected = connect(args, &claim, created.streams, caps.budget())?;
    sandbox.start(&process).await?;
    let journal = connected.journal;
    let container = Container {
        sandbox: sandbox.clone(),
        id: name.clone(),
        process: first,
        journal,
        hermetic: args.hermetic,
        config: paths.config.clone(),
        members: None,
        is_member: false,
        phase: Phase::running(),
    };
    let server = Server::start(claim.folder(), Arc::new(container))
        .map_err(|e| RunError::Host("open the control socket", e))?;
    claim.started(Timestamp::now())?;
    if let Some(background) = background {
        print(&format!("{name}\n"));
        let entered = background.enter(claim.folder());
        entered.map_err(|e| RunError::Host("go to the background", e))?;
    }
    let supervised =
        Supervised { sandbox: &sandbox, process: &process, signals: &mut signals, caps: &caps };
    let (exit, cap) = supervised.run(connected.outputs).await?;
    drop(connected.terminal);
    let death = sandbox.end().await;
    timings.ended(connected.first_byte.load(Ordering::Relaxed), death.exits);
    let mut ended = Ended::from(exit.clone());
    ended.reason = cap.map(|cap| format!("{cap} ({})", cap.option())).or(ended.reason);
    settle(args, claim, server, ended.clone()).await?;
    receipt.map(|receipt| receipt.finish(ended)).transpose()?;
    Ok(End { name, exit, cap })
}

/// Records or forgets the sandbox, and only then tells of its end: who waited finds everything done.
async fn settle(
    args: &RunArgs,
    claim: Claim,
    server: Server,
    ended: Ended,
) -> Result<(), RunError> {
    let kept = if args.detach && !args.rm {
        claim.ended(ended.clone())
    } else {
        drop(claim);
        Ok(())
    };
    server.finish(ended).await;
    Ok(kept?)
}

/// A container's streams, connected.
struct Connected {
    /// Each resolves at the end of an output.
    outputs: Vec<oneshot::Receiver<()>>,
    first_byte: FirstByte,
    terminal: Option<RawTerminal>,
    journal: Option<Arc<Journal>>,
}

/// To our own streams or, in the background, to the log.
fn connect(
    args: &RunArgs,
    claim: &Claim,
    streams: Streams,
    budget: Option<&Arc<Budget>>,
) -> Result<Connected, RunError> {
    let first_byte = FirstByte::default();
    if args.detach {
        let (journal, outputs) = Journal::begin(claim.folder(), streams)
            .map_err(|e| RunError::Host("begin the log", e))?;
        return Ok(Connected { outputs, first_byte, terminal: None, journal: Some(journal) });
    }
    let terminal = (args.tty && args.interactive).then(RawTerminal::enter).transpose();
    let terminal = terminal.map_err(|e| RunError::Host("make the terminal raw", e))?;
    let outputs = stdio::connect(streams, &first_byte, budget, None)
        .map_err(|e| RunError::Host("attach the standard streams", e))?;
    Ok(Connected { outputs, first_byte, terminal, journal: None })
}

/// What is to be known of the sandbox by other commands.
fn record(args: &RunArgs, image: &Image, name: &Id, first: &Process) -> Record {
    // An image's mistake here is no reason not to run it.
    let images = || image.config.stop_signal.as_deref().and_then(|s| s.parse().ok());
    Record {
        name: name.to_string(),
        image: args.image().into(),
        digest: image.digest.clone(),
        command: first.args().clone().unwrap_or_default(),
        created: Timestamp::now(),
        started: None,
        ended: None,
        pid: std::process::id(),
        detached: args.detach,
        remove: !args.detach || args.rm,
        terminal: args.tty,
        interactive: args.interactive,
        memory: args.memory.0,
        vcpus: args.cpus.vcpus(),
        boot_timeout: args.boot_timeout,
        network: args.network.choice().to_string(),
        ports: args.network.publish.iter().map(ToString::to_string).collect(),
        egress: args.network.egress.as_ref().map(ToString::to_string),
        stop_signal: args.stop_signal.or_else(images).unwrap_or(Signal::TERM),
        stop_timeout: args.stop_timeout,
        labels: args.label.iter().map(|label| key_and_value(label)).collect(),
    }
}

fn key_and_value(label: &str) -> (String, String) {
    let (key, value) = label.split_once('=').unwrap_or((label, ""));
    (key.into(), value.into())
}

/// Boots a sandbox and puts the container into it, parked before its workload.
async fn prepare(
    args: &RunArgs,
    paths: &Paths,
    image: &Image,
    name: &Id,
    (spec, shares, files): (Spec, Vec<Share>, Vec<HostFile>),
    timings: &mut Timings,
) -> Result<(Sandbox, Created), RunError> {
    let scratch = Scratch { size: args.scratch_size.0, lasts: false };
    let scratch = needs_scratch(&spec).then_some(scratch);
    let store = Store::open(&paths.store)?;
    let mounts = [Mount::image(&image.rootfs)];
    let prepared = rootfs::prepare(&store, &mounts, Path::new(""), scratch)?;
    let (disks, rootfs) = prepared.with_devices(Device::all(&spec)?)?.from_slot(FIRST_DISK);
    let boot_timeout = Duration::from_secs(args.boot_timeout.into());
    let room = spare_disks(disks.len(), 0, !shares.is_empty());
    let network =
        network::connect(&args.network, room, args.cpus.vcpus(), Pace::of(boot_timeout)).await?;
    let (sandbox, _events) = Sandbox::create(SandboxConfig {
        name: name.clone(),
        hostname: hostname(name.as_str()).to_string(),
        vcpus: args.cpus.vcpus(),
        memory_mib: vm_memory_mib(args.memory.0),
        vmm: paths.vmm.clone(),
        kernel: paths.kernel.clone(),
        guest_image: paths.guest.clone(),
        disks,
        spare_disks: 0,
        network,
        cmdline: String::new(),
        seeded: args.seed.is_some(),
        boot_timeout,
        oom_score_adj: 0,
        fsd: (!shares.is_empty()).then(|| paths.fsd.clone()),
    })
    .await?;
    timings.booted(&sandbox.boot_record().await?);
    let stdio = Stdio { stdin: args.interactive, stdout: true, stderr: !args.tty };
    let config = ContainerConfig {
        id: name.clone(),
        spec,
        rootfs,
        upper: None,
        stdio,
        init: args.container.init,
        fixed: Fixed {
            clock: args.clock.map(|clock| clock.0.0),
            seed: args.seed.map(|seed| seed.0),
        },
        files,
        binds: Vec::new(),
        shares,
        joins: None,
    };
    let created = sandbox.create_container(config).await?;
    Ok((sandbox, created))
}

fn options(args: &RunArgs, name: &Id) -> Result<RunOptions, RunError> {
    let ContainerArgs { hostname, security_opt, .. } = &args.container;
    let default = if args.hermetic { hermetic::HOSTNAME } else { name.as_str() };
    let mut options = RunOptions {
        command: args.command().to_vec(),
        env: [env::from_files(&args.container.env_file)?, env::given(&args.env)].concat(),
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty.then(|| terminal::size().unwrap_or((0, 0))),
        hostname: hostname.clone().unwrap_or_else(|| default.into()),
        memory: args.memory.0,
        milli_cpus: args.cpus.quota(),
        pids_limit: args.pids_limit,
        read_only: args.read_only,
        entrypoint: args.container.entrypoint.clone(),
        cap_add: args.container.cap_add.clone(),
        cap_drop: args.container.cap_drop.clone(),
        privileged: args.container.privileged,
        seeded: args.seed.is_some(),
        ulimits: args.container.ulimit.clone(),
        sysctls: args.container.sysctl.clone(),
        tmpfs: args.container.tmpfs.clone(),
        volumes: args.container.volume.clone(),
        devices: args.container.device.iter().map(device).collect::<Result<_, _>>()?,
        shm_size: Some(args.container.shm_size.0),
        ..Default::default()
    };
    for option in security_opt {
        match option {
            SecurityOption::SeccompUnconfined => options.seccomp = SeccompChoice::Unconfined,
            SecurityOption::SeccompFile(path) => options.seccomp = seccomp_file(path)?,
            SecurityOption::NoNewPrivileges(on) => options.no_new_privileges = *on,
            SecurityOption::SystemPathsUnconfined => options.open_system_paths = true,
        }
    }
    Ok(options)
}

fn device(option: &DeviceOption) -> Result<BlockDevice, RunError> {
    let path = &option.source;
    let found = fs::metadata(path).map_err(FileError::of("--device", path))?;
    let Some(number) = device::number(&found) else {
        return Err(DeviceError::NotBlock { path: path.clone() }.into());
    };
    let (path, access) = (option.path.clone(), option.access.clone());
    let (mode, uid, gid) = (found.mode() & 0o7777, found.uid(), found.gid());
    Ok(BlockDevice { number, path, access, mode, uid, gid })
}

fn seccomp_file(path: &Path) -> Result<SeccompChoice, RunError> {
    let failed = FileError::of("--security-opt seccomp", path);
    let profile = fs::read(path).map_err(failed)?;
    let profile = serde_json::from_slice(&profile).map_err(|e| failed(e.into()))?;
    Ok(SeccompChoice::Profile(profile))
}

/// How a run ended.
struct End {
    name: Id,
    exit: Exit,
    cap: Option<Cap>,
}

impl End {
    /// Why it ended so, where the exit code alone does not say it.
    fn explained(self, limit: Memory) -> Option<RunError> {
        let Self { name, exit, cap } = self;
        match (cap, exit.death.filter(|death| !death.is_orderly())) {
            (Some(cap), _) => Some(RunError::Cap(cap)),
            (None, Some(source)) => Some(RunError::Died { name, source }),
            (None, None) if exit.oom_kills > 0 && exit.status == 137 => {
                Some(RunError::OutOfMemory { name, limit })
            }
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{sandbox::StartFailure, vm::Death};

    #[test]
    fn exit_codes_are_dockers() {
        let process = ProcessId::init("c".parse().unwrap());
        let start =
            |source| RunError::Sandbox(SandboxError::Start { process: process.clone(), source });
        for (error, code) in [
            (start(StartFailure::NotFound(String::new())), 127),
            (start(StartFailure::NotExecutable(String::new())), 126),
            (RunError::Sandbox(SandboxError::Gone(Arc::new(Death::lost()))), 125),
            (RunError::NotATerminal, 125),
            (RunError::Spec(RunSpecError::NoCommand), 125),
            (RunError::Interrupted(libc::SIGINT), 130),
            (RunError::Interrupted(libc::SIGTERM), 143),
        ] {
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }

    #[test]
    fn the_vm_has_more_memory_than_its_container() {
        for (limit, mib) in [(1, 65), (64 << 20, 132), (512 << 20, 608), (1 << 40, 1_114_176)] {
            assert_eq!(vm_memory_mib(limit), mib);
        }
        assert_eq!(vm_memory_mib(u64::MAX), u32::MAX);
    }

    #[test]
    fn a_label_without_a_value_has_an_empty_one() {
        assert_eq!(key_and_value("a=b=c"), ("a".into(), "b=c".into()));
        assert_eq!(key_and_value("a"), ("a".into(), String::new()));
    }
}
