//! `ampoule-vmm`: runs one VM, told by the control socket that is its standard input.

use std::{os::fd::FromRawFd, process::ExitCode};

fn main() -> ExitCode {
    let process_ns = ampoule_vmm::events::now_ns();
    // SAFETY: whoever starts this program gives it the control socket as descriptor 0; nothing else here uses it.
    let control = unsafe { std::os::fd::OwnedFd::from_raw_fd(0) };
    ampoule_vmm::run::run(control, process_ns).into()
}
