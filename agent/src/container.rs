//! One container: its cgroup, its root file system, its processes.
//!
//!     create ──► Created ──start──► Running ◄──pause/resume──► Paused
//!                   └───────────────────┴───exit of init───► Stopped ──► delete
//!
//! The state is not stored: it is what the init process and the cgroup say. When init ends, so does
//! everything else in the container.

use std::{
    fs,
    os::{fd::AsFd, unix::ffi::OsStringExt},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ampoule_agent_api::agent::{
    CreateConsoleRequest, CreateContainerRequest, CreateExecRequest, PidsResponse, StartResponse,
    StatsResponse, ViewRequest, WriteOutRequest, WriteOutResponse, pids_response,
};

use crate::{
    cgroup::{self, Cgroup},
    clock, console,
    error::Error,
    files::Files,
    init::mounts,
    oci::{self, ConsoleSize, CpuAffinity, NamespaceKind, Personality, Seccomp},
    pace,
    plan::{Exec, Init, Plan, StepError, at},
    process::{Ending, Exit, Process, Recipe},
    random::{self, Random},
    reaper::Reaper,
    registry::{Registry, is_valid_id},
    rootfs::Rootfs,
    share::Shares,
    spawn::Namespaces,
    stats,
    stdio::Streams,
    view,
    write_out::{Amount, Earlier, LeftOut, Overlay, WriteOutError},
};

/// How long freezing usually may take.
const FREEZE: Duration = Duration::from_secs(10);
/// How long a killed container's cgroup usually may take to become empty and removable.
const EMPTY: Duration = Duration::from_secs(10);
/// Who asked for it has given it up then.
const WRITE_OUT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Created,
    Running,
    Paused,
    Stopped,
}

pub struct Container {
    id: String,
    cgroup: Arc<Cgroup>,
    /// Taken by delete, as far as it came.
    rootfs: Mutex<Option<Rootfs>>,
    /// What the host has of what it has written.
    written_out: Arc<Mutex<Earlier>>,
    /// Let go with the container.
    _shares: Shares,
    init: Arc<Process>,
    execs: Registry<Process>,
    /// For further processes.
    seccomp: Option<Seccomp>,
    personality: Option<Personality>,
    affinity: Option<CpuAffinity>,
    user_namespace: bool,
    time_namespace: bool,
    /// What the clock is to show when the first process starts; 0 for what it shows anyway.
    realtime_ns: u64,
    /// Where random numbers come from, if that is not the guest's kernel.
    random: Option<Arc<Random>>,
}

impl Container {
    /// Makes everything and parks the first process. If this fails, nothing is left.
    pub async fn create(reaper: &Reaper, request: CreateContainerRequest) -> Result<Self, Error> {
        let CreateContainerRequest {
            container_id: id,
            spec,
            rootfs,
            stdio,
            init,
            files,
            realtime_ns,
            seed,
            ..
        } = request;
        let spec = oci::container(&spec)?;
        set_clock(realtime_ns)?;
        let random = (!seed.is_empty()).then(|| Random::new(&seed)).transpose()?;
        let random_file = random.clone().map(random::device::mount).transpose()?;
        let streams = Streams::connect(&stdio).await?;
        // Until the container's mounts have them.
        let _files = Files::write(&id, &files)?;
        let name = id.clone();
        let (shares, rootfs, spec, mounts) = blocking(move || {
            let mut spec = spec;
            let shares = Shares::mount_for(&spec)?;
            let mut rootfs = Rootfs::mount(&name, &rootfs)?;
            rootfs.number_disks(&mut spec.linux)?;
            let mounts = mounts::mapped(&rootfs.root(), &spec)?;
            Ok((shares, rootfs, spec, mounts))
        })
        .await?;
        let cgroup = match Cgroup::create(&id, &spec.linux.resources) {
            Ok(cgroup) => Arc::new(cgroup),
            Err(error) => {
                release(rootfs).await.map_err(|(_, e)| e)?;
                return Err(error.into());
            }
        };
        let terminal = spec.process.terminal;
        let linux = spec.linux.clone();
        let affinity = spec.process.exec_cpu_affinity.clone();
        let seeded = random.is_some();
        let plan = Plan::Init(Box::new(Init {
            id: id.clone(),
            spec,
            rootfs: rootfs.root(),
            scratch: rootfs.scratch(),
            init,
            seeded,
        }));
        let namespaces = Namespaces::New(&linux);
        let recipe = Recipe {
            plan: &plan,
            cgroup: cgroup.directory(),
            namespaces,
            terminal,
            streams,
            random: random.clone(),
            random_file,
            mounts,
        };
        let (init, ending) = match Process::prepare(reaper, recipe).await {
            Ok(prepared) => prepared,
            Err(error) => {
                // The first error is the one to tell.
                let _ = cgroup.kill();
                let _ = cgroup.remove(pace::limit(EMPTY)).await;
                let _ = release(rootfs).await;
                return Err(error.into());
            }
        };
        conclude(cgroup.clone(), ending, true);
        Ok(Self {
            id,
            cgroup,
            rootfs: Mutex::new(Some(rootfs)),
            written_out: Arc::default(),
            _shares: shares,
            init: Arc::new(init),
            execs: Registry::default(),
            user_namespace: linux.has_users(),
            time_namespace: linux.namespace(NamespaceKind::Time).is_some(),
            seccomp: linux.seccomp,
            personality: linux.personality,
            affinity,
            realtime_ns,
            random,
        })
    }

    /// Lets a parked process run its workload.
    pub async fn start(&self, exec_id: &str) -> Result<StartResponse, Error> {
        let process = self.process(exec_id)?;
        if exec_id.is_empty() && process.is_parked() {
            set_clock(self.realtime_ns)?;
        }
        process.start().await
    }

    /// Parks one more process.
    pub async fn create_exec(
        &self,
        reaper: &Reaper,
        request: CreateExecRequest,
    ) -> Result<Arc<Process>, Error> {
        let id = request.exec_id;
        if !is_valid_id(&id) {
            return Err(Error::Id(id));
        }
        let mut process = oci::process(&request.process)?;
        process.exec_cpu_affinity = process.exec_cpu_affinity.or_else(|| self.affinity.clone());
        self.expect(&[State::Running])?;
        let held = self.execs.hold(&id).ok_or(Error::Exists(id))?;
        let streams = Streams::connect(&request.stdio).await?;
        let directory =
            self.cgroup.directory_beside(self.init.pid).map_err(at("cgroup", &self.id))?;
        let terminal = process.terminal;
        let plan = Plan::Exec(Box::new(Exec {
            process,
            seccomp: self.seccomp.clone(),
            personality: self.personality.clone(),
            user_namespace: self.user_namespace,
            time_namespace: self.time_namespace,
            seeded: self.random.is_some(),
        }));
        let namespaces = Namespaces::Of(self.init.pidfd());
        let recipe = Recipe {
            plan: &plan,
            cgroup: directory.as_fd(),
            namespaces,
            terminal,
            streams,
            random: self.random.clone(),
            random_file: None,
            mounts: Vec::new(),
        };
        let (process, ending) = Process::prepare(reaper, recipe).await?;
        conclude(self.cgroup.clone(), ending, false);
        let process = Arc::new(process);
        held.put(process.clone());
        Ok(process)
    }

    /// Parks a shell in the guest itself, which ends when this container does.
    pub async fn create_console(
        &self,
        reaper: &Reaper,
        request: CreateConsoleRequest,
    ) -> Result<Arc<Process>, Error> {
        let CreateConsoleRequest { exec_id: id, stdio, terminal, width, height, .. } = request;
        if !is_valid_id(&id) {
            return Err(Error::Id(id));
        }
        self.expect(&[State::Created, State::Running, State::Paused])?;
        let held = self.execs.hold(&id).ok_or(Error::Exists(id))?;
        let streams = Streams::connect(&stdio).await?;
        let characters = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let size = ConsoleSize { width: characters(width), height: characters(height) };
        let plan = Plan::Console(Box::new(console::shell(terminal.then_some(size))));
        let directory = cgroup::of_agent().map_err(at("cgroup", "agent"))?;
        let recipe = Recipe {
            plan: &plan,
            cgroup: directory.as_fd(),
            namespaces: Namespaces::Guest,
            terminal,
            streams,
            random: None,
            random_file: None,
            mounts: Vec::new(),
        };
        let (process, ending) = Process::prepare(reaper, recipe).await?;
        conclude(self.cgroup.clone(), ending, false);
        let process = Arc::new(process);
        held.put(process.clone());
        let (init, shell) = (self.init.clone(), process.clone());
        tokio::spawn(async move {
            let _ = init.wait().await;
            let _ = shell.kill().await;
        });
        Ok(process)
    }

    /// Serves what init sees of files to the host, until either ends.
    pub async fn view(&self, reaper: &Reaper, request: &ViewRequest) -> Result<(), Error> {
        self.expect(&[State::Created, State::Running, State::Paused])?;
        Ok(view::serve(reaper, self.init.clone(), request).await?)
    }

    pub fn pid(&self) -> u32 {
        self.init.pid.as_raw_pid() as u32
    }

    /// A process by its id; init has the empty one.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        match exec_id {
            "" => Ok(self.init.clone()),
            id => self.execs.get(id).ok_or_else(|| Error::NoProcess(id.to_owned())),
        }
    }

    pub fn state(&self) -> State {
        if self.init.has_ended() {
            State::Stopped
        } else if self.init.is_parked() {
            State::Created
        } else if self.cgroup.is_frozen() {
            State::Paused
        } else {
            State::Running
        }
    }

    fn expect(&self, wanted: &[State]) -> Result<(), Error> {
        let state = self.state();
        match wanted.contains(&state) {
            true => Ok(()),
            false => Err(Error::State { id: self.id.clone(), state }),
        }
    }

    /// Signals every process there is.
    pub fn signal_all(&self, signal: i32) -> Result<(), Error> {
        self.expect(&[State::Created, State::Running, State::Paused])?;
        if signal == libc::SIGKILL {
            return Ok(self.cgroup.kill().map_err(at("kill", &self.id))?);
        }
        let pids = self.cgroup.pids().map_err(at("signal", &self.id))?;
        for pid in pids {
            // SAFETY: kill(2) takes plain numbers. A process that has gone meanwhile needs no signal.
            unsafe { libc::kill(pid.as_raw_pid(), signal) };
        }
        Ok(())
    }

    pub async fn pause(&self) -> Result<(), Error> {
        self.expect(&[State::Running])?;
        Ok(self.cgroup.freeze(true, pace::limit(FREEZE)).await.map_err(at("pause", &self.id))?)
    }

    pub async fn resume(&self) -> Result<(), Error> {
        self.expect(&[State::Paused])?;
        Ok(self.cgroup.freeze(false, pace::limit(FREEZE)).await.map_err(at("resume", &self.id))?)
    }

    /// Writes out what it has written, or says how much that is.
    pub async fn write_out(&self, request: WriteOutRequest) -> Result<WriteOutResponse, Error> {
        self.expect(&[State::Running, State::Paused, State::Stopped])?;
        let has_ended = self.state() == State::Stopped;
        if has_ended {
            // Who shares its namespace of processes with others may leave some.
            let _ = self.cgroup.kill();
            let empty = self.cgroup.empty(pace::limit(EMPTY)).await;
            empty.map_err(at("wait for the end of", &self.id))?;
        }
        let overlay = match &*self.lock_rootfs() {
            Some(rootfs) => rootfs.overlay(request.has_start, !has_ended)?,
            None => return Err(Error::Ended),
        };
        let earlier = self.written_out.clone();
        let written = blocking(move || {
            let mut earlier = earlier.lock().unwrap_or_else(PoisonError::into_inner);
            write_out(&request, &overlay, &mut earlier, has_ended)
        });
        Ok(written.await?)
    }

    pub fn update(&self, resources: &[u8]) -> Result<(), Error> {
        self.expect(&[State::Created, State::Running, State::Paused])?;
        Ok(self.cgroup.limit(&oci::resources(resources)?)?)
    }

    pub fn stats(&self) -> Result<StatsResponse, Error> {
        Ok(stats::read(&self.cgroup).map_err(at("stats", &self.id))?)
    }

    /// Waits until the kernel has killed more than `known` times for lack of memory, or init has ended.
    pub async fn wait_oom(&self, known: u64) -> Result<u64, Error> {
        tokio::select! {
            biased;
            kills = self.cgroup.wait_oom(known) => Ok(kills.map_err(at("memory events", &self.id))?),
            _ = self.init.wait() => Err(Error::Ended),
        }
    }

    pub fn pids(&self) -> Result<PidsResponse, Error> {
        let execs = self.execs.all();
        let pids = self.cgroup.pids().map_err(at("pids", &self.id))?;
        let describe = |pid: rustix::process::Pid| pids_response::Process {
            pid: pid.as_raw_pid() as u32,
            exec_id: execs.iter().find(|(_, p)| p.pid == pid).map_or("", |(id, _)| id).to_owned(),
            command: command(pid),
            ..Default::default()
        };
        let processes = pids.into_iter().map(describe).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    /// Forgets an exec that has ended, or was never started.
    pub async fn delete_exec(&self, id: &str) -> Result<(), Error> {
        let (held, process) = self.execs.take(id).ok_or_else(|| Error::NoProcess(id.to_owned()))?;
        if !process.has_ended() && !process.is_parked() {
            held.put(process);
            return Err(Error::Running);
        }
        process.kill().await
    }

    /// Takes everything apart, once init has ended or if it was never started. May be tried again.
    pub async fn delete(&self) -> Result<(), Error> {
        self.expect(&[State::Created, State::Stopped])?;
        self.destroy().await
    }

    /// Takes everything apart, whatever runs.
    pub async fn destroy(&self) -> Result<(), Error> {
        let _ = self.cgroup.kill();
        self.init.kill().await?;
        self.cgroup.remove(pace::limit(EMPTY)).await.map_err(at("remove cgroup", &self.id))?;
        let rootfs = self.lock_rootfs().take();
        let Some(rootfs) = rootfs else { return Ok(()) };
        release(rootfs).await.map_err(|(rootfs, error)| {
            *self.lock_rootfs() = Some(rootfs);
            error.into()
        })
    }

    fn lock_rootfs(&self) -> std::sync::MutexGuard<'_, Option<Rootfs>> {
        self.rootfs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the end of a process and makes it known, after the end of what must end with it.
fn conclude(cgroup: Arc<Cgroup>, ending: Ending, is_init: bool) {
    tokio::spawn(async move {
        let status = ending.status.await.unwrap_or(u8::MAX.into());
        let oom_kills = cgroup.oom_kills();
        if is_init {
            // A PID namespace of its own has seen to it already; a shared one has not.
            let _ = cgroup.kill();
        }
        ending.exit.send_replace(Some(Exit { status, oom_kills, at_ns: realtime_ns() }));
    });
}

fn write_out(
    request: &WriteOutRequest,
    overlay: &Overlay,
    earlier: &mut Earlier,
    has_ended: bool,
) -> Result<WriteOutResponse, StepError> {
    const STEP: &str = "write out";
    let failed = |error: WriteOutError| at(STEP, error.path.display())(error.source);
    let most = Amount { files: request.most_files, bytes: request.most_bytes };
    let written = match request.share {
        None => overlay
            .amount(&most, earlier)
            .map(|amount| (amount, LeftOut::default()))
            .map_err(failed),
        Some(number) => Shares::own(number).and_then(|(_share, directory)| {
            let end = Instant::now() + pace::limit(WRITE_OUT);
            let left_out = overlay.write_out(directory, earlier, most, end).map_err(failed);
            left_out.map(|left_out| (Amount::default(), left_out))
        }),
    };
    let is_all = written.as_ref().is_ok_and(|(amount, _)| !amount.exceeds(&most));
    let hidden = if has_ended && !is_all { overlay.hide(earlier) } else { Ok(()) };
    let (amount, left_out) = written?;
    hidden.map_err(failed)?;
    Ok(WriteOutResponse {
        files: amount.files,
        bytes: amount.bytes,
        left_out: left_out.count,
        first_left_out: left_out.path.into_os_string().into_vec(),
        ..Default::default()
    })
}

fn set_clock(realtime_ns: u64) -> Result<(), StepError> {
    match realtime_ns {
        0 => Ok(()),
        ns => clock::set(ns).map_err(at("clock", "guest")),
    }
}

fn realtime_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// What the process calls itself.
fn command(pid: rustix::process::Pid) -> String {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid()));
    name.map(|n| n.trim_end().to_owned()).unwrap_or_default()
}

async fn release(mut rootfs: Rootfs) -> Result<(), (Rootfs, StepError)> {
    let task = tokio::task::spawn_blocking(move || {
        let result = rootfs.unmount();
        (rootfs, result)
    });
    match task.await {
        Ok((_, Ok(()))) => Ok(()),
        Ok((rootfs, Err(error))) => Err((rootfs, error)),
        // Blocking tasks are neither cancelled nor, with panic = abort, do they panic.
        Err(_) => Ok(()),
    }
}

/// Runs what may block for a while off the runtime's thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    let task = tokio::task::spawn_blocking(work).await;
    task.map_err(at("agent", "blocking task"))?
}
