//! Against this machine's kernel, in a network namespace of the test's own.

use std::{collections::BTreeSet, process::Command, sync::mpsc::channel, thread::spawn};

use ampoule_agent_api::agent::NextHop;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::*;

const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

/// `ip link add eth0 type veth peer name eth1`
fn devices() -> Option<()> {
    // SAFETY: CLONE_FILES, the flag that is not safe, is not given; this thread ends with the test.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.ok()?;
    let [mut one, mut other] = MACS.map(|mac| {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::Address(mac.into())];
        message
    });
    one.attributes.push(LinkAttribute::IfName("eth0".into()));
    other.attributes.push(LinkAttribute::IfName("eth1".into()));
    one.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
    ]));
    let mut netlink = Netlink::open().ok()?;
    netlink.change(libc::RTM_NEWLINK, NLM_F_CREATE, &one).ok()
}

fn request() -> ConfigureNetworkRequest {
    let address =
        |ip: &[u8], prefix_length| Address { ip: ip.into(), prefix_length, ..Default::default() };
    let interface = |mac: [u8; 6], name: &str, addresses| Interface {
        mac: mac.into(),
        name: name.into(),
        mtu: 1400,
        addresses,
        ..Default::default()
    };
    let hop = |interface: &str, gateway: &[u8]| NextHop {
        interface: interface.into(),
        gateway: gateway.into(),
        ..Default::default()
    };
    let route = |destination: [u8; 4], prefix_length, scope, next_hops| Route {
        destination: destination.into(),
        prefix_length,
        scope,
        next_hops,
        kind: 1,
        protocol: 4,
        ..Default::default()
    };
    let mut default = route([0; 4], 0, 0, vec![hop("eth1", &[10, 1, 0, 1])]);
    default.metrics = [(2, 1300)].into();
    default.priority = 7;
    let mut shared = hop("eth1", &[10, 1, 0, 2]);
    shared.weight = 1;
    let several = vec![hop("net-1", &[10, 2, 0, 1]), shared];
    ConfigureNetworkRequest {
        // The first one's name is that of the second one's device.
        interfaces: vec![
            interface(MACS[0], "eth1", vec![address(&[10, 1, 0, 5], 24)]),
            interface(MACS[1], "net-1", vec![address(&[10, 2, 0, 5], 24)]),
        ],
        routes: vec![
            route([10, 1, 0, 0], 24, 253, vec![hop("eth1", &[])]),
            route([10, 2, 0, 0], 24, 253, vec![hop("net-1", &[])]),
            default,
            route([10, 3, 0, 0], 16, 0, several),
        ],
        neighbours: vec![Neighbour {
            interface: "eth1".into(),
            ip: vec![10, 1, 0, 9],
            mac: vec![2, 0, 0, 0, 0, 9],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn ip(words: &str) -> BTreeSet<String> {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// What the test does where devices can be made.
fn with_devices(test: impl FnOnce() + Send + 'static) {
    if spawn(move || devices().map(|()| test())).join().unwrap().is_none() {
        eprintln!("skipped: no veth can be made here (root is needed)");
    }
}

#[test]
fn the_guest_gets_what_the_host_says() {
    with_devices(|| {
        let told = Told::default();
        told.configure(&request(), None).unwrap();
        if Command::new("ip").arg("-V").output().is_err() {
            return eprintln!("skipped in part: there is no ip(8) to look with");
        }
        let routes = ip("-4 route");
        for route in [
            "default via 10.1.0.1 dev eth1 proto static metric 7 mtu 1300",
            "10.1.0.0/24 dev eth1 proto static scope link",
            "10.2.0.0/24 dev net-1 proto static scope link",
            "nexthop via 10.2.0.1 dev net-1 weight 1",
            "nexthop via 10.1.0.2 dev eth1 weight 2",
        ] {
            assert!(routes.contains(route), "{route} is not in {routes:#?}");
        }
        assert_eq!(routes.len(), 6, "{routes:#?}");
        let links = ip("-o link show dev eth1");
        assert!(links.iter().all(|l| l.contains("mtu 1400") && l.contains("02:00:00:00:00:01")));
        let neighbours = ip("neigh show nud permanent");
        assert!(neighbours.contains("10.1.0.9 dev eth1 lladdr 02:00:00:00:00:09 PERMANENT"));

        // Another address and route, one of each less, and no neighbour.
        let mut request = request();
        request.interfaces[0].addresses[0].ip = vec![10, 1, 0, 6];
        let other = Address { ip: vec![10, 9, 0, 5], prefix_length: 32, ..Default::default() };
        request.interfaces[1].addresses.push(other);
        request.routes[3].destination = vec![10, 4, 0, 0];
        request.neighbours.clear();
        told.configure(&request, None).unwrap();
        let routes = ip("-4 route");
        assert!(routes.contains("10.4.0.0/16 proto static"), "{routes:#?}");
        assert!(routes.contains("default via 10.1.0.1 dev eth1 proto static metric 7 mtu 1300"));
        assert_eq!(routes.len(), 6, "{routes:#?}");
        let addresses: Vec<_> = ip("-4 -o address").into_iter().collect();
        let has = |ip: &str| addresses.iter().any(|address| address.contains(ip));
        assert!(has("10.1.0.6/24") && has("10.2.0.5/24") && has("10.9.0.5/32"), "{addresses:?}");
        assert!(!has("10.1.0.5/"), "{addresses:?}");
        assert!(ip("neigh show nud permanent").is_empty());
    });
}

#[test]
fn a_process_gets_devices_that_become_what_the_host_says() {
    with_devices(|| {
        let (tell, told) = channel();
        let (go, done) = channel();
        let other = spawn(move || {
            // SAFETY: as above.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            tell.send(rustix::thread::gettid()).unwrap();
            done.recv().unwrap();
            Command::new("ip").arg("-V").output().is_ok().then(|| ip("-o link"))
        });
        let process = told.recv().unwrap().as_raw_pid().unsigned_abs();
        Told::default().configure(&request(), Some(process)).unwrap();
        go.send(()).unwrap();
        let Some(links) = other.join().unwrap() else { return };
        for expected in [["eth1", "02:00:00:00:00:01"], ["net-1", "02:00:00:00:00:02"]] {
            let all = |link: &String| expected.iter().all(|word| link.contains(word));
            assert!(links.iter().any(all), "no {expected:?} in {links:?}");
        }
    });
}

#[test]
fn what_cannot_be_is_named() {
    let fails = |change: fn(&mut ConfigureNetworkRequest), message: &'static str| {
        with_devices(move || {
            let mut request = request();
            change(&mut request);
            assert_eq!(Told::default().configure(&request, None).unwrap_err().to_string(), message);
        });
    };
    fails(
        |r| r.interfaces[1].mac[5] = 3,
        "network: net-1: no device has the MAC 02:00:00:00:00:03",
    );
    fails(
        |r| r.interfaces[0].addresses[0].ip = vec![1; 3],
        "network: eth1: address [1, 1, 1]: not valid",
    );
    fails(
        |r| r.routes[3].next_hops[0].interface = "eth7".into(),
        "network: eth7: not one of the sandbox's",
    );
    fails(
        |r| r.routes[2].next_hops[0].gateway = vec![192, 0, 2, 1],
        "network: route to default: Network is unreachable",
    );
}
