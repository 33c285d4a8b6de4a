//! Block devices of the host that a container asks for by themselves: each becomes a disk of its VM.
//!
//! A spec names them by number, and this host's kernel knows the name that each has in /dev. One that is written to is
//! opened for one container alone: two kernels that write to one disk, each with caches of its own, destroy what is on it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use rustix::fs::{major, minor};

use crate::spec::{SpecError, Wanted, block_devices};

/// One of the host's disks, open.
#[derive(Debug)]
pub struct Device {
    pub file: File,
    pub read_only: bool,
    /// Which of `linux.devices` of the spec it is.
    pub entries: Vec<usize>,
}

/// Why a container does not get a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("--device {}: not a block device; a VM has character devices of its own", path.display())]
    NotBlock { path: PathBuf },
    #[error("{field}: block device {major}:{minor}: this host has none", major = number.0, minor = number.1)]
    None { field: String, number: (i64, i64) },
    #[error("{field}: {}", path.display())]
    Open { field: String, path: PathBuf, source: io::Error },
    #[error("{field}: {}: this is another device than {major}:{minor}", path.display(), major = number.0, minor = number.1)]
    Other { field: String, path: PathBuf, number: (i64, i64) },
    #[error(
        "{field}: {} is in use on this host, and what two kernels write to one disk destroys it: unmount it, or end what \
         else has it (a sandbox, LVM, RAID, swap), or ask for it read-only", path.display()
    )]
    InUse { field: String, path: PathBuf },
}

impl DeviceError {
    /// What it is about.
    pub fn object(&self) -> String {
        match self {
            Self::Spec(_) => "linux.devices".into(),
            Self::None { field, .. } => field.clone(),
            Self::NotBlock { path }
            | Self::Open { path, .. }
            | Self::Other { path, .. }
            | Self::InUse { path, .. } => path.display().to_string(),
        }
    }
}

impl Device {
    /// Opens all that a spec asks for. Blocks.
    pub fn all(spec: &Spec) -> Result<Vec<Self>, DeviceError> {
        wanted(spec)?.into_iter().map(Self::open).collect()
    }

    fn open(wanted: Wanted) -> Result<Self, DeviceError> {
        let Wanted { number: named, entries, writable, field } = wanted;
        let Some(path) = node(named) else {
            return Err(DeviceError::None { field, number: named });
        };
        let exclusive = if writable { libc::O_EXCL } else { 0 };
        let opened =
            OpenOptions::new().read(true).write(writable).custom_flags(exclusive).open(&path);
        let file = match opened {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                return Err(DeviceError::InUse { field, path });
            }
            Err(source) => return Err(DeviceError::Open { field, path, source }),
            Ok(file) => file,
        };
        match file.metadata().map(|found| number(&found)) {
            Err(source) => Err(DeviceError::Open { field, path, source }),
            Ok(found) if found == Some(named) => Ok(Self { file, read_only: !writable, entries }),
            Ok(_) => Err(DeviceError::Other { field, path, number: named }),
        }
    }
}

/// What a spec asks for.
pub fn wanted(spec: &Spec) -> Result<Vec<Wanted>, DeviceError> {
    Ok(block_devices(spec, |path| number(&fs::metadata(path).ok()?))?)
}

/// The number of a block device.
pub fn number(found: &fs::Metadata) -> Option<(i64, i64)> {
    let device = found.rdev();
    found.file_type().is_block_device().then(|| (major(device).into(), minor(device).into()))
}

/// Where this host has a block device of that number (sysfs(5), /sys/dev/block).
fn node((major, minor): (i64, i64)) -> Option<PathBuf> {
    let about = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).ok()?;
    let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let wanted = Wanted {
            number: (4000, 1),
            entries: vec![2],
            writable: true,
            field: "linux.devices[2] (/dev/x)".into(),
        };
        let error = Device::open(wanted).unwrap_err().to_string();
        assert_eq!(error, "linux.devices[2] (/dev/x): block device 4000:1: this host has none");
        assert_eq!(number(&fs::metadata("/dev/null").unwrap()), None);
    }
}
