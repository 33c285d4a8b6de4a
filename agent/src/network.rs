//! The guest's network: loopback, and the interfaces that the host gives it.
//!
//! - [`messages`]: what the host said, as the kernel wants it
//! - [`resolver`]: Docker's DNS, which is on the host
//! - [`connect`]: connections that the host passes on

mod connect;
mod messages;
mod resolver;

use std::{
    collections::HashMap,
    fs::{self, File},
    io, mem,
    os::fd::{AsFd, AsRawFd},
    panic::resume_unwind,
    path::Path,
    thread,
};

use ampoule_agent_api::{
    agent::{Address, ConfigureNetworkRequest, Interface, Neighbour, Route},
    netlink::Netlink,
};
use netlink_packet_core::{Emitable, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::link::LinkMessage;
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::plan::{StepError, at, refuse};
pub use connect::connect;
use messages::Device;
pub use resolver::Sockets;

const STEP: &str = "network";
/// What the kernel makes a name of that is not taken.
const SOME_NAME: &str = "given%d";

/// Brings `lo` of the current network namespace up; the kernel adds its addresses.
pub fn loopback_up() -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: ifreq is plain bytes and numbers, for all of which 0 is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads a whole ifreq, which this is (netdevice(7)).
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives a network namespace all that the host says: this one, or that of a process, which then gets the devices too. The
/// sockets are to be served if the host has a server of names.
pub fn configure(
    request: &ConfigureNetworkRequest,
    process: Option<u32>,
) -> Result<Option<Sockets>, StepError> {
    let Some(process) = process else { return configure_own(request) };
    Guest::new()?.hand_over(&request.interfaces, process)?;
    inside(process, || configure_own(request))
}

/// With a thread of its own: a namespace is a thread's, and this one ends with its work.
fn inside<T: Send>(
    process: u32,
    work: impl FnOnce() -> Result<T, StepError> + Send,
) -> Result<T, StepError> {
    let path = format!("/proc/{process}/ns/net");
    let namespace = File::open(&path).map_err(at(STEP, &path))?;
    thread::scope(|scope| {
        let working = thread::Builder::new().spawn_scoped(scope, || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).map_err(at(STEP, &path))?;
            work()
        });
        let working = working.map_err(at(STEP, "thread"))?;
        working.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

fn configure_own(request: &ConfigureNetworkRequest) -> Result<Option<Sockets>, StepError> {
    let mut guest = Guest::new()?;
    guest.find(&request.interfaces)?;
    guest.rename(&request.interfaces)?;
    request.interfaces.iter().try_for_each(|interface| guest.set_up(interface))?;
    request.routes.iter().try_for_each(|route| guest.route(route))?;
    request.neighbours.iter().try_for_each(|neighbour| guest.neighbour(neighbour))?;
    let sockets = (request.resolver_port > 0).then(Sockets::bind).transpose();
    sockets.map_err(at(STEP, "127.0.0.11 port 53"))
}

struct Guest {
    netlink: Netlink,
    /// Of the host's interfaces, by their names.
    indexes: HashMap<String, u32>,
}

impl Guest {
    /// What there is in this thread's network namespace.
    fn new() -> Result<Self, StepError> {
        let netlink = Netlink::open().map_err(at(STEP, "netlink socket"))?;
        Ok(Self { netlink, indexes: HashMap::new() })
    }

    /// Moves the interfaces into the network namespace of a process.
    fn hand_over(&mut self, interfaces: &[Interface], process: u32) -> Result<(), StepError> {
        self.find(interfaces)?;
        interfaces.iter().try_for_each(|Interface { name, .. }| {
            let index = self.index(name)?;
            self.change(libc::RTM_SETLINK, 0, &messages::hand_over(index, process), name)
        })
    }

    fn find(&mut self, interfaces: &[Interface]) -> Result<(), StepError> {
        let mut devices: Vec<Device> = self
            .netlink
            .list(libc::RTM_GETLINK, &LinkMessage::default())
            .map_err(at(STEP, "devices"))?;
        for Interface { name, mac, device, .. } in interfaces {
            let mac = if device.is_empty() { mac } else { device };
            let missing =
                || refuse(STEP, name, format_args!("no device has the MAC {}", text(mac)));
            // Several of one MAC are in the order in which the host has them.
            let found = devices.iter().position(|device| device.mac == *mac);
            let index = devices.remove(found.ok_or_else(missing)?).index;
            self.indexes.insert(name.clone(), index);
        }
        Ok(())
    }

    /// Calls the interfaces as the host does. None may have another one's name while that still has it.
    fn rename(&mut self, interfaces: &[Interface]) -> Result<(), StepError> {
        for new in [|_| SOME_NAME, |name| name] as [fn(&str) -> &str; 2] {
            for Interface { name, .. } in interfaces {
                let message = messages::rename(self.index(name)?, new(name));
                self.change(libc::RTM_SETLINK, 0, &message, name)?;
            }
        }
        Ok(())
    }

    fn index(&self, name: &str) -> Result<u32, StepError> {
        self.indexes
            .get(name)
            .copied()
            .ok_or_else(|| refuse(STEP, name, "not one of the sandbox's"))
    }

    fn set_up(&mut self, interface: &Interface) -> Result<(), StepError> {
        let name = &interface.name;
        let index = self.index(name)?;
        if !interface.device.is_empty() {
            let message = messages::mac(index, &interface.mac);
            self.change(libc::RTM_SETLINK, 0, &message, &format!("{name}: MAC"))?;
        }
        let mtu = interface.mtu;
        self.change(
            libc::RTM_SETLINK,
            0,
            &messages::mtu(index, mtu),
            &format!("{name}: MTU {mtu}"),
        )?;
        ipv6(interface)?;
        interface.addresses.iter().try_for_each(|address| self.address(name, index, address))?;
        self.change(libc::RTM_SETLINK, 0, &messages::up(index), &format!("{name}: up"))
    }

    fn address(&mut self, name: &str, index: u32, address: &Address) -> Result<(), StepError> {
        let object =
            format!("{name}: address {}", messages::prefix(&address.ip, address.prefix_length));
        let message =
            messages::address(index, address).ok_or_else(|| refuse(STEP, &object, "not valid"))?;
        self.change(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &message, &object)
    }

    fn route(&mut self, route: &Route) -> Result<(), StepError> {
        // Which for IPv4 the kernel calls invalid: it is built without.
        let ways = if route.next_hops.len() > 1 { " over several gateways" } else { "" };
        let to = messages::prefix(&route.destination, route.prefix_length);
        let object = format!("route to {to}{ways}");
        let hops = route.next_hops.iter().map(|hop| Ok((self.index(&hop.interface)?, hop)));
        let hops: Vec<_> = hops.collect::<Result<_, StepError>>()?;
        let message =
            messages::route(route, &hops).ok_or_else(|| refuse(STEP, &object, "not valid"))?;
        self.change(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, &message, &object)
    }

    fn neighbour(&mut self, neighbour: &Neighbour) -> Result<(), StepError> {
        let object = format!("neighbour {}", messages::prefix(&neighbour.ip, 0));
        let index = self.index(&neighbour.interface)?;
        let message = messages::neighbour(index, neighbour)
            .ok_or_else(|| refuse(STEP, &object, "not valid"))?;
        self.change(libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &message, &object)
    }

    fn change(
        &mut self,
        kind: u16,
        flags: u16,
        message: &impl Emitable,
        object: &str,
    ) -> Result<(), StepError> {
        self.netlink.change(kind, flags, message).map_err(at(STEP, object))
    }
}

fn text(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// An interface whose MTU is too small for it has no such settings, nor the protocol.
fn ipv6(interface: &Interface) -> Result<(), StepError> {
    let folder = Path::new("/proc/sys/net/ipv6/conf").join(&interface.name);
    let settings =
        [("accept_ra", interface.accept_ra), ("disable_ipv6", interface.disable_ipv6.into())];
    for (setting, value) in settings {
        let path = folder.join(setting);
        match fs::write(&path, value.to_string()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(at(STEP, path.display())(error));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
