//! What an error is about, beyond its words: the phase, the object, the way out. Every error that a command can
//! end with is looked at here.

use std::{error::Error, fmt, io};

use ampoule_fsd_api::FsdError;
use ampoule_vmm_api::spawn::SpawnError;
use serde::{Deserialize, Serialize};

use super::chain;
use crate::{
    commands::{RunError, VerbError, install::InstallError},
    config::ConfigError,
    control::ControlError,
    device::DeviceError,
    image::{FormatError, ImageError},
    kvm,
    name::NameError,
    oci::OciError,
    registry::RegistryError,
    rootfs::RootFsError,
    run_spec::RunSpecError,
    sandbox::{SandboxError, SharesError, StartFailure},
    share::ShareError,
    task::TaskError,
    vm::{Death, KERNEL, VmError},
};

/// What a command was doing. The names are part of the JSON, and stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reading the command line and the files it names.
    Options,
    /// Reading `config.toml`.
    Config,
    /// Finding, reading and converting an image.
    Image,
    /// Fetching an image from a registry.
    Pull,
    /// Finding a sandbox, or taking the name for one, and speaking to it.
    Sandbox,
    /// Reading or writing the folder of sandboxes.
    State,
    /// Making the container's OCI spec.
    Spec,
    /// Opening and making the VM's disks.
    Disks,
    /// From starting the VMM to the agent's hello.
    Boot,
    /// Creating the container, up to just before its command.
    Create,
    /// Starting the command.
    Start,
    /// While the command ran.
    Run,
    /// Copying files into a container or out of it.
    Copy,
    /// What else this program needs of its host.
    Host,
}

impl Phase {
    /// As it is said before a message; empty where that alone says enough.
    pub fn word(self) -> &'static str {
        match self {
            Self::Options => "options",
            Self::Config => "config",
            Self::Image => "image",
            Self::Pull => "pull",
            Self::Sandbox => "sandbox",
            Self::State => "state",
            Self::Spec => "spec",
            Self::Disks => "disks",
            Self::Boot => "boot",
            Self::Create => "create",
            Self::Start => "start",
            Self::Run => "run",
            Self::Copy | Self::Host => "",
        }
    }
}

#[derive(Debug)]
pub(super) struct Facts {
    pub phase: Phase,
    pub object: Option<String>,
    pub hint: Option<String>,
}

impl Facts {
    fn at(phase: Phase) -> Self {
        Self { phase, object: None, hint: None }
    }

    fn of(self, object: impl fmt::Display) -> Self {
        Self { object: Some(object.to_string()), ..self }
    }

    fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// Of the error that a command ended with.
pub(super) fn of(error: &(dyn Error + 'static)) -> Facts {
    let mut facts = if let Some(error) = error.downcast_ref::<RunError>() {
        run(error)
    } else if let Some(error) = error.downcast_ref::<VerbError>() {
        verb(error)
    } else if let Some(error) = error.downcast_ref::<ImageError>() {
        image(error)
    } else if let Some(error) = error.downcast_ref::<SandboxError>() {
        sandbox(error)
    } else if let Some(error) = error.downcast_ref::<OciError>() {
        oci(error)
    } else if let Some(error) = error.downcast_ref::<TaskError>() {
        task(error)
    } else if let Some(error) = error.downcast_ref::<ConfigError>() {
        Facts::at(Phase::Config).of(error.object())
    } else if let Some(error) = error.downcast_ref::<InstallError>() {
        Facts::at(Phase::Host).of(error.path().display())
    } else {
        Facts::at(Phase::Host)
    };
    // What the system ran short of comes first: whatever was asked of it would have been refused.
    facts.hint = refusal(error).and_then(way_round).map(String::from).or(facts.hint);
    facts
}

fn run(error: &RunError) -> Facts {
    match error {
        RunError::Image(error) => image(error),
        RunError::Registry(error) => registry(error),
        RunError::Spec(error) => spec(error),
        RunError::Share(error) => share(error),
        RunError::Device(error) => device(error),
        RunError::RootFs(error) => rootfs(error),
        RunError::NotATerminal => Facts::at(Phase::Options)
            .of("-t")
            .hint("leave out -t, or -i, or run it from a terminal"),
        RunError::NotHermetic(_) => Facts::at(Phase::Options).of("--hermetic"),
        RunError::Network(error) => {
            let facts = Facts::at(Phase::Host).of(error.object());
            Facts { hint: error.hint().map(String::from), ..facts }
        }
        RunError::Config(error) => Facts::at(Phase::Config).of(error.object()),
        RunError::File(error) => Facts::at(Phase::Options).of(error.path.display()),
        RunError::Host(..) | RunError::Interrupted(_) => Facts::at(Phase::Host),
        RunError::Sandbox(error) => sandbox(error),
        RunError::Cap(cap) => {
            Facts::at(Phase::Run).of(cap.option()).hint(format!("{} sets this limit", cap.option()))
        }
        RunError::OutOfMemory { name, .. } => {
            Facts::at(Phase::Run).of(name).hint("--memory sets this limit")
        }
        RunError::Died { name, source } => {
            Facts { object: Some(name.to_string()), ..died(Phase::Run, source) }
        }
    }
}

/// Of a verb of the OCI command line.
fn oci(error: &OciError) -> Facts {
    match error {
        OciError::Sandbox(error) => sandbox(error),
        OciError::Task(error) => task(error),
        OciError::RootFs(error) => rootfs(error),
        OciError::Device(error) => device(error),
        OciError::Config(error) => Facts::at(Phase::Config).of(error.object()),
        OciError::Process(error) => spec(error),
        OciError::Control(_, ControlError::Failed(failure))
        | OciError::Answered(ControlError::Failed(failure)) => failure.facts(),
        OciError::Refused { object, .. } => Facts::at(Phase::Host).of(object),
        OciError::File { path, .. } | OciError::Json { path, .. } => {
            Facts::at(Phase::Host).of(path.display())
        }
        OciError::Id { .. }
        | OciError::NotFound(_)
        | OciError::Exists(_)
        | OciError::NotRunning(_)
        | OciError::State { .. }
        | OciError::NotStopped { .. }
        | OciError::Slow { .. }
        | OciError::Bundle(_)
        | OciError::Network(..)
        | OciError::Hook(_)
        | OciError::Control(..)
        | OciError::Answered(_)
        | OciError::Systemd(..)
        | OciError::Host(..)
        | OciError::Interrupted => Facts::at(Phase::Host),
    }
}

/// Of a call of containerd's.
fn task(error: &TaskError) -> Facts {
    match error {
        TaskError::Sandbox(error) => sandbox(error),
        TaskError::RootFs(error) => rootfs(error),
        TaskError::Device(error) => device(error),
        TaskError::Share(error) => share(error),
        TaskError::File { path, .. } => Facts::at(Phase::Host).of(path.display()),
        TaskError::NotFound(_)
        | TaskError::Exists(_)
        | TaskError::State { .. }
        | TaskError::Ended(_)
        | TaskError::Invalid(_)
        | TaskError::Unsupported(_)
        | TaskError::Leaving
        | TaskError::Slow { .. }
        | TaskError::Id(_)
        | TaskError::Bundle(_)
        | TaskError::Stdio(_)
        | TaskError::Anchor(_)
        | TaskError::Network(_)
        | TaskError::Hook(_)
        | TaskError::Host(..) => Facts::at(Phase::Host),
    }
}

fn device(error: &DeviceError) -> Facts {
    Facts::at(Phase::Disks).of(error.object())
}

fn share(error: &ShareError) -> Facts {
    let facts = Facts::at(Phase::Options).of(error.path().display());
    match error.hint() {
        Some(hint) => facts.hint(hint),
        None => facts,
    }
}

fn rootfs(error: &RootFsError) -> Facts {
    let disks = Facts::at(Phase::Disks);
    match error {
        RootFsError::Refused { object, .. } => disks.of(object),
        RootFsError::Open { path, .. } | RootFsError::InUse { path } => disks.of(path.display()),
        RootFsError::Convert(error) | RootFsError::Scratch(error) => {
            Facts { phase: Phase::Disks, ..image(error) }
        }
    }
}

fn verb(error: &VerbError) -> Facts {
    match error {
        VerbError::Registry(error) => registry(error),
        VerbError::Control(id, error) => {
            let facts = Facts::at(Phase::Sandbox).of(id);
            match error {
                ControlError::Silent(_) => facts.hint(format!("`ampoule rm -f {id}` ends it")),
                ControlError::Gone => facts.hint("`ampoule ps -a` tells what became of it"),
                ControlError::TooLong => facts.hint("hand a long script over on stdin, with -i"),
                ControlError::Failed(failure) => failure.facts(),
                _ => facts,
            }
        }
        VerbError::Not(id, _) => Facts::at(Phase::Sandbox).of(id),
        VerbError::Refused { name, hint, .. } => Facts::at(Phase::Sandbox).of(name).hint(*hint),
        VerbError::Options(_) => Facts::at(Phase::Options),
        VerbError::Copy { object, .. } => Facts::at(Phase::Copy).of(object),
        VerbError::Host(..) => Facts::at(Phase::Host),
    }
}

fn image(error: &ImageError) -> Facts {
    let phase = match error {
        ImageError::Reference(_) => Phase::Options,
        ImageError::Config(_) => Phase::Config,
        ImageError::Pull { .. } | ImageError::Given { .. } | ImageError::EventLoop { .. } => {
            Phase::Pull
        }
        _ => Phase::Image,
    };
    Facts { phase, object: error.object(), hint: error.hint() }
}

fn registry(error: &RegistryError) -> Facts {
    let sandbox = Facts::at(Phase::Sandbox);
    match error {
        RegistryError::Name(NameError::InUse(id)) => sandbox
            .of(id)
            .hint(format!("choose another --name, or end that one: `ampoule rm -f {id}`")),
        RegistryError::Ended(id) => sandbox
            .of(id)
            .hint(format!("choose another --name, or remove that one: `ampoule rm {id}`")),
        RegistryError::NotFound(name) => {
            sandbox.of(name).hint("`ampoule ps -a` lists what there is")
        }
        RegistryError::Ambiguous(name, _) => sandbox.of(name).hint("write more of the name"),
        RegistryError::Foreign { path, .. } => Facts::at(Phase::State)
            .of(path.display())
            .hint("set XDG_RUNTIME_DIR to a folder of yours"),
        RegistryError::Name(NameError::Io { path, .. }) | RegistryError::Io { path, .. } => {
            Facts::at(Phase::State).of(path.display())
        }
    }
}

fn spec(error: &RunSpecError) -> Facts {
    match error {
        RunSpecError::NoCommand => Facts::at(Phase::Options).hint("give a command after the image"),
        RunSpecError::Workdir(path) => Facts::at(Phase::Options).of(path),
        RunSpecError::Seccomp(_) => Facts::at(Phase::Options).of("--security-opt seccomp"),
        RunSpecError::Json(_) => Facts::at(Phase::Spec),
    }
}

fn sandbox(error: &SandboxError) -> Facts {
    match error {
        SandboxError::Boot(error) | SandboxError::Vm(error) => vm(error),
        SandboxError::Died { kernel, source, .. } => died(Phase::Boot, source).of(kernel.display()),
        SandboxError::Gone(death) => died(Phase::Run, death),
        SandboxError::Refused(_) | SandboxError::Disk(_) => Facts::at(Phase::Run),
        SandboxError::Spec(_) | SandboxError::Json(_) | SandboxError::Cpus(_) => {
            Facts::at(Phase::Spec)
        }
        SandboxError::Agent(_) | SandboxError::Network(_) => Facts::at(Phase::Create),
        SandboxError::Shares(error) => shares(error),
        SandboxError::Start { process, source } => {
            let facts = Facts::at(Phase::Start).of(&process.container);
            match source {
                StartFailure::NotFound(_) => facts.hint("is it in the image, and on its PATH?"),
                StartFailure::NotExecutable(_) => facts,
            }
        }
    }
}

fn shares(error: &SharesError) -> Facts {
    let create = Facts::at(Phase::Create);
    match error {
        SharesError::Add { path, .. } => create.of(path.display()),
        SharesError::Fsd(FsdError::Spawn(
            SpawnError::Child { exe, .. } | SpawnError::Prepare { exe, .. },
        )) => create
            .of(exe.display())
            .hint("ampoule-fsd belongs beside ampoule; AMPOULE_FSD names another"),
        SharesError::None | SharesError::Open(_) | SharesError::Ended | SharesError::Fsd(_) => {
            create
        }
    }
}

fn vm(error: &VmError) -> Facts {
    let boot = Facts::at(Phase::Boot);
    match error {
        VmError::Kvm(error) => boot.of(kvm::DEVICE).hint(error.hint()),
        VmError::Open { what, path, .. } if *what == KERNEL => boot
            .of(path.display())
            .hint("--kernel, or sandbox.kernel in config.toml, names another; `make kernel` builds it"),
        VmError::Open { path, .. } => boot
            .of(path.display())
            .hint("--guest-image, or sandbox.guest_image in config.toml, names another; `make guest` builds it"),
        VmError::Spawn(SpawnError::Child { exe, source, .. })
            if matches!(
                source.raw_os_error(),
                Some(libc::ENOENT | libc::EACCES | libc::ENOEXEC)
            ) =>
        {
            boot.of(exe.display())
                .hint("ampoule-vmm belongs beside ampoule; AMPOULE_VMM names another")
        }
        VmError::Spawn(SpawnError::Child { exe, .. } | SpawnError::Prepare { exe, .. }) => {
            boot.of(exe.display())
        }
        VmError::Spawn(SpawnError::Nul(_)) | VmError::Prepare(..) | VmError::Send(_) => boot,
    }
}

/// The end of a VM.
fn died(phase: Phase, death: &Death) -> Facts {
    let facts = Facts::at(phase);
    if death.blames_memory_size() {
        facts.hint("choose another --memory")
    } else if let Some(hint) = death.errno().and_then(way_round) {
        facts.hint(hint)
    } else if death.blames_kvm() {
        facts.hint("this /dev/kvm may be emulated: see `ampoule check`")
    } else if death.blames_memory() {
        facts.hint("the guest had too little memory: give it more with --memory")
    } else {
        facts
    }
}

/// Why the system refused something, if it did.
pub fn refusal(error: &(dyn Error + 'static)) -> Option<i32> {
    chain(error).find_map(|link| match link.downcast_ref::<FormatError>() {
        Some(FormatError::Io(error)) => error.raw_os_error(),
        _ => link.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error),
    })
}

/// What helps against that, whatever it was that was refused.
fn way_round(errno: i32) -> Option<&'static str> {
    Some(match errno {
        libc::ENOSPC | libc::EDQUOT => {
            "make room there; `ampoule image prune` removes what no image needs"
        }
        libc::EROFS => {
            "that file system is read-only: AMPOULE_ROOT names another place for images and sandboxes"
        }
        libc::EMFILE => "too many files are open in this process: raise its limit with `ulimit -n`",
        libc::ENFILE => "too many files are open on this host: raise the sysctl fs.file-max",
        libc::ENOMEM => "this host, or the cgroup of this process, has too little memory left",
        libc::EAGAIN => "too many processes or threads: raise the limit with `ulimit -u`",
        _ => return None,
    })
}
