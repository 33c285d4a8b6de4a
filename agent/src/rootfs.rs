//! The root file system of a container, mounted in the agent's own mount namespace.
//!
//! Under `/run/ampoule/ID`: `lower0` (the image, or its top layer), `lower1`, ..., `scratch` (a disk or a tmpfs,
//! with the directories `upper` and `work`) and `root` (what the container sees; the only one where a single
//! file system is all there is). A [`Rootfs`] owns these mounts; everything in here blocks, and is called off
//! the runtime's thread.

use std::{
    fs,
    io::{self, Seek, SeekFrom},
    os::fd::AsFd,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use ampoule_agent_api::{
    DISK_MAJOR,
    agent::{
        RootFs,
        root_fs::{Lower, Upper},
    },
};
use ampoule_vmm_api::Owners;
use rustix::{
    fs::{Mode, OFlags, major, minor, open},
    mount::{MountAttrFlags, UnmountFlags, unmount},
};

use crate::{
    mount,
    oci::{DeviceRule, Linux},
    pace,
    plan::{StepError, at, refuse},
    write_out::Overlay,
};

const STEP: &str = "root file system";
const BASE: &str = "/run/ampoule";
/// Disk slots: /dev/vda is the guest's own image, which a container may have for its root too.
const SLOTS: std::ops::Range<u32> = 0..16;
/// How long a disk usually may take to get its capacity after it was attached.
const DISK_READY: Duration = Duration::from_secs(5);
/// How long a file system usually may stay busy after its last user has gone.
const RELEASE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(2);

/// Mounted file systems of one container.
#[derive(Debug)]
pub struct Rootfs {
    directory: PathBuf,
    /// In the order they were mounted.
    mounts: Vec<PathBuf>,
    /// The disks written to or passed on, which must be free again; others may be shared by several containers.
    disks: Vec<PathBuf>,
    /// Of what is mapped.
    owners: Option<Owners>,
}

impl Rootfs {
    /// Mounts what the request names. The id is a plain name.
    pub fn mount(id: &str, request: &RootFs) -> Result<Self, StepError> {
        let directory = Path::new(BASE).join(id);
        fs::create_dir_all(&directory).map_err(at(STEP, directory.display()))?;
        // From here on, a failure undoes what was done.
        let owners = owners(request)?;
        let mut rootfs = Self { directory, mounts: Vec::new(), disks: Vec::new(), owners };
        let upper = request.upper.enum_value();
        let upper = upper.map_err(|n| refuse(STEP, "upper", format_args!("{n} is not known")))?;
        match (&request.lowers[..], upper) {
            ([], Upper::KEPT) => rootfs.mount_disk("root", request.upper_slot, &[], true)?,
            ([], _) => return Err(refuse(STEP, "lowers", "there are none")),
            ([lower], Upper::NONE) => rootfs.mount_lower("root", lower)?,
            (lowers, upper) => {
                for (n, lower) in lowers.iter().enumerate() {
                    rootfs.mount_lower(&format!("lower{n}"), lower)?;
                }
                rootfs.mount_upper(upper, request.upper_slot)?;
                rootfs.mount_overlay(lowers.len(), upper)?;
            }
        }
        Ok(rootfs)
    }

    /// What the container is to see as its root.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Where what the container writes is kept, if that is beside its root.
    pub fn scratch(&self) -> PathBuf {
        self.directory.join("scratch")
    }

    /// What its overlay is made of, whose first lower layer may be what its upper one began with.
    pub fn overlay(&self, has_start: bool, is_live: bool) -> Result<Overlay, StepError> {
        let open = |path: PathBuf| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            open(&path, flags, Mode::empty()).map_err(at(STEP, path.display()))
        };
        let lower = |n| self.directory.join(format!("lower{n}"));
        let count = (0..).take_while(|&n| self.mounts.contains(&lower(n))).count();
        let mut lowers = (0..count).map(|n| open(lower(n))).collect::<Result<Vec<_>, _>>()?;
        let start = (has_start && count > 0).then(|| lowers.remove(0));
        let upper = open(self.scratch().join("upper"))?;
        Ok(Overlay { upper, start, image: lowers, is_live })
    }

    /// Puts the numbers of disks in the place of their slots. They, too, must be free again in the end.
    pub fn number_disks(&mut self, linux: &mut Linux) -> Result<(), StepError> {
        for device in linux.devices.iter_mut().filter(|device| device.major == DISK_MAJOR) {
            let slot = device.minor;
            let path = disk(slot)?;
            let number = fs::metadata(&path).map_err(at("device", path.display()))?.rdev();
            (device.major, device.minor) = (major(number), minor(number));
            let named = |rule: &&mut DeviceRule| {
                (rule.major, rule.minor) == (Some(DISK_MAJOR.into()), Some(slot.into()))
            };
            for rule in linux.resources.devices.iter_mut().filter(named) {
                (rule.major, rule.minor) = (Some(device.major.into()), Some(device.minor.into()));
            }
            if !self.disks.contains(&path) {
                self.disks.push(path);
            }
        }
        Ok(())
    }

    fn mount_lower(&mut self, name: &str, lower: &Lower) -> Result<(), StepError> {
        let mut options = vec![source(&disk(lower.slot)?), "ro".to_owned()];
        match lower.type_.as_str() {
            "erofs" => {
                for slot in &lower.devices {
                    options.push(format!("device={}", disk(*slot)?.display()));
                }
            }
            // Its journal, if it has one, cannot be replayed onto a read-only disk.
            "ext4" => options.push("noload".into()),
            other => return Err(refuse(STEP, "lower", format_args!("{other:?} is not supported"))),
        }
        self.add(name, &lower.type_, &options, MountAttrFlags::MOUNT_ATTR_RDONLY, lower.mapped)
    }

    /// An ext4 that is written to.
    fn mount_disk(
        &mut self,
        name: &str,
        slot: u32,
        options: &[&str],
        mapped: bool,
    ) -> Result<(), StepError> {
        let device = disk(slot)?;
        let source = source(&device);
        let options: Vec<_> = [&*source].iter().chain(options).map(|&o| o.to_owned()).collect();
        self.add(name, "ext4", &options, MountAttrFlags::empty(), mapped)?;
        self.disks.push(device);
        Ok(())
    }

    fn mount_upper(&mut self, upper: Upper, slot: u32) -> Result<(), StepError> {
        match upper {
            Upper::NONE => Ok(()),
            Upper::DISK => self.mount_disk("scratch", slot, &["noinit_itable"], false),
            Upper::KEPT => self.mount_disk("scratch", slot, &[], false),
            // Half of the guest's memory, as tmpfs does by itself; the rest is for programs.
            Upper::TMPFS => {
                let options = ["size=50%", "mode=0755"].map(str::to_owned);
                self.add("scratch", "tmpfs", &options, MountAttrFlags::empty(), false)
            }
        }
    }

    fn mount_overlay(&mut self, lowers: usize, upper: Upper) -> Result<(), StepError> {
        let mut options = vec!["source=overlay".to_owned()];
        // Several one by one, since the kernel takes no value of more than 255 bytes; kernels before 6.7 cannot.
        let option = if lowers == 1 { "lowerdir" } else { "lowerdir+" };
        let lower = |n| self.directory.join(format!("lower{n}"));
        options.extend((0..lowers).map(|n| format!("{option}={}", lower(n).display())));
        if upper != Upper::NONE {
            let scratch = self.scratch();
            let (top, upper, work) = (lower(0), scratch.join("upper"), scratch.join("work"));
            // The root directory takes its owner and mode from the upper one.
            let like = fs::metadata(&top).map_err(at(STEP, top.display()))?;
            for directory in [&upper, &work] {
                make_directory(directory, &like).map_err(at(STEP, directory.display()))?;
            }
            options.push(format!("upperdir={}", upper.display()));
            options.push(format!("workdir={}", work.display()));
        }
        // Directories of the image can be renamed: package managers do. What is kept is for whom cannot see where to.
        let redirect = if upper == Upper::KEPT { "off" } else { "on" };
        options.push(format!("redirect_dir={redirect}"));
        // Nothing mounts the upper again, or elsewhere.
        options.push("index=off".into());
        options.push("metacopy=off".into());
        if upper != Upper::KEPT {
            // The scratch disk dies with the sandbox: no need to make it outlive a crash.
            options.push("volatile".into());
        }
        self.add("root", "overlay", &options, MountAttrFlags::empty(), false)
    }

    fn add(
        &mut self,
        name: &str,
        kind: &str,
        options: &[String],
        attributes: MountAttrFlags,
        mapped: bool,
    ) -> Result<(), StepError> {
        let path = self.directory.join(name);
        let object = options.first().and_then(|o| o.strip_prefix("source=")).unwrap_or(kind);
        fs::create_dir_all(&path).map_err(at(STEP, path.display()))?;
        let mount = mount::new(kind, options.iter().map(String::as_str), attributes)
            .map_err(at(STEP, format_args!("{object} as {kind}")))?;
        if let Some(owners) = self.owners.as_ref().filter(|_| mapped) {
            let failed = format_args!("owners of the files of {object}, a {kind}").to_string();
            owners.apply(mount.as_fd()).map_err(at(STEP, failed))?;
        }
        mount::attach_at(&mount, &path).map_err(at(STEP, path.display()))?;
        self.mounts.push(path);
        Ok(())
    }

    /// Unmounts everything and waits until the disks written to are free. May be tried again.
    pub fn unmount(&mut self) -> Result<(), StepError> {
        let end = Instant::now() + pace::limit(RELEASE);
        while let Some(path) = self.mounts.last() {
            retry(end, || Ok(unmount(path, UnmountFlags::NOFOLLOW)?))
                .map_err(at("unmount", path.display()))?;
            fs::remove_dir(path).map_err(at("remove", path.display()))?;
            self.mounts.pop();
        }
        while let Some(disk) = self.disks.last() {
            // A file system may outlive its mount for a moment: an exclusive open says when it is gone.
            let open = || {
                fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(disk).map(drop)
            };
            retry(end, open).map_err(at("release", disk.display()))?;
            self.disks.pop();
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

/// Whose the files of what is mapped are, if anything is.
fn owners(request: &RootFs) -> Result<Option<Owners>, StepError> {
    if request.uid_map.is_empty() && request.gid_map.is_empty() {
        return Ok(None);
    }
    let owners = Owners::new(&request.uid_map, &request.gid_map, false);
    owners.map(Some).map_err(at(STEP, "uid_map and gid_map"))
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
    retry(Instant::now() + pace::limit(DISK_READY), ready).map_err(at(STEP, path.display()))?;
    Ok(path)
}

/// The option that names what is mounted.
fn source(device: &Path) -> String {
    format!("source={}", device.display())
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

/// A directory with this one's owner and mode, unless a kept disk has it already.
fn make_directory(path: &Path, like: &fs::Metadata) -> io::Result<()> {
    match fs::create_dir(path) {
        // A symbolic link is none, whatever it leads to.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let is_directory = fs::symlink_metadata(path)?.is_dir();
            return if is_directory { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) };
        }
        made => made?,
    }
    chown(path, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(like.mode() & 0o7777))
}
