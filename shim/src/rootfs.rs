//! A container's root file system as disks of its VM: the image's file, read-only, and a scratch disk that
//! takes what is written. Both are descriptors only: the scratch disk has no name, so that whichever way a run
//! ends nothing is left to remove.

use std::{
    fs::OpenOptions,
    io,
    path::{Path, PathBuf},
};

use crate::{
    image::{self, ImageError},
    sandbox::{RootFs, Upper},
    vm::Disk,
};

#[derive(Debug, thiserror::Error)]
pub enum RootFsError {
    #[error("root file system {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("scratch disk")]
    Scratch(#[source] ImageError),
}

/// The disks and how the agent is to put them together.
#[derive(Debug)]
pub struct Prepared {
    pub disks: Vec<Disk>,
    pub rootfs: RootFs,
}

/// Opens `image` as the disk in `first_slot`; if `scratch_bytes` is given, the next slot is a scratch disk of
/// that size, else what is written stays in guest memory.
pub fn prepare(
    image: &Path,
    store: &Path,
    scratch_bytes: Option<u64>,
    first_slot: u8,
) -> Result<Prepared, RootFsError> {
    let open = |source| RootFsError::Open { path: image.into(), source };
    let lower = OpenOptions::new().read(true).open(image).map_err(open)?;
    let mut disks = vec![Disk { id: "rootfs".into(), read_only: true, file: lower.into() }];
    let mut upper = Upper::Tmpfs;
    if let Some(bytes) = scratch_bytes {
        let scratch =
            image::scratch(&store.join("scratch"), bytes).map_err(RootFsError::Scratch)?;
        disks.push(Disk { id: "scratch".into(), read_only: false, file: scratch.into() });
        upper = Upper::Disk(first_slot + 1);
    }
    let rootfs = RootFs { lower_slot: first_slot, lower_type: "erofs".into(), upper };
    Ok(Prepared { disks, rootfs })
}
