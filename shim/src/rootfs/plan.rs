//! What a list of mounts means: layers, top first, and where writes go. Pure.
//!
//! The last mount is the root file system; those before it are there to be referred to by it, as
//! `{{ mount 0 }}` (containerd's `docs/mounts.md`). Options that change nothing for a guest (`noatime`, `loop`,
//! `index=off`) are passed over; what would make another file system of it is refused.

use std::path::PathBuf;

use super::{Mount, RootFsError, overlay, template};
use crate::image::Dialect;

/// A root file system.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Top first. With none, it is the disk of [`Writes::Kept`].
    pub layers: Vec<Layer>,
    pub writes: Writes,
    /// How its directories are marked.
    pub dialect: Dialect,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// A directory that nobody changes any more.
    Committed(PathBuf),
    /// A directory that may have been changed since the last start.
    Changing(PathBuf),
    /// A file system of its own, in a file or on a device; an EROFS may have more devices.
    Image { kind: Kind, path: PathBuf, devices: Vec<PathBuf> },
}

impl Layer {
    pub fn committed(&self) -> Option<PathBuf> {
        match self {
            Self::Committed(path) => Some(path.clone()),
            _ => None,
        }
    }
}

/// File systems that the guest's kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Erofs,
    Ext4,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Ext4 => "ext4",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Writes {
    /// Read-only.
    Nowhere,
    /// To a disk or memory of ours.
    Above,
    /// To this ext4 image or device.
    Kept(PathBuf),
}

/// # Errors
/// For what a guest cannot mount, or what is no root file system.
pub fn plan(mounts: &[Mount]) -> Result<Plan, RootFsError> {
    let Some((last, earlier)) = mounts.split_last() else {
        return Err(refuse("mounts", "there are none"));
    };
    check(last)?;
    let (layers, writes) = match file_system(last)? {
        "overlay" => return overlay::plan(&last.options, earlier),
        "bind" => match template::mount(&last.source)? {
            // The whole of an earlier one, read-only where either is.
            Some(index) => {
                let source = template::find(earlier, index)?;
                let writes = if is_read_only(last) { Writes::Nowhere } else { writes(source) };
                (vec![layer(source)?], writes)
            }
            None => (vec![layer(last)?], writes(last)),
        },
        "ext4" if !is_read_only(last) => (Vec::new(), Writes::Kept(last.source.clone().into())),
        _ => (vec![layer(last)?], writes(last)),
    };
    Ok(Plan { layers, writes, dialect: Dialect::Trusted })
}

/// What a mount adds to a stack.
pub fn layer(mount: &Mount) -> Result<Layer, RootFsError> {
    check(mount)?;
    let path = PathBuf::from(&mount.source);
    let image = |kind| {
        let devices = mount.options.iter().filter_map(|o| o.strip_prefix("device="));
        let devices = devices.map(PathBuf::from).collect();
        Layer::Image { kind, path: path.clone(), devices }
    };
    match file_system(mount)? {
        "bind" if is_read_only(mount) => Ok(Layer::Committed(path)),
        "bind" => Ok(Layer::Changing(path)),
        "erofs" => Ok(image(Kind::Erofs)),
        "ext4" if is_read_only(mount) => Ok(image(Kind::Ext4)),
        "ext4" => Err(refuse(&mount.source, "an ext4 that is written to cannot be below others")),
        other => Err(refuse(
            &mount.source,
            format!(
                "the guest has no file system `{other}`: use a snapshotter of overlay, bind, ext4 or erofs mounts"
            ),
        )),
    }
}

fn writes(mount: &Mount) -> Writes {
    if is_read_only(mount) { Writes::Nowhere } else { Writes::Above }
}

pub fn is_read_only(mount: &Mount) -> bool {
    // As mount(8): the last one counts.
    let last = mount.options.iter().rev().find(|o| *o == "ro" || *o == "rw");
    last.is_some_and(|option| option == "ro")
}

/// A mount's type without what was to be done before: filling in words is done here, and directories for an
/// overlay are made in the guest.
pub fn file_system(mount: &Mount) -> Result<&str, RootFsError> {
    let (before, kind) = mount.kind.rsplit_once('/').unwrap_or(("", &mount.kind));
    if let Some(step) = before.split('/').find(|step| !["", "format", "mkdir"].contains(step)) {
        let reason =
            format!("the step `{step}` of its type `{}` is containerd's to do", mount.kind);
        return Err(refuse(&mount.source, reason));
    }
    let binds = mount.options.iter().any(|o| o == "bind" || o == "rbind");
    Ok(if binds && ["", "none"].contains(&kind) { "bind" } else { kind })
}

fn check(mount: &Mount) -> Result<(), RootFsError> {
    if !["", "/"].contains(&mount.target.as_str()) {
        let reason = format!("it is to lie at {} in the root file system", mount.target);
        return Err(refuse(&mount.source, reason));
    }
    for option in &mount.options {
        let name = option.split('=').next().unwrap_or_default();
        let reason = match name {
            "uidmap" | "gidmap" => "root file systems with mapped owners cannot be made yet",
            "offset" | "sizelimit" => "only whole files and devices become disks",
            "X-containerd.dmverity" => {
                "the guest does not verify it: set the snapshotter's dmverity_mode to off, or have \
                 containerd mount it"
            }
            _ => continue,
        };
        return Err(refuse(&mount.source, format!("option {name}: {reason}")));
    }
    Ok(())
}

pub fn refuse(object: &str, reason: impl Into<String>) -> RootFsError {
    RootFsError::Refused { object: object.into(), reason: reason.into() }
}
