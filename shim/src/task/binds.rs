//! What of the host is bound into a container by its specification: all of it is shared as it is ([`crate::share`]), so
//! that `/etc/resolv.conf`, config maps and tokens follow the host. A pod's shared memory is the guest's own.

use oci_spec::runtime::Spec;

use super::error::TaskError;
use crate::share::{Share, is_bind};

/// A pod's shared memory: the guest has its own, which all containers of the sandbox share.
const SHM: &str = "/dev/shm";

/// What a container's binds become.
#[derive(Debug, Default)]
pub struct Binds {
    /// Source in the spec, source in the guest.
    pub own: Vec<(String, String)>,
    pub shares: Vec<Share>,
}

/// Opens what is to be shared. Blocks.
pub fn binds(spec: &Spec) -> Result<Binds, TaskError> {
    let mut binds = Binds::default();
    let mounts = spec.mounts().iter().flatten().enumerate();
    for (n, mount) in mounts.filter(|(_, mount)| is_bind(mount)) {
        let source = mount.source().as_deref().and_then(|source| source.to_str());
        match source {
            Some(source) if mount.destination().to_str() == Some(SHM) => {
                binds.own.push((source.into(), SHM.into()));
            }
            _ => binds.shares.push(Share::open(spec, mount, n)?),
        }
    }
    Ok(binds)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ampoule_fsd_api::Access;
    use serde_json::json;

    use super::*;

    #[test]
    fn all_is_shared_but_shared_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
        fs::write(path("hosts"), "").unwrap();
        fs::create_dir(path("shm")).unwrap();
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
                bind("hosts", "/etc/hosts", "rw"),
                bind("shm", "/dev/shm", "rw"),
                bind("shm", "/data", "ro"),
            ],
        });
        let binds = binds(&serde_json::from_value(spec).unwrap()).unwrap();
        assert_eq!(binds.own, [(path("shm"), "/dev/shm".to_string())]);
        let shared = binds.shares.iter();
        let shared: Vec<_> = shared.map(|s| (&*s.source, s.mount, s.access)).collect();
        let [hosts, shm] = [path("hosts"), path("shm")];
        assert_eq!(shared, [(hosts.as_ref(), 1, Access::Write), (shm.as_ref(), 3, Access::Read)]);
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
        assert!(error.to_string().contains("/no/such/hosts"), "{error}");
    }
}
