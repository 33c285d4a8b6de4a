//! The root file system of a container, mounted in the agent's own mount namespace.
//!
//! Under `/run/ampoule/ID`: `lower` (the image), `scratch` (a disk or a tmpfs, with the directories
//! `upper` and `work`) and `root` (what the container sees). A [`Rootfs`] owns these mounts; everything
//! in here blocks, and is called off the runtime's thread.

use std::{
    fs,
    io::{self, Seek, SeekFrom},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use ampoule_agent_api::agent::{RootFs, root_fs::Upper};
use rustix::mount::{MountAttrFlags, UnmountFlags, unmount};

use crate::{
    mount,
    plan::{StepError, at, refuse},
};

const STEP: &str = "root file system";
const BASE: &str = "/run/ampoule";
/// Disk slots: /dev/vda is the guest's own image.
const SLOTS: std::ops::Range<u32> = 1..16;
/// How long a disk may take to get its capacity after it was attached.
const DISK_READY: Duration = Duration::from_secs(5);
/// How long a file system may stay busy after its last user has gone.
const RELEASE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(2);

/// Mounted file systems of one container.
#[derive(Debug)]
pub struct Rootfs {
    directory: PathBuf,
    /// In the order they were mounted.
    mounts: Vec<PathBuf>,
    /// The disk that must be free again.
    scratch: Option<PathBuf>,
}

impl Rootfs {
    /// Mounts what the request names. The id is a plain name.
    pub fn mount(id: &str, request: &RootFs) -> Result<Self, StepError> {
        let directory = Path::new(BASE).join(id);
        fs::create_dir_all(&directory).map_err(at(STEP, directory.display()))?;
        // From here on, a failure undoes what was done.
        let mut rootfs = Self { directory, mounts: Vec::new(), scratch: None };
        match request.upper.enum_value() {
            Ok(Upper::NONE) => rootfs.mount_lower("root", request)?,
            Ok(Upper::DISK) => {
                rootfs.mount_lower("lower", request)?;
                rootfs.mount_scratch(request.upper_slot)?;
                rootfs.mount_overlay()?;
            }
            Ok(Upper::TMPFS) => {
                rootfs.mount_lower("lower", request)?;
                // Half of the guest's memory, as tmpfs does by itself; the rest is for programs.
                let options = ["size=50%", "mode=0755"];
                rootfs.add("scratch", "tmpfs", &options, MountAttrFlags::empty())?;
                rootfs.mount_overlay()?;
            }
            Err(n) => return Err(refuse(STEP, "upper", format_args!("{n} is not known"))),
        }
        Ok(rootfs)
    }

    /// What the container is to see as its root.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    fn mount_lower(&mut self, name: &str, request: &RootFs) -> Result<(), StepError> {
        let source = format!("source={}", disk(request.lower_slot)?.display());
        let options: &[&str] = match request.lower_type.as_str() {
            "erofs" => &[&source, "ro"],
            // Its journal, if it has one, cannot be replayed onto a read-only disk.
            "ext4" => &[&source, "ro", "noload"],
            other => return Err(refuse(STEP, "lower", format_args!("{other:?} is not supported"))),
        };
        self.add(name, &request.lower_type, options, MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    fn mount_scratch(&mut self, slot: u32) -> Result<(), StepError> {
        let device = disk(slot)?;
        let source = format!("source={}", device.display());
        self.add("scratch", "ext4", &[&source, "noinit_itable"], MountAttrFlags::empty())?;
        self.scratch = Some(device);
        Ok(())
    }

    fn mount_overlay(&mut self) -> Result<(), StepError> {
        let path = |name| self.directory.join(name);
        let (lower, upper, work) = (path("lower"), path("scratch/upper"), path("scratch/work"));
        // The root directory takes its owner and mode from the upper one.
        let like = fs::metadata(&lower).map_err(at(STEP, lower.display()))?;
        for directory in [&upper, &work] {
            make_directory(directory, &like).map_err(at(STEP, directory.display()))?;
        }
        let options = [
            "source=overlay".to_owned(),
            format!("lowerdir={}", lower.display()),
            format!("upperdir={}", upper.display()),
            format!("workdir={}", work.display()),
            // Directories of the image can be renamed: package managers do.
            "redirect_dir=on".to_owned(),
            // Nothing mounts the upper again, or elsewhere.
            "index=off".to_owned(),
            "metacopy=off".to_owned(),
            // The scratch disk dies with the sandbox: no need to make it outlive a crash.
            "volatile".to_owned(),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        self.add("root", "overlay", &options, MountAttrFlags::empty())
    }

    fn add(
        &mut self,
        name: &str,
        kind: &str,
        options: &[&str],
        attributes: MountAttrFlags,
    ) -> Result<(), StepError> {
        let path = self.directory.join(name);
        let object = options.first().and_then(|o| o.strip_prefix("source=")).unwrap_or(kind);
        fs::create_dir_all(&path).map_err(at(STEP, path.display()))?;
        let mount = mount::new(kind, options.iter().copied(), attributes)
            .map_err(at(STEP, format_args!("{object} as {kind}")))?;
        mount::attach_at(&mount, &path).map_err(at(STEP, path.display()))?;
        self.mounts.push(path);
        Ok(())
    }

    /// Unmounts everything and waits until the scratch disk is free. May be tried again.
    pub fn unmount(&mut self) -> Result<(), StepError> {
        let end = Instant::now() + RELEASE;
        while let Some(path) = self.mounts.last() {
            retry(end, || Ok(unmount(path, UnmountFlags::NOFOLLOW)?))
                .map_err(at("unmount", path.display()))?;
            fs::remove_dir(path).map_err(at("remove", path.display()))?;
            self.mounts.pop();
        }
        if let Some(disk) = &self.scratch {
            // A file system may outlive its mount for a moment: an exclusive open says when it is gone.
            let open = || {
                fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(disk).map(drop)
            };
            retry(end, open).map_err(at("release", disk.display()))?;
            self.scratch = None;
        }
        match fs::remove_dir(&self.directory) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(at("remove", self.directory.display())(e))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        for path in self.mounts.drain(..).rev() {
            let _ = unmount(&path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
            let _ = fs::remove_dir(&path);
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

/// The device of a slot, once it has a capacity: the kernel hears of it a moment after the host attached it.
fn disk(slot: u32) -> Result<PathBuf, StepError> {
    if !SLOTS.contains(&slot) {
        return Err(refuse(STEP, format_args!("disk slot {slot}"), "there is none"));
    }
    let path = PathBuf::from(format!("/dev/vd{}", char::from(b'a' + slot as u8)));
    let ready = || match fs::File::open(&path)?.seek(SeekFrom::End(0))? {
        0 => Err(io::ErrorKind::ResourceBusy.into()),
        _ => Ok(()),
    };
    retry(Instant::now() + DISK_READY, ready).map_err(at(STEP, path.display()))?;
    Ok(path)
}

/// Again and again while the object is busy.
fn retry(end: Instant, mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match attempt() {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                thread::sleep(TICK);
            }
            result => return result,
        }
    }
}

fn make_directory(path: &Path, like: &fs::Metadata) -> io::Result<()> {
    fs::create_dir(path)?;
    chown(path, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(like.mode() & 0o7777))
}
