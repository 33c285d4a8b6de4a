//! The runner: what `ampoule-agent init` does, single-threaded, between its start and the exec of the
//! workload. In reading order:
//!
//! - [`namespaces`][]: joining and preparing them
//! - [`paths`][]: opening and making paths inside a root file system, and nowhere else
//! - [`mounts`], with [`options`], [`copy_up`] and [`volume`]: the spec's mounts
//! - [`devices`][]: /dev
//! - [`terminal`][]: the process's terminal
//! - [`random`][]: random numbers that come from the agent
//! - [`user`][]: names to ids, by the container's own files
//! - [`seccomp`][]: the OCI profile as a BPF program
//! - [`identity`][]: ids, capabilities, limits
//! - [`scheduling`][]: CPU and I/O scheduling, personality
//! - [`hooks`][]: programs of the container that run before its command
//! - [`first`][]: a PID 1 before the workload, where one is wished
//! - [`view`][]: the container's files, served to the host
//! - [`exec`][]: finding the command and becoming it

mod copy_up;
mod devices;
mod exec;
mod first;
mod hooks;
mod identity;
pub mod mounts;
pub mod namespaces;
mod options;
mod paths;
mod random;
mod scheduling;
mod seccomp;
mod terminal;
mod user;
mod view;
mod volume;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use ampoule_vmm_api::{Channel, ChannelError};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::{FdFlags, fcntl_setfd},
    process::{DumpableBehavior, set_dumpable_behavior, setsid},
};

use crate::{
    oci::{Mount, Process},
    plan::{self, CHANNEL_FD, Order, PLAN_FD, Plan, RANDOM_FD, Report, StepError, TARGET_FD, at},
};
use paths::Root;

/// Runs as a runner and does not come back.
pub fn run() -> ! {
    // SAFETY: the agent gave us these descriptors, at these numbers, and nothing else owns them.
    let (channel, plan) = unsafe { (inherit(CHANNEL_FD), inherit(PLAN_FD)) };
    let channel = Channel::from_fd(channel);
    // Success does not return.
    let error = prepare_and_become(&channel, plan);
    let code = error.fault.exit_code();
    let _ = channel.send(&Report::from(error), &[]);
    std::process::exit(code)
}

/// # Safety
/// The descriptor is open and nobody else's.
unsafe fn inherit(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller's promise.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let _ = fcntl_setfd(&fd, FdFlags::CLOEXEC);
    fd
}

fn prepare_and_become(channel: &Channel, plan: OwnedFd) -> StepError {
    let workload = Plan::read(plan).map_err(at("runner", "plan")).and_then(|plan| match plan {
        Plan::Init(init) => first_process(*init, channel),
        Plan::Exec(exec) => further_process(*exec),
        Plan::Console(process) => guest_process(*process),
        Plan::View(view) => Err(view::serve(&view, channel)),
    });
    match workload.and_then(|workload| workload.park(channel)) {
        Ok(workload) => workload.become_it(),
        Err(error) => error,
    }
}

/// The container's first process: makes the container around itself.
fn first_process(init: plan::Init, channel: &Channel) -> Result<Workload, StepError> {
    let spec = &init.spec;
    begin(spec.process.oom_score_adj.unwrap_or(0))?;
    namespaces::join_users(&spec.linux, channel)?;
    lead()?;
    namespaces::join(&spec.linux)?;
    namespaces::prepare(spec)?;
    let root = mounts::own_root(&init.rootfs)?;
    let mapped = match spec.mounts.iter().any(Mount::is_mapped) {
        true => order(channel)?.1,
        false => Vec::new(),
    };
    mounts::mount_all(&root, spec, &init.scratch, mapped)?;
    // SAFETY: the first process of a container with a seed is given this descriptor too.
    let random = init.seeded.then(|| unsafe { inherit(RANDOM_FD) });
    devices::make(&root, &spec.linux, random.as_ref())?;
    let terminal = terminal::open(&root, &spec.process)?;
    if let Some(terminal) = &terminal {
        terminal.bind_console(&root)?;
    }
    mounts::mask(&root, &spec.linux.masked_paths)?;
    mounts::protect(&root, &spec.linux.readonly_paths)?;
    root.make_directory(&spec.process.cwd)?;
    mounts::enter(&root)?;
    mounts::finish_root(spec)?;
    let seccomp = spec.linux.seccomp.as_ref().map(seccomp::compile).transpose()?;
    scheduling::set_personality(spec.linux.personality.as_ref())?;
    let hooks = hooks::prepare(spec, &init.id)?;
    let workload = workload(init.spec.process, terminal, seccomp, init.seeded)?;
    Ok(Workload { init: init.init, hooks, ..workload })
}

/// A further process: joins the container of the init it was given.
fn further_process(exec: plan::Exec) -> Result<Workload, StepError> {
    // SAFETY: an exec is given this descriptor besides the two others.
    let target = unsafe { inherit(TARGET_FD) };
    begin(exec.process.oom_score_adj.unwrap_or(0))?;
    lead()?;
    let affinity = exec.process.exec_cpu_affinity.as_ref();
    scheduling::set_affinity(affinity.map(|affinity| &*affinity.initial))?;
    namespaces::join_all(&target, exec.user_namespace, exec.time_namespace)?;
    scheduling::set_affinity(affinity.map(|affinity| &*affinity.last))?;
    scheduling::set_personality(exec.personality.as_ref())?;
    let terminal = terminal::open(&Root::current()?, &exec.process)?;
    let seccomp = exec.seccomp.as_ref().map(seccomp::compile).transpose()?;
    workload(exec.process, terminal, seccomp, exec.seeded)
}

/// A process in the guest itself.
fn guest_process(process: Process) -> Result<Workload, StepError> {
    begin(process.oom_score_adj.unwrap_or(0))?;
    lead()?;
    let terminal = terminal::open(&Root::current()?, &process)?;
    workload(process, terminal, None, false)
}

/// What all begin with, while /proc is still the guest's.
fn begin(oom_score: i32) -> Result<(), StepError> {
    identity::reset_signals();
    // First: the files of a process that is not dumpable are not its own.
    identity::set_oom_score(oom_score)?;
    // What shares our PID namespace must not reach into us while we have our privileges.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(at("runner", "dumpable"))
}

/// A session of its own, of the process that stays.
fn lead() -> Result<(), StepError> {
    setsid().map_err(at("runner", "session"))?;
    identity::join_new_keyring();
    Ok(())
}

/// The rest, inside the container's root: everything but the exec, the filter and what must wait for it.
fn workload(
    process: Process,
    terminal: Option<terminal::Terminal>,
    seccomp: Option<seccomp::Filter>,
    seeded: bool,
) -> Result<Workload, StepError> {
    let root = Root::current()?;
    let user = user::resolve(&root, &process.user)?;
    match &terminal {
        Some(terminal) => terminal.become_standard_streams(&user)?,
        None => identity::prepare_standard_streams(&root, &user)?,
    }
    let command = exec::Command::new(&process, &user.home)?;
    scheduling::schedule(&process)?;
    let mut identity = identity::Identity::new(&process, user)?;
    let listener = seeded.then(random::listen).transpose()?;
    identity.enter(&process.cwd, seccomp.is_some())?;
    Ok(Workload { identity, command, seccomp, terminal, listener, hooks: Vec::new(), init: false })
}

/// Waits for an order, and what comes along.
fn order(channel: &Channel) -> Result<(Order, Vec<OwnedFd>), StepError> {
    loop {
        poll(&mut [PollFd::new(channel, PollFlags::IN)], None).map_err(at("runner", "wait"))?;
        match channel.recv() {
            Err(e) if e.would_block() => {}
            order => return order.map_err(|e| at("runner", "order")(io::Error::other(e))),
        }
    }
}

/// A process that is ready but for its exec.
struct Workload {
    identity: identity::Identity,
    command: exec::Command,
    seccomp: Option<seccomp::Filter>,
    terminal: Option<terminal::Terminal>,
    /// Of getrandom(2), for the agent.
    listener: Option<OwnedFd>,
    hooks: Vec<hooks::Prepared>,
    /// This process stays before it.
    init: bool,
}

impl Workload {
    /// Says that everything is prepared, and waits for the word to start.
    fn park(mut self, channel: &Channel) -> Result<Self, StepError> {
        let (terminal, listener) = (self.terminal.take(), self.listener.take());
        let master = terminal.as_ref().map(|terminal| terminal.master.as_fd());
        let listener = listener.as_ref().map(OwnedFd::as_fd);
        let fds: Vec<BorrowedFd<'_>> = master.into_iter().chain(listener).collect();
        let failed = |e: ChannelError| at("runner", "report")(io::Error::other(e));
        channel.send(&Report::Prepared, &fds).map_err(failed)?;
        match order(channel)? {
            (Order::Start, _) => Ok(self),
            _ => Err(at("runner", "order")(io::Error::from(io::ErrorKind::InvalidData))),
        }
    }

    fn become_it(self) -> StepError {
        let confined = match &self.seccomp {
            Some(filter) => self.identity.load(filter),
            None => Ok(()),
        };
        let hooked =
            confined.and_then(|()| self.hooks.into_iter().try_for_each(hooks::Prepared::run));
        let alone = hooked.and_then(|()| match self.init {
            true => first::stay_before_it(),
            false => Ok(()),
        });
        match alone {
            Ok(()) => self.command.exec(),
            Err(error) => error,
        }
    }
}
