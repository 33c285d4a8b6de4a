//! The seeded random numbers of a container, as its runner puts them in place; the agent gives them (`random`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use libseccomp::{ScmpAction, ScmpFilterContext, ScmpSyscall, error::SeccompError};
use rustix::io::fcntl_dupfd_cloexec;

use super::paths::Root;
use crate::{
    mount,
    plan::{StepError, at, refuse},
};

/// Puts the agent's file where the kernel's devices would be.
pub fn place(root: &Root, file: &OwnedFd) -> Result<(), StepError> {
    let (random, urandom) = ("/dev/random", "/dev/urandom");
    mount::attach(file, root.make_file(random)?).map_err(at("device", random))?;
    let copy = mount::copy(file.as_fd(), "", false).map_err(at("device", urandom))?;
    mount::attach(&copy, root.make_file(urandom)?).map_err(at("device", urandom))
}

/// Hands getrandom(2) of this process, and of all it becomes, to whoever holds the listener. Needs privilege, and must
/// not be followed by anything random before the agent has it.
pub fn listen() -> Result<OwnedFd, StepError> {
    let load = || -> Result<RawFd, SeccompError> {
        let mut filter = ScmpFilterContext::new(ScmpAction::Allow)?;
        filter.set_ctl_nnp(false)?;
        filter.set_ctl_ssb(true)?;
        filter.add_rule(ScmpAction::Notify, ScmpSyscall::from_name("getrandom")?)?;
        filter.load()?;
        filter.get_notify_fd()
    };
    let listener = load().map_err(|error| refuse("seed", "getrandom", error))?;
    // SAFETY: the kernel made it in `load`, and the library, which holds it, is not used again.
    let listener = unsafe { BorrowedFd::borrow_raw(listener) };
    fcntl_dupfd_cloexec(listener, 0).map_err(at("seed", "getrandom"))
}
