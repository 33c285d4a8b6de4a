//! Why a VM ended, in words, with what the guest said last.

use std::fmt;

use ampoule_vmm_api::{StopCause, message::ExitCounts};

use crate::text::{last_lines, one_line};

/// Lines of the guest's console kept.
const CONSOLE_LINES: usize = 20;
/// Lines of the VMM's standard error kept.
const STDERR_LINES: usize = 3;

/// What a VMM left behind.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Its [`ampoule_vmm_api::Event::Stopped`].
    pub last_words: Option<(StopCause, String, ExitCounts)>,
    pub stderr: Vec<u8>,
    pub console: Vec<u8>,
}

/// The kind of end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The VMM said why.
    Stopped(StopCause),
    /// The VMM ended with this code and said nothing.
    Exited(i32),
    /// A signal killed the VMM.
    Killed(i32),
    /// The VMM said something that makes no sense; we killed it.
    Protocol(String),
    /// The agent did not do its part; we killed the VM.
    GivenUp(String),
    /// The host's KVM cannot run guest kernels; we killed the VM.
    Emulated(String),
    /// Nobody knows.
    Lost,
}

/// The end of a VM. [`fmt::Display`] is one line; the console is apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    pub cause: Cause,
    /// What the VMM added; empty if nothing. Escaped.
    pub detail: String,
    /// The last lines of the guest's console, escaped.
    pub console: Vec<String>,
    pub exits: ExitCounts,
}

impl Death {
    /// Our own verdict goes before the VMM's last words, and those before how its process ended.
    pub(super) fn new(verdict: Option<Cause>, ended: Cause, said: Said) -> Self {
        let (words, detail, exits) = match said.last_words {
            Some((cause, detail, exits)) => (Some(Cause::Stopped(cause)), detail, exits),
            // A VMM that could not say it properly may have said it on standard error.
            None => {
                let lines = last_lines(&said.stderr, STDERR_LINES);
                (None, lines.join("; "), ExitCounts::default())
            }
        };
        Self {
            cause: verdict.or(words).unwrap_or(ended),
            detail: one_line(&detail, 500),
            console: last_lines(&said.console, CONSOLE_LINES),
            exits,
        }
    }

    /// For a sandbox whose owner task is gone without leaving a reason.
    pub fn lost() -> Self {
        Self {
            cause: Cause::Lost,
            detail: String::new(),
            console: Vec::new(),
            exits: ExitCounts::default(),
        }
    }

    /// Whether somebody wanted it: our own request, or the guest switching itself off.
    pub fn is_orderly(&self) -> bool {
        matches!(self.cause, Cause::Stopped(StopCause::Requested | StopCause::PowerOff))
    }

    /// Whether it looks like a KVM that cannot run a guest kernel.
    pub fn blames_kvm(&self) -> bool {
        match self.cause {
            Cause::Emulated(_) => true,
            Cause::Stopped(StopCause::KvmError | StopCause::TripleFault) => true,
            Cause::GivenUp(_) => self.console.is_empty(),
            _ => false,
        }
    }

    /// Whether the guest said that its memory is not enough for it.
    pub fn blames_memory(&self) -> bool {
        let words = ["out of memory", "deadlocked on memory", "failed to allocate"];
        self.console
            .iter()
            .map(|line| line.to_lowercase())
            .any(|line| words.iter().any(|w| line.contains(w)))
    }

    /// What the host refused the VMM, from the last of its words: "... (os error 24)".
    pub fn errno(&self) -> Option<i32> {
        let (_, number) = self.detail.strip_suffix(')')?.rsplit_once("(os error ")?;
        number.parse().ok()
    }

    /// Whether it is no size for a VM's memory, or not on this host.
    pub fn blames_memory_size(&self) -> bool {
        self.cause == Cause::Stopped(StopCause::BootFailed)
            && self.detail.starts_with("guest memory")
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Stopped(cause) => f.write_str(cause.describe())?,
            Cause::Exited(code) => write!(f, "ampoule-vmm ended with code {code}")?,
            Cause::Killed(signal) => {
                write!(f, "ampoule-vmm was killed by {}", signal_name(*signal))?;
            }
            Cause::Protocol(error) => write!(f, "ampoule-vmm broke the protocol: {error}")?,
            Cause::GivenUp(why) => f.write_str(why)?,
            Cause::Emulated(why) => write!(f, "/dev/kvm: {why}")?,
            Cause::Lost => f.write_str("the sandbox is gone")?,
        }
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

impl std::error::Error for Death {}

/// "SIGKILL", or "signal 40".
pub fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGHUP => "SIGHUP",
        libc::SIGILL => "SIGILL",
        libc::SIGINT => "SIGINT",
        libc::SIGKILL => "SIGKILL",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGSYS => "SIGSYS",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        other => return format!("signal {other}"),
    };
    name.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(cause: StopCause, detail: &str) -> Said {
        Said { last_words: Some((cause, detail.into(), ExitCounts::default())), ..Said::default() }
    }

    #[test]
    fn the_nearest_reason_wins() {
        let verdict = || Some(Cause::GivenUp("the agent did not answer".into()));
        let stderr = Said { stderr: b"a\nthread panicked\n".to_vec(), ..Said::default() };
        for (verdict, ended, said, text) in [
            (
                None,
                Cause::Killed(libc::SIGKILL),
                Said::default(),
                "ampoule-vmm was killed by SIGKILL",
            ),
            (
                None,
                Cause::Exited(101),
                stderr,
                "ampoule-vmm ended with code 101: a; thread panicked",
            ),
            (None, Cause::Exited(12), said(StopCause::Panic, ""), "the guest kernel panicked"),
            (
                None,
                Cause::Exited(10),
                said(StopCause::BootFailed, "no\x1b PT_LOAD"),
                "the VM could not be started: no\\u{1b} PT_LOAD",
            ),
            (verdict(), Cause::Killed(9), Said::default(), "the agent did not answer"),
        ] {
            assert_eq!(Death::new(verdict, ended, said).to_string(), text);
        }
    }

    #[test]
    fn what_the_host_refused_is_read_from_the_vmms_words() {
        for (detail, errno) in [
            ("device rng: Too many open files (os error 24)", Some(24)),
            ("(os error x)", None),
            ("(os error 24) and more", None),
            ("", None),
        ] {
            let death = Death::new(None, Cause::Exited(10), said(StopCause::BootFailed, detail));
            assert_eq!(death.errno(), errno, "{detail}");
        }
    }

    #[test]
    fn only_wanted_ends_are_orderly() {
        let by = |cause| Death::new(None, Cause::Exited(0), said(cause, ""));
        assert!(by(StopCause::Requested).is_orderly() && by(StopCause::PowerOff).is_orderly());
        assert!(!by(StopCause::Panic).is_orderly());
        assert!(!Death::new(None, Cause::Exited(0), Said::default()).is_orderly());
    }

    #[test]
    fn a_silent_guest_or_a_kvm_error_blames_kvm() {
        let kvm = Death::new(None, Cause::Exited(14), said(StopCause::KvmError, ""));
        let slow = || Some(Cause::GivenUp("slow".into()));
        let silent = Death::new(slow(), Cause::Killed(9), Said::default());
        let console = b"Linux version 6.12".to_vec();
        let talking = Death::new(slow(), Cause::Killed(9), Said { console, ..Said::default() });
        assert!(kvm.blames_kvm() && silent.blames_kvm() && !talking.blames_kvm());
    }
}
