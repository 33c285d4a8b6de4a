//! A PID 1 before the workload (docker's `--init`): this process, prepared and confined like the workload, stays to
//! reap what is left to it, passes signals on, and ends as the workload does.

use std::{io, mem, process, ptr};

use libc::{c_int, sigset_t};
use rustix::{
    process::{Pid, WaitOptions, WaitStatus, getpid, setpgid, wait},
    stdio::stdin,
    termios::{isatty, tcsetpgrp},
};

use crate::plan::{StepError, at};

/// Signals of a process's own making, and those of job control: never passed on.
const OWN: [c_int; 9] = [
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// Comes back in the child, which is to become the workload.
pub fn stay_before_it() -> Result<(), StepError> {
    let signals = passed_on();
    mask(&signals);
    // SAFETY: the runner has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(at("init", "fork")(io::Error::last_os_error())),
        0 => {
            lead_the_terminal();
            mask(&empty());
            Ok(())
        }
        child => reap(&signals, child),
    }
}

/// The workload is the group that the terminal listens to.
fn lead_the_terminal() {
    let _ = setpgid(None, None);
    if isatty(stdin()) {
        let _ = tcsetpgrp(stdin(), getpid());
    }
}

fn reap(signals: &sigset_t, workload: c_int) -> ! {
    // Above all the channel: its end tells the agent that the workload runs.
    // SAFETY: nothing below uses a descriptor.
    unsafe { libc::close_range(3, u32::MAX, 0) };
    loop {
        let mut signal = 0;
        // SAFETY: two live variables.
        if unsafe { libc::sigwait(signals, &mut signal) } != 0 {
            continue;
        }
        if signal != libc::SIGCHLD {
            // SAFETY: kill(2) takes no pointers.
            unsafe { libc::kill(workload, signal) };
            continue;
        }
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if Some(pid) == Pid::from_raw(workload) {
                process::exit(exit_code(status));
            }
        }
    }
}

/// As a shell has it.
fn exit_code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    }
}

fn passed_on() -> sigset_t {
    let mut set = empty();
    // SAFETY: the set is initialised.
    unsafe {
        libc::sigfillset(&mut set);
        for signal in OWN {
            libc::sigdelset(&mut set, signal);
        }
    }
    set
}

fn empty() -> sigset_t {
    // SAFETY: sigemptyset(3) initialises all of it.
    unsafe {
        let mut set = mem::zeroed();
        libc::sigemptyset(&mut set);
        set
    }
}

fn mask(set: &sigset_t) {
    // SAFETY: an initialised set.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, set, ptr::null_mut()) };
}
