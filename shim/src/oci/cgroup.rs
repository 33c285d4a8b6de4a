//! The cgroup on the host that a container's specification names: the keeper and the VM are in it, so that whoever looks
//! there finds what the sandbox uses. Of its limits those on disks are set ([`super::block_io`]), others are met in the guest.
//!
//! Only with cgroup v2, and where we may. With `--systemd-cgroup` the specification has `SLICE:PREFIX:NAME`, and it is
//! systemd that makes `PREFIX-NAME.scope` of it and puts the keeper there: `systemd.rs`.

use std::{
    fs,
    fs::File,
    io,
    path::{Component, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use oci_spec::runtime::Spec;

use super::{OciError, Result, systemd::Scope};

const ROOT: &str = "/sys/fs/cgroup";
const KVM: &str = "/dev/kvm";
/// How long systemd may take to make a scope.
const ARRIVAL: Duration = Duration::from_secs(10);
/// And the processes of a container to be gone from its cgroup once they have ended.
const DEPARTURE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(5);
/// What limits on disks take: what is written late is charged to whose memory it was in.
const CONTROLLERS: [&str; 2] = ["io", "memory"];

/// Makes the cgroup and enters it; gives its folder. To be left with [`remove`].
pub fn enter(spec: &Spec, systemd: bool) -> Result<Option<PathBuf>> {
    let Some(path) = named(spec, systemd) else { return Ok(None) };
    let before = current().map_err(|e| OciError::Host("find the own cgroup", e))?;
    let (folder, entered) = match systemd {
        true => {
            let scope = Scope::parse(path)?;
            scope.enter()?;
            (Path::new(ROOT).join(scope.path()), arrive(&scope.path()))
        }
        false => {
            let Some(folder) = folder(Path::new(ROOT), path) else { return Ok(None) };
            let entered = fs::create_dir_all(&folder).and_then(|()| join(&folder));
            (folder, entered)
        }
    };
    match entered {
        // That of a Podman pod filters devices, and what is below it too.
        Ok(()) if Path::new(KVM).exists() && is_refused(File::open(KVM)) => {
            join(&before).map_err(|e| OciError::Host("go back to the own cgroup", e))?;
            remove(Some(&folder));
            Ok(None)
        }
        Ok(()) => Ok(Some(folder)),
        // An ordinary user, or a container that was given none.
        Err(e)
            if [io::ErrorKind::PermissionDenied, io::ErrorKind::ReadOnlyFilesystem]
                .contains(&e.kind()) =>
        {
            Ok(None)
        }
        Err(source) => Err(OciError::File { what: "linux.cgroupsPath", path: folder, source }),
    }
}

/// The one that is to be made, if we may.
pub fn named(spec: &Spec, systemd: bool) -> Option<&Path> {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
    // For an ordinary user it would be another systemd's to make.
    path.filter(|_| is_unified(Path::new(ROOT)) && (!systemd || is_root()))
}

/// Whether what is in a cgroup can be kept from using disks. Has those above it hand down what that takes, as runc does.
pub fn controls_disks(folder: &Path) -> bool {
    let read = || fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    let has =
        |text: &str| CONTROLLERS.iter().all(|name| text.split_whitespace().any(|n| n == *name));
    if has(&read()) {
        return true;
    }
    let Ok(below) = folder.strip_prefix(ROOT) else { return false };
    let mut above = PathBuf::from(ROOT);
    for name in below {
        for controller in CONTROLLERS {
            // It may be there already, or not for us to hand down: what has arrived is looked at in the end.
            let _ = fs::write(above.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        above.push(name);
    }
    has(&read())
}

fn join(folder: &Path) -> io::Result<()> {
    fs::write(folder.join("cgroup.procs"), "0")
}

/// Root of the host, not of a user namespace.
fn is_root() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    rustix::process::geteuid().is_root() && map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Waits until systemd has put us there.
fn arrive(path: &Path) -> io::Result<()> {
    let end = Instant::now() + ARRIVAL;
    // There may be more above it: systemd's own cgroup, where that runs in a container.
    while !current()?.ends_with(path) {
        if Instant::now() > end {
            let late = "systemd did not put this process there in time";
            return Err(io::Error::new(io::ErrorKind::TimedOut, late));
        }
        thread::sleep(TICK);
    }
    Ok(())
}

fn is_refused(opened: io::Result<File>) -> bool {
    opened.is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
}

/// The folder of the cgroup that we are in (cgroups(7), /proc/[pid]/cgroup).
fn current() -> io::Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    Ok(Path::new(ROOT).join(path.trim_start_matches('/')))
}

fn is_unified(root: &Path) -> bool {
    root.join("cgroup.controllers").exists()
}

fn folder(root: &Path, path: &Path) -> Option<PathBuf> {
    if path.to_str()?.contains(':') {
        return None;
    }
    let names = path.components().filter(|part| !matches!(part, Component::RootDir));
    let names: PathBuf = names.collect();
    let plain = names.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && !names.as_os_str().is_empty()).then(|| root.join(names))
}

/// Leaves a cgroup that nothing is to be left of.
pub fn leave(folder: &Path) {
    let _ = join(Path::new(ROOT));
    remove(Some(folder));
}

/// Once nobody is in it any more, which those of a container that has ended take a moment to be. Others may have made it
/// go, or be in it.
pub fn remove(folder: Option<&Path>) {
    let Some(folder) = folder else { return };
    let end = Instant::now() + DEPARTURE;
    while fs::remove_dir(folder).is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy)
        && Instant::now() < end
    {
        thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_below_the_root_or_not_ours() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert!(!is_unified(root));
        fs::write(root.join("cgroup.controllers"), "").unwrap();
        assert!(is_unified(root));
        for (path, found) in [
            ("/libpod_parent/libpod-1", Some("libpod_parent/libpod-1")),
            ("a", Some("a")),
            ("/", None),
            ("/../etc", None),
            ("machine.slice:libpod:1", None),
        ] {
            assert_eq!(
                folder(root, Path::new(path)),
                found.map(|found| root.join(found)),
                "{path}"
            );
        }
    }
}
