//! `ampoule-vmm`: runs one VM, told by the control socket that is its standard input.

use std::os::fd::{FromRawFd, OwnedFd};

fn main() {
    let process_ns = ampoule_vmm::events::now_ns();
    // SAFETY: whoever starts this program gives it the control socket as descriptor 0, and nothing else in it
    // uses that.
    let control = unsafe { OwnedFd::from_raw_fd(0) };
    ampoule_vmm::run::run(control, process_ns)
}
