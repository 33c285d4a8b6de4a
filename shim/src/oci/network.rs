//! The network namespace on the host that a container's process is to be in. The guest has a loopback of its own and
//! nothing else yet: a namespace that is connected to something is refused, rather than left out silently.

use std::{collections::BTreeSet, fs, fs::File, io, os::unix::fs::MetadataExt};

use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};

use super::{OciError, Result};
use crate::task::HostNetwork;

const NAMESPACE: &str = "linux.namespaces (network)";
const LOOPBACK: &str = "a sandbox has loopback only yet: use a network of `none`";

/// Puts this thread into the network namespace.
pub fn enter(network: &HostNetwork) -> Result<()> {
    let failed = |e: Errno| OciError::Host("enter the network namespace", e.into());
    let why = format!("the host's network is asked for; {LOOPBACK}");
    let hosts = Err(OciError::refused(NAMESPACE, why));
    match network {
        HostNetwork::Host => return hosts,
        HostNetwork::New => match unshare() {
            // An ordinary user: nothing of the guest is in ours anyway.
            Ok(()) | Err(Errno::PERM) => return Ok(()),
            Err(e) => return Err(failed(e)),
        },
        HostNetwork::Path(path) => {
            let what = "network namespace";
            let file = File::open(path).map_err(|source| OciError::File {
                what,
                path: path.clone(),
                source,
            })?;
            if is_ours(&file).map_err(|e| OciError::Host("look at the network namespace", e))? {
                return hosts;
            }
            move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&file),
                Some(LinkNameSpaceType::Network),
            )
            .map_err(failed)?;
        }
    }
    refuse(interfaces()?.first())
}

/// Refuses what the namespace is connected by.
pub fn refuse(interface: Option<&String>) -> Result<()> {
    match interface {
        None => Ok(()),
        Some(name) => {
            Err(OciError::refused(NAMESPACE, format!("it has the interface {name}; {LOOPBACK}")))
        }
    }
}

/// Docker names the host's by a path too.
fn is_ours(namespace: &File) -> io::Result<bool> {
    let (own, other) = (fs::metadata("/proc/thread-self/ns/net")?, namespace.metadata()?);
    Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
}

fn unshare() -> std::result::Result<(), Errno> {
    // SAFETY: a new network namespace changes nothing that memory safety depends on.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Those of our first thread's namespace that are in use, but for loopback.
pub fn interfaces() -> Result<BTreeSet<String>> {
    let routes = fs::read_to_string("/proc/self/net/route")
        .map_err(|e| OciError::Host("look at the network", e))?;
    // Without IPv6 there is no such file.
    let addresses = fs::read_to_string("/proc/self/net/if_inet6").unwrap_or_default();
    Ok(in_use(&routes, &addresses))
}

/// The first column of proc(5)'s `net/route`, which has a heading, and the last one of `net/if_inet6`.
fn in_use(routes: &str, addresses: &str) -> BTreeSet<String> {
    let routed = routes.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let addressed = addresses.lines().filter_map(|line| line.split_whitespace().last());
    routed.chain(addressed).filter(|name| *name != "lo").map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_with_a_route_or_an_address_are_in_use() {
        let heading = "Iface\tDestination\tGateway\n";
        let loopback = "00000000000000000000000000000001 01 80 10 80       lo\n";
        assert!(in_use(heading, loopback).is_empty());
        let routes = format!("{heading}eth0\t00000000\t0101A8C0\n");
        let link_local =
            format!("{loopback}fe80000000000000000000000000beef 02 40 20 80     eth1\n");
        assert_eq!(in_use(&routes, &link_local).into_iter().collect::<Vec<_>>(), ["eth0", "eth1"]);
    }

    #[test]
    fn the_hosts_network_is_refused() {
        let named = HostNetwork::Path("/proc/thread-self/ns/net".into());
        for network in [HostNetwork::Host, named] {
            let error = enter(&network).unwrap_err().to_string();
            assert!(error.contains("none"), "{error}");
        }
    }
}
