//! A sandbox's network: what a network namespace of the host is connected by is given to a guest.
//!
//! ```text
//!           the pod's network namespace on the host: CNI's, Docker's, Podman's          the VM
//!             ┌────────────────────────────────────────────────────────┐
//!   bridge ───┤ eth0, a veth   ── all that comes in (tc, mirred) ─▶   tap ├─── VMM ── eth0: the same MAC,
//!             │                ◀─ all that comes in (tc, mirred) ──       │           addresses, routes
//!             └────────────────────────────────────────────────────────┘
//! ```
//!
//! No bridge is made and no address is changed: the namespace's own IP sees none of the frames, and whoever looks into it
//! finds what was configured. The guest is told of it once, at its boot.
//!
//! - [`found`]: what there is, and what the guest is told of it
//! - [`tap`], [`redirect`]: how frames get to it
//!
//! [`Network::join`] does all of it; what it has changed is undone when [`Joined`] is dropped.

mod found;
mod redirect;
mod tap;

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    panic::resume_unwind,
    thread,
};

use ampoule_agent_api::{agent::ConfigureNetworkRequest, netlink::Netlink};
use ampoule_vmm_api::{NetConfig, RateLimit};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use found::{Found, Link};
pub use redirect::Joined;

/// Why a guest cannot be given a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    #[error("a VM cannot be in the host's network: leave the network namespace to the sandbox")]
    Hosts,
    #[error("interface {name}: {why}")]
    Refused { name: String, why: String },
    #[error("interface {name}: {what}")]
    Interface { name: String, what: &'static str, source: io::Error },
}

type Result<T> = std::result::Result<T, NetworkError>;

/// What a sandbox is booted with.
#[derive(Debug)]
pub struct Network {
    /// For the agent.
    pub request: ConfigureNetworkRequest,
    /// In the same order as there.
    pub nets: Vec<Net>,
    /// To be kept as long as the VM runs.
    pub joined: Joined,
}

/// A network device, and what lies under it.
#[derive(Debug)]
pub struct Net {
    pub config: NetConfig,
    pub tap: OwnedFd,
}

impl Network {
    /// Joins a guest that is yet to be booted to a namespace. `None` if that has loopback alone. Blocks, for milliseconds.
    pub fn join(namespace: &File) -> Result<Option<Self>> {
        if is_own(namespace).map_err(looked)? {
            return Err(NetworkError::Hosts);
        }
        inside(namespace, Self::join_own)
    }

    /// Likewise, in the namespace of this thread.
    fn join_own() -> Result<Option<Self>> {
        let mut netlink = netlink()?;
        let found = Found::look(&mut netlink)?;
        let links = found.links()?;
        if links.is_empty() {
            return Ok(None);
        }
        let request = found.request(&links);
        let mut joined = Joined::new(netlink);
        let nets = links.iter().map(|link| {
            let tap = tap::make(link)?;
            joined.join(link, &tap)?;
            Ok(Net { config: config(link), tap: tap.fd })
        });
        let nets = nets.collect::<Result<_>>()?;
        Ok(Some(Self { request, nets, joined }))
    }
}

/// Says so if a namespace that a guest was not joined to has got an interface since. The host's own is left alone.
pub fn refuse_late(namespace: &File) -> Result<()> {
    if is_own(namespace).map_err(looked)? {
        return Ok(());
    }
    let links = inside(namespace, || Found::look(&mut netlink()?)?.links())?;
    let why = "it came after the VM was booted, which is not built yet; let who boots it find it \
               there: a CRI pod, a hook createRuntime, or a namespace with a path";
    match links.into_iter().next() {
        None => Ok(()),
        Some(link) => Err(NetworkError::Refused { name: link.name, why: why.into() }),
    }
}

fn looked(error: io::Error) -> NetworkError {
    NetworkError::Host("look at the network namespace", error)
}

fn netlink() -> Result<Netlink> {
    Netlink::open().map_err(|e| NetworkError::Host("open a netlink socket", e))
}

/// With a thread of its own: a namespace is a thread's, and this one ends with its work.
fn inside<T: Send>(namespace: &File, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("network".into());
        let working = thread.spawn_scoped(scope, || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind)
                .map_err(|e| NetworkError::Host("enter the network namespace", e.into()))?;
            work()
        });
        let working = working.map_err(|e| NetworkError::Host("start a thread", e))?;
        working.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

fn config(link: &Link) -> NetConfig {
    let unlimited = RateLimit::default();
    NetConfig { mac: link.mac, mtu: link.mtu, from_guest: unlimited, to_guest: unlimited }
}

/// Whether it is that of this thread.
pub fn is_own(namespace: &File) -> io::Result<bool> {
    let (own, other) = (fs::metadata("/proc/thread-self/ns/net")?, namespace.metadata()?);
    Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
mod tests;
