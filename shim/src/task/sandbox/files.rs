//! What CRI leaves to whoever makes a pod's sandbox: the files by which its containers know names, and the shared memory
//! that they have in common. They are made as containerd's own sandboxer, "podsandbox", makes them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use super::pod_config::Dns;

const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The guest's own, in the guest as in a container.
const SHM: &str = "/dev/shm";

/// Where they belong in a container, and where they lie on this host: in the sandbox's bundle, which containerd removes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFiles(Vec<(&'static str, PathBuf)>);

impl PodFiles {
    /// A pod that does not say which servers of names it has has this host's. Blocks.
    pub fn write(bundle: &Path, hostname: &str, dns: Option<&Dns>) -> io::Result<Self> {
        let resolv_conf = match dns {
            Some(dns) => dns.resolv_conf(),
            None => fs::read_to_string(RESOLV_CONF)?,
        };
        let contents = [
            (HOSTNAME, format!("{hostname}\n")),
            (HOSTS, fs::read_to_string(HOSTS)?),
            (RESOLV_CONF, resolv_conf),
        ];
        let write = |(place, content): (&'static str, String)| {
            let path = bundle.join(place.rsplit('/').next().unwrap_or(place));
            fs::write(&path, content).map(|()| (place, path))
        };
        contents.into_iter().map(write).collect::<io::Result<_>>().map(Self)
    }

    /// Gives them to a container, but where it has something of its own.
    pub fn bind_into(&self, spec: &mut Spec) {
        if self.0.is_empty() {
            return;
        }
        let access = match spec.root().as_ref().and_then(|root| root.readonly()) {
            Some(true) => "ro",
            _ => "rw",
        };
        let of_the_pod = joins_ipc(spec);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in mounts.iter_mut().filter(|mount| of_the_pod && is_own_memory(mount)) {
            *mount = bind(Path::new(SHM), SHM, "rw");
        }
        for (place, path) in &self.0 {
            if mounts.iter().all(|mount| mount.destination() != Path::new(place)) {
                mounts.push(bind(path, place, access));
            }
        }
        spec.set_mounts(Some(mounts));
    }
}

/// Whether it shares what is in memory with the pod's other containers.
fn joins_ipc(spec: &Spec) -> bool {
    let namespaces = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    let mut ipc = namespaces.filter(|namespace| namespace.typ() == LinuxNamespaceType::Ipc);
    ipc.all(|namespace| namespace.path().is_some())
}

/// What containerd's template has for who gets nothing else.
fn is_own_memory(mount: &Mount) -> bool {
    mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("tmpfs")
}

fn bind(source: &Path, destination: &str, access: &str) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some(source.into()))
        .set_destination(destination.into())
        .set_options(Some(["rbind", "rprivate", access].map(String::from).into()));
    mount
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(ipc: serde_json::Value, read_only: bool) -> Spec {
        let json = json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs", "readonly": read_only },
            "mounts": [
                { "type": "tmpfs", "source": "shm", "destination": "/dev/shm" },
                { "type": "bind", "source": "/own", "destination": "/etc/hosts", "options": ["rbind"] },
            ],
            "linux": { "namespaces": [ipc] },
        });
        serde_json::from_value(json).unwrap()
    }

    fn seen(spec: &Spec) -> Vec<(String, String, bool)> {
        let mounts = spec.mounts().iter().flatten();
        let text = |path: &Path| path.to_str().unwrap().to_string();
        let seen = mounts.map(|mount| {
            let read_only = mount.options().iter().flatten().any(|option| option == "ro");
            (text(mount.destination()), text(mount.source().as_ref().unwrap()), read_only)
        });
        seen.collect()
    }

    #[test]
    fn a_container_gets_what_it_has_not_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let dns = Dns {
            servers: vec!["192.0.2.53".into(), "192.0.2.54".into()],
            searches: vec!["a.test".into(), "b.test".into()],
            options: vec!["ndots:5".into()],
        };
        let files = PodFiles::write(folder.path(), "web", Some(&dns)).unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
        assert_eq!(fs::read_to_string(path("hostname")).unwrap(), "web\n");
        assert_eq!(
            fs::read_to_string(path("resolv.conf")).unwrap(),
            "search a.test b.test\nnameserver 192.0.2.53\nnameserver 192.0.2.54\noptions ndots:5\n"
        );
        assert_eq!(fs::read(path("hosts")).unwrap(), fs::read("/etc/hosts").unwrap());
        for read_only in [false, true] {
            let mut joined = spec(json!({ "type": "ipc", "path": "/proc/1/ns/ipc" }), read_only);
            files.bind_into(&mut joined);
            let expected = [
                ("/dev/shm".into(), "/dev/shm".into(), false),
                ("/etc/hosts".into(), "/own".into(), false),
                ("/etc/hostname".into(), path("hostname"), read_only),
                ("/etc/resolv.conf".into(), path("resolv.conf"), read_only),
            ];
            assert_eq!(seen(&joined), expected);
        }
        let mut own = spec(json!({ "type": "ipc" }), false);
        files.bind_into(&mut own);
        assert_eq!(seen(&own)[0].1, "shm");
        let untouched = spec(json!({ "type": "ipc" }), false);
        let mut same = untouched.clone();
        PodFiles::default().bind_into(&mut same);
        assert_eq!(same, untouched);
    }

    #[test]
    fn a_pod_that_says_nothing_has_the_hosts_servers() {
        let folder = tempfile::tempdir().unwrap();
        PodFiles::write(folder.path(), "web", None).unwrap();
        let written = fs::read(folder.path().join("resolv.conf")).unwrap();
        assert_eq!(written, fs::read("/etc/resolv.conf").unwrap());
    }
}
