//! Real interfaces, where the test may make them: in network namespaces of its own.

use std::{
    os::fd::AsRawFd,
    thread::{sleep, spawn},
    time::{Duration, Instant},
};

use ampoule_agent_api::agent::{self, Interface};
use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage},
    link::{
        InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
        LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
        RouteScope, RouteType,
    },
    tc::{TcAttribute, TcMessage},
};
use rustix::thread::UnshareFlags;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn link_message(index: u32, name: &str, kind: Option<InfoKind>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.link_layer_type = LinkLayerType::Ether;
    message.header.flags = LinkFlags::Up;
    message.attributes = vec![
        LinkAttribute::IfName(name.into()),
        LinkAttribute::Address(MAC.into()),
        LinkAttribute::Mtu(1450),
    ];
    let kind = kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
    message.attributes.extend(kind);
    message
}

fn found(links: Vec<LinkMessage>) -> Found {
    Found { links, ..Default::default() }
}

#[test]
fn interfaces_that_are_up_are_joined_or_refused_by_name() {
    let mut lo = link_message(1, "lo", None);
    lo.header.flags |= LinkFlags::Loopback;
    let mut down = link_message(2, "gre0", Some(InfoKind::GreTap));
    down.header.flags = LinkFlags::empty();
    let veth = link_message(3, "eth0", Some(InfoKind::Veth));
    let links = fit(&found(vec![lo, down, veth])).unwrap();
    assert_eq!(links.len(), 1);
    assert_eq!((&*links[0].name, links[0].mac, links[0].mtu), ("eth0", MAC, 1450));

    let refused = |change: fn(&mut LinkMessage), kind, words: &str| {
        let mut message = link_message(3, "net1", kind);
        change(&mut message);
        let error = fit(&found(vec![message])).unwrap_err().to_string();
        assert!(error.starts_with("interface net1: ") && error.contains(words), "{error}");
    };
    refused(|_| (), Some(InfoKind::IpVlan), "ipvlan: its MAC");
    refused(|_| (), Some(InfoKind::Bridge), "use a veth");
    refused(|_| (), Some(InfoKind::Wireguard), "use a veth");
    refused(|m| m.header.link_layer_type = LinkLayerType::None, None, "no MAC");
    refused(|m| m.attributes[1] = LinkAttribute::Address(vec![0; 6]), None, "no MAC");
    refused(|m| m.attributes[2] = LinkAttribute::Mtu(67), None, "MTU of 67");
    refused(|m| m.attributes.push(LinkAttribute::Controller(2)), None, "part of another");
    let lower = |m: &mut LinkMessage| m.attributes.push(LinkAttribute::Link(2));
    refused(lower, Some(InfoKind::MacVlan), "lies on another");

    let mut elsewhere = link_message(3, "net1", Some(InfoKind::MacVlan));
    elsewhere.attributes.extend([LinkAttribute::Link(2), LinkAttribute::LinkNetNsId(0)]);
    assert_eq!(fit(&found(vec![elsewhere])).unwrap().len(), 1);
    let tap = link_message(4, "ampoule0", Some(InfoKind::Tun));
    let error = fit(&found(vec![tap])).unwrap_err().to_string();
    assert!(error.contains("another sandbox"), "{error}");
}

fn route_message(family: AddressFamily, attributes: Vec<RouteAttribute>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Static,
        kind: RouteType::Unicast,
        ..Default::default()
    };
    message.attributes = attributes;
    message
}

fn v4(last: u8) -> std::net::IpAddr {
    [10, 1, 2, last].into()
}

#[test]
fn routes_of_the_main_table_follow_their_interfaces() {
    let via = |last| RouteAttribute::Gateway(v4(last).into());
    let gateway = route_message(
        AddressFamily::Inet,
        vec![via(1), RouteAttribute::Oif(3), RouteAttribute::Priority(50)],
    );
    let mut on_link = gateway.clone();
    on_link.header.flags = RouteFlags::Onlink;
    let mut subnet = route_message(
        AddressFamily::Inet,
        vec![
            RouteAttribute::Destination(v4(0).into()),
            RouteAttribute::PrefSource(v4(5).into()),
            RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]),
            RouteAttribute::Oif(3),
        ],
    );
    subnet.header.destination_prefix_length = 24;
    subnet.header.scope = RouteScope::Link;
    subnet.header.protocol = RouteProtocol::Kernel;
    let mut local = subnet.clone();
    local.header.table = 255;
    let mut lost = gateway.clone();
    lost.attributes[1] = RouteAttribute::Oif(9);
    let mut learnt = gateway.clone();
    learnt.header.protocol = RouteProtocol::Ra;
    let link_local = std::net::IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 0u16]);
    let link_local = route_message(
        AddressFamily::Inet6,
        vec![RouteAttribute::Destination(link_local.into()), RouteAttribute::Oif(3)],
    );
    let mut nowhere = route_message(AddressFamily::Inet6, vec![]);
    nowhere.header.kind = RouteType::Unreachable;

    let all = Found {
        links: vec![link_message(3, "eth0", None)],
        routes: vec![gateway, on_link, local, lost, learnt, link_local, nowhere, subnet],
        ..Default::default()
    };
    let routes = all.request(&fit(&all).unwrap()).routes;
    assert_eq!(routes.len(), 4, "{routes:?}");
    // Without a gateway first.
    let nowhere = &routes[0];
    assert_eq!((nowhere.destination.len(), nowhere.next_hops.len(), nowhere.kind), (16, 0, 7));
    let subnet = &routes[1];
    assert_eq!((&*subnet.destination, subnet.prefix_length), (&[10, 1, 2, 0][..], 24));
    assert_eq!((&*subnet.source, subnet.scope, subnet.protocol), (&[10, 1, 2, 5][..], 253, 2));
    assert_eq!(subnet.metrics, [(2, 1400)].into());
    assert_eq!(subnet.next_hops[0].interface, "eth0");
    let gateways = [&routes[2], &routes[3]];
    assert!(gateways.iter().all(|route| route.destination == [0; 4] && route.priority == 50));
    assert!(gateways.iter().all(|route| route.next_hops[0].gateway == [10, 1, 2, 1]));
    assert!(!gateways[0].next_hops[0].on_link && gateways[1].next_hops[0].on_link);
}

/// `ip link add eth0 type veth peer name peer0`, both up; in a namespace of this thread's own.
fn veth() -> Option<Netlink> {
    // SAFETY: CLONE_FILES, the flag that is not safe, is not given; this thread ends with the test.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.ok()?;
    let mut netlink = Netlink::open().ok()?;
    let mut peer = LinkMessage::default();
    peer.attributes = vec![LinkAttribute::IfName("peer0".into())];
    let mut veth = LinkMessage::default();
    veth.attributes = vec![
        LinkAttribute::IfName("eth0".into()),
        LinkAttribute::Address(MAC.into()),
        LinkAttribute::Mtu(1400),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    make(&mut netlink, libc::RTM_NEWLINK, &veth)?;
    set_up(&mut netlink, "eth0");
    Some(netlink)
}

fn make(netlink: &mut Netlink, kind: u16, message: &impl Emitable) -> Option<()> {
    let made = netlink.change(kind, NLM_F_CREATE | NLM_F_EXCL, message);
    made.inspect_err(|error| eprintln!("{error}")).ok()
}

fn index(name: &str) -> u32 {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    rustix::net::netdevice::name_to_index(&socket, name).unwrap()
}

fn set_up(netlink: &mut Netlink, name: &str) {
    let mut message = LinkMessage::default();
    message.header.index = index(name);
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    netlink.change(libc::RTM_SETLINK, 0, &message).unwrap();
}

/// 10.1.2.5/24 and fd00::5/64 on eth0, a default route, and a neighbour.
fn fill(netlink: &mut Netlink) {
    let index = index("eth0");
    let add = |netlink: &mut Netlink, family, ip: std::net::IpAddr, length| {
        let mut address = AddressMessage::default();
        address.header.family = family;
        address.header.prefix_len = length;
        address.header.index = index;
        address.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        make(netlink, libc::RTM_NEWADDR, &address)
    };
    add(netlink, AddressFamily::Inet, v4(5), 24).unwrap();
    // Where there is IPv6.
    let _ = add(netlink, AddressFamily::Inet6, "fd00::5".parse().unwrap(), 64);
    let mut route = route_message(AddressFamily::Inet, vec![RouteAttribute::Gateway(v4(1).into())]);
    route.attributes.push(RouteAttribute::Oif(index));
    make(netlink, libc::RTM_NEWROUTE, &route).unwrap();
    let mut neighbour = NeighbourMessage::default();
    neighbour.header.family = AddressFamily::Inet;
    neighbour.header.ifindex = index;
    neighbour.header.state = NeighbourState::Permanent;
    neighbour.header.kind = RouteType::Unicast;
    neighbour.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 1, 2, 9].into())),
        NeighbourAttribute::LinkLayerAddress(NEIGHBOUR.into()),
    ];
    make(netlink, libc::RTM_NEWNEIGH, &neighbour).unwrap();
}

/// Interfaces with an `ingress`.
fn redirected(netlink: &mut Netlink) -> Vec<i32> {
    let all: Vec<TcMessage> = netlink.list(libc::RTM_GETQDISC, &TcMessage::default()).unwrap();
    let ingress = TcAttribute::Kind("ingress".into());
    let redirected = all.iter().filter(|qdisc| qdisc.attributes.contains(&ingress));
    redirected.map(|qdisc| qdisc.header.index).collect()
}

/// What an interface has of them, in order.
fn disciplines(netlink: &mut Netlink, interface: &str) -> Vec<String> {
    let all: Vec<TcMessage> = netlink.list(libc::RTM_GETQDISC, &TcMessage::default()).unwrap();
    let index = index(interface) as i32;
    let own = all.iter().filter(|qdisc| qdisc.header.index == index);
    let kinds = own.flat_map(|qdisc| &qdisc.attributes).filter_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.clone()),
        _ => None,
    });
    let mut kinds: Vec<_> = kinds.collect();
    kinds.sort();
    kinds
}

/// Waits until these have an `ingress`. What was just closed may be open for a moment more: in a process that another test
/// has started and that has not come to its `execve`.
#[track_caller]
fn settles(netlink: &mut Netlink, interfaces: &[u32]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let expected: Vec<_> = interfaces.iter().map(|index| *index as i32).collect();
    while redirected(netlink) != expected {
        assert!(Instant::now() < deadline, "{:?} instead of {expected:?}", redirected(netlink));
        sleep(Duration::from_millis(5));
    }
}

/// What `work` returns in another namespace.
fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let working = spawn(|| {
        // SAFETY: as above.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        work()
    });
    working.join().unwrap()
}

/// What `test` does in a namespace with a veth, where one can be made.
fn with_veth(test: fn(&mut Netlink)) {
    let done = spawn(move || veth().map(|mut netlink| test(&mut netlink)));
    if done.join().unwrap().is_none() {
        eprintln!("skipped: no veth can be made here (root is needed)");
    }
}

#[test]
fn a_veth_is_joined_with_all_that_it_has_and_left_as_it_was() {
    with_veth(|netlink| {
        fill(netlink);
        // Its other end is the host's, in another namespace.
        let host = elsewhere(|| File::open("/proc/thread-self/ns/net").unwrap());
        let mut peer = LinkMessage::default();
        peer.header.index = index("peer0");
        peer.attributes = vec![LinkAttribute::NetNsFd(host.as_raw_fd())];
        netlink.change(libc::RTM_SETLINK, 0, &peer).unwrap();

        let Some(joined) = joined_or_skipped() else { return };
        let Interface { mac, name, mtu, addresses, .. } = &joined.request.interfaces[0];
        assert_eq!((&**mac, &**name, *mtu), (&MAC[..], "eth0", 1400));
        let own = |a: &agent::Address| (a.ip.clone(), a.prefix_length, a.peer.is_empty());
        assert_eq!(own(&addresses[0]), (vec![10, 1, 2, 5], 24, true));
        assert!(addresses[1..].iter().all(|a| a.ip[0] == 0xfd && a.prefix_length == 64));
        let v4: Vec<_> =
            joined.request.routes.iter().filter(|r| r.destination.len() == 4).collect();
        assert_eq!((v4[0].prefix_length, &*v4[0].source), (24, &[10, 1, 2, 5][..]));
        assert_eq!((v4[1].prefix_length, &*v4[1].next_hops[0].gateway), (0, &[10, 1, 2, 1][..]));
        assert_eq!(joined.request.neighbours.len(), 1);
        assert_eq!(joined.request.neighbours[0].mac, NEIGHBOUR);
        assert_eq!((joined.nets[0].config.mac, joined.nets[0].config.mtu), (MAC, 1400));

        // A second sandbox cannot have it as well.
        assert_eq!(redirected(netlink).len(), 2);
        let second = Network::join_own(Room::default()).unwrap_err().to_string();
        assert!(second.contains("ampoule0: another sandbox"), "{second}");
        let Network { nets, joined, .. } = joined;
        // A VMM that ended, and a shim that was killed before it could undo anything.
        drop(nets);
        settles(netlink, &[index("eth0")]);
        let again = Network::join_own(Room::default()).unwrap();
        drop(again);
        settles(netlink, &[]);
        drop(joined);
    });
}

#[test]
fn filters_of_somebody_else_stay_and_the_interface_is_refused() {
    with_veth(|netlink| {
        let Some(joined) = joined_or_skipped() else { return };
        drop(joined);
        let eth0 = index("eth0");
        make(netlink, libc::RTM_NEWQDISC, &redirect::ingress(eth0)).unwrap();
        let to_lo = redirect::filter(eth0, "u32", redirect::match_u32(index("lo")));
        make(netlink, libc::RTM_NEWTFILTER, &to_lo).unwrap();
        let error = crate::error::chain_text(&Network::join_own(Room::default()).unwrap_err());
        assert!(error.contains("eth0") && error.contains("somebody else"), "{error}");
        // No tap is left, and no filter lost.
        settles(netlink, &[eth0]);
    });
}

fn joined_or_skipped() -> Option<Network> {
    match Network::join_own(Room::default()) {
        Ok(joined) => Some(joined),
        Err(error @ NetworkError::Interface { .. }) => {
            eprintln!("skipped: {}", crate::error::chain_text(&error));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_namespace_with_loopback_alone_joins_nothing_and_our_own_is_refused() {
    let own = File::open("/proc/thread-self/ns/net").unwrap();
    assert!(matches!(Network::join(&own, Room::default()), Err(NetworkError::Hosts)));
    with_veth(|netlink| {
        let mut veth = LinkMessage::default();
        veth.header.index = index("eth0");
        netlink.change(libc::RTM_DELLINK, 0, &veth).unwrap();
        let empty = File::open("/proc/thread-self/ns/net").unwrap();
        let joined =
            elsewhere(move || Network::join(&empty, Room { devices: 2, ..Room::default() }))
                .unwrap();
        assert!(!joined.connects() && joined.nets.is_empty());
    });
}

#[test]
fn a_guest_follows_what_comes_and_goes_as_far_as_it_has_devices() {
    with_veth(|netlink| {
        let Network { nets, mut joined, request, .. } =
            match Network::join_own(Room { devices: 2, vcpus: 3, ..Room::default() }) {
                Ok(network) => network,
                Err(error) => return eprintln!("skipped: {}", crate::error::chain_text(&error)),
            };
        assert_eq!((nets.len(), request.interfaces.len()), (2, 1));
        assert_eq!([nets[0].config.plugged, nets[1].config.plugged], [true, false]);
        assert!(nets.iter().all(|net| (net.config.pairs, net.tap.len()) == (3, 3)));
        assert_eq!(disciplines(netlink, "ampoule0"), ["ingress", "noqueue"]);
        let same = joined.follow().unwrap();
        assert_eq!((same.plugged.len(), same.unplugged.len(), &same.request), (0, 0, &request));

        fill(netlink);
        let filled = joined.follow().unwrap();
        assert!(filled.plugged.is_empty() && filled.request.neighbours.len() == 1);
        assert!(!filled.request.interfaces[0].addresses.is_empty());
        assert!(filled.request.routes.len() >= 2, "{:?}", filled.request);

        set_up(netlink, "peer0");
        let more = joined.follow().unwrap();
        assert_eq!((more.plugged[0].0, &*more.plugged[0].1.name), (1, "peer0"));
        assert_eq!((more.request.interfaces.len(), redirected(netlink).len()), (2, 4));
        // A third one has no device.
        let mut third = LinkMessage::default();
        third.attributes = vec![
            LinkAttribute::IfName("third".into()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Dummy)]),
        ];
        if make(netlink, libc::RTM_NEWLINK, &third).is_some() {
            set_up(netlink, "third");
            assert_eq!(joined.follow().unwrap().request, more.request);
            let refused = joined.follow_all().unwrap_err().to_string();
            assert!(
                refused.contains("third") && refused.contains("2 network devices"),
                "{refused}"
            );
            third.header.index = index("third");
            netlink.change(libc::RTM_DELLINK, 0, &third).unwrap();
        }
        // One goes, and comes again.
        let mut down = LinkMessage::default();
        down.header.index = index("eth0");
        down.header.change_mask = LinkFlags::Up;
        netlink.change(libc::RTM_SETLINK, 0, &down).unwrap();
        let less = joined.follow().unwrap();
        assert_eq!((less.plugged.len(), &*less.unplugged), (0, &[0][..]));
        assert_eq!((less.request.interfaces.len(), redirected(netlink).len()), (1, 2));
        set_up(netlink, "eth0");
        let again = joined.follow().unwrap();
        assert_eq!((again.plugged[0].0, again.unplugged.len()), (0, 0));
        assert_eq!((again.request.interfaces.len(), redirected(netlink).len()), (2, 4));
        // Both at once, and the namespace is left as it was.
        down.header.change_mask = LinkFlags::empty();
        netlink.change(libc::RTM_DELLINK, 0, &down).unwrap();
        assert_eq!(joined.follow().unwrap().unplugged, [0, 1]);
        drop((joined, nets));
        settles(netlink, &[]);
    });
}

#[test]
fn changes_are_told_of() {
    with_veth(|netlink| {
        let changes = Changes::listen().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let comes =
            |limit| runtime.block_on(async { tokio::time::timeout(limit, changes.come()).await });
        assert!(comes(Duration::from_millis(300)).is_err());
        set_up(netlink, "peer0");
        comes(Duration::from_secs(10)).unwrap().unwrap();
        assert!(comes(Duration::from_millis(300)).is_err(), "told once");
    });
}

/// Those of a namespace without taps.
fn fit(found: &Found) -> Result<Vec<Link>> {
    found.links(&[]).collect()
}
