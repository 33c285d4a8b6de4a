//! System call filters, as lists of what is allowed: for `ampoule-vmm` and `ampoule-fsd`, which the guest speaks to. What is
//! not listed kills the process.

use std::collections::BTreeMap;

use libc::*;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// A compiled filter.
#[derive(Debug)]
pub struct Filter(BpfProgram);

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("a system call filter cannot be compiled")]
    Compile(#[from] BackendError),
    #[error("the kernel refused a system call filter")]
    Install(#[from] seccompiler::Error),
}

/// One system call, and what its arguments must be.
pub type Rule = (c_long, Arguments);

#[derive(Clone, Copy, Debug)]
pub enum Arguments {
    Any,
    /// The argument of this index is one of these values.
    OneOf(u8, &'static [u32]),
    /// The argument of this index has none of these bits.
    Without(u8, u32),
}
use Arguments::*;

/// What any thread of Rust needs to live, to use the heap and to end.
pub const THREAD: &[Rule] = &[
    // Locks between threads, joins, channels.
    (SYS_futex, Any),
    // Heap. Never executable.
    (SYS_brk, Any),
    (SYS_mmap, Without(2, PROT_EXEC as u32)),
    (SYS_mprotect, Without(2, PROT_EXEC as u32)),
    (SYS_mremap, Any),
    (SYS_munmap, Any),
    // The allocator, and a thread's stack when it ends.
    (SYS_madvise, OneOf(2, &[MADV_DONTNEED as u32, MADV_FREE as u32])),
    // What is given up.
    (SYS_close, Any),
    // Eventfds, and last words.
    (SYS_write, Any),
    // Return from a signal handler; blocking signals while a thread ends.
    (SYS_rt_sigreturn, Any),
    (SYS_rt_sigprocmask, Any),
    (SYS_sigaltstack, Any),
    (SYS_sched_yield, Any),
    (SYS_exit, Any),
    (SYS_exit_group, Any),
    // abort() after a panic: ends with SIGABRT and its message on stderr.
    (SYS_getpid, Any),
    (SYS_gettid, Any),
    (SYS_tgkill, Any),
];

impl Filter {
    /// A filter of several lists, in which no call may be twice: the last rule would count.
    pub fn compile(lists: &[&[Rule]]) -> Result<Self, SeccompError> {
        let mut rules = BTreeMap::new();
        for (syscall, arguments) in lists.iter().copied().flatten() {
            rules.insert(*syscall, arguments.rules()?);
        }
        let filter = SeccompFilter::new(
            rules,
            SeccompAction::KillProcess,
            SeccompAction::Allow,
            TargetArch::x86_64,
        )?;
        Ok(Self(filter.try_into()?))
    }

    /// Puts the filter on the calling thread, for good.
    pub fn install(&self) -> Result<(), SeccompError> {
        Ok(apply_filter(&self.0)?)
    }
}

impl Arguments {
    /// An empty list allows whatever the arguments are; else one rule must match.
    fn rules(&self) -> Result<Vec<SeccompRule>, BackendError> {
        let rule = |index, op, value: u32| {
            SeccompRule::new(vec![SeccompCondition::new(index, Dword, op, value.into())?])
        };
        match *self {
            Any => Ok(vec![]),
            OneOf(index, values) => {
                values.iter().map(|&value| rule(index, SeccompCmpOp::Eq, value)).collect()
            }
            Without(index, bits) => Ok(vec![rule(index, SeccompCmpOp::MaskedEq(bits.into()), 0)?]),
        }
    }
}
