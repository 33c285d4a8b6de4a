//! The network namespace on the host that a container's process is to be in: what that is connected by, when the hooks
//! have run, is the guest's.

use std::{fs::File, io};

use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};

use super::{OciError, Result};
use crate::{
    network::{Network, NetworkError, Room, is_own},
    task::HostNetwork,
};

const NAMESPACE: &str = "linux.namespaces (network)";

/// Puts this thread into the network namespace.
pub fn enter(network: &HostNetwork) -> Result<()> {
    let failed = |e: Errno| OciError::Host("enter the network namespace", e.into());
    let hosts = Err(OciError::Network(NAMESPACE, NetworkError::Hosts));
    match network {
        HostNetwork::Host => hosts,
        HostNetwork::New => match unshare() {
            // An ordinary user: nothing of the guest is in ours anyway.
            Ok(()) | Err(Errno::PERM) => Ok(()),
            Err(e) => Err(failed(e)),
        },
        HostNetwork::Path(path) => {
            let what = "network namespace";
            let file = File::open(path).map_err(|source| OciError::File {
                what,
                path: path.clone(),
                source,
            })?;
            // Docker names the host's by a path too.
            if is_own(&file).map_err(looked)? {
                return hosts;
            }
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), kind).map_err(failed)
        }
    }
}

/// Joins a guest to the namespace that our first thread is in, unless that was left in the host's or has loopback alone.
pub async fn join(room: Room) -> Result<Option<Network>> {
    let joining = tokio::task::spawn_blocking(move || {
        let namespace = File::open("/proc/self/ns/net").map_err(looked)?;
        if is_own(&namespace).map_err(looked)? {
            return Ok(None);
        }
        let network = Network::join(&namespace, room);
        let network = network.map_err(|e| OciError::Network(NAMESPACE, e))?;
        Ok(network.connects().then_some(network))
    });
    joining.await.map_err(|e| OciError::Host("look at the network", e.into()))?
}

fn looked(error: io::Error) -> OciError {
    OciError::Host("look at the network namespace", error)
}

fn unshare() -> std::result::Result<(), Errno> {
    // SAFETY: a new network namespace changes nothing that memory safety depends on.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_network_is_refused() {
        let named = HostNetwork::Path("/proc/thread-self/ns/net".into());
        for network in [HostNetwork::Host, named] {
            let error = enter(&network).unwrap_err();
            assert!(matches!(error, OciError::Network(_, NetworkError::Hosts)), "{error}");
        }
    }
}
