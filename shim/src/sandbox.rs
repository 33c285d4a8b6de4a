//! A sandbox: one VM and the containers in it.
//!
//! ```text
//!   create()                          shutdown(), or the last handle is dropped
//!   ┌──────────┐ hello ┌─────────┐ ─────────────────────────▶ ┌──────────┐ VM gone ┌─────────┐
//!   │ Creating │──────▶│ Running │                            │ Stopping │────────▶│ Stopped │
//!   └──────────┘       └─────────┘ ──────── the VM dies ─────────────────────────▶ └─────────┘
//!        └─ fails: the VM is killed, nothing is left
//! ```
//!
//! After [`Sandbox::create`] everything belongs to one task, the [`owner`]: the VM, the table of processes and
//! the phase. A [`Sandbox`] is a handle that sends it requests; what changes no state (signals, sizes, numbers)
//! goes to the agent directly. The files that are shared with its containers are served by a process of their own.
//! Every end of a process, by its own exit or by the VM's death, is found in one
//! place and leaves as one [`Event::Exited`].

mod boot;
mod config;
mod disks;
mod follow;
mod follower;
mod gate;
mod kept;
mod owner;
mod shares;
mod table;
mod wire;
mod write_out;

use std::{
    fmt,
    future::Future,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
    time::SystemTime,
};

use ampoule_agent_api::agent::{
    ConnectRequest, PidsResponse, ProcessRequest, StatsResponse, ViewRequest,
};
use ampoule_vmm_api::Stamps;
use oci_spec::runtime::LinuxResources;
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use crate::{
    agent::{Agent, AgentError},
    cpus::{self, Cpus, CpusError},
    descriptors,
    id::Id,
    network::NetworkError,
    pace::Pace,
    spec::{SpecError, guest_resources},
    vm::{Death, Disk, VmError},
};
pub use config::{
    ConsoleConfig, ContainerConfig, DeviceDisk, ExecConfig, Fixed, HostFile, IdMaps, Lower, RootFs,
    SandboxConfig, Stdio, Upper, vm_memory_mib,
};
pub use disks::{FIRST_DISK, GUEST_IMAGE, spare_disks};
use owner::Input;
pub use shares::SharesError;
pub use table::Refused;
pub use write_out::HostUpper;

/// How long a guest usually may take to write to disks that are kept.
const WRITTEN: Duration = Duration::from_secs(30);

/// A process: a container's init, or an exec in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId {
    pub container: Id,
    pub exec: Option<Id>,
}

impl ProcessId {
    pub fn init(container: Id) -> Self {
        Self { container, exec: None }
    }

    pub fn exec(container: Id, exec: Id) -> Self {
        Self { container, exec: Some(exec) }
    }

    fn request(&self) -> ProcessRequest {
        ProcessRequest {
            container_id: self.container.to_string(),
            exec_id: self.exec.as_ref().map(Id::to_string).unwrap_or_default(),
            ..Default::default()
        }
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "container {}", self.container),
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
        }
    }
}

/// Our ends of a process's streams. Shutting down the write side of `stdin` is the end of its input.
#[derive(Debug, Default)]
pub struct Streams {
    pub stdin: Option<UnixStream>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
}

/// A created process, parked before its workload.
#[derive(Debug)]
pub struct Created {
    /// In the guest's root PID namespace.
    pub pid: u32,
    pub streams: Streams,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal: 0 to 255.
    pub status: u8,
    /// How often the kernel has killed something of the container for its memory limit.
    pub oom_kills: u64,
    pub at: SystemTime,
    /// Set if it ended because its VM did.
    pub death: Option<Arc<Death>>,
}

/// What a sandbox tells of itself, in order: for each process create, start, exit, delete; a container's init
/// exits after all its execs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Created {
        process: ProcessId,
        pid: u32,
    },
    Started {
        process: ProcessId,
        pid: u32,
    },
    Paused {
        container: Id,
    },
    Resumed {
        container: Id,
    },
    Oom {
        container: Id,
    },
    Exited {
        process: ProcessId,
        pid: u32,
        exit: Exit,
    },
    Deleted {
        process: ProcessId,
    },
    /// The last one.
    Stopped {
        death: Arc<Death>,
    },
}

/// Why a workload did not start: the command, not the sandbox, is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartFailure {
    /// Exit code 127. Callers know it by runc's words.
    #[error("executable file not found: {0}")]
    NotFound(String),
    /// Exit code 126.
    #[error("cannot be executed: {0}")]
    NotExecutable(String),
}

/// Instants of a boot, CLOCK_MONOTONIC in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootRecord {
    pub stamps: Stamps,
    /// Stage marks of the guest and when they were made.
    pub marks: Vec<(u8, u64)>,
    /// When the agent's hello was received.
    pub hello_ns: u64,
    pub agent_version: String,
    pub kernel_release: String,
    /// Device faults that were logged; a guest makes as many as it likes.
    pub device_faults: u32,
}

/// What can go wrong with a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("boot")]
    Boot(#[source] VmError),
    /// Before it was up.
    #[error("boot of {} with {}", kernel.display(), guest_image.display())]
    Died { kernel: PathBuf, guest_image: PathBuf, source: Arc<Death> },
    /// After it was up.
    #[error("sandbox")]
    Gone(#[source] Arc<Death>),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("container spec")]
    Spec(#[from] SpecError),
    #[error("container spec cannot be written")]
    Json(#[from] serde_json::Error),
    #[error("stream or disk")]
    Vm(#[source] VmError),
    #[error("disk slot {0}: the VMM did not attach or detach it in time")]
    Disk(u8),
    #[error(transparent)]
    Cpus(#[from] CpusError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("share files")]
    Shares(#[from] SharesError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("start {process}")]
    Start { process: ProcessId, source: StartFailure },
}

type Result<T> = std::result::Result<T, SandboxError>;
type Reply<T> = oneshot::Sender<Result<T>>;

/// Who asked may have gone in the meantime.
fn answer<T>(reply: Reply<T>, value: Result<T>) {
    let _ = reply.send(value);
}

/// A handle; clones speak to the same sandbox. When the last one is dropped, the VM ends.
#[derive(Clone)]
pub struct Sandbox {
    inputs: mpsc::Sender<Input>,
    agent: Agent,
    end: watch::Receiver<Option<Arc<Death>>>,
    vmm: u32,
    file_server: watch::Receiver<Option<u32>>,
    keeps: watch::Receiver<bool>,
    /// Those that have ended, which is not told yet.
    ending: watch::Receiver<Vec<Id>>,
    cpus: Arc<Cpus>,
}

impl Sandbox {
    /// Boots a VM and waits for its agent. Dropping the future kills the VM.
    ///
    /// # Errors
    /// `Boot` for what the host lacks, `Died` with the guest's console for everything later.
    pub async fn create(config: SandboxConfig) -> Result<(Self, mpsc::UnboundedReceiver<Event>)> {
        descriptors::raise();
        Ok(Self::owned(boot::boot(config).await?))
    }

    /// Hands everything to an owner task.
    fn owned(booted: boot::Booted) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (agent, vmm) = (booted.agent.clone(), booted.vm.pid());
        let file_server = booted.shares.lender().pid();
        let (inputs, queue) = mpsc::channel(32);
        let (events, listener) = mpsc::unbounded_channel();
        let (died, end) = watch::channel(None);
        let owner = owner::Owner::new(booted, queue, events, died);
        let (keeps, ending, cpus) = (owner.kept().keeps(), owner.kept().ending(), Arc::default());
        tokio::spawn(owner.run());
        (Self { inputs, agent, end, vmm, file_server, keeps, ending, cpus }, listener)
    }

    /// Prepares a container up to just before its workload.
    pub async fn create_container(&self, config: ContainerConfig) -> Result<Created> {
        let (id, cpus) = (config.id.clone(), cpus::of_spec(&config.spec)?);
        let created = self.ask(|reply| Input::CreateContainer(Box::new(config), reply)).await?;
        self.cpus.set(&id, cpus);
        self.bind()?;
        Ok(created)
    }

    /// Prepares a further process of a running container likewise.
    pub async fn create_exec(&self, config: ExecConfig) -> Result<Created> {
        self.ask(|reply| Input::CreateExec(Box::new(config), reply)).await
    }

    /// Prepares a shell in the guest itself, which from then on is a process like an exec.
    pub async fn create_console(&self, config: ConsoleConfig) -> Result<Created> {
        self.ask(|reply| Input::CreateConsole(config, reply)).await
    }

    /// Lets a created process run its workload.
    pub async fn start(&self, process: &ProcessId) -> Result<()> {
        self.ask(|reply| Input::Start(process.clone(), reply)).await
    }

    /// Waits for the end of a process, also after it, until it is deleted. A dead VM is no error here: it is
    /// exit status 137.
    pub async fn wait(&self, process: &ProcessId) -> Result<Exit> {
        self.ask(|reply| Input::Wait(process.clone(), reply)).await
    }

    pub async fn signal(&self, process: &ProcessId, signal: u32, all: bool) -> Result<()> {
        match self.alive(self.agent.signal(&process.request(), signal, all)).await {
            // To the caller it is still there, and about to end.
            Err(SandboxError::Agent(AgentError::Refused { .. })) if self.is_ending(process) => {
                Ok(())
            }
            sent => sent,
        }
    }

    fn is_ending(&self, process: &ProcessId) -> bool {
        process.exec.is_none() && self.ending.borrow().contains(&process.container)
    }

    /// Gives a process's terminal a size in characters.
    pub async fn resize(&self, process: &ProcessId, width: u16, height: u16) -> Result<()> {
        self.alive(self.agent.resize(&process.request(), width, height)).await
    }

    pub async fn close_stdin(&self, process: &ProcessId) -> Result<()> {
        self.alive(self.agent.close_stdin(&process.request())).await
    }

    pub async fn stats(&self, container: &Id) -> Result<StatsResponse> {
        self.alive(self.agent.stats(container.as_str())).await
    }

    pub async fn pids(&self, container: &Id) -> Result<PidsResponse> {
        self.alive(self.agent.pids(container.as_str())).await
    }

    /// Gives a container other limits: OCI's resources, JSON.
    pub async fn update(&self, container: &Id, resources: &[u8]) -> Result<()> {
        let given: LinuxResources = serde_json::from_slice(resources)?;
        if let Some(cpu) = given.cpu()
            && let Some(cpus) = cpus::of(cpu)?
        {
            self.cpus.set(container, Some(cpus));
            self.bind()?;
        }
        let resources = guest_resources(resources)?;
        self.alive(self.agent.update(container.as_str(), resources)).await
    }

    fn bind(&self) -> Result<()> {
        Ok(self.cpus.bind(self.vmm().into_iter().chain(self.file_server()))?)
    }

    pub async fn pause(&self, container: &Id) -> Result<()> {
        self.ask(|reply| Input::Freeze(container.clone(), true, reply)).await
    }

    pub async fn resume(&self, container: &Id) -> Result<()> {
        self.ask(|reply| Input::Freeze(container.clone(), false, reply)).await
    }

    /// Forgets an ended process, or a container that ended or never started with all it had.
    pub async fn delete(&self, process: &ProcessId) -> Result<()> {
        self.ask(|reply| Input::Delete(process.clone(), reply)).await?;
        if process.exec.is_none() {
            self.cpus.forget(&process.container);
            // The container is gone all the same.
            if let Err(error) = self.bind() {
                tracing::warn!(%error, "a VM stays bound to an ended container's processors");
            }
        }
        Ok(())
    }

    /// Puts a disk under a free spare slot and returns the slot.
    pub async fn attach_disk(&self, disk: Disk) -> Result<u8> {
        self.ask(|reply| Input::AttachDisk(disk, reply)).await
    }

    pub async fn detach_disk(&self, slot: u8) -> Result<()> {
        self.ask(|reply| Input::DetachDisk(slot, reply)).await
    }

    /// Gives a created container, before it is started, what its network namespace on the host has got since the boot, if
    /// the guest had no network then; and from then on what changes there.
    pub async fn attach_network(&self, container: &Id) -> Result<()> {
        self.ask(|reply| Input::AttachNetwork(container.clone(), reply)).await
    }

    /// Connects to a TCP server in a container's network namespace, or the guest's own.
    pub async fn connect(&self, address: SocketAddr, container: Option<&Id>) -> Result<UnixStream> {
        let (stream_port, stream) = self.ask(Input::Listen).await?;
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.octets().into(),
            IpAddr::V6(ip) => ip.octets().into(),
        };
        let port = address.port().into();
        let container_id = container.map(Id::to_string).unwrap_or_default();
        let request = ConnectRequest { ip, port, stream_port, container_id, ..Default::default() };
        self.alive(self.agent.connect(&request)).await?;
        Ok(stream)
    }

    /// A stream to a file server of a container in the guest, whose numbers begin with `first`.
    pub async fn view(&self, container: &Id, first: u64) -> Result<UnixStream> {
        let (stream_port, stream) = self.ask(Input::Listen).await?;
        let container_id = container.to_string();
        let request = ViewRequest { container_id, stream_port, first, ..Default::default() };
        self.alive(self.agent.view(&request)).await?;
        Ok(stream)
    }

    /// How long things may take in it.
    pub fn pace(&self) -> Pace {
        self.agent.pace()
    }

    /// The instants of the boot, as far as they are known.
    pub async fn boot_record(&self) -> Result<BootRecord> {
        self.ask(Input::BootRecord).await
    }

    /// Ends the VM and everything in it, and waits until it is gone. What containers wrote to scratch disks is
    /// thrown away with them, so the guest is not asked to write anything back.
    pub async fn shutdown(&self) -> Arc<Death> {
        let _ = self.inputs.send(Input::Shutdown).await;
        self.ended().await
    }

    /// Has the guest end everything, write to its disks what belongs there and switch itself off; returns when it
    /// has. Whoever calls this keeps the time.
    pub async fn power_off(&self) -> Arc<Death> {
        if let Err(error) = self.alive(self.agent.shutdown()).await
            && !self.has_ended()
        {
            tracing::warn!(%error, "the guest does not switch itself off");
        }
        self.ended().await
    }

    /// Whether what its containers have written to disks of the host may not be on them yet.
    pub fn keeps(&self) -> bool {
        *self.keeps.borrow()
    }

    /// Ends the VM, after the guest has written to the host's disks what is kept.
    pub async fn end(&self) -> Arc<Death> {
        if self.keeps() && timeout(self.pace().limit(WRITTEN), self.power_off()).await.is_err() {
            tracing::warn!("the guest has not written its disks in time");
        }
        self.shutdown().await
    }

    /// The PID of its VMM on this host, while that is there.
    pub fn vmm(&self) -> Option<u32> {
        (!self.has_ended()).then_some(self.vmm)
    }

    /// The PID of its file server on this host, while that is there.
    pub fn file_server(&self) -> Option<u32> {
        *self.file_server.borrow()
    }

    pub fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Waits for the end of the VM.
    pub async fn ended(&self) -> Arc<Death> {
        let mut end = self.end.clone();
        let death = end.wait_for(Option::is_some).await.ok().and_then(|death| death.clone());
        death.unwrap_or_else(|| Arc::new(Death::lost()))
    }

    async fn ask<T>(&self, input: impl FnOnce(Reply<T>) -> Input) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        // Neither failing means anything but that the owner has gone, and it leaves the reason behind.
        let _ = self.inputs.send(input(reply)).await;
        match answer.await {
            Ok(answer) => answer,
            Err(_) => Err(SandboxError::Gone(self.ended().await)),
        }
    }

    /// A call to the agent, unless the VM ends first.
    async fn alive<T>(
        &self,
        call: impl Future<Output = std::result::Result<T, AgentError>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            answer = call => match answer {
                Err(AgentError::Disconnected { .. }) => Err(SandboxError::Gone(self.ended().await)),
                other => Ok(other?),
            },
            death = self.ended() => Err(SandboxError::Gone(death)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
