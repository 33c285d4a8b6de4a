//! A container's root file system as disks of its VM.
//!
//! containerd says what a root file system is made of as a list of [`Mount`]s, which a runtime would mount on the
//! host. Here nothing is mounted: [`prepare`] turns them into disks, which the agent mounts in the guest.
//!
//! | what comes | what the VM gets |
//! |---|---|
//! | overlay: the lower directories | one read-only EROFS of all, converted once, shared ([`Store::committed`]) |
//! | Docker's layer for one container (it has `.dockerenv`), an upper directory that is not empty | an EROFS each, converted at each start ([`Store::changing`]) |
//! | a lower directory alone, on which an EROFS is mounted (containerd 2.1's erofs snapshotter) | its image itself |
//! | a bind mount, a plain directory | the same; with the option `ro` it is a committed layer |
//! | a directory on which an overlay is mounted already (Docker) | as that overlay |
//! | an ext4 or EROFS image, a block device | itself |
//!
//! Above what is read-only lies a scratch disk, or guest memory, for what the container writes. While it runs, writes
//! reach no upper directory, or source of a bind mount, of the host; only an ext4 image or device without the
//! option `ro` takes them itself and keeps them. A scratch disk that [lasts](Scratch::lasts) is [a file](SCRATCH) beside
//! the upper directory. When the container has ended, what is on it is written out to that directory ([`HostUpper`]), and
//! is a layer of the next start; where that cannot be, the disk is the container's again when it is started again.
//!
//! All disks are descriptors, and what is made for one start has no name: whichever way a run ends, nothing is left
//! to remove.
//!
//! - [`plan`]: mounts as layers; pure
//! - [`overlay`], [`template`], [`mounted`]: the words in them

mod mounted;
mod overlay;
mod plan;
mod template;

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use ampoule_vmm_api::config::MAX_DISKS;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{
    device::Device,
    image::{self, Dialect, ImageError, Marks, Store},
    mountinfo::erofs_image,
    sandbox::{DeviceDisk, FIRST_DISK, HostUpper, Lower, RootFs, Sandbox, SandboxError, Upper},
    vm::Disk,
};
use plan::{Kind, Layer, Plan, Writes};

/// The types of mounts that containerd 2.2 and later is to leave to us, by the annotation
/// `containerd.io/runtime-allow-mounts` of the runtime: else it mounts EROFS layers on the host, and they would be
/// converted again. Not `mkfs/*`: it makes a writable image before we see it.
pub const ALLOWED_MOUNTS: &str = "erofs,format/*,mkdir/*";

/// A scratch disk's name in the directory that a snapshotter has made for its container.
const SCRATCH: &str = "ampoule.ext4";
/// For the VM of a container's last run to be gone.
const ENDS: Duration = Duration::from_secs(5);

/// The disk for what a container writes.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    /// In bytes.
    pub size: u64,
    /// What is on it is there when the container is started again, where its mounts have a place for that: an upper
    /// directory in a directory of its own.
    pub lasts: bool,
}

/// A mount as containerd describes it (containerd.types.Mount).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    pub kind: String,
    pub source: String,
    /// Below the root file system; empty for the root itself.
    pub target: String,
    pub options: Vec<String>,
}

impl Mount {
    /// An EROFS image that containers may write above.
    pub fn image(path: &Path) -> Self {
        let source = path.to_string_lossy().into_owned();
        Self { kind: "erofs".into(), source, ..Self::default() }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RootFsError {
    /// What was asked for is not what a VM can have.
    #[error("root file system: {object}: {reason}")]
    Refused { object: String, reason: String },
    #[error("root file system {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("root file system {}: another sandbox writes to it", path.display())]
    InUse { path: PathBuf },
    #[error("root file system")]
    Convert(#[source] ImageError),
    #[error("scratch disk")]
    Scratch(#[source] ImageError),
}

/// Disks, and how the agent is to put them together.
#[derive(Debug)]
pub struct Prepared {
    /// In the order of their slots.
    pub disks: Vec<Disk>,
    /// Where on the host what is written lasts, when it has been written.
    pub upper: Option<HostUpper>,
    /// With the places in `disks` for slots.
    layout: RootFs,
}

impl Prepared {
    /// The root file system, when the disks are in these slots.
    pub fn rootfs(&self, slots: &[u8]) -> RootFs {
        // A slot that was not given is one that the agent refuses.
        let slot = |place: u8| slots.get(usize::from(place)).copied().unwrap_or(u8::MAX);
        let lower = |lower: &Lower| Lower {
            slot: slot(lower.slot),
            kind: lower.kind.clone(),
            devices: lower.devices.iter().map(|&place| slot(place)).collect(),
            mapped: lower.mapped,
        };
        let upper = match self.layout.upper {
            Upper::Disk(place) => Upper::Disk(slot(place)),
            Upper::Kept(place) => Upper::Kept(slot(place)),
            upper @ (Upper::None | Upper::Tmpfs) => upper,
        };
        let devices = self.layout.devices.iter();
        let devices = devices.map(|disk| DeviceDisk { slot: slot(disk.slot), ..disk.clone() });
        let lowers = self.layout.lowers.iter().map(lower).collect();
        RootFs { lowers, upper, devices: devices.collect(), owners: self.layout.owners.clone() }
    }

    /// Adds devices of the host.
    pub fn with_devices(mut self, devices: Vec<Device>) -> Result<Self, RootFsError> {
        for Device { file, read_only, entries } in devices {
            let slot = add(&mut self.disks, "device", file, read_only);
            self.layout.devices.push(DeviceDisk { slot, read_only, entries });
        }
        let (count, most) = (self.disks.len(), MAX_DISKS - usize::from(FIRST_DISK));
        if count > most {
            let reason =
                format!("with its root file system it takes {count} disks, and a VM has {most}");
            return Err(plan::refuse("linux.devices", reason));
        }
        Ok(self)
    }

    /// The disks for the boot of a VM, from slot `first` on, and the root file system they make.
    pub fn from_slot(self, first: u8) -> (Vec<Disk>, RootFs) {
        let slots: Vec<u8> = (first..=u8::MAX).take(self.disks.len()).collect();
        let rootfs = self.rootfs(&slots);
        (self.disks, rootfs)
    }

    /// Attaches the disks to a running sandbox. [`RootFs::slots`] tells what to detach in the end; if this fails,
    /// that was done.
    pub async fn attach(mut self, sandbox: &Sandbox) -> Result<RootFs, SandboxError> {
        let mut slots = Vec::new();
        for disk in std::mem::take(&mut self.disks) {
            match sandbox.attach_disk(disk).await {
                Ok(slot) => slots.push(slot),
                Err(error) => {
                    for slot in slots {
                        // The first error is the one to tell.
                        let _ = sandbox.detach_disk(slot).await;
                    }
                    return Err(error);
                }
            }
        }
        Ok(self.rootfs(&slots))
    }
}

/// Takes the disks that [`Prepared::attach`] has attached from a sandbox that runs.
pub async fn detach(rootfs: &RootFs, sandbox: &Sandbox) {
    for slot in rootfs.slots() {
        // The slot is lost to the sandbox; what was under it is not.
        if let Err(error) = sandbox.detach_disk(slot).await {
            tracing::warn!(slot, %error, "a disk was not detached");
        }
    }
}

/// Makes the disks of a root file system: of `mounts`, or without any of the directory `root`, which then is what
/// `root.path` of the OCI spec names, absolute. What the container writes goes to a scratch disk, or
/// without one to guest memory, unless the mounts have a place for it. Blocks.
pub fn prepare(
    store: &Store,
    mounts: &[Mount],
    root: &Path,
    scratch: Option<Scratch>,
) -> Result<Prepared, RootFsError> {
    let plan = match mounts {
        [] => mounted::plan(root)?,
        mounts => plan::plan(mounts)?,
    };
    let mut prepared = Stack::default().build(store, &plan, scratch)?;
    if mounts.is_empty() {
        prepared.upper = prepared.upper.map(|upper| upper.below(root));
    }
    Ok(prepared)
}

/// A root file system in the making.
#[derive(Default)]
struct Stack {
    disks: Vec<Disk>,
    lowers: Vec<Lower>,
    host_upper: Option<HostUpper>,
}

impl Stack {
    fn build(
        mut self,
        store: &Store,
        plan: &Plan,
        scratch: Option<Scratch>,
    ) -> Result<Prepared, RootFsError> {
        let is_committed = |layer: &Layer| matches!(layer, Layer::Committed(_));
        let groups = plan.layers.chunk_by(|a, b| is_committed(a) && is_committed(b));
        for (n, group) in groups.enumerate() {
            let above = self.lowers.len();
            let committed: Vec<PathBuf> = group.iter().filter_map(Layer::committed).collect();
            self.committed(store, &committed, plan.dialect)?;
            for layer in group {
                let alone = plan.layers.len() == 1;
                match layer {
                    Layer::Committed(_) => {}
                    Layer::Changing(path) => self.changing(store, path, alone, plan.dialect)?,
                    Layer::Image { kind, path, devices } => self.image(*kind, path, devices)?,
                }
            }
            if n == 0 && matches!(scratch, Some(Scratch { lasts: true, .. })) {
                self.host_upper = self.host_upper(plan)?;
            }
            let mapped = plan.owners.is_some() && !(n == 0 && plan.owned);
            self.lowers[above..].iter_mut().for_each(|lower| lower.mapped = mapped);
        }
        let templates = || store.root().join("scratch");
        let upper = match (&plan.writes, scratch) {
            (Writes::Nowhere, _) => Upper::None,
            (Writes::Kept(path), _) => {
                Upper::Kept(self.disk("upper", open_kept(path, Duration::ZERO)?, false))
            }
            (Writes::Above | Writes::Beside(_), None) => Upper::Tmpfs,
            (Writes::Beside(folder), Some(Scratch { size, lasts: true })) => {
                let path = folder.join(SCRATCH);
                image::lasting_scratch(&templates(), size, &path).map_err(RootFsError::Scratch)?;
                Upper::Kept(self.disk("scratch", open_kept(&path, ENDS)?, false))
            }
            (Writes::Above | Writes::Beside(_), Some(Scratch { size, .. })) => {
                let disk = image::scratch(&templates(), size).map_err(RootFsError::Scratch)?;
                Upper::Disk(self.disk("scratch", disk, false))
            }
        };
        let (count, most) = (self.disks.len(), MAX_DISKS - usize::from(FIRST_DISK));
        if count > most {
            let reason = format!(
                "it takes {count} disks, and a VM has {most}: images of so many layers need a snapshotter that \
                 gives directories, as overlayfs does"
            );
            return Err(plan::refuse("mounts", reason));
        }
        let owners = plan.owners.clone();
        let layout = RootFs { lowers: self.lowers, upper, devices: Vec::new(), owners };
        Ok(Prepared { disks: self.disks, upper: self.host_upper, layout })
    }

    /// The directory of the first layer, if what is written is to be there in the end. Owners that are mapped would be others
    /// there.
    fn host_upper(&self, plan: &Plan) -> Result<Option<HostUpper>, RootFsError> {
        match (&plan.writes, plan.layers.first(), &plan.owners) {
            (Writes::Beside(folder), Some(Layer::Changing(path)), None) => {
                let upper = HostUpper::open(path, !self.lowers.is_empty(), folder.join(SCRATCH));
                let failed = |e: Errno| RootFsError::Open { path: path.into(), source: e.into() };
                upper.map(Some).map_err(failed)
            }
            _ => Ok(None),
        }
    }

    /// Layers that are one file system; but Docker's own is another in each container, and those below it are not.
    fn committed(
        &mut self,
        store: &Store,
        layers: &[PathBuf],
        dialect: Dialect,
    ) -> Result<(), RootFsError> {
        let shared = match layers {
            [] => return Ok(()),
            [own, shared @ ..] if !shared.is_empty() && own.join(".dockerenv").exists() => {
                self.changing(store, own, false, dialect)?;
                shared
            }
            shared => shared,
        };
        let file = match own_image(shared, dialect)? {
            Some(file) => file,
            None => store.committed(shared, dialect).map_err(RootFsError::Convert)?,
        };
        self.erofs(file);
        Ok(())
    }

    /// A directory as it is now; above others an empty one adds nothing.
    fn changing(
        &mut self,
        store: &Store,
        path: &Path,
        alone: bool,
        dialect: Dialect,
    ) -> Result<(), RootFsError> {
        let failed = |source| RootFsError::Open { path: path.into(), source };
        if !alone && path.read_dir().map_err(failed)?.next().is_none() {
            return Ok(());
        }
        let marks = if alone { Marks::None } else { Marks::Kept };
        self.erofs(store.changing(path, marks, dialect).map_err(RootFsError::Convert)?);
        Ok(())
    }

    fn image(&mut self, kind: Kind, path: &Path, devices: &[PathBuf]) -> Result<(), RootFsError> {
        let slot = self.disk("lower", open(path, false)?, true);
        let mut disks = Vec::new();
        for device in devices {
            disks.push(self.disk("device", open(device, false)?, true));
        }
        self.lowers.push(Lower { slot, kind: kind.name().into(), devices: disks, mapped: false });
        Ok(())
    }

    fn erofs(&mut self, file: File) {
        let slot = self.disk("lower", file, true);
        let kind = Kind::Erofs.name().into();
        self.lowers.push(Lower { slot, kind, devices: Vec::new(), mapped: false });
    }

    fn disk(&mut self, what: &str, file: File, read_only: bool) -> u8 {
        add(&mut self.disks, what, file, read_only)
    }
}

/// Adds a disk and gives its place.
fn add(disks: &mut Vec<Disk>, what: &str, file: File, read_only: bool) -> u8 {
    let place = u8::try_from(disks.len()).unwrap_or(u8::MAX);
    disks.push(Disk { id: format!("{what}{place}"), read_only, file: file.into() });
    place
}

/// Opens an image file or a block device.
fn open(path: &Path, write: bool) -> Result<File, RootFsError> {
    let failed = |source| RootFsError::Open { path: path.into(), source };
    let mut options = OpenOptions::new();
    // What is neither is not waited for.
    options.read(true).write(write).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let reason = "it is neither an image file nor a block device".into();
        return Err(RootFsError::Refused { object: path.display().to_string(), reason });
    }
    Ok(file)
}

/// The image that a layer alone is made of, if it is the guest's to mount. Several are one disk when they are
/// converted, and a VM has few.
fn own_image(layers: &[PathBuf], dialect: Dialect) -> Result<Option<File>, RootFsError> {
    let ([layer], Dialect::Trusted) = (layers, dialect) else { return Ok(None) };
    let failed = |source| RootFsError::Open { path: layer.clone(), source };
    let image = erofs_image(layer).map_err(failed)?;
    image.map(|image| open(&image, false)).transpose()
}

/// Opens what is written to and kept, for one sandbox alone: the lock goes with the last descriptor, which is
/// the VM's.
fn open_kept(path: &Path, patience: Duration) -> Result<File, RootFsError> {
    let (file, end) = (open(path, true)?, Instant::now() + patience);
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < end => sleep(Duration::from_millis(10)),
            Err(Errno::WOULDBLOCK) => return Err(RootFsError::InUse { path: path.into() }),
            Err(e) => return Err(RootFsError::Open { path: path.into(), source: e.into() }),
        }
    }
}

#[cfg(test)]
mod tests;
