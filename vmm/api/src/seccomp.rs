//! System call filters, as lists of what is allowed: for `ampoule-vmm` and `ampoule-fsd`, which the guest speaks to. What is
//! not listed kills the process.

use std::collections::BTreeMap;

use libc::c_long;
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
