//! What the host said, as the kernel wants it (rtnetlink(7)). What makes no sense is `None`.

use std::net::IpAddr;

use ampoule_agent_api::agent::{Address, Neighbour, NextHop, Route};
use netlink_packet_core::{
    DecodeError, DefaultNla, NlasIterator, Parseable, parse_string, parse_u32,
};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
        RouteNextHopFlags, RouteType, RouteVia,
    },
};

/// What is looked at of an RTM_NEWLINK: to read them whole is much code.
pub struct Device {
    pub index: u32,
    pub name: String,
    pub mac: Vec<u8>,
}

impl Parseable<[u8]> for Device {
    /// A `struct ifinfomsg` of 16 bytes, then attributes.
    fn parse(message: &[u8]) -> Result<Self, DecodeError> {
        let (head, attributes) = message.split_at_checked(16).ok_or("no ifinfomsg")?;
        let mut device =
            Self { index: parse_u32(&head[4..8])?, name: String::new(), mac: Vec::new() };
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            match attribute.kind() {
                libc::IFLA_ADDRESS => device.mac = attribute.value().to_vec(),
                libc::IFLA_IFNAME => device.name = parse_string(attribute.value())?,
                _ => {}
            }
        }
        Ok(device)
    }
}

pub fn rename(index: u32, name: &str) -> LinkMessage {
    link(index, vec![LinkAttribute::IfName(name.into())])
}

/// Into the network namespace of a process, under this name, or what the kernel makes of it, if its own is taken there.
pub fn hand_over(index: u32, process: u32, name: &str) -> LinkMessage {
    link(index, vec![LinkAttribute::NetNsPid(process), LinkAttribute::IfName(name.into())])
}

pub fn mtu(index: u32, mtu: u32) -> LinkMessage {
    link(index, vec![LinkAttribute::Mtu(mtu)])
}

pub fn up(index: u32) -> LinkMessage {
    let mut message = link(index, vec![]);
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message
}

fn link(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

/// Routes come by themselves ([`route`]); that no one else has the address has been found out on the host.
pub fn address(index: u32, address: &Address) -> Option<AddressMessage> {
    let own = ip(&address.ip)?;
    let peer = if address.peer.is_empty() { own } else { ip(&address.peer)? };
    let flags = AddressFlags::Noprefixroute | AddressFlags::Nodad | AddressFlags::Permanent;
    let mut message = AddressMessage::default();
    message.header.family = family(own);
    message.header.prefix_len = u8::try_from(address.prefix_length).ok()?;
    message.header.scope = u8::try_from(address.scope).ok()?.into();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(own),
        AddressAttribute::Address(peer),
        AddressAttribute::Flags(flags),
    ];
    match ip(&address.broadcast) {
        Some(IpAddr::V4(broadcast)) => {
            message.attributes.push(AddressAttribute::Broadcast(broadcast));
        }
        _ if address.broadcast.is_empty() => {}
        _ => return None,
    }
    Some(message)
}

/// `hops` are the route's, each with the index of its interface.
pub fn route(route: &Route, hops: &[(u32, &NextHop)]) -> Option<RouteMessage> {
    let byte = |number: u32| u8::try_from(number).ok();
    let destination = ip(&route.destination)?;
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(destination),
        destination_prefix_length: byte(route.prefix_length)?,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: byte(route.protocol)?.into(),
        scope: byte(route.scope)?.into(),
        kind: RouteType::from(byte(route.kind)?),
        tos: byte(route.tos)?,
        ..Default::default()
    };
    let attributes = &mut message.attributes;
    if route.prefix_length > 0 {
        attributes.push(RouteAttribute::Destination(destination.into()));
    }
    if !route.source.is_empty() {
        attributes.push(RouteAttribute::PrefSource(ip(&route.source)?.into()));
    }
    if route.priority > 0 {
        attributes.push(RouteAttribute::Priority(route.priority));
    }
    if !route.metrics.is_empty() {
        let metrics = route.metrics.iter().map(|(kind, value)| metric(*kind, *value));
        attributes.push(RouteAttribute::Metrics(metrics.collect::<Option<_>>()?));
    }
    match hops {
        [] => {}
        [(index, hop)] => {
            attributes.extend(gateway(hop, destination)?);
            attributes.push(RouteAttribute::Oif(*index));
            if hop.on_link {
                message.header.flags = RouteFlags::Onlink;
            }
        }
        several => {
            let several = several.iter().map(|(index, hop)| next_hop(*index, hop, destination));
            attributes.push(RouteAttribute::MultiPath(several.collect::<Option<_>>()?));
        }
    }
    Some(message)
}

fn next_hop(index: u32, hop: &NextHop, destination: IpAddr) -> Option<RouteNextHop> {
    let mut next = RouteNextHop::default();
    next.interface_index = index;
    next.hops = u8::try_from(hop.weight).ok()?;
    next.attributes = gateway(hop, destination)?;
    if hop.on_link {
        next.flags = RouteNextHopFlags::Onlink;
    }
    Some(next)
}

/// At most one attribute: a gateway of the other family is named in another one.
fn gateway(hop: &NextHop, destination: IpAddr) -> Option<Vec<RouteAttribute>> {
    if hop.gateway.is_empty() {
        return Some(vec![]);
    }
    let gateway = ip(&hop.gateway)?;
    Some(vec![if gateway.is_ipv4() == destination.is_ipv4() {
        RouteAttribute::Gateway(gateway.into())
    } else {
        RouteAttribute::Via(match gateway {
            IpAddr::V4(gateway) => RouteVia::Inet(gateway),
            IpAddr::V6(gateway) => RouteVia::Inet6(gateway),
        })
    }])
}

fn metric(kind: u32, value: u32) -> Option<RouteMetric> {
    let kind = u16::try_from(kind).ok()?;
    Some(RouteMetric::Other(DefaultNla::new(kind, value.to_ne_bytes().into())))
}

pub fn neighbour(index: u32, neighbour: &Neighbour) -> Option<NeighbourMessage> {
    let ip = ip(&neighbour.ip)?;
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(match ip {
            IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
            IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
        }),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.clone()),
    ];
    Some(message)
}

/// For errors.
pub fn prefix(bytes: &[u8], length: u32) -> String {
    match (ip(bytes), length) {
        (None, _) => format!("{bytes:?}"),
        (Some(ip), 0) if ip.is_unspecified() => "default".into(),
        (Some(ip), 0) => ip.to_string(),
        (Some(ip), length) => format!("{ip}/{length}"),
    }
}

pub fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
