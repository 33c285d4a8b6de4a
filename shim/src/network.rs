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
//! finds what was configured. The guest is told of it once: at its boot, or, where an engine configures it only when the
//! container has been created (`ctr run --cni`), before that is started ([`Late`]).
//!
//! - [`found`]: what there is, and what the guest is told of it
//! - [`tap`], [`redirect`]: how frames get to it
//! - [`resolver`]: Docker's DNS, which frames do not reach
//! - [`loopback`]: connections from within the namespace, which are no frames
//! - [`user`], [`private`], [`passt`]: a network that nobody has made, for `ampoule run`
//! - [`egress`]: what of it is a list of destinations
//!
//! [`Network::join`] does all of it; what it has changed is undone when [`Joined`] is dropped.

mod egress;
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

use found::Found;
pub use loopback::Loopback;
pub use redirect::Joined;
pub use resolver::{ADDRESS as LISTED_DNS, Resolver};
use tap::Tap;
pub use user::DNS;

/// Why a guest cannot be given a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    #[error("a VM cannot be in the host's network: leave the network namespace to the sandbox")]
    Hosts,
    #[error("passt is missing on this host")]
    NoPasst,
    #[error("passt: {0}")]
    Passt(String),
    #[error("--egress cannot be enforced: {0}")]
    Egress(&'static str, #[source] io::Error),
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
    pub resolver: Option<Resolver>,
    /// It is the first container's own, as who has users of its own has power over its own alone; else the guest's.
    pub of_first: bool,
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
            let tap = tap::make(&link.name)?;
            joined.join(link, &tap.name)?;
            Ok(Net { config: config(link.mac, link.mtu), tap: tap.fd })
        });
        let nets = nets.collect::<Result<_>>()?;
        Ok(Some(Self { request, nets, joined, resolver: Resolver::find(), of_first: false }))
    }
}

/// The taps of network devices that a guest has had from its boot for what comes later, by their names.
#[derive(Clone, Debug, Default)]
pub struct Spares(Vec<String>);

/// Makes some in a namespace that has loopback alone yet. Until they are used they are down.
pub fn spare(namespace: &File, count: u8) -> Result<(Vec<Net>, Spares)> {
    let taps = || (0..count).map(|_| tap::make("to come")).collect::<Result<Vec<_>>>();
    let taps = inside(namespace, taps)?;
    let names = taps.iter().map(|tap| tap.name.clone()).collect();
    let net =
        |(number, tap): (u8, Tap)| Net { config: config(spare_mac(number), u16::MAX), tap: tap.fd };
    Ok(((0..).zip(taps).map(net).collect(), Spares(names)))
}

/// By which the guest finds a device before it is told what it is.
fn spare_mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0xff, number]
}

/// What a guest is given after its boot: see [`Network`]. Its devices are the first of the spare ones.
#[derive(Debug)]
pub struct Late {
    pub request: ConfigureNetworkRequest,
    pub nets: Vec<NetConfig>,
    pub joined: Joined,
    pub resolver: Option<Resolver>,
}

impl Late {
    /// Joins a guest to what a namespace has got since the boot, if anything. The host's own is left alone.
    pub fn join(namespace: &File, spares: &Spares) -> Result<Option<Self>> {
        match is_own(namespace).map_err(looked)? {
            true => Ok(None),
            false => inside(namespace, || Self::join_own(spares)),
        }
    }

    fn join_own(Spares(taps): &Spares) -> Result<Option<Self>> {
        let mut netlink = netlink()?;
        let found = Found::look(&mut netlink)?;
        let links = found.links()?;
        if links.is_empty() {
            return Ok(None);
        }
        if let Some(link) = links.get(taps.len()) {
            let why = format!(
                "it came after the VM was booted, which has room for {} then; let who boots it find it there: \
                 a CRI pod, a hook createRuntime, or a namespace with a path",
                taps.len()
            );
            return Err(NetworkError::Refused { name: link.name.clone(), why });
        }
        let mut request = found.request(&links);
        for (number, interface) in (0..).zip(&mut request.interfaces) {
            interface.device = spare_mac(number).into();
        }
        let mut joined = Joined::new(netlink);
        links.iter().zip(taps).try_for_each(|(link, tap)| joined.join(link, tap))?;
        let nets = links.iter().map(|link| config(link.mac, link.mtu)).collect();
        Ok(Some(Self { request, nets, joined, resolver: Resolver::find() }))
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

fn config(mac: [u8; 6], mtu: u16) -> NetConfig {
    let unlimited = RateLimit::default();
    NetConfig { mac, mtu, from_guest: unlimited, to_guest: unlimited }
}

/// Whether it is that of this thread.
pub fn is_own(namespace: &File) -> io::Result<bool> {
    let (own, other) = (fs::metadata("/proc/thread-self/ns/net")?, namespace.metadata()?);
    Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
mod tests;
