//! Directories and files of the host that a container sees as they are, while they change: what may be shared, and its
//! opening. They are served by `ampoule-fsd`, see [`crate::sandbox`].
//!
//! What is shared is what the path led to when it was opened, with what was mounted below it then: a directory or a
//! regular file. Refused are what in the guest would be something else than it is here:
//!
//! - devices: their numbers mean the guest's own;
//! - sockets and FIFOs: who is at their other end is on the host, where a guest reaches nobody;
//! - `/`, and file systems that show this machine's kernel (proc, sysfs, cgroups, ...): a container that is given them
//!   is to look after the host, which from a VM it cannot.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use ampoule_fsd_api::Access;
use ampoule_vmm_api::Owners;
use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};
use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, fstatfs, open, stat};

/// f_type of statfs(2), by the names of include/uapi/linux/magic.h: the kernel's own file systems.
const KERNELS: [(u32, &str); 13] = [
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x0027_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x1cd1, "devpts"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xcafe_4a11, "bpf"),
    (0x6265_6570, "configfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x1980_0202, "mqueue"),
    (0xde5e_81e4, "efivarfs"),
];

/// Options that ask for other owners of files than those on the disk.
pub const MAPPED: [&str; 2] = ["idmap", "ridmap"];

/// Something of the host, open.
#[derive(Debug)]
pub struct Share {
    /// As the caller has it.
    pub source: PathBuf,
    /// With `O_PATH`.
    pub root: OwnedFd,
    pub access: Access,
    /// If its files are to have other owners in the container than on the host.
    pub owners: Option<Owners>,
    /// Which mount of the spec it is for.
    pub mount: usize,
}

/// Why something is not shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("mount source {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("mount source {}: mapping the owners of its files: {why}", path.display())]
    Unmapped { path: PathBuf, why: &'static str },
    #[error(
        "mount source {}: mapping the owners of its files (uidMappings, gidMappings), which takes root and ids that the host has",
        path.display()
    )]
    Owners { path: PathBuf, source: io::Error },
    #[error("mount source {}: {what} cannot be shared with a VM; {instead}", path.display())]
    Refused { path: PathBuf, what: String, instead: &'static str },
}

impl ShareError {
    pub fn path(&self) -> &Path {
        match self {
            Self::Open { path, .. }
            | Self::Unmapped { path, .. }
            | Self::Owners { path, .. }
            | Self::Refused { path, .. } => path,
        }
    }

    /// The way out.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some("make it first: what is shared has to be there")
            }
            _ => None,
        }
    }
}

impl Share {
    /// Opens the source of a bind mount of the spec, the `mount`th.
    pub fn open(spec: &Spec, wanted: &Mount, mount: usize) -> Result<Self, ShareError> {
        let source = wanted.source().clone().unwrap_or_default();
        let failed = |source_error| ShareError::Open { path: source.clone(), source: source_error };
        let root = open(&source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let root = root.map_err(|e| failed(e.into()))?;
        let found = fstat(&root).map_err(|e| failed(e.into()))?;
        let kernels = fstatfs(&root).ok().and_then(|found| {
            KERNELS.iter().find(|(magic, _)| u64::from(*magic) == found.f_type as u64 & 0xffff_ffff)
        });
        let refused = refusal(&found, kernels.map(|(_, name)| *name));
        if let Some((what, instead)) = refused {
            return Err(ShareError::Refused { path: source, what, instead });
        }
        let owners = owners(spec, wanted, &source)?;
        let access = if is_read_only(wanted) { Access::Read } else { Access::Write };
        Ok(Self { root, access, owners, mount, source })
    }

    /// All bind mounts of a spec.
    pub fn all(spec: &Spec) -> Result<Vec<Self>, ShareError> {
        let mounts = spec.mounts().iter().flatten().enumerate();
        let binds = mounts.filter(|(_, mount)| is_bind(mount));
        binds.map(|(n, mount)| Self::open(spec, mount, n)).collect()
    }
}

/// Whether its files are to have other owners than on the disk.
pub fn is_mapped(mount: &Mount) -> bool {
    let lists = [mount.uid_mappings(), mount.gid_mappings()];
    options(mount).any(|option| MAPPED.contains(&option))
        || lists.into_iter().flatten().any(|list| !list.is_empty())
}

/// Whose the files of a share are, if it is mapped.
fn owners(spec: &Spec, mount: &Mount, source: &Path) -> Result<Option<Owners>, ShareError> {
    if !is_mapped(mount) {
        return Ok(None);
    }
    let path = || source.to_path_buf();
    let (users, groups) =
        mappings(spec, mount).map_err(|why| ShareError::Unmapped { path: path(), why })?;
    let recursive = options(mount).any(|option| option == "ridmap");
    let owners = Owners::new(&map(&users), &map(&groups), recursive);
    owners.map(Some).map_err(|source| ShareError::Owners { path: path(), source })
}

/// Those of a mapped mount's users and groups: its own, or the container's.
pub fn mappings(
    spec: &Spec,
    mount: &Mount,
) -> Result<(Vec<LinuxIdMapping>, Vec<LinuxIdMapping>), &'static str> {
    let own = |list: &Option<Vec<LinuxIdMapping>>| list.clone().filter(|list| !list.is_empty());
    let maps = match (own(mount.uid_mappings()), own(mount.gid_mappings()), spec.linux()) {
        (Some(users), Some(groups), _) => Some((users, groups)),
        (None, None, Some(linux)) => own(linux.uid_mappings()).zip(own(linux.gid_mappings())),
        (None, None, None) => None,
        _ => return Err("uidMappings and gidMappings go together"),
    };
    maps.ok_or("`idmap` takes mappings, the mount's or those of a user namespace; add them, or leave it out")
}

/// As the kernel reads it (user_namespaces(7)).
fn map(mappings: &[LinuxIdMapping]) -> String {
    let line = |m: &LinuxIdMapping| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size());
    mappings.iter().map(line).collect()
}

/// What it is that cannot be shared, and what to do instead.
fn refusal(found: &Stat, kernels: Option<&str>) -> Option<(String, &'static str)> {
    let refuse = |what: &str, instead| Some((what.to_string(), instead));
    match FileType::from_raw_mode(found.st_mode) {
        FileType::CharacterDevice | FileType::BlockDevice => refuse(
            "a device",
            "leave it out: its number means one of the guest's own; a disk is for --device",
        ),
        FileType::Socket => {
            refuse("a socket", "leave it out: nobody of the host can be reached by it")
        }
        FileType::Fifo => refuse("a FIFO", "use the container's own stdin and stdout"),
        FileType::RegularFile | FileType::Directory => match kernels {
            Some(name) => {
                let what = format!("a part of this host's {name}");
                Some((what, "the guest has a kernel of its own: leave it out"))
            }
            None if is_root(found) => {
                refuse("the whole host", "share the directory that is needed")
            }
            None => None,
        },
        _ => refuse("what is neither a directory nor a file", "leave it out"),
    }
}

fn is_root(found: &Stat) -> bool {
    stat("/").is_ok_and(|root| (root.st_dev, root.st_ino) == (found.st_dev, found.st_ino))
}

pub fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || options(mount).any(|o| o == "bind" || o == "rbind")
}

/// By the last word on it.
pub fn is_read_only(mount: &Mount) -> bool {
    let said = options(mount).filter(|option| ["ro", "rro", "rw", "rrw"].contains(option)).last();
    said.is_some_and(|option| option.ends_with("ro"))
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener};

    use serde_json::json;

    use super::*;

    fn shared(source: &Path, options: &[&str]) -> Result<Share, ShareError> {
        let mount = json!({
            "type": "bind", "source": source, "destination": "/x", "options": options,
        });
        Share::open(&Spec::default(), &serde_json::from_value(mount).unwrap(), 3)
    }

    #[test]
    fn directories_and_files_are_shared_with_the_access_that_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("file", folder.path().join("link")).unwrap();
        for (name, options, access) in [
            ("", &["rbind"][..], Access::Write),
            ("file", &["bind", "ro"], Access::Read),
            ("link", &["rbind", "rprivate", "rro"], Access::Read),
            ("", &["ro", "rw"], Access::Write),
        ] {
            let share = shared(&folder.path().join(name), options).unwrap();
            assert_eq!((share.access, share.mount), (access, 3), "{name} {options:?}");
        }
    }

    #[test]
    fn what_would_be_something_else_in_a_guest_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        for (path, words) in [
            (Path::new("/"), "the whole host"),
            (Path::new("/dev/null"), "a device"),
            (Path::new("/proc"), "a part of this host's proc"),
            (Path::new("/proc/self/status"), "a part of this host's proc"),
            (&socket, "a socket"),
            (&fifo, "a FIFO"),
        ] {
            let error = shared(path, &["rbind"]).unwrap_err();
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("mount source {}: {words}", path.display())),
                "{text}"
            );
        }
        let missing = folder.path().join("missing");
        let error = shared(&missing, &["rbind"]).unwrap_err();
        assert_eq!((error.path(), error.hint().is_some()), (&*missing, true));
    }
}
