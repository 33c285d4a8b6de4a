//! Starting and reaping the VMM's process. The child gets its control socket as standard input, nothing else,
//! and, where the host permits, user and pid namespaces of its own; the rest of its confinement it does
//! itself.
//!
//! The VMM ends with its shim because the control socket then ends. (PR_SET_PDEATHSIG would fire when the
//! *thread* that called [`VmmProcess::spawn`] ends, which with an async runtime is any time.)

use std::{
    ffi::{CStr, CString, NulError},
    fmt, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, fcntl_setfl, open},
    io::{Errno, fcntl_dupfd_cloexec},
    pipe::{PipeFlags, fcntl_setpipe_size, pipe_with},
    process::{
        Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, getegid, geteuid, pidfd_send_signal,
        waitid,
    },
};

use crate::Channel;

/// Bytes of standard error kept; what the VMM says beyond it is lost to it, without blocking it.
const STDERR_SIZE: usize = 16 << 10;

/// Namespaces to try, best first.
const NAMESPACES: [libc::c_int; 3] =
    [libc::CLONE_NEWUSER | libc::CLONE_NEWPID, libc::CLONE_NEWPID, 0];
/// The same for a process that acts as several users.
const WITH_ALL_USERS: [libc::c_int; 2] = [libc::CLONE_NEWPID, 0];

/// Why a VMM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("the path or the name of the VMM holds a NUL byte")]
    Nul(#[from] NulError),
    #[error("preparing to start {}", exe.display())]
    Prepare { exe: PathBuf, source: io::Error },
    #[error("starting {}: {step} failed", exe.display())]
    Child { exe: PathBuf, step: &'static str, source: io::Error },
}

/// How a VMM's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmExit {
    /// An exit code: see [`StopCause::exit_code`](crate::StopCause::exit_code).
    Code(i32),
    /// Killed by this signal; SIGSYS is a forbidden system call.
    Signal(i32),
}

impl fmt::Display for VmmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// A running VMM. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct VmmProcess {
    pid: Pid,
    pidfd: OwnedFd,
    stderr: OwnedFd,
    exit: Option<VmmExit>,
}

impl VmmProcess {
    /// Starts `exe` with `control` as its standard input; `name` is for process listings only. Returns when
    /// the program is loaded, some 0.3 ms; from any thread.
    pub fn spawn(exe: &Path, name: &str, control: Channel) -> Result<Self, SpawnError> {
        Self::spawn_in(&NAMESPACES, exe, name, control)
    }

    /// As [`VmmProcess::spawn`], but the process keeps the users of the host, and what its caller may do.
    pub fn spawn_with_all_users(
        exe: &Path,
        name: &str,
        control: Channel,
    ) -> Result<Self, SpawnError> {
        Self::spawn_in(&WITH_ALL_USERS, exe, name, control)
    }

    fn spawn_in(
        namespaces: &[libc::c_int],
        exe: &Path,
        name: &str,
        control: Channel,
    ) -> Result<Self, SpawnError> {
        let child = Child::prepare(exe, name, control)?;
        let mut namespaces = namespaces.iter().copied().peekable();
        loop {
            let wanted = namespaces.next().unwrap_or(0);
            match child.start(wanted) {
                Err(failure) if failure.step.namespaces() && namespaces.peek().is_some() => {}
                Err(Failure { step, source }) => {
                    let exe = exe.to_owned();
                    return Err(SpawnError::Child { exe, step: step.name(), source });
                }
                Ok((pid, pidfd)) => {
                    return Ok(Self { pid, pidfd, stderr: child.stderr_read, exit: None });
                }
            }
        }
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// SIGKILL. No error if it has ended already.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// How it ended, or `None` while it runs.
    pub fn try_wait(&mut self) -> io::Result<Option<VmmExit>> {
        self.reap(WaitIdOptions::NOHANG)
    }

    /// Blocks until it has ended. For async callers: wait until the pidfd is readable, then call this.
    pub fn wait(&mut self) -> io::Result<VmmExit> {
        loop {
            match self.reap(WaitIdOptions::empty()) {
                Ok(Some(exit)) => return Ok(exit),
                Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
                _ => {}
            }
        }
    }

    /// What it has said on standard error since the last call, at most 16 KiB. Escape before use.
    pub fn stderr(&self) -> Vec<u8> {
        let mut bytes = vec![0; STDERR_SIZE];
        let len = rustix::io::read(&self.stderr, &mut bytes).unwrap_or(0);
        bytes.truncate(len);
        bytes
    }

    fn reap(&mut self, options: WaitIdOptions) -> io::Result<Option<VmmExit>> {
        if self.exit.is_none() {
            let status =
                waitid(WaitId::PidFd(self.pidfd.as_fd()), options | WaitIdOptions::EXITED)?;
            self.exit = status.map(exit);
        }
        Ok(self.exit)
    }
}

/// The pidfd: readable once the process has ended.
impl AsFd for VmmProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        if self.exit.is_none() {
            self.kill();
            let _ = self.wait();
        }
    }
}

fn exit(status: WaitIdStatus) -> VmmExit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => VmmExit::Code(code),
        (None, signal) => VmmExit::Signal(signal.unwrap_or(0)),
    }
}

/// What the child does, in order; also what it reports when one fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Clone,
    MapUser,
    Descriptors,
    Exec,
}

impl Step {
    const ALL: [Self; 4] = [Self::Clone, Self::MapUser, Self::Descriptors, Self::Exec];

    fn name(self) -> &'static str {
        match self {
            Self::Clone => "making the process",
            Self::MapUser => "mapping its user",
            Self::Descriptors => "arranging its descriptors",
            Self::Exec => "executing the program",
        }
    }

    /// Whether fewer namespaces may help.
    fn namespaces(self) -> bool {
        matches!(self, Self::Clone | Self::MapUser)
    }
}

struct Failure {
    step: Step,
    source: io::Error,
}

/// Everything the child needs, made before it exists: it may neither allocate nor lock.
struct Child {
    exe: CString,
    arguments: [CString; 3],
    uid_map: CString,
    gid_map: CString,
    /// Standard input, output and error; none of them is 0, 1 or 2 here.
    streams: [OwnedFd; 3],
    stderr_read: OwnedFd,
}

impl Child {
    fn prepare(exe: &Path, name: &str, control: Channel) -> Result<Self, SpawnError> {
        let prepare = |source| SpawnError::Prepare { exe: exe.to_owned(), source };
        // The child goes to the root directory first.
        let path = std::path::absolute(exe).map_err(prepare)?;
        let path = CString::new(path.into_os_string().into_vec())?;
        let program = exe.file_name().unwrap_or(exe.as_os_str());
        let arguments =
            [CString::new(program.as_bytes())?, CString::from(c"--id"), CString::new(name)?];
        let uid_map = CString::new(format!("0 {} 1\n", geteuid().as_raw()))?;
        let gid_map = CString::new(format!("0 {} 1\n", getegid().as_raw()))?;
        let (streams, stderr_read) = open_streams(&control.into_fd()).map_err(prepare)?;
        Ok(Self { exe: path, arguments, uid_map, gid_map, streams, stderr_read })
    }

    /// Makes the process and waits until it has executed the program, or could not.
    fn start(&self, namespaces: libc::c_int) -> Result<(Pid, OwnedFd), Failure> {
        let failed = |e: Errno| Failure { step: Step::Clone, source: e.into() };
        let (report, report_write) = pipe_with(PipeFlags::CLOEXEC).map_err(failed)?;
        // The addresses of what the child uses.
        let [a, b, c] = &self.arguments;
        let argv = [a.as_ptr(), b.as_ptr(), c.as_ptr(), std::ptr::null()];
        let signals = block_signals();
        // SAFETY: the child runs `run` only, which keeps to async-signal-safe calls and never returns.
        let cloned = unsafe { clone(namespaces) };
        if let Ok(None) = cloned {
            self.run(namespaces, &argv, report_write.as_raw_fd());
        }
        restore_signals(&signals);
        drop(report_write);
        let Some((pid, pidfd)) = cloned.map_err(failed)? else { std::process::abort() };
        match read_report(&report) {
            None => Ok((pid, pidfd)),
            Some(failure) => {
                let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
                Err(failure)
            }
        }
    }

    /// The child's only function: async-signal-safe calls, no allocation.
    fn run(&self, namespaces: libc::c_int, argv: &[*const libc::c_char; 4], report: RawFd) -> ! {
        let step = self.try_run(namespaces, argv);
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let mut bytes = [step as u8; 5];
        bytes[1..].copy_from_slice(&errno.to_ne_bytes());
        // SAFETY: plain system calls on memory of this frame; then the process ends without clean-up.
        unsafe {
            libc::write(report, bytes.as_ptr().cast(), bytes.len());
            libc::_exit(127)
        }
    }

    /// Returns only if a step failed, with its error in errno.
    fn try_run(&self, namespaces: libc::c_int, argv: &[*const libc::c_char; 4]) -> Step {
        if namespaces & libc::CLONE_NEWUSER != 0 && !self.map_user() {
            return Step::MapUser;
        }
        // SAFETY: plain system calls; all pointers are to NUL-terminated memory that outlives them.
        unsafe {
            // Signals for the shim's terminal are not the VMM's.
            libc::setsid();
            for (target, fd) in (0..).zip(&self.streams) {
                if libc::dup2(fd.as_raw_fd(), target) < 0 {
                    return Step::Descriptors;
                }
            }
            if libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) < 0
                || libc::chdir(c"/".as_ptr()) < 0
            {
                return Step::Descriptors;
            }
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
            let environment = [std::ptr::null()];
            libc::execve(self.exe.as_ptr(), argv.as_ptr(), environment.as_ptr());
        }
        Step::Exec
    }

    /// The caller's user becomes root of the new namespace, the only user there is.
    fn map_user(&self) -> bool {
        write_file(c"/proc/self/setgroups", c"deny")
            && write_file(c"/proc/self/uid_map", &self.uid_map)
            && write_file(c"/proc/self/gid_map", &self.gid_map)
    }
}

/// Copies of the control socket, of /dev/null and of the writing end of a pipe, all above the standard
/// streams; and the reading end.
fn open_streams(control: &OwnedFd) -> io::Result<([OwnedFd; 3], OwnedFd)> {
    let null = open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let (stderr_read, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setpipe_size(&stderr, STDERR_SIZE)?;
    fcntl_setfl(&stderr, OFlags::NONBLOCK)?;
    fcntl_setfl(&stderr_read, OFlags::NONBLOCK)?;
    let high = |fd: &OwnedFd| fcntl_dupfd_cloexec(fd, 3);
    Ok(([high(control)?, high(&null)?, high(&stderr)?], stderr_read))
}

/// `None` in the child.
///
/// # Safety
/// Like fork in a program with threads: the child must keep to async-signal-safe calls.
unsafe fn clone(namespaces: libc::c_int) -> Result<Option<(Pid, OwnedFd)>, Errno> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all zero is a valid clone_args.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = (namespaces | libc::CLONE_PIDFD) as u64;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM the child has its own copy of this stack; the arguments outlive the call.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>())
    };
    if pid < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    match Pid::from_raw(pid as i32) {
        None => Ok(None),
        // SAFETY: the kernel has just opened it for us.
        Some(pid) => Ok(Some((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))),
    }
}

/// What the child reported before it gave up; `None` when the program was executed and the pipe closed.
fn read_report(report: &OwnedFd) -> Option<Failure> {
    let mut bytes = [0; 5];
    let len = loop {
        match rustix::io::read(report, &mut bytes) {
            Err(Errno::INTR) => {}
            read => break read.unwrap_or(0),
        }
    };
    let [step, errno @ ..] = bytes;
    (len == bytes.len()).then(|| Failure {
        step: Step::ALL.get(usize::from(step)).copied().unwrap_or(Step::Exec),
        source: io::Error::from_raw_os_error(i32::from_ne_bytes(errno)),
    })
}

/// Async-signal-safe.
fn write_file(path: &CStr, text: &CStr) -> bool {
    // SAFETY: plain system calls on NUL-terminated memory.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        let len = text.count_bytes();
        let written = fd >= 0 && libc::write(fd, text.as_ptr().cast(), len) == len as isize;
        let errno = *libc::__errno_location();
        libc::close(fd);
        *libc::__errno_location() = errno;
        written
    }
}

/// No signal handler of the caller's may run in the child. Returns what was blocked before.
fn block_signals() -> libc::sigset_t {
    // SAFETY: both sets are memory of this frame.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        before
    }
}

fn restore_signals(before: &libc::sigset_t) {
    // SAFETY: a set that `block_signals` filled.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, sync::Mutex};

    use super::*;

    /// Held while a script is open for writing and while a child is made: a child that still has the
    /// script open for writing would keep it from being executed.
    static SCRIPTS: Mutex<()> = Mutex::new(());

    struct Script(PathBuf);

    impl Script {
        fn new(name: &str, text: &str) -> Self {
            let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
            let _guard = SCRIPTS.lock().unwrap();
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            Self(path)
        }

        fn start(&self) -> (VmmProcess, Channel) {
            let (ours, theirs) = Channel::pair().unwrap();
            let _guard = SCRIPTS.lock().unwrap();
            (VmmProcess::spawn(&self.0, "test", theirs).unwrap(), ours)
        }
    }

    impl Drop for Script {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    #[test]
    fn the_exit_code_and_the_last_words_arrive() {
        let script = Script::new("spawn-exit", "echo arguments: $* >&2; env >&2; exit 7");
        let (mut vmm, _control) = script.start();
        assert_eq!(vmm.wait().unwrap(), VmmExit::Code(7));
        assert_eq!(vmm.try_wait().unwrap(), Some(VmmExit::Code(7)));
        let said = String::from_utf8(vmm.stderr()).unwrap();
        assert!(said.starts_with("arguments: --id test\n"), "{said}");
        assert!(!said.contains("PATH=/"), "{said}");
    }

    #[test]
    fn the_child_has_the_standard_streams_only() {
        let _inheritable = without_cloexec(&fs::File::open("/dev/null").unwrap());
        let text = "[ /proc/self/fd/1 -ef /dev/null ] && ls /proc/self/fd >&2; exit 0";
        let script = Script::new("spawn-fds", text);
        let (mut vmm, _control) = script.start();
        vmm.wait().unwrap();
        // The fourth is what ls reads.
        assert_eq!(String::from_utf8(vmm.stderr()).unwrap(), "0\n1\n2\n3\n");
    }

    fn without_cloexec(file: &fs::File) -> OwnedFd {
        let copy = rustix::io::dup(file).unwrap();
        rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty()).unwrap();
        copy
    }

    #[test]
    fn a_kill_is_reported_and_the_pidfd_wakes() {
        let script = Script::new("spawn-kill", "exec sleep 100");
        let (mut vmm, _control) = script.start();
        assert_eq!(vmm.try_wait().unwrap(), None);
        vmm.kill();
        let mut fds = [rustix::event::PollFd::new(&vmm, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, None).unwrap(), 1);
        assert_eq!(vmm.wait().unwrap(), VmmExit::Signal(libc::SIGKILL));
        vmm.kill();
    }

    #[test]
    fn dropping_kills_and_reaps() {
        let script = Script::new("spawn-drop", "exec sleep 100");
        let (vmm, _control) = script.start();
        let pid = vmm.pid();
        drop(vmm);
        assert!(rustix::process::test_kill_process(pid).is_err());
    }

    #[test]
    fn a_flood_on_stderr_blocks_nobody() {
        let script = Script::new("spawn-flood", "head -c 1000000 /dev/zero >&2; exit 3");
        let (mut vmm, _control) = script.start();
        assert_eq!(vmm.wait().unwrap(), VmmExit::Code(3));
        assert_eq!(vmm.stderr().len(), STDERR_SIZE);
    }

    #[test]
    fn what_cannot_be_executed_is_named() {
        for (path, reason) in [("/nonexistent/vmm", Errno::NOENT), ("/dev/null", Errno::ACCESS)] {
            let (_ours, theirs) = Channel::pair().unwrap();
            let _guard = SCRIPTS.lock().unwrap();
            let error = VmmProcess::spawn(Path::new(path), "test", theirs).unwrap_err();
            assert_eq!(error.to_string(), format!("starting {path}: executing the program failed"));
            let SpawnError::Child { source, .. } = error else { panic!("{error:?}") };
            assert_eq!(source.raw_os_error(), Some(reason.raw_os_error()));
        }
    }
}
