//! `/dev/kvm`, opened and recognised.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
};

/// The only version there is (Linux, Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;
/// `_IO(KVMIO, 0x00)`, KVM_GET_API_VERSION.
const GET_API_VERSION: libc::c_ulong = 0xae00;
pub const DEVICE: &str = "/dev/kvm";

/// Why there is no KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("{DEVICE}")]
    Open(#[source] io::Error),
    #[error("{DEVICE}: not a KVM device")]
    NotKvm(#[source] io::Error),
    #[error("{DEVICE}: KVM API version {0}, expected {API_VERSION}")]
    Version(i32),
}

impl KvmError {
    /// The way out.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Open(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                "run as root, or add your user to the group of /dev/kvm (usually `kvm`)"
            }
            _ => {
                "load the module kvm_intel or kvm_amd; in a VM, its host must allow nested virtualization"
            }
        }
    }
}

/// Opens `/dev/kvm` for reading and writing.
///
/// # Errors
/// What is in the way, with [`KvmError::hint`] for the user.
pub fn open() -> Result<File, KvmError> {
    let kvm = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(KvmError::Open)?;
    // SAFETY: the descriptor is open, and this request takes no argument.
    match unsafe { libc::ioctl(kvm.as_raw_fd(), GET_API_VERSION, 0) } {
        API_VERSION => Ok(kvm),
        ..0 => Err(KvmError::NotKvm(io::Error::last_os_error())),
        other => Err(KvmError::Version(other)),
    }
}
