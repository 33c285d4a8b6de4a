//! What the host shares with this VM: one virtio-fs whose root has an entry, a directory or a file, for each share
//! by its number. It is mounted when the first container asks for a share, at a place that containers see nothing
//! of: their mounts of type [`TYPE`] bind single entries.
//!
//! A directory is a file system of its own to the kernel, mounted when it is first walked into. That is done here, so
//! that all containers that have a share see the same one, and the agent too ([`crate::follow`]).

use std::{
    collections::BTreeMap,
    fs::{File, read_link},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ampoule_vmm_api::guest::SHARE_TAG;
use rustix::{
    fs::{AtFlags, CWD, Dev, Mode, OFlags, StatxFlags, fstat, mkdir, open, statx},
    io::{Errno, Result},
    mount::{MountAttrFlags, UnmountFlags, unmount},
};

use crate::{
    mount,
    oci::Spec,
    plan::{StepError, at, refuse},
};

/// The type of such mounts; their source is a number.
pub const TYPE: &str = "share";
const DIRECTORY: &str = "/run/ampoule-shares";
/// Numbers of the host's devices mean other devices here.
const ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;

/// The shares that containers have, once there is a mount, each by an open directory of its file system: opening one
/// later would be told to whoever watches it.
static MOUNTED: Mutex<Option<BTreeMap<u32, Share>>> = Mutex::new(None);

fn mounted() -> MutexGuard<'static, Option<BTreeMap<u32, Share>>> {
    MOUNTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The shares of one container. Dropping it lets them go.
#[derive(Debug, Default)]
pub struct Shares(Vec<u32>);

impl Shares {
    /// Mounts what the container has a use for. Blocks.
    pub fn mount_for(spec: &Spec) -> std::result::Result<Self, StepError> {
        let mut shares = Self::default();
        for wanted in spec.mounts.iter().filter(|mount| mount.kind == TYPE) {
            let number = number(&wanted.source)?;
            let mut mounted = mounted();
            let known = known(&mut mounted)?;
            shares.0.push(number);
            known.insert(number, Share::open(number).map_err(at("shares", number))?);
        }
        Ok(shares)
    }

    /// A directory that no container has, only the agent, as long as it has both. Blocks.
    pub fn own(number: u32) -> std::result::Result<(Self, OwnedFd), StepError> {
        known(&mut mounted())?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(path_of(number), flags, Mode::empty());
        Ok((Self(vec![number]), directory.map_err(at("shares", number))?))
    }
}

impl Drop for Shares {
    fn drop(&mut self) {
        for number in &self.0 {
            if let Some(known) = &mut *mounted() {
                known.remove(number);
            }
            let _ = unmount(path_of(*number), UnmountFlags::DETACH);
        }
    }
}

/// Those that containers have; the first time, all is mounted.
fn known(
    mounted: &mut Option<BTreeMap<u32, Share>>,
) -> std::result::Result<&mut BTreeMap<u32, Share>, StepError> {
    match mounted {
        Some(known) => Ok(known),
        none => {
            mount_all()?;
            Ok(none.insert(BTreeMap::new()))
        }
    }
}

fn mount_all() -> std::result::Result<(), StepError> {
    match mkdir(DIRECTORY, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(at("shares", DIRECTORY)(e)),
    }
    let source = format!("source={SHARE_TAG}");
    let shares = mount::new("virtiofs", [source.as_str()], ATTRIBUTES);
    let shares = shares.map_err(at("shares", "virtiofs"))?;
    mount::attach_at(&shares, DIRECTORY.as_ref()).map_err(at("shares", DIRECTORY))
}

/// Where the guest has the share of a mount's source.
pub fn path(source: &str) -> std::result::Result<String, StepError> {
    number(source).map(path_of)
}

fn path_of(number: u32) -> String {
    format!("{DIRECTORY}/{number}")
}

fn number(source: &str) -> std::result::Result<u32, StepError> {
    match source.parse::<u32>() {
        Ok(number) if number.to_string() == source => Ok(number),
        _ => Err(refuse("mount", format_args!("share {source:?}"), "not a number")),
    }
}

/// The file system that a share is in.
#[derive(Clone, Debug)]
pub struct Share {
    pub path: PathBuf,
    pub device: Dev,
    root: Arc<OwnedFd>,
}

/// struct file_handle of FUSE: the number that its server has given a file, and a generation, of which ours has one.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    number: [u32; 2],
    generation: u32,
}

impl Handle {
    /// FILEID_INO64_GEN.
    const KIND: i32 = 0x81;

    fn new(node: u64) -> Self {
        Self {
            bytes: 12,
            kind: Self::KIND,
            number: [(node >> 32) as u32, node as u32],
            generation: 0,
        }
    }
}

impl Share {
    /// Those that containers have.
    pub fn numbers() -> Vec<u32> {
        mounted().iter().flat_map(BTreeMap::keys).copied().collect()
    }

    /// One that a container has.
    pub fn get(number: u32) -> Option<Self> {
        mounted().as_ref()?.get(&number).cloned()
    }

    fn open(number: u32) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let own = PathBuf::from(path_of(number));
        let (path, root) = match open(&own, flags, Mode::empty()) {
            // A file is in the file system of all.
            Err(Errno::NOTDIR) => (DIRECTORY.into(), open(DIRECTORY, flags, Mode::empty())?),
            root => (own, root?),
        };
        Ok(Self { device: fstat(&root)?.st_dev, path, root: Arc::new(root) })
    }

    /// A file that the kernel remembers, by its number. With the last descriptor of it the kernel forgets its name, after
    /// which it cannot be found any more, unless somebody has it [remembered](remember).
    pub fn find(&self, node: u64, flags: OFlags) -> Result<OwnedFd> {
        let handle = Handle::new(node);
        let flags = (flags | OFlags::CLOEXEC).bits();
        // SAFETY: the handle is a whole one, of the size it says; the descriptor is new, and nobody else's.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                self.root.as_raw_fd(),
                &raw const handle,
                flags,
            )
        };
        match fd {
            // SAFETY: as before.
            0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
            _ => Err(last_error()),
        }
    }

    /// The number of what lies at a path, of the agent's.
    pub fn number_of(path: &Path) -> Result<u64> {
        let file = File::from(open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?);
        let (mut handle, mut mount) = (Handle::new(0), 0);
        // SAFETY: the handle has as much room as it says; the path is NUL-terminated.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                file.as_raw_fd(),
                c"".as_ptr(),
                &raw mut handle,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        match result {
            0 if handle.kind == Handle::KIND => {
                Ok(u64::from(handle.number[0]) << 32 | u64::from(handle.number[1]))
            }
            0 => Err(Errno::INVAL),
            _ => Err(last_error()),
        }
    }
}

/// What an open file is called.
pub fn name_of(file: &OwnedFd) -> Option<PathBuf> {
    read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
}

/// Has the kernel look up a file's name again, which it else forgets with the last descriptor.
pub fn remember(file: &OwnedFd) {
    if let Some(name) = name_of(file) {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
        let _ = statx(CWD, name, flags, StatxFlags::TYPE);
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_has_a_number_and_nothing_else() {
        assert_eq!(path("0").unwrap(), "/run/ampoule-shares/0");
        assert_eq!(path("17").unwrap(), "/run/ampoule-shares/17");
        for wrong in ["", "a", "../0", "0/..", "-1", "+1", "01", " 1", "4294967296", "0\0"] {
            assert!(path(wrong).is_err(), "{wrong:?}");
        }
    }
}
