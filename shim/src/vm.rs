//! One VM: the `ampoule-vmm` process, its control socket, and the memory of its console.
//!
//! [`Vm`] owns all three. Dropping it kills and reaps the process, so that no way out of the shim leaves a
//! VM behind; the other way round, a VMM whose control socket closes ends itself. Only the sandbox's owner
//! task has a `Vm`. Whatever arrives from the VMM is data of a process that a guest may have taken over.

mod death;

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use ampoule_vmm_api::{
    Channel, ChannelError, DiskConfig, Event, Request, StopCause, VmConfig,
    console::ConsoleReader,
    message::ExitCounts,
    spawn::{SpawnError, VmmExit, VmmProcess},
};
use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    time::{Instant, timeout_at},
};

use death::Said;
pub use death::{Cause, Death};

use crate::{
    kvm::{self, KvmError},
    network::{Link, Net},
    oom,
};

/// How long a VMM that said goodbye, or closed its socket, may take to be gone before it is killed.
const GRACE: Duration = Duration::from_secs(1);

/// What the kernel is called in errors.
pub const KERNEL: &str = "guest kernel";

/// Everything a VM is started from.
#[derive(Debug)]
pub struct VmSetup {
    pub vmm: PathBuf,
    /// The sandbox's name, shown in process lists.
    pub name: String,
    pub kernel: PathBuf,
    pub guest_image: PathBuf,
    /// Disks after the guest image, in slot order from 1.
    pub disks: Vec<Disk>,
    pub spare_disks: u8,
    /// In the order in which the guest finds them.
    pub nets: Vec<Net>,
    pub vcpus: u8,
    pub memory_mib: u32,
    /// Further words of the kernel's command line.
    pub cmdline: String,
    /// The processor's random numbers are kept from the guest.
    pub hide_random: bool,
    /// Host port on which the guest's agent calls.
    pub agent_port: u32,
    /// See [`crate::sandbox::SandboxConfig::oom_score_adj`].
    pub oom_score_adj: i32,
    /// The VM's end of the socket to its file server, if it has one.
    pub share: Option<OwnedFd>,
}

/// A disk and what lies under it.
#[derive(Debug)]
pub struct Disk {
    pub id: String,
    pub read_only: bool,
    pub file: OwnedFd,
}

/// What can go wrong between a request and its VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("{what} {}", path.display())]
    Open { what: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error("{0}")]
    Prepare(&'static str, #[source] io::Error),
    #[error("send the VMM a request")]
    Send(#[source] ChannelError),
}

/// What a VM reports next.
#[derive(Debug)]
pub enum Report {
    Event(Event),
    /// The last one.
    Died(Box<Death>),
}

/// A running VM.
#[derive(Debug)]
pub struct Vm {
    process: VmmProcess,
    /// A second descriptor of the process's pidfd, for waiting.
    pidfd: AsyncFd<OwnedFd>,
    channel: AsyncFd<Channel>,
    console: ConsoleReader,
    /// The VMM's [`Event::Stopped`].
    last_words: Option<(StopCause, String, ExitCounts)>,
    /// Why we killed it.
    verdict: Option<Cause>,
    /// Why we will kill it if it does not go by itself.
    doom: Option<Cause>,
    /// When a VMM that is going has to be gone.
    gone_by: Option<Instant>,
}

impl Vm {
    /// Starts the VMM and tells it to boot. The agent will call at the stream returned.
    pub fn boot(setup: VmSetup) -> Result<(Self, UnixStream), VmError> {
        let kvm = kvm::open()?;
        let kernel = open(KERNEL, &setup.kernel)?;
        let guest_image = open("guest image", &setup.guest_image)?;
        let (console, console_memory) =
            ConsoleReader::new().map_err(|e| VmError::Prepare("make the console memory", e))?;
        let vm = Self::spawn(&setup.vmm, &setup.name, console)?;
        oom::set_score(vm.pid(), setup.oom_score_adj);
        let (agent, agents_end) = stream_pair()?;
        let mut fds =
            vec![kvm.as_fd(), kernel.as_fd(), console_memory.as_fd(), guest_image.as_fd()];
        fds.extend(setup.disks.iter().map(|d| d.file.as_fd()));
        fds.push(agents_end.as_fd());
        fds.extend(setup.nets.iter().flat_map(|net| &net.tap).map(AsFd::as_fd));
        fds.extend(setup.share.iter().map(AsFd::as_fd));
        vm.send(&Request::Boot(config(&setup)), &fds)?;
        Ok((vm, agent))
    }

    /// Of the VMM's process.
    pub fn pid(&self) -> u32 {
        self.process.pid().as_raw_pid().unsigned_abs()
    }

    /// Starts the VMM, which then waits to be told to boot.
    pub(crate) fn spawn(exe: &Path, name: &str, console: ConsoleReader) -> Result<Self, VmError> {
        let (ours, theirs) =
            Channel::pair().map_err(|e| VmError::Prepare("make the control socket", e))?;
        let process = VmmProcess::spawn(exe, name, theirs)?;
        let wait = |e| VmError::Prepare("wait for the VMM", e);
        let pidfd = process.as_fd().try_clone_to_owned().map_err(wait)?;
        Ok(Self {
            process,
            pidfd: watch(pidfd).map_err(wait)?,
            channel: watch(ours).map_err(wait)?,
            console,
            last_words: None,
            verdict: None,
            doom: None,
            gone_by: None,
        })
    }

    /// The guest's next connection to host port `port` arrives at the stream returned.
    pub fn listen(&self, port: u32) -> Result<UnixStream, VmError> {
        let (ours, theirs) = stream_pair()?;
        self.send(&Request::ListenVsock { port }, &[theirs.as_fd()])?;
        Ok(ours)
    }

    /// Puts a disk under a spare slot; [`Event::DiskAttached`] tells when.
    pub fn attach(&self, slot: u8, disk: &Disk) -> Result<(), VmError> {
        let config = DiskConfig { id: disk.id.clone(), read_only: disk.read_only };
        self.send(&Request::AttachDisk { slot, disk: config }, &[disk.file.as_fd()])
    }

    /// Takes a disk away; [`Event::DiskDetached`] tells when.
    pub fn detach(&self, slot: u8) -> Result<(), VmError> {
        self.send(&Request::DetachDisk { slot }, &[])
    }

    /// Has the guest find a network device.
    pub fn plug_net(&self, number: u8, link: &Link) -> Result<(), VmError> {
        self.send(&Request::PlugNet { number, mac: link.mac, mtu: link.mtu }, &[])
    }

    pub fn unplug_net(&self, number: u8) -> Result<(), VmError> {
        self.send(&Request::UnplugNet { number }, &[])
    }

    /// Asks the VMM to end; it is killed if it does not in time.
    pub fn stop(&mut self) {
        if self.send(&Request::Stop, &[]).is_err() {
            self.process.kill();
        }
        self.gone_by.get_or_insert(Instant::now() + GRACE);
    }

    /// Ends the VM at once, for a reason that its death will then carry.
    pub fn kill(&mut self, verdict: Cause) {
        self.verdict.get_or_insert(verdict);
        self.process.kill();
    }

    /// For a VM that seems to be dying: leaves it a moment to say why by itself, then kills it for this reason.
    pub fn doom(&mut self, verdict: Cause) {
        self.doom.get_or_insert(verdict);
        self.gone_by.get_or_insert(Instant::now() + GRACE);
    }

    /// The next thing that happens. Cancel-safe; after [`Report::Died`] there is nothing more.
    pub async fn next(&mut self) -> Report {
        loop {
            let overdue = self.gone_by;
            tokio::select! {
                // A VMM that talks without end neither outlives its time nor, a message at a time, keeps
                // our caller from its other business.
                biased;
                () = sleep_until(overdue) => break,
                message = receive(&self.channel) => match message {
                    Ok(Event::Stopped { cause, detail, exits }) => {
                        self.last_words = Some((cause, detail, exits));
                        self.gone_by.get_or_insert(Instant::now() + GRACE);
                    }
                    Ok(event) => return Report::Event(event),
                    Err(ChannelError::Closed) => break,
                    Err(error) => {
                        self.kill(Cause::Protocol(error.to_string()));
                        break;
                    }
                },
                _ = self.pidfd.readable() => break,
            }
        }
        Report::Died(Box::new(self.bury().await))
    }

    /// Waits until the process is gone, killing it when it takes too long, and says why it ended.
    async fn bury(&mut self) -> Death {
        let gone_by = *self.gone_by.get_or_insert(Instant::now() + GRACE);
        if timeout_at(gone_by, self.pidfd.readable()).await.is_err() {
            self.verdict = self.verdict.take().or(self.doom.take());
            self.process.kill();
        }
        let cause = self.process.wait().map(|exit| match exit {
            VmmExit::Code(code) => Cause::Exited(code),
            VmmExit::Signal(signal) => Cause::Killed(signal),
        });
        let ended = cause.unwrap_or_else(|e| Cause::Protocol(format!("wait for ampoule-vmm: {e}")));
        let said = Said {
            last_words: self.last_words.take(),
            stderr: self.process.stderr(),
            console: self.console.tail().unwrap_or_default(),
        };
        Death::new(self.verdict.take(), ended, said)
    }

    fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), VmError> {
        self.channel.get_ref().send(request, fds).map_err(VmError::Send)
    }
}

/// Registers a descriptor with tokio.
pub(crate) fn watch<T: AsRawFd>(fd: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: the types this is used with, OwnedFd and Channel, own their descriptor: it stays open, and the
    // same, until dropped.
    let watched = unsafe { AsyncFd::register(fd) };
    watched.map_err(io::Error::from)
}

/// One message of the VMM. Descriptors, which it never sends, are closed.
async fn receive(channel: &AsyncFd<Channel>) -> Result<Event, ChannelError> {
    loop {
        let mut ready = channel.readable().await.map_err(ChannelError::Io)?;
        match ready.get_inner().recv() {
            Ok((event, _)) => return Ok(event),
            Err(e) if e.would_block() => ready.clear_ready(),
            Err(e) => return Err(e),
        }
    }
}

async fn sleep_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

fn config(setup: &VmSetup) -> VmConfig {
    let guest = DiskConfig { id: "guest".into(), read_only: true };
    let others =
        setup.disks.iter().map(|d| DiskConfig { id: d.id.clone(), read_only: d.read_only });
    VmConfig {
        vcpus: setup.vcpus,
        memory_mib: setup.memory_mib,
        cmdline: setup.cmdline.clone(),
        disks: std::iter::once(guest).chain(others).collect(),
        spare_disks: setup.spare_disks,
        guest_cid: 3,
        listen: vec![setup.agent_port],
        hide_random: setup.hide_random,
        nets: setup.nets.iter().map(|net| net.config.clone()).collect(),
        share: setup.share.is_some(),
    }
}

fn open(what: &'static str, path: &Path) -> Result<File, VmError> {
    let error = |source| VmError::Open { what, path: path.into(), source };
    let file = OpenOptions::new().read(true).open(path).map_err(error)?;
    if file.metadata().map_err(error)?.is_dir() {
        return Err(error(io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

/// Our end, for tokio, and the end that goes to the VMM.
fn stream_pair() -> Result<(UnixStream, OwnedFd), VmError> {
    let failed = |e| VmError::Prepare("make a stream", e);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    theirs.set_nonblocking(true).map_err(failed)?;
    Ok((UnixStream::from_std(ours).map_err(failed)?, theirs.into()))
}
