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
//! finds what was configured. The guest is told of it at its boot, and from then on of what changes ([`follow`]).
//!
//! - [`found`]: what there is, and what the guest is told of it
//! - [`tap`], [`redirect`]: how frames get to it
//! - [`follow`]: what comes and goes while it runs
//! - [`resolver`]: Docker's DNS, which frames do not reach
//! - [`loopback`]: connections from within the namespace, which are no frames
//! - [`user`], [`private`], [`passt`]: a network that nobody has made, for `ampoule run`
//! - [`egress`]: what of it is a list of destinations
//!
//! [`Network::join`] does all of it; what it has changed is undone when [`Joined`] is dropped.

mod egress;
mod follow;
mod found;
mod loopback;
mod passt;
mod private;
mod redirect;
mod resolver;
mod tap;
mod user;

use std::{
    fs::{self, File},
    io,
    net::Ipv4Addr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    panic::resume_unwind,
    thread,
};

use ampoule_agent_api::{agent::ConfigureNetworkRequest, netlink::Netlink};
use ampoule_vmm_api::{NetConfig, RateLimit, config::MAX_QUEUE_PAIRS};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub use follow::{Change, Changes};
use found::Found;
pub use found::Link;
pub use loopback::Loopback;
pub use redirect::Joined;
pub use resolver::{ADDRESS as LISTED_DNS, Resolver};
pub use user::dns_servers;

/// Why a guest cannot be given a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    #[error("a VM cannot be in the host's network: choose another one, or `none`")]
    Hosts,
    #[error("passt is missing on this host")]
    NoPasst,
    #[error("passt: {0}")]
    Passt(String),
    #[error(
        "--publish {0}: this host reaches the outside by IPv6 alone, and so does the guest: leave out the address"
    )]
    Published(Ipv4Addr),
    #[error("--egress cannot be enforced: {0}")]
    Egress(&'static str, #[source] io::Error),
    #[error("interface {name}: {why}")]
    Refused { name: String, why: String },
    #[error("interface {name}: {what}")]
    Interface { name: String, what: &'static str, source: io::Error },
}

type Result<T> = std::result::Result<T, NetworkError>;

/// Network devices besides those that a guest has from its boot on, for interfaces that come later. Each costs the boot a
/// look into an empty window.
const SPARE: usize = 2;

/// What a sandbox is booted with.
#[derive(Debug)]
pub struct Network {
    /// For the agent.
    pub request: ConfigureNetworkRequest,
    /// In the same order as there, then those for what comes later.
    pub nets: Vec<Net>,
    /// To be kept as long as the VM runs.
    pub joined: Joined,
    pub resolver: Option<Resolver>,
    /// It is the first container's own, as who has users of its own has power over its own alone; else the guest's.
    pub of_container: bool,
}

/// What a guest can have.
#[derive(Clone, Copy, Debug, Default)]
pub struct Room {
    /// Network devices at most, if there are not more interfaces already.
    pub devices: u8,
    /// As many take part in what a network device does, up to a limit.
    pub vcpus: u8,
    /// A first interface may come after its boot.
    pub late: bool,
    /// A network is its first container's own, which has it before it is started.
    pub of_container: bool,
}

/// A network device, and what lies under it.
#[derive(Debug)]
pub struct Net {
    pub config: NetConfig,
    /// Its queues.
    pub tap: Vec<OwnedFd>,
}

impl Network {
    /// Joins a guest that is yet to be booted to a namespace, with spare devices as far as there is room for so many. Blocks,
    /// for milliseconds.
    pub fn join(namespace: &File, room: Room) -> Result<Self> {
        if is_own(namespace).map_err(|e| NetworkError::Host("look at the network namespace", e))? {
            return Err(NetworkError::Hosts);
        }
        inside(namespace, || Self::join_own(room))
    }

    /// Likewise, in the namespace of this thread.
    fn join_own(room: Room) -> Result<Self> {
        let mut netlink = netlink()?;
        // What changes from here on is not missed.
        let changes = Changes::listen()?;
        let found = Found::look(&mut netlink)?;
        let links = found.links(&[]).collect::<Result<Vec<_>>>()?;
        let request = found.request(&links);
        let mut joined = Joined::new(netlink, Some(changes));
        let pairs = room.vcpus.clamp(1, MAX_QUEUE_PAIRS);
        let mut device = |link: Option<Link>| {
            let tap = tap::make(link.as_ref().map_or("to come", |link| &link.name), pairs)?;
            let config = NetConfig { pairs, ..config(link.as_ref()) };
            joined.add(&tap, link)?;
            Ok(Net { config, tap: tap.queues })
        };
        let joined_links = links.into_iter().map(|link| device(Some(link)));
        let mut nets = joined_links.collect::<Result<Vec<_>>>()?;
        let spare = if nets.is_empty() && !room.late { 0 } else { SPARE };
        for _ in nets.len()..usize::from(room.devices).min(nets.len() + spare) {
            nets.push(device(None)?);
        }
        let of_container = room.of_container;
        let changes = joined.changes.as_mut().filter(|_| !of_container);
        let resolver = changes.and_then(Changes::resolver);
        Ok(Self { request, nets, joined, resolver, of_container })
    }

    /// Whether there is more than loopback now.
    pub fn connects(&self) -> bool {
        !self.request.interfaces.is_empty()
    }
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

/// Of a device with one pair of queues that the guest has from its boot on, or may have later.
fn config(link: Option<&Link>) -> NetConfig {
    let unlimited = RateLimit::default();
    let (mac, mtu) = link.map_or(([0; 6], u16::MAX), |link| (link.mac, link.mtu));
    NetConfig {
        mac,
        mtu,
        plugged: link.is_some(),
        pairs: 1,
        from_guest: unlimited,
        to_guest: unlimited,
    }
}

/// Whether it is that of this thread.
pub fn is_own(namespace: &File) -> io::Result<bool> {
    let (own, other) = (fs::metadata("/proc/thread-self/ns/net")?, namespace.metadata()?);
    Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
mod tests;
