//! What of the host is bound into a container by its specification: some is copied, the rest is shared.
//!
//! Every pod is given `/etc/resolv.conf`, `/etc/hosts` and `/etc/hostname`, `ctr run --net-host` binds the host's,
//! Podman has its `/run/.containerenv`: small files that the container reads. It gets copies, made at its creation; what
//! it writes to them stays in the guest. Of other binds small read-only files are copied too. Directories, files that
//! may be written and large ones are shared as they are ([`crate::share`]).

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::MetadataExt,
    path::Path,
};

use oci_spec::runtime::{Mount, Spec};

use super::error::TaskError;
use crate::{
    sandbox::HostFile,
    share::{Share, is_bind, is_read_only},
};

/// For each container; its request must fit a message to the agent.
const MAX_SIZE: u64 = 1 << 20;
/// Copied though they may be writable.
const KNOWN: [&str; 4] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv"];
/// A pod's shared memory: the guest has its own, which all containers of the sandbox share.
const SHM: &str = "/dev/shm";

/// What a container's binds become.
#[derive(Debug, Default)]
pub struct Binds {
    pub files: Vec<HostFile>,
    /// Source in the spec, source in the guest.
    pub own: Vec<(String, String)>,
    pub shares: Vec<Share>,
}

/// Reads what is to be copied and opens what is to be shared. Blocks.
pub fn binds(spec: &Spec) -> Result<Binds, TaskError> {
    let mut binds = Binds::default();
    let mut room = MAX_SIZE;
    let mounts = spec.mounts().iter().flatten().enumerate();
    for (n, mount) in mounts.filter(|(_, mount)| is_bind(mount)) {
        let Some(source) = mount.source().as_deref() else { continue };
        let destination = mount.destination().to_str().unwrap_or_default();
        let Some(name) = source.to_str() else { continue };
        if destination == SHM {
            binds.own.push((name.into(), SHM.into()));
        } else if is_copied(mount, destination)
            && let Some(file) = read(source, name, room)?
        {
            room -= file.content.len() as u64;
            binds.files.push(file);
        } else {
            binds.shares.push(Share::open(mount, n)?);
        }
    }
    Ok(binds)
}

impl Binds {
    /// Reads the files once more, as hooks may have written them: Docker's write `/etc/resolv.conf`. Blocks.
    pub fn read_again(&mut self) -> Result<(), TaskError> {
        for file in &mut self.files {
            if let Some(now) = read(Path::new(&file.source), &file.source, MAX_SIZE)? {
                *file = now;
            }
        }
        Ok(())
    }
}

fn is_copied(mount: &Mount, destination: &str) -> bool {
    KNOWN.contains(&destination) || is_read_only(mount)
}

/// `None` for what is no file, or too large.
fn read(source: &Path, name: &str, room: u64) -> Result<Option<HostFile>, TaskError> {
    let failed = |error| TaskError::File { path: source.into(), source: error };
    let found = fs::metadata(source).map_err(failed)?;
    if !found.is_file() || found.len() > room {
        return Ok(None);
    }
    let mut content = Vec::new();
    let file = File::open(source).map_err(failed)?;
    file.take(room).read_to_end(&mut content).map_err(failed)?;
    Ok(Some(HostFile { source: name.into(), content, mode: found.mode() & 0o777 }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn small_files_are_copied_and_the_rest_is_shared() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
        for name in ["resolv.conf", "hosts", "secret", "log"] {
            fs::write(path(name), name).unwrap();
        }
        fs::create_dir(path("shm")).unwrap();
        fs::write(path("large"), vec![0; 2 << 20]).unwrap();
        let bind = |name: &str, destination: &str, access: &str| {
            json!({
                "type": "bind", "source": path(name), "destination": destination,
                "options": ["rbind", "rprivate", access],
            })
        };
        let spec = json!({
            "ociVersion": "1.1.0",
            "mounts": [
                { "type": "proc", "source": "proc", "destination": "/proc" },
                bind("resolv.conf", "/etc/resolv.conf", "rw"),
                bind("hosts", "/etc/hosts", "ro"),
                bind("secret", "/run/secret", "ro"),
                bind("log", "/dev/termination-log", "rw"),
                bind("large", "/large", "ro"),
                bind("shm", "/dev/shm", "rw"),
                bind("shm", "/data", "ro"),
            ],
        });
        let binds = binds(&serde_json::from_value(spec).unwrap()).unwrap();
        let copied: Vec<&str> =
            binds.files.iter().map(|f| std::str::from_utf8(&f.content).unwrap()).collect();
        assert_eq!(copied, ["resolv.conf", "hosts", "secret"]);
        assert_eq!(binds.own, [(path("shm"), "/dev/shm".to_string())]);
        let shared: Vec<_> = binds
            .shares
            .iter()
            .map(|s| (s.source.file_name().unwrap().to_str().unwrap(), s.mount, s.read_only))
            .collect();
        assert_eq!(shared, [("log", 4, false), ("large", 5, true), ("shm", 7, true)]);
    }

    #[test]
    fn a_file_that_is_missing_is_named() {
        let spec = json!({
            "ociVersion": "1.1.0",
            "mounts": [{
                "type": "bind", "source": "/no/such/hosts", "destination": "/etc/hosts",
                "options": ["rbind"],
            }],
        });
        let error = binds(&serde_json::from_value(spec).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "/no/such/hosts");
    }
}
