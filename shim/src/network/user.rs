//! `--network user`: what the user of this host reaches, with no more power than that user has.
//!
//! ```text
//!          a network namespace of the sandbox's own                       the VM
//!            ┌──────────────────────────────────────────────┐
//!   passt ═══╪═ eth0, a tap ── all that comes in (tc) ──▶ tap ├─── VMM ─── eth0, 10.0.2.15, fd00:a00:200::f
//!   a stream │              ◀─ all that comes in (tc) ──      │
//!   of frames└──────────────────────────────────────────────┘
//! ```
//!
//! passt(1) opens a socket of the host for each of the guest's connections. pasta(1) would put its tap there by itself, but
//! hands what comes from the host's loopback to sockets of the namespace, where no VM is.
//!
//! There is IPv4, and IPv6, where the host has a route to everywhere by it. The guest's address of the latter is a local one (RFC 4193), by which
//! whoever has a choice prefers IPv4 (RFC 6724).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use ampoule_agent_api::agent::{Address, ConfigureNetworkRequest, Interface, NextHop, Route};
use rustix::net::netdevice::name_to_index;

use super::{
    Joined, Net, Network, NetworkError, Resolver, Result, config, egress, found::Link,
    passt::Passt, private::Private, tap,
};
use crate::{
    cli::{Egress, Publish},
    pace::Pace,
};

const NAME: &str = "eth0";
pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const GATEWAY_MAC: &str = "02:00:00:00:00:02";
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);
const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 255);
pub(super) const PREFIX_LENGTH: u8 = 24;
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NETWORK_6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xa00, 0x200, 0, 0, 0, 0, 0);
pub(super) const ADDRESS_6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xa00, 0x200, 0, 0, 0, 0, 0xf);
const PREFIX_LENGTH_6: u8 = 64;
pub(super) const GATEWAY_6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xa00, 0x200, 0, 0, 0, 0, 2);
/// Addresses that are reached by a default route alone (RFC 5737, RFC 3849).
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const ELSEWHERE_6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1);
/// Where the host's DNS servers of either kind are for the guest.
pub(super) const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub(super) const DNS_6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xa00, 0x200, 0, 0, 0, 0, 3);
/// What passt takes at most: it cuts nothing, as the host's sockets do that.
pub(super) const MTU: u16 = 65520;

impl Network {
    /// One behind passt, whose ports of the host lead to the guest. With a list of destinations nothing else is reached.
    /// Blocks until passt is ready, for milliseconds.
    pub fn user(ports: &[Publish], egress: Option<&Egress>, pace: Pace) -> Result<Self> {
        let reach = Reach::of_host();
        if let Some(address) = ports.iter().find_map(|port| port.address).filter(|_| !reach.ipv4) {
            return Err(NetworkError::Published(address));
        }
        let (cgroup, names) = egress.map(egress::enforce).transpose()?.unzip();
        let Private { netlink, tuns: [guests, passts] } = Private::new()?;
        let failed =
            |source| NetworkError::Interface { name: NAME.into(), what: "set it up", source };
        let passts = tap::plain(passts, NAME)?;
        let index = name_to_index(&netlink, NAME).map_err(|e| failed(e.into()))?;
        let mut joined = Joined::new(netlink, None);
        joined.set_up(index, MTU).map_err(failed)?;
        let link = Link::ipv4(index, NAME.into(), MAC, MTU);
        let tap = tap::of(guests, NAME)?;
        let config = config(Some(&link));
        joined.add(&tap, Some(link))?;
        let passt = Passt::start(passts, ports, reach, cgroup, pace)?;
        Ok(Self {
            request: request(reach),
            nets: vec![Net { config, tap: tap.queues }],
            joined: joined.behind(passt),
            resolver: names.map(Resolver::Listed),
            of_container: false,
        })
    }
}

/// By what a host reaches everywhere. So does passt, which takes an interface with a link-local address besides for IPv6.
#[derive(Clone, Copy, Debug)]
pub struct Reach {
    pub ipv4: bool,
    pub ipv6: bool,
}

impl Reach {
    fn of_host() -> Self {
        let ipv6 = reaches(Ipv6Addr::UNSPECIFIED.into(), ELSEWHERE_6.into());
        // Without any, passt says what it misses.
        Self { ipv4: !ipv6 || reaches(Ipv4Addr::UNSPECIFIED.into(), ELSEWHERE.into()), ipv6 }
    }
}

fn reaches(from: IpAddr, to: IpAddr) -> bool {
    let connected = UdpSocket::bind((from, 0)).and_then(|socket| {
        // Nothing is sent: the kernel looks for a route.
        socket.connect((to, 9))?;
        socket.local_addr()
    });
    connected.is_ok_and(|own| !own.ip().is_loopback())
}

/// Those of the guest, for a host with this resolv.conf: one for each kind that the host has and reaches.
pub fn dns_servers(resolv_conf: &str) -> Vec<IpAddr> {
    of_servers(resolv_conf, Reach::of_host())
}

fn of_servers(resolv_conf: &str, reach: Reach) -> Vec<IpAddr> {
    let servers = resolv_conf.lines().filter_map(|line| line.strip_prefix("nameserver"));
    let servers: Vec<IpAddr> = servers.filter_map(|server| server.trim().parse().ok()).collect();
    let has = |ipv4| servers.iter().any(|server| server.is_ipv4() == ipv4);
    let all = [
        (reach.ipv4 && (has(true) || !reach.ipv6 || !has(false)), DNS.into()),
        (reach.ipv6 && (has(false) || !reach.ipv4), DNS_6.into()),
    ];
    all.into_iter().filter_map(|(is_there, server)| is_there.then_some(server)).collect()
}

/// What the guest is told.
fn request(reach: Reach) -> ConfigureNetworkRequest {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let route = |destination: IpAddr, prefix_length: u8, scope: u8, source, gateway| Route {
        destination: octets(destination),
        prefix_length: prefix_length.into(),
        scope: scope.into(),
        kind: libc::RTN_UNICAST.into(),
        protocol: libc::RTPROT_BOOT.into(),
        source,
        next_hops: vec![NextHop { interface: NAME.into(), gateway, ..Default::default() }],
        ..Default::default()
    };
    let (near, everywhere) = (libc::RT_SCOPE_LINK, libc::RT_SCOPE_UNIVERSE);
    let (mut addresses, mut routes) = (Vec::new(), Vec::new());
    if reach.ipv4 {
        addresses.push(Address {
            ip: octets(ADDRESS.into()),
            prefix_length: PREFIX_LENGTH.into(),
            broadcast: octets(BROADCAST.into()),
            scope: everywhere.into(),
            ..Default::default()
        });
        let gateway = octets(GATEWAY.into());
        routes.extend([
            route(NETWORK.into(), PREFIX_LENGTH, near, octets(ADDRESS.into()), Vec::new()),
            route(Ipv4Addr::UNSPECIFIED.into(), 0, everywhere, Vec::new(), gateway),
        ]);
    }
    if reach.ipv6 {
        addresses.push(Address {
            ip: octets(ADDRESS_6.into()),
            prefix_length: PREFIX_LENGTH_6.into(),
            scope: everywhere.into(),
            ..Default::default()
        });
        let gateway = octets(GATEWAY_6.into());
        routes.extend([
            route(NETWORK_6.into(), PREFIX_LENGTH_6, everywhere, Vec::new(), Vec::new()),
            route(Ipv6Addr::UNSPECIFIED.into(), 0, everywhere, Vec::new(), gateway),
        ]);
    }
    ConfigureNetworkRequest {
        interfaces: vec![Interface {
            mac: MAC.into(),
            name: NAME.into(),
            mtu: MTU.into(),
            addresses,
            disable_ipv6: !reach.ipv6,
            ..Default::default()
        }],
        routes,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::{
        fs::{OFlags, fcntl_getfl, fcntl_setfl},
        io::{read, write},
    };

    use super::{super::passt, *};

    #[test]
    fn the_guest_has_a_dns_server_of_each_kind_that_its_host_has_and_reaches() {
        let both = "nameserver 192.0.2.53\nnameserver 2001:db8::53\n";
        let of = |ipv4, ipv6, text: &str| of_servers(text, Reach { ipv4, ipv6 });
        let (four, six) = (IpAddr::from(DNS), IpAddr::from(DNS_6));
        assert_eq!(of(true, true, both), [four, six]);
        assert_eq!(of(true, false, both), [four]);
        assert_eq!(of(false, true, both), [six]);
        assert_eq!(of(true, true, "nameserver 127.0.0.53\nsearch lan\n"), [four]);
        assert_eq!(of(true, true, "nameserver 2001:db8::53\nnameserver fe80::1%eth0\n"), [six]);
        assert_eq!((of(true, true, ""), of(false, true, "")), (vec![four], vec![six]));
    }

    /// Of a tap as it is made, before a VMM sets it up.
    const HEADER: usize = 10;

    #[test]
    fn a_guests_frames_get_to_passt_and_its_frames_to_the_guest() {
        let network = match Network::user(&[], None, Pace::default()) {
            Ok(network) => network,
            Err(error) => return eprintln!("skipped: {}", crate::error::chain_text(&error)),
        };
        let Network { nets, joined, .. } = network;
        let tap = &nets[0].tap[0];
        fcntl_setfl(tap, fcntl_getfl(tap).unwrap() | OFlags::NONBLOCK).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut answer = vec![0; 2000];
        let answers = |len: usize, answer: &[u8]| {
            let frame = &answer[HEADER..len];
            let by_ipv4 = frame[12..14] == [8, 6] && frame[28..32] == GATEWAY.octets();
            let by_ipv6 = || {
                let advertised = frame.get(62..78) == Some(&GATEWAY_6.octets()[..]);
                frame[12..14] == [0x86, 0xdd] && frame[54] == 136 && advertised
            };
            frame[..6] == MAC && (by_ipv4 || by_ipv6())
        };
        let question = passt::question(Reach::of_host());
        write(tap, &[&[0; HEADER][..], &question].concat()).unwrap();
        while !read(tap, &mut answer).is_ok_and(|len| answers(len, &answer)) {
            assert!(Instant::now() < deadline, "no answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        let begun = Instant::now();
        drop(joined);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
}
