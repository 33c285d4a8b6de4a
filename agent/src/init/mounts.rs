//! The container's mounts: its root, those of the spec, and what is hidden or protected.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use ampoule_vmm_api::{Owners, attributes::Attributes, channel::MAX_FDS};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2},
    io::Errno,
    mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_change, unmount},
    process::{chdir, fchdir, pivot_root},
};

use super::{
    copy_up::copy_up,
    options::{self, Options},
    paths::{Root, guest_null, is_on_proc, kind},
    volume,
};
use crate::{
    mount,
    oci::{Mount, Spec, id_map},
    plan::{StepError, at, refuse},
    share,
};

/// File systems a container may have instances of: name in the spec, name in the kernel.
const KINDS: [(&str, &str); 7] = [
    ("proc", "proc"),
    ("sysfs", "sysfs"),
    ("tmpfs", "tmpfs"),
    ("devpts", "devpts"),
    ("mqueue", "mqueue"),
    ("cgroup", "cgroup2"),
    ("cgroup2", "cgroup2"),
];

/// Cuts our mounts off from the guest's, and gives the root file system a mount of its own, which
/// pivot_root(2) can take.
pub fn own_root(rootfs: &Path) -> Result<Root, StepError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(at("root", "/"))?;
    let below = Root::open(rootfs).map_err(at("root", rootfs.display()))?;
    let copy = mount::copy(below.as_fd(), "", true).map_err(at("root", rootfs.display()))?;
    mount::attach(&copy, &below).map_err(at("root", rootfs.display()))?;
    Ok(Root::from_fd(copy))
}

/// File systems whose files have other owners than they say, for the spec's mounts that are mapped, in their order. Only
/// the agent may make them: who has users of its own has no power over others' mappings.
pub fn mapped(rootfs: &Path, spec: &Spec) -> Result<Vec<OwnedFd>, StepError> {
    let mounts: Vec<_> = spec.mounts.iter().filter(|mount| mount.is_mapped()).collect();
    if mounts.is_empty() {
        return Ok(Vec::new());
    }
    if mounts.len() > MAX_FDS {
        return Err(refuse("spec", "mounts[].uidMappings", format_args!("of more than {MAX_FDS}")));
    }
    let root = Root::open(rootfs).map_err(at("root", rootfs.display()))?;
    let mapped = mounts.into_iter().map(|mount| {
        let options = options::parse(mount.options.iter().map(String::as_str));
        let object = format!("owners of the {} at {}", mount.kind, mount.destination);
        if mount.kind != "tmpfs" || options.bind || options.copy_up {
            return Err(refuse("mount", object, "only those of an empty tmpfs can be mapped"));
        }
        let mounted = instance(&root, mount, &options, "tmpfs")?;
        Owners::new(&id_map(&mount.uid_mappings), &id_map(&mount.gid_mappings), false)
            .and_then(|owners| owners.apply(mounted.as_fd()))
            .map_err(at("mount", object))?;
        Ok(mounted)
    });
    mapped.collect()
}

/// All mounts of the spec, in its order; `mapped` are those that the agent has made.
pub fn mount_all(
    root: &Root,
    spec: &Spec,
    scratch: &Path,
    mapped: Vec<OwnedFd>,
) -> Result<(), StepError> {
    let mut mapped = mapped.into_iter();
    spec.mounts.iter().enumerate().try_for_each(|(n, mount)| {
        let options = options::parse(mount.options.iter().map(String::as_str));
        match mount.kind.as_str() {
            _ if mount.is_mapped() => {
                let destination = mount.destination.as_str();
                let mounted =
                    mapped.next().ok_or(Errno::NOENT).map_err(at("mount", destination))?;
                place(&mounted, &root.make_directory(destination)?, destination, &options)
            }
            share::TYPE => bind(root, &share::path(&mount.source)?, mount, &options),
            volume::TYPE => {
                let hidden = root.make_directory(&mount.destination)?;
                let volume = volume::open(scratch, n, &hidden, &mount.destination)?;
                bind_opened(&volume, hidden, volume::TYPE, mount, &options)
            }
            "bind" => bind(root, &mount.source, mount, &options),
            _ if options.bind => bind(root, &mount.source, mount, &options),
            _ => new(root, mount, &options),
        }
    })
}

fn new(root: &Root, wanted: &Mount, options: &Options) -> Result<(), StepError> {
    let destination = wanted.destination.as_str();
    let Some((_, kernel)) = KINDS.iter().find(|(name, _)| *name == wanted.kind) else {
        let object = format_args!("mount type {:?} at {destination}", wanted.kind);
        return Err(refuse("mount", object, "not supported"));
    };
    if options.copy_up && *kernel != "tmpfs" {
        let object = format_args!("option \"tmpcopyup\" of the {kernel} at {destination}");
        return Err(refuse("mount", object, "only a tmpfs can be filled"));
    }
    let mounted = instance(root, wanted, options, kernel)?;
    let mut target = root.make_directory(destination)?;
    if matches!(*kernel, "proc" | "sysfs") {
        // What is masked below must be found where it is expected.
        target = root.find_plain(destination).map_err(at("mount", destination))?;
    }
    if options.copy_up {
        let failed = format_args!("tmpcopyup at {destination}").to_string();
        copy_up(&target, &mounted).map_err(at("mount", &failed))?;
        options.attributes.apply(&mounted, false).map_err(at("mount", destination))?;
    }
    place(&mounted, &target, destination, options)
}

/// A file system that is mounted nowhere yet.
fn instance(
    root: &Root,
    wanted: &Mount,
    options: &Options,
    kernel: &str,
) -> Result<OwnedFd, StepError> {
    let destination = wanted.destination.as_str();
    let source =
        format!("source={}", if wanted.source.is_empty() { kernel } else { &*wanted.source });
    // As runc: a tmpfs has the mode of what it hides, unless it is said.
    let hidden = root.find(destination).ok().filter(|_| kernel == "tmpfs");
    let mode = hidden.map(fstat).transpose().map_err(at("mount", destination))?;
    let mode = mode.map(|stat| format!("mode={:o}", stat.st_mode & 0o7777));
    let said = options.data.iter().map(String::as_str);
    let data = mode.as_deref().into_iter().chain(said).chain([source.as_str()]);
    mount::new(kernel, data, options.new_attributes())
        .map_err(at("mount", format_args!("{kernel} at {destination}")))
}

/// Binds something of the guest. The host's files are not reachable from here, whatever the path.
fn bind(root: &Root, source: &str, wanted: &Mount, options: &Options) -> Result<(), StepError> {
    let destination = wanted.destination.as_str();
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let failed = format_args!("{source} at {destination}").to_string();
    let opened =
        openat2(CWD, source, flags, Mode::empty(), resolve).map_err(at("bind", &failed))?;
    let is_directory = |fd: &OwnedFd| {
        kind(fd).map(|kind| kind == FileType::Directory).map_err(at("bind", &failed))
    };
    let binds_directory = is_directory(&opened)?;
    if let Ok(hidden) = root.find(destination)
        && is_directory(&hidden)? != binds_directory
    {
        // Docker has a hint of its own for the last words.
        let why = match binds_directory {
            true => "a directory cannot be mounted on a file: not a directory",
            false => "a file cannot be mounted on a directory: not a directory",
        };
        return Err(refuse("mount", destination, why));
    }
    let target = match binds_directory {
        true => root.make_directory(destination)?,
        false => root.make_file(destination)?,
    };
    bind_opened(&opened, target, source, wanted, options)
}

fn bind_opened(
    opened: &OwnedFd,
    target: OwnedFd,
    source: &str,
    wanted: &Mount,
    options: &Options,
) -> Result<(), StepError> {
    let destination = wanted.destination.as_str();
    if let Some(unknown) = options.data.first() {
        let object = format_args!("option {unknown:?} of the bind at {destination}");
        return Err(refuse("mount", object, "not supported"));
    }
    let failed = format_args!("{source} at {destination}").to_string();
    let copy = mount::copy(opened.as_fd(), "", options.recursive).map_err(at("bind", &failed))?;
    for (attributes, recursive) in
        [(&options.attributes, false), (&options.recursive_attributes, true)]
    {
        if *attributes != Attributes::default() {
            attributes.apply(&copy, recursive).map_err(at("bind", &failed))?;
        }
    }
    place(&copy, &target, destination, options)
}

fn place(
    mounted: &OwnedFd,
    target: &OwnedFd,
    destination: &str,
    options: &Options,
) -> Result<(), StepError> {
    mount::attach(mounted, target).map_err(at("mount", destination))?;
    match options.propagation {
        Some((flag, recursive)) => Attributes::propagation(flag)
            .apply(mounted, recursive)
            .map_err(at("mount propagation", destination)),
        None => Ok(()),
    }
}

/// Hides paths: files behind the guest's /dev/null, directories behind an empty tmpfs.
pub fn mask(root: &Root, paths: &[String]) -> Result<(), StepError> {
    let null = guest_null().map_err(at("mask", "/dev/null"))?;
    for path in paths {
        let Some(target) = find(root, path, "mask")? else { continue };
        let cover = match kind(&target).map_err(at("mask", path))? {
            FileType::Directory => {
                mount::new("tmpfs", ["size=0k"], MountAttrFlags::MOUNT_ATTR_RDONLY)
                    .map_err(at("mask", path))?
            }
            _ => mount::copy(null.as_fd(), "", false).map_err(at("mask", path))?,
        };
        mount::attach(&cover, &target).map_err(at("mask", path))?;
    }
    Ok(())
}

/// Makes paths read-only.
pub fn protect(root: &Root, paths: &[String]) -> Result<(), StepError> {
    for path in paths {
        let Some(target) = find(root, path, "protect")? else { continue };
        let copy = mount::copy(target.as_fd(), "", true).map_err(at("protect", path))?;
        Attributes::READ_ONLY.apply(&copy, false).map_err(at("protect", path))?;
        mount::attach(&copy, &target).map_err(at("protect", path))?;
    }
    Ok(())
}

/// A path to be covered, if it exists. What the kernel shows must really be the kernel's: no link of the
/// image may lead there, and below /proc it must lie in a proc file system.
fn find(root: &Root, path: &str, step: &'static str) -> Result<Option<OwnedFd>, StepError> {
    let kernels = path.starts_with("/proc/") || path.starts_with("/sys/");
    match if kernels { root.find_plain(path) } else { root.find(path) } {
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(at(step, path)(e)),
        Ok(found) if path.starts_with("/proc/") && !is_on_proc(&found) => {
            Err(refuse(step, path, "is not in a proc file system"))
        }
        Ok(found) => Ok(Some(found)),
    }
}

/// Makes the root file system the root of this mount namespace; nothing of the guest's is left in it.
pub fn enter(root: &Root) -> Result<(), StepError> {
    // pivot_root(2), "pivot_root(".", ".")": the old root is stacked below the new one, and let go.
    fchdir(root).map_err(at("pivot", "new root"))?;
    pivot_root(".", ".").map_err(at("pivot", "new root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(at("pivot", "old root"))?;
    chdir("/").map_err(at("pivot", "/"))
}

/// What is set on the root once everything is in place.
pub fn finish_root(spec: &Spec) -> Result<(), StepError> {
    let root = Root::current()?;
    if spec.root.readonly {
        Attributes::READ_ONLY.apply(&root, false).map_err(at("read-only root", "/"))?;
    }
    let name = spec.linux.rootfs_propagation.as_str();
    if name.is_empty() {
        return Ok(());
    }
    let (flag, recursive) = options::propagation(name)
        .ok_or_else(|| refuse("spec", "linux.rootfsPropagation", format_args!("{name:?}")))?;
    Attributes::propagation(flag).apply(&root, recursive).map_err(at("root propagation", name))
}
