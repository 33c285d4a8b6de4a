//! Starts a runner: clone3(2) straight into its cgroup and namespaces, then exec of this very binary.
//!
//! Between the two, the child only makes system calls on memory prepared before: the agent may have
//! threads. It blocks its signals around the clone, so that none is handled in between.

use std::{
    ffi::CStr,
    fs, io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    panic::resume_unwind,
    ptr, thread,
    time::{Duration, Instant},
};

use ampoule_vmm_api::Channel;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, write},
    pipe::{PipeFlags, pipe_with},
    process::Pid,
};

use crate::{
    init::namespaces,
    oci::{Linux, NamespaceKind, id_map},
    pace,
    plan::{CHANNEL_FD, PLAN_FD, Plan, RANDOM_FD, Report, StepError, TARGET_FD, at},
    stdio::ChildEnds,
};

const SELF: &CStr = c"/proc/self/exe";
const ARGUMENTS: [&CStr; 2] = [c"ampoule-agent", c"init"];
/// CLONE_CLEAR_SIGHAND and CLONE_INTO_CGROUP (clone3(2)), which do not fit libc's type.
const CLEAR_SIGNAL_HANDLERS: u64 = 1 << 32;
const INTO_CGROUP: u64 = 1 << 33;
/// Descriptors of the child are first moved above all of their targets.
const SPARE_FDS: RawFd = 64;

/// How long a runner usually may take to be in the user namespace that it joins.
const JOINED: Duration = Duration::from_secs(10);

/// What a runner starts with.
pub struct Launch<'a> {
    pub plan: &'a Plan,
    pub stdio: ChildEnds,
    /// The directory of its cgroup.
    pub cgroup: BorrowedFd<'a>,
    pub namespaces: Namespaces<'a>,
    /// For [`RANDOM_FD`].
    pub random: Option<BorrowedFd<'a>>,
}

/// Where a runner starts. What is not made or joined here, the runner joins itself.
pub enum Namespaces<'a> {
    /// In namespaces of its own, as the container's spec says.
    New(&'a Linux),
    /// In the PID namespace of a running container, known by a pidfd of its init.
    Of(BorrowedFd<'a>),
    /// In those of the guest.
    Guest,
}

/// A runner that has been started.
pub struct Launched {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    pub channel: Channel,
}

/// Starts a runner. Does not wait for anything but the mapping of its user namespace, or its joining one.
pub fn launch(launch: Launch<'_>) -> Result<Launched, StepError> {
    let (ours, theirs) = Channel::pair().map_err(at("spawn", "control socket"))?;
    let plan = launch.plan.write().map_err(at("spawn", "plan"))?;
    let [stdin, stdout, stderr] = &launch.stdio;
    let mut fds = vec![
        (stdin.as_raw_fd(), 0),
        (stdout.as_raw_fd(), 1),
        (stderr.as_raw_fd(), 2),
        (theirs.as_raw_fd(), CHANNEL_FD),
        (plan.as_raw_fd(), PLAN_FD),
    ];
    if let Namespaces::Of(target) = launch.namespaces {
        fds.push((target.as_raw_fd(), TARGET_FD));
    }
    if let Some(random) = launch.random {
        fds.push((random.as_raw_fd(), RANDOM_FD));
    }
    let linux = match launch.namespaces {
        Namespaces::New(linux) if linux.has_users() => Some(linux),
        _ => None,
    };
    linux.map_or(Ok(()), namespaces::check_joined_maps)?;
    let own_users = linux.filter(|linux| linux.has_own(NamespaceKind::User));
    let gate = match own_users {
        Some(_) => Some(pipe_with(PipeFlags::CLOEXEC).map_err(at("spawn", "pipe"))?),
        None => None,
    };
    let child = Child { fds, gate: gate.as_ref().map(|(read, _)| read.as_raw_fd()) };
    let clone = || {
        in_pid_namespace(&launch.namespaces, || {
            clone(clone_flags(&launch.namespaces), launch.cgroup, &child)
        })
    };
    let (pid, pidfd) = match linux {
        Some(linux) => in_joined(linux, clone)?,
        None => clone()?,
    };
    drop(theirs);
    if let (Some(linux), Some((_, gate))) = (own_users, gate) {
        map_ids(pid, linux)?;
        write(&gate, &[1]).map_err(at("user namespace", pid.as_raw_pid()))?;
    }
    let (pid, pidfd) = match linux.and_then(Linux::joined_users) {
        Some(_) => successor(&ours)?,
        None => (pid, pidfd),
    };
    Ok(Launched { pid, pidfd, channel: ours })
}

/// Namespaces the kernel makes with the process. The cgroup namespace is the runner's to make: its root
/// is the cgroup of whoever makes it. A mount namespace is always the container's own.
fn clone_flags(namespaces: &Namespaces<'_>) -> libc::c_int {
    match namespaces {
        // The runner makes them when it has joined.
        Namespaces::New(linux) if linux.joined_users().is_some() => 0,
        Namespaces::New(linux) => namespaces::made_with_a_process(linux),
        _ => 0,
    }
}

/// Waits for the process as which a runner goes on in the user namespace that it joins. Nothing is reaped meanwhile.
fn successor(channel: &Channel) -> Result<(Pid, OwnedFd), StepError> {
    let failed = |error| at("join user namespace", "runner")(error);
    let end = Instant::now() + pace::limit(JOINED);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(failed(io::ErrorKind::TimedOut.into())),
            Ok(_) => break,
            // By the end of the runner's first process, or of another one.
            Err(Errno::INTR) => {}
            Err(e) => return Err(failed(e.into())),
        }
    }
    let (report, fds) = channel.recv().map_err(|e| failed(io::Error::other(e)))?;
    match (report, fds.into_iter().next()) {
        (Report::Failed { fault, message }, _) => Err(StepError::relayed(fault, message)),
        (Report::Joined, Some(pidfd)) => Ok((pid_of(&pidfd).map_err(failed)?, pidfd)),
        _ => Err(failed(io::ErrorKind::InvalidData.into())),
    }
}

/// As /proc has it.
fn pid_of(pidfd: &OwnedFd) -> io::Result<Pid> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    // Of one that is gone it is -1.
    pid.filter(|pid| *pid > 0).and_then(Pid::from_raw).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Runs `spawn` so that its child is in the right PID namespace, and a child of the agent nevertheless:
/// setns(2) for a PID namespace only concerns the caller's future children.
fn in_pid_namespace<T>(
    namespaces: &Namespaces<'_>,
    spawn: impl FnOnce() -> io::Result<T>,
) -> Result<T, StepError> {
    let object = "PID namespace";
    let path = match namespaces {
        Namespaces::Guest => None,
        Namespaces::Of(target) => Some(target.try_clone_to_owned()),
        Namespaces::New(linux) => linux
            .namespace(NamespaceKind::Pid)
            .and_then(|n| n.path.as_ref())
            .map(|path| fs::File::open(path).map(OwnedFd::from)),
    };
    let Some(target) = path else { return spawn().map_err(at("spawn", "runner")) };
    let target = target.map_err(at("join", object))?;
    let own = fs::File::open("/proc/self/ns/pid").map_err(at("join", object))?;
    set_pid_namespace(target.as_fd()).map_err(at("join", object))?;
    let spawned = spawn().map_err(at("spawn", "runner"));
    set_pid_namespace(own.as_fd()).map_err(at("leave", object))?;
    spawned
}

/// Runs `spawn` in the namespaces that the spec names by path: whoever is in a user namespace of its own cannot join
/// others' any more. On a thread that ends in them.
fn in_joined<T: Send>(
    linux: &Linux,
    spawn: impl FnOnce() -> Result<T, StepError> + Send,
) -> Result<T, StepError> {
    let joined = || {
        namespaces::join_named(linux)?;
        spawn()
    };
    thread::scope(|scope| match scope.spawn(joined).join() {
        Ok(spawned) => spawned,
        Err(panic) => resume_unwind(panic),
    })
}

fn set_pid_namespace(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns(2) takes a descriptor and flags.
    check(unsafe { libc::setns(fd.as_raw_fd(), libc::CLONE_NEWPID) }.into()).map(drop)
}

/// What the child does before its exec.
struct Child {
    /// (descriptor, number in the runner)
    fds: Vec<(RawFd, RawFd)>,
    /// Read a byte from here first: then the ids are mapped.
    gate: Option<RawFd>,
}

fn clone(
    namespaces: libc::c_int,
    cgroup: BorrowedFd<'_>,
    child: &Child,
) -> io::Result<(Pid, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain numbers, for all of which 0 is valid.
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.flags = (namespaces | libc::CLONE_PIDFD) as u64 | CLEAR_SIGNAL_HANDLERS | INTO_CGROUP;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    let arguments = [ARGUMENTS[0].as_ptr(), ARGUMENTS[1].as_ptr(), ptr::null()];
    let mask = block_signals();
    // SAFETY: as fork(2): the child has a copy of this stack and goes on below, with system calls only.
    let result = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut args, mem::size_of::<libc::clone_args>())
    };
    if result == 0 {
        child.run(&arguments);
    }
    let error = io::Error::last_os_error();
    restore_signals(&mask);
    let pid = match i32::try_from(result).ok().and_then(Pid::from_raw) {
        Some(pid) if result > 0 => pid,
        _ => return Err(error),
    };
    // SAFETY: the kernel has just made this descriptor for us.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

impl Child {
    /// In the child. No allocation, no locks: system calls alone.
    fn run(&self, arguments: &[*const libc::c_char; 3]) -> ! {
        // SAFETY: descriptors and pointers were made by the parent before the clone; _exit never returns.
        unsafe {
            if let Some(gate) = self.gate {
                let mut byte = 0u8;
                if libc::read(gate, (&raw mut byte).cast(), 1) != 1
                    || libc::syscall(libc::SYS_setresgid, 0, 0, 0) != 0
                    || libc::syscall(libc::SYS_setresuid, 0, 0, 0) != 0
                {
                    libc::_exit(125);
                }
            }
            let mut spares = [-1; 8];
            for ((fd, _), spare) in self.fds.iter().zip(&mut spares) {
                *spare = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, SPARE_FDS);
            }
            for ((_, target), spare) in self.fds.iter().zip(spares) {
                if libc::dup2(spare, *target) < 0 {
                    libc::_exit(125);
                }
            }
            let environment = [ptr::null()];
            libc::execve(SELF.as_ptr(), arguments.as_ptr(), environment.as_ptr());
            libc::_exit(125)
        }
    }
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: both sets are local and initialised by the calls before they are read.
    unsafe {
        let (mut all, mut old) = (mem::zeroed(), mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, &mut old);
        old
    }
}

fn restore_signals(mask: &libc::sigset_t) {
    // SAFETY: a set that block_signals filled.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, ptr::null_mut()) };
}

fn map_ids(pid: Pid, linux: &Linux) -> Result<(), StepError> {
    let proc = format!("/proc/{}", pid.as_raw_pid());
    for (file, mappings) in [("uid_map", &linux.uid_mappings), ("gid_map", &linux.gid_mappings)] {
        let path = format!("{proc}/{file}");
        fs::write(&path, id_map(mappings)).map_err(at("user namespace", path))?;
    }
    Ok(())
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use rustix::process::{PidfdFlags, getpid, pidfd_open};

    use super::*;

    #[test]
    fn a_pidfd_has_its_process() {
        let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        assert_eq!(pid_of(&pidfd).unwrap(), getpid());
    }
}
