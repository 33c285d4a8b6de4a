//! `ampoule run`: one container in a sandbox of its own, in the foreground.

mod env;
mod supervise;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{FAILURE, image};
use crate::{
    cli::{ContainerArgs, RunArgs, SecurityOption},
    error::report,
    id::{BadId, Id},
    image::{Image, ImageError},
    name::{HeldName, NameError},
    paths::Paths,
    rootfs::{self, Prepared, RootFsError},
    run_spec::{RunOptions, RunSpecError, SeccompChoice, hostname, run_spec},
    sandbox::{
        ContainerConfig, Created, Exit, ProcessId, Sandbox, SandboxConfig, SandboxError,
        StartFailure, Stdio,
    },
    signals::Signals,
    terminal,
    text::complain,
    timings::Timings,
};
use supervise::Supervised;

/// Why nothing was run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Id(#[from] BadId),
    #[error(transparent)]
    Spec(#[from] RunSpecError),
    #[error(transparent)]
    RootFs(#[from] RootFsError),
    #[error("the input is not a terminal: leave out -t, or -i, or run it from one")]
    NotATerminal,
    /// A file that an option names.
    #[error("{}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A signal came before the workload ran.
    #[error("interrupted")]
    Interrupted(i32),
}

impl RunError {
    /// The process's exit code, as docker's.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Sandbox(SandboxError::Start { source: StartFailure::NotFound(_), .. }) => 127,
            Self::Sandbox(SandboxError::Start {
                source: StartFailure::NotExecutable(_), ..
            }) => 126,
            Self::Interrupted(signal) => u8::try_from(128 + signal).unwrap_or(FAILURE),
            _ => FAILURE,
        }
    }
}

/// Runs, prints what went wrong, and returns the exit code.
pub fn run(args: &RunArgs, paths: &Paths, mut timings: Timings) -> u8 {
    let code = match run_image(args, paths, &mut timings) {
        Ok(exit) => finish(args, &exit),
        Err(error) => {
            if !matches!(error, RunError::Interrupted(_)) {
                complain(&report("run", &error));
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
fn run_image(args: &RunArgs, paths: &Paths, timings: &mut Timings) -> Result<Exit, RunError> {
    if args.tty && args.interactive && !terminal::is_terminal() {
        return Err(RunError::NotATerminal);
    }
    let image = image::obtain(args.image(), args.pull, paths)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| RunError::Host("start the event loop", e))?;
    runtime.block_on(run_async(args, paths, image, timings))
}

async fn run_async(
    args: &RunArgs,
    paths: &Paths,
    image: Image,
    timings: &mut Timings,
) -> Result<Exit, RunError> {
    let (name, _held) = name(args, paths)?;
    // From here on signals are ours: what was begun is ended in order.
    let mut signals = Signals::listen().map_err(|e| RunError::Host("listen for signals", e))?;
    let (sandbox, process, created) = tokio::select! {
        biased;
        prepared = prepare(args, paths, &image, &name, timings) => prepared?,
        signal = signals.end() => return Err(RunError::Interrupted(signal)),
    };
    let supervised = Supervised { sandbox: &sandbox, process: &process, signals: &mut signals };
    let (exit, first_byte) = supervised.run(args, created).await?;
    let death = sandbox.shutdown().await;
    timings.ended(first_byte, death.exits);
    Ok(exit)
}

/// A name given is held against others; a random one needs no lock.
fn name(args: &RunArgs, paths: &Paths) -> Result<(Id, Option<HeldName>), RunError> {
    match &args.name {
        Some(name) => Ok((name.clone(), Some(HeldName::take(&paths.state, name)?))),
        None => {
            let name = Id::random().map_err(|e| RunError::Host("draw a random name", e))?;
            Ok((name, None))
        }
    }
}

/// Boots a sandbox and puts the container into it, parked before its workload.
async fn prepare(
    args: &RunArgs,
    paths: &Paths,
    image: &Image,
    name: &Id,
    timings: &mut Timings,
) -> Result<(Sandbox, ProcessId, Created), RunError> {
    let spec = run_spec(&image.config, &options(args, name)?)?;
    let scratch = (!args.read_only).then_some(args.scratch_size.0);
    let Prepared { disks, rootfs } = rootfs::prepare(&image.rootfs, &paths.store, scratch, 1)?;
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
        cmdline: String::new(),
        boot_timeout: Duration::from_secs(args.boot_timeout.into()),
    })
    .await?;
    timings.booted(&sandbox.boot_record().await?);
    let stdio = Stdio { stdin: args.interactive, stdout: true, stderr: !args.tty };
    let config =
        ContainerConfig { id: name.clone(), spec, rootfs, stdio, init: args.container.init };
    let created = sandbox.create_container(config).await?;
    Ok((sandbox, ProcessId::init(name.clone()), created))
}

fn options(args: &RunArgs, name: &Id) -> Result<RunOptions, RunError> {
    let ContainerArgs { hostname, security_opt, .. } = &args.container;
    let mut options = RunOptions {
        command: args.command().to_vec(),
        env: env::variables(&args.container.env_file, &args.env)?,
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty.then(|| terminal::size().unwrap_or((0, 0))),
        hostname: hostname.clone().unwrap_or_else(|| name.to_string()),
        memory: args.memory.0,
        milli_cpus: args.cpus.quota(),
        pids_limit: args.pids_limit,
        read_only: args.read_only,
        entrypoint: args.container.entrypoint.clone(),
        cap_add: args.container.cap_add.clone(),
        cap_drop: args.container.cap_drop.clone(),
        privileged: args.container.privileged,
        ulimits: args.container.ulimit.clone(),
        sysctls: args.container.sysctl.clone(),
        tmpfs: args.container.tmpfs.clone(),
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

fn seccomp_file(path: &Path) -> Result<SeccompChoice, RunError> {
    let failed = |source| RunError::File { path: path.into(), source };
    let profile = fs::read(path).map_err(failed)?;
    let profile = serde_json::from_slice(&profile).map_err(|e| failed(e.into()))?;
    Ok(SeccompChoice::Profile(profile))
}

/// RAM of the VM: the container's limit, and for the guest kernel and agent 64 MiB and a sixteenth (its page
/// tables and page descriptors grow with the memory). So the limit is met in the container, not in the VM.
fn vm_memory_mib(limit: u64) -> u32 {
    let mib = limit.div_ceil(1 << 20);
    u32::try_from(mib + mib / 16 + 64).unwrap_or(u32::MAX)
}

/// Says how it ended, where the exit code alone does not.
fn finish(args: &RunArgs, exit: &Exit) -> u8 {
    if let Some(death) = exit.death.as_deref().filter(|death| !death.is_orderly()) {
        complain(&report("run: sandbox", death));
    } else if exit.oom && exit.status == 137 {
        let limit = args.memory;
        complain(&format!("ampoule: run: killed by the memory limit of {limit} (see --memory)\n"));
    }
    exit.status
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::vm::Death;

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
}
