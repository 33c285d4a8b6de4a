//! What the host shares with this VM: one virtio-fs whose root has an entry, a directory or a file, for each share
//! by its number. It is mounted when the first container asks for a share, at a place that containers see nothing
//! of: their mounts of type [`TYPE`] bind single entries.

use std::sync::{Mutex, PoisonError};

use ampoule_vmm_api::guest::SHARE_TAG;
use rustix::{
    fs::{Mode, mkdir},
    io::Errno,
    mount::MountAttrFlags,
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

static MOUNTED: Mutex<bool> = Mutex::new(false);

/// Mounts them if the container has a use for them. Blocks.
pub fn mount_for(spec: &Spec) -> Result<(), StepError> {
    let mut mounted = MOUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    if *mounted || !spec.mounts.iter().any(|mount| mount.kind == TYPE) {
        return Ok(());
    }
    match mkdir(DIRECTORY, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(at("shares", DIRECTORY)(e)),
    }
    let source = format!("source={SHARE_TAG}");
    let shares = mount::new("virtiofs", [source.as_str()], ATTRIBUTES);
    let shares = shares.map_err(at("shares", "virtiofs"))?;
    mount::attach_at(&shares, DIRECTORY.as_ref()).map_err(at("shares", DIRECTORY))?;
    *mounted = true;
    Ok(())
}

/// Where the guest has the share of a mount's source.
pub fn path(source: &str) -> Result<String, StepError> {
    match source.parse::<u32>() {
        Ok(number) if number.to_string() == source => Ok(format!("{DIRECTORY}/{number}")),
        _ => Err(refuse("mount", format_args!("share {source:?}"), "not a number")),
    }
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
