//! The process's terminal: a pair from the container's own devpts, so that its name means something
//! inside. The master goes to the agent.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, fstat},
    io::Errno,
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    termios::{Winsize, tcsetwinsize},
};

use super::{
    paths::{Root, is_char_device},
    user::User,
};
use crate::{
    mount,
    oci::Process,
    plan::{StepError, at},
};

const MULTIPLEXER: &str = "/dev/pts/ptmx";

pub struct Terminal {
    pub master: OwnedFd,
    slave: OwnedFd,
}

/// Opens a pair, if the process is to have a terminal.
pub fn open(root: &Root, process: &Process) -> Result<Option<Terminal>, StepError> {
    if !process.terminal {
        return Ok(None);
    }
    let master = root
        .open_with(MULTIPLEXER, OFlags::RDWR | OFlags::NOCTTY, ResolveFlags::NO_SYMLINKS)
        .map_err(at("terminal", MULTIPLEXER))?;
    let terminal = pair(master).map_err(at("terminal", MULTIPLEXER))?;
    if let Some(size) = process.console_size {
        let size = Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal.master, size).map_err(at("terminal", "size"))?;
    }
    Ok(Some(terminal))
}

fn pair(master: OwnedFd) -> rustix::io::Result<Terminal> {
    if !is_char_device(&fstat(&master)?, 5, 2) {
        return Err(Errno::NODEV);
    }
    unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    Ok(Terminal { master, slave })
}

impl Terminal {
    /// Makes it /dev/console.
    pub fn bind_console(&self, root: &Root) -> Result<(), StepError> {
        let console = root.make_file("/dev/console")?;
        let copy = mount::copy(self.slave.as_fd(), "", false).map_err(at("terminal", "console"))?;
        mount::attach(&copy, &console).map_err(at("terminal", "/dev/console"))
    }

    /// Makes it the controlling terminal and descriptors 0, 1 and 2, and the user's.
    pub fn become_standard_streams(&self, user: &User) -> Result<(), StepError> {
        let slave = &self.slave;
        ioctl_tiocsctty(slave).map_err(at("terminal", "controlling"))?;
        let group = fstat(slave).map_err(at("terminal", "owner"))?.st_gid;
        fchown(slave, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(group)))
            .and_then(|()| fchmod(slave, Mode::from_raw_mode(0o620)))
            .map_err(at("terminal", "owner"))?;
        dup2_stdin(slave)
            .and_then(|()| dup2_stdout(slave))
            .and_then(|()| dup2_stderr(slave))
            .map_err(at("terminal", "standard streams"))
    }
}
