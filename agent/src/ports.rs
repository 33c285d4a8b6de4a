//! The I/O ports by which the agent marks its stages and switches the VM off.
//!
//! The permission (ioperm(2)) is inherited by fork and exec, so it is held only around the `out`.

use std::{arch::asm, io};

use ampoule_vmm_api::guest::{Mark, POWER_PORT, STAGE_PORT};

/// Marks a stage of the boot. Where there are no such ports, nothing happens.
pub fn mark(mark: Mark) {
    let _ = write(STAGE_PORT, mark as u8);
}

/// Ends the VM. File systems have been synced and unmounted before.
pub fn power_off() -> ! {
    let _ = write(POWER_PORT, 0);
    // Not reached in a VM of ours. Where there is no such port, a reset is what every machine has.
    loop {
        // SAFETY: reboot(2) with a plain command takes no pointer.
        unsafe { libc::reboot(libc::RB_AUTOBOOT) };
        // SAFETY: pause(2) has no arguments.
        unsafe { libc::pause() };
    }
}

fn write(port: u16, value: u8) -> io::Result<()> {
    permit(port, true)?;
    // SAFETY: the kernel granted this port; the instruction touches nothing else.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
    permit(port, false)
}

fn permit(port: u16, on: bool) -> io::Result<()> {
    // SAFETY: ioperm(2) takes plain numbers.
    match unsafe { libc::ioperm(port.into(), 1, on.into()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
