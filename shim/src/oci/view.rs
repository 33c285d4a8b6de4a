//! What is found by whoever enters the mount namespace of a container's process, as `podman cp` and `podman top` do: the
//! container's files, which are in its VM. They are a file system of FUSE, whose messages [`relay`] passes to a file server
//! in the guest. Where the host has no FUSE there is nothing; without either the host's files would be taken for them.
//!
//! The thread itself goes on seeing the host: its root lies below what is mounted on top of it, where only who enters
//! the namespace anew comes to (mount_namespaces(7), setns(2)). It can make no user namespaces any more.
//!
//! ```text
//!  podman cp ── file system call ──▶ FUSE on "/" ──▶ /dev/fuse ── relay ── vsock stream ──▶ the guest's file server
//! ```
//!
//! Nothing is asked of the guest before somebody looks.

mod init;
mod relay;

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{CWD, Mode, OFlags, open},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, fsconfig_create, fsconfig_reconfigure, fsconfig_set_string, fsmount,
        fsopen, fspick, mount, mount_change, move_mount,
    },
    process::{getegid, geteuid},
    thread::UnshareFlags,
};
use tokio::net::UnixStream;

use super::{OciError, Result};
use crate::{
    control::{Connection, ControlError},
    pace::Pace,
};
use relay::{Relay, Times};

/// The container's files for who enters the namespace.
pub struct View {
    device: OwnedFd,
    mount: OwnedFd,
}

/// Gives this thread a mount namespace with the container's files on top, once they are served, or nothing; an ordinary
/// user has none.
pub fn cover() -> Result<Option<View>> {
    match cover_root() {
        Err(Errno::PERM) => Ok(None),
        covered => covered.map_err(|e| OciError::Host("cover the host's root directory", e.into())),
    }
}

fn cover_root() -> std::result::Result<Option<View>, Errno> {
    // SAFETY: a new mount namespace changes nothing that memory safety depends on.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    // What is unmounted on the host is not held here.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    match View::mount() {
        Ok(view) => return Ok(Some(view)),
        Err(error) => tracing::debug!(%error, "no FUSE: `podman cp` will find nothing"),
    }
    let nothing = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("ampoule", "/", "tmpfs", nothing, c"size=4k,nr_inodes=1")?;
    Ok(None)
}

impl View {
    /// Nobody but this user is let in, and nothing in there is a device, a program or gives privileges.
    fn mount() -> std::result::Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let device = open("/dev/fuse", flags, Mode::empty())?;
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (option, value) in [
            ("source", "ampoule".to_owned()),
            ("fd", device.as_raw_fd().to_string()),
            ("rootmode", "40000".to_owned()),
            ("user_id", geteuid().as_raw().to_string()),
            ("group_id", getegid().as_raw().to_string()),
        ] {
            fsconfig_set_string(context.as_fd(), option, value)?;
        }
        fsconfig_create(context.as_fd())?;
        init::answer(&device)?;
        let inert = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, inert)?;
        move_mount(&mount, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(Self { device, mount })
    }

    /// Has the files of the container whose control socket is in this folder be seen from now on, as long as the process lives.
    pub fn serve(self, folder: &Path, boot_timeout: u16) -> Result<()> {
        let times = Times::of(Pace::of(Duration::from_secs(boot_timeout.into())));
        let folder = folder.to_owned();
        let mount = self.mount;
        let relay = Relay::new(
            self.device,
            times,
            move |first| connect(folder.clone(), boot_timeout, first),
            move || forget(&mount),
        );
        let relay = relay.map_err(|e| OciError::Host("serve the container's files", e))?;
        tokio::spawn(relay.run());
        Ok(())
    }
}

/// To a file server in the guest, as any other process can that may reach the container.
async fn connect(
    folder: PathBuf,
    boot_timeout: u16,
    first: u64,
) -> std::result::Result<UnixStream, ControlError> {
    Connection::open(&folder, boot_timeout)?.view(first).await
}

/// Has the kernel forget files that nobody uses, as it does when a file system is mounted anew.
fn forget(mount: &OwnedFd) -> std::result::Result<(), Errno> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    fsconfig_reconfigure(fspick(mount, "", flags)?.as_fd())
}
