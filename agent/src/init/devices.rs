//! /dev of the container: the nodes of every container, those of the spec, and the usual links.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, Uid, chmodat, chownat, fstat, makedev, mknodat, symlinkat},
    io::Errno,
};

use super::{paths::Root, random};
use crate::{
    mount,
    oci::{Device, Linux},
    plan::{StepError, at, refuse},
};

/// Path, major, minor (OCI runtime spec, "Default Devices").
const NODES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];
/// Minor numbers of /dev/random and /dev/urandom.
const RANDOM: [u32; 2] = [8, 9];
/// Path, target.
const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];
const ANYONE: u32 = 0o666;

/// Makes them all; the spec's say what becomes of the usual ones too. In a user namespace, where nobody may make nodes,
/// the guest's are bound instead. A file that is given takes the place of the kernel's random numbers.
pub fn make(root: &Root, linux: &Linux, seeded: Option<&OwnedFd>) -> Result<(), StepError> {
    root.make_directory("/dev")?;
    root.find_plain("/dev").map_err(at("device", "/dev"))?;
    let defaults = NODES.map(|(path, major, minor)| Device {
        path: path.to_owned(),
        kind: "c".to_owned(),
        major,
        minor,
        file_mode: Some(ANYONE),
        uid: 0,
        gid: 0,
    });
    let bound = linux.has_users();
    let replaced =
        |device: &&Device| seeded.is_some() && device.major == 1 && RANDOM.contains(&device.minor);
    let named = |device: &&Device| linux.devices.iter().any(|other| other.path == device.path);
    let defaults = defaults.iter().filter(|device| !named(device));
    for device in defaults.chain(&linux.devices).filter(|device| !replaced(device)) {
        if bound { bind(root, &device.path)? } else { node(root, device)? }
    }
    if let Some(file) = seeded {
        random::place(root, file)?;
    }
    LINKS.iter().try_for_each(|(path, target)| link(root, path, target))
}

fn node(root: &Root, device: &Device) -> Result<(), StepError> {
    let path = device.path.as_str();
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => return Err(refuse("device", path, format_args!("{other:?} is no type"))),
    };
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(ANYONE) & 0o7777);
    let number = makedev(device.major, device.minor);
    let (parent, name) = root.make_parent(path)?;
    match mknodat(&parent, name, kind, mode, number) {
        Err(Errno::EXIST) => keep(root, path, kind, number)?,
        made => made.map_err(at("device", path))?,
    }
    let owner = (Some(Uid::from_raw(device.uid)), Some(Gid::from_raw(device.gid)));
    chownat(&parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
        .and_then(|()| chmodat(&parent, name, mode, AtFlags::empty()))
        .map_err(at("device", path))
}

/// An image may bring the node along, but no other.
fn keep(root: &Root, path: &str, kind: FileType, number: u64) -> Result<(), StepError> {
    let there = root.find_plain(path).and_then(fstat).map_err(at("device", path))?;
    let same = FileType::from_raw_mode(there.st_mode) == kind
        && (kind == FileType::Fifo || there.st_rdev == number);
    match same {
        true => Ok(()),
        false => Err(at("device", path)(Errno::EXIST)),
    }
}

fn bind(root: &Root, path: &str) -> Result<(), StepError> {
    let guest = mount::copy(rustix::fs::CWD.as_fd(), path, false).map_err(at("device", path))?;
    let target = root.make_file(path)?;
    mount::attach(&guest, &target).map_err(at("device", path))
}

fn link(root: &Root, path: &str, target: &str) -> Result<(), StepError> {
    let (parent, name) = root.make_parent(path)?;
    match symlinkat(target, &parent, name) {
        // An image's own /dev may have it, or better.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(at("device", path)(e)),
    }
}
