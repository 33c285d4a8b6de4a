//! What a network namespace has, in the kernel's messages (rtnetlink(7)), and what a guest is told of it. Pure, but for the
//! asking.

use std::{collections::HashMap, net::IpAddr};

use ampoule_agent_api::{
    agent::{self, ConfigureNetworkRequest},
    netlink::Netlink,
};
use ampoule_vmm_api::config::MIN_MTU;
use netlink_packet_core::{Nla, Parseable};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{
        AfSpecInet6, AfSpecUnspec, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
        LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
        RouteNextHop, RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
    },
};

use super::{NetworkError, Result, tap::PREFIX};

/// All that there is.
#[derive(Debug, Default)]
pub struct Found {
    pub links: Vec<LinkMessage>,
    pub addresses: Vec<AddressMessage>,
    pub routes: Vec<RouteMessage>,
    pub neighbours: Vec<NeighbourMessage>,
}

/// An interface that a guest can be joined to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    disable_ipv6: bool,
    accept_ra: i32,
}

impl Found {
    pub fn look(netlink: &mut Netlink) -> Result<Self> {
        Ok(Self {
            links: list(netlink, libc::RTM_GETLINK, "list the interfaces")?,
            addresses: list(netlink, libc::RTM_GETADDR, "list the addresses")?,
            routes: list(netlink, libc::RTM_GETROUTE, "list the routes")?,
            neighbours: list(netlink, libc::RTM_GETNEIGH, "list the neighbours")?,
        })
    }

    /// Those that are up, but for loopback and these taps. One that a guest cannot be joined to is refused: nothing is left
    /// out silently.
    pub fn links<'a>(&'a self, taps: &'a [&str]) -> impl Iterator<Item = Result<Link>> + 'a {
        let connects = |message: &&LinkMessage| {
            let flags = message.header.flags;
            flags.contains(LinkFlags::Up) && !flags.contains(LinkFlags::Loopback)
        };
        let is_tap = |message: &&LinkMessage| {
            let mut attributes = message.attributes.iter();
            attributes.any(|a| matches!(a, LinkAttribute::IfName(name) if taps.contains(&&**name)))
        };
        self.links.iter().filter(connects).filter(move |message| !is_tap(message)).map(link)
    }

    /// What goes with these.
    pub fn request(&self, links: &[Link]) -> ConfigureNetworkRequest {
        let names: Names = links.iter().map(|link| (link.index, &*link.name)).collect();
        let interface = |link: &Link| {
            let own = self.addresses.iter().filter(|message| message.header.index == link.index);
            agent::Interface {
                mac: link.mac.into(),
                name: link.name.clone(),
                mtu: link.mtu.into(),
                addresses: own.filter_map(address).collect(),
                disable_ipv6: link.disable_ipv6,
                accept_ra: link.accept_ra,
                ..Default::default()
            }
        };
        let mut routes: Vec<_> = self.routes.iter().filter_map(|m| route(m, &names)).collect();
        // Gateways are found by routes that have none.
        routes.sort_by_key(|route| route.next_hops.iter().any(|hop| !hop.gateway.is_empty()));
        ConfigureNetworkRequest {
            interfaces: links.iter().map(interface).collect(),
            routes,
            neighbours: self.neighbours.iter().filter_map(|m| neighbour(m, &names)).collect(),
            ..Default::default()
        }
    }
}

/// By their indexes.
type Names<'a> = HashMap<u32, &'a str>;

fn list<M>(netlink: &mut Netlink, kind: u16, what: &'static str) -> Result<Vec<M>>
where
    M: Parseable<[u8]> + netlink_packet_core::Emitable + Default,
{
    netlink.list(kind, &M::default()).map_err(|e| NetworkError::Host(what, e))
}

fn link(message: &LinkMessage) -> Result<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        disable_ipv6: true,
        accept_ra: 0,
    };
    let (mut kind, mut lower, mut lower_elsewhere, mut port) = (None, false, false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac[..].try_into().unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => link.mtu = u16::try_from(*mtu).unwrap_or(u16::MAX),
            LinkAttribute::LinkInfo(infos) => kind = kind_of(infos),
            LinkAttribute::Link(_) => lower = true,
            LinkAttribute::LinkNetNsId(_) => lower_elsewhere = true,
            LinkAttribute::Controller(_) => port = true,
            LinkAttribute::AfSpecUnspec(families) => link.ipv6(families),
            _ => {}
        }
    }
    let refuse = |why: String| Err(NetworkError::Refused { name: link.name.clone(), why });
    if kind == Some(InfoKind::Tun) && link.name.starts_with(PREFIX) {
        return refuse("another sandbox is joined to this network namespace by it".into());
    }
    if let Some(kind) = &kind
        && let Some(why) = unfit(kind)
    {
        return refuse(format!("{kind}: {why}"));
    }
    if message.header.link_layer_type != LinkLayerType::Ether || link.mac == [0; 6] {
        return refuse("it has no MAC address, as the guest's has to have".into());
    }
    if port {
        return refuse("it is a part of another interface of this network namespace".into());
    }
    if matches!(kind, Some(InfoKind::Vlan | InfoKind::MacVlan)) && lower && !lower_elsewhere {
        return refuse("it lies on another interface of this network namespace".into());
    }
    if link.mtu < MIN_MTU {
        return refuse(format!("its MTU of {} is too small", link.mtu));
    }
    Ok(link)
}

impl Link {
    /// Whether a guest's device stands for both.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.index, &self.name, self.mac, self.mtu)
            == (other.index, &other.name, other.mac, other.mtu)
    }

    /// One that is the guest's by IPv4 alone.
    pub fn ipv4(index: u32, name: String, mac: [u8; 6], mtu: u16) -> Self {
        Self { index, name, mac, mtu, disable_ipv6: true, accept_ra: 0 }
    }

    fn ipv6(&mut self, families: &[AfSpecUnspec]) {
        let inet6 = families.iter().find_map(|family| match family {
            AfSpecUnspec::Inet6(attributes) => Some(attributes),
            _ => None,
        });
        for attribute in inet6.into_iter().flatten() {
            if let AfSpecInet6::DevConf(settings) = attribute {
                self.disable_ipv6 = settings.disable_ipv6 != 0;
                self.accept_ra = settings.accept_ra;
            }
        }
    }
}

fn kind_of(infos: &[LinkInfo]) -> Option<InfoKind> {
    infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.clone()),
        _ => None,
    })
}

/// Why frames of this kind of interface cannot be a guest's.
fn unfit(kind: &InfoKind) -> Option<&'static str> {
    match kind {
        InfoKind::Veth | InfoKind::MacVlan | InfoKind::Vlan | InfoKind::Tun | InfoKind::Dummy => {
            None
        }
        InfoKind::IpVlan => Some("its MAC address is that of others too; use macvlan or a veth"),
        InfoKind::Bridge | InfoKind::Bond | InfoKind::Team => {
            Some("its parts would have to be the guest's; use a veth")
        }
        _ => Some("a guest cannot be joined to this kind of interface; use a veth"),
    }
}

/// What IPv6 makes of a MAC, or of what a router says, the guest makes itself.
fn address(message: &AddressMessage) -> Option<agent::Address> {
    let header = &message.header;
    let (mut own, mut other, mut broadcast) = (None, None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => own = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = ip.octets().into(),
            _ => {}
        }
    }
    let ip = own.or(other)?;
    if let IpAddr::V6(ip) = ip
        && (ip.is_unicast_link_local() || !header.flags.contains(AddressHeaderFlags::Permanent))
    {
        return None;
    }
    Some(agent::Address {
        ip: octets(ip),
        prefix_length: header.prefix_len.into(),
        peer: other.filter(|other| *other != ip).map(octets).unwrap_or_default(),
        broadcast,
        scope: u8::from(header.scope).into(),
        ..Default::default()
    })
}

/// Of the main table, if it is not one that the guest's kernel finds by itself.
fn route(message: &RouteMessage, names: &Names<'_>) -> Option<agent::Route> {
    let header = &message.header;
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let mut route = agent::Route {
        destination: match header.address_family {
            AddressFamily::Inet => vec![0; 4],
            AddressFamily::Inet6 => vec![0; 16],
            _ => return None,
        },
        prefix_length: header.destination_prefix_length.into(),
        scope: u8::from(header.scope).into(),
        kind: u8::from(header.kind).into(),
        protocol: u8::from(header.protocol).into(),
        tos: header.tos.into(),
        ..Default::default()
    };
    let mut table = u32::from(header.table);
    let (mut interface, mut hop, mut several) = (None, agent::NextHop::default(), false);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(to) => route.destination = route_octets(to)?,
            RouteAttribute::PrefSource(from) => route.source = route_octets(from)?,
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Metrics(metrics) => {
                route.metrics = metrics.iter().filter_map(metric).collect();
            }
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::MultiPath(hops) => {
                route.next_hops = hops.iter().filter_map(|hop| next_hop(hop, names)).collect();
                several = true;
            }
            other => via(other, &mut hop),
        }
    }
    let learnt = matches!(header.protocol, RouteProtocol::Ra | RouteProtocol::IcmpRedirect);
    if table != main || learnt || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    match header.kind {
        RouteType::Unicast if !several => {
            hop.interface = names.get(&interface?)?.to_string();
            hop.on_link = header.flags.contains(RouteFlags::Onlink);
            route.next_hops = vec![hop];
        }
        RouteType::Unicast if !route.next_hops.is_empty() => {}
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit
            if header.protocol != RouteProtocol::Kernel => {}
        _ => return None,
    }
    (!is_link_local(&route.destination)).then_some(route)
}

/// One of several.
fn next_hop(next: &RouteNextHop, names: &Names<'_>) -> Option<agent::NextHop> {
    let mut hop = agent::NextHop {
        interface: names.get(&next.interface_index)?.to_string(),
        on_link: next.flags.contains(RouteNextHopFlags::Onlink),
        weight: next.hops.into(),
        ..Default::default()
    };
    next.attributes.iter().for_each(|attribute| via(attribute, &mut hop));
    Some(hop)
}

/// The gateway, if it is that.
fn via(attribute: &RouteAttribute, hop: &mut agent::NextHop) {
    match attribute {
        RouteAttribute::Gateway(gateway) => {
            hop.gateway = route_octets(gateway).unwrap_or_default();
        }
        RouteAttribute::Via(RouteVia::Inet(gateway)) => hop.gateway = gateway.octets().into(),
        RouteAttribute::Via(RouteVia::Inet6(gateway)) => hop.gateway = gateway.octets().into(),
        _ => {}
    }
}

/// Those that are numbers; no other is in use but the name of a way to avoid congestion, which the guest need not have.
fn metric(metric: &RouteMetric) -> Option<(u32, u32)> {
    let mut bytes = [0; 4];
    (metric.value_len() == bytes.len()).then(|| {
        metric.emit_value(&mut bytes);
        (metric.kind().into(), u32::from_ne_bytes(bytes))
    })
}

/// Permanent ones: others are found again.
fn neighbour(message: &NeighbourMessage, names: &Names<'_>) -> Option<agent::Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = agent::Neighbour {
        interface: names.get(&message.header.ifindex)?.to_string(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                neighbour.ip = ip.octets().into();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                neighbour.ip = ip.octets().into();
            }
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac.clone_from(mac),
            _ => {}
        }
    }
    (!neighbour.ip.is_empty() && !neighbour.mac.is_empty()).then_some(neighbour)
}

/// fe80::/10, and ff00::/8 for good measure.
fn is_link_local(ip: &[u8]) -> bool {
    matches!(ip, [0xfe, second, ..] if ip.len() == 16 && second & 0xc0 == 0x80)
        || ip.len() == 16 && ip[0] == 0xff
}

fn route_octets(address: &RouteAddress) -> Option<Vec<u8>> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.octets().into()),
        RouteAddress::Inet6(ip) => Some(ip.octets().into()),
        _ => None,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}
