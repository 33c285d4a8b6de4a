//! The guest's network: loopback, and the interfaces that the host gives it.
//!
//! - [`device`]: what stands for the interfaces, which comes and goes
//! - [`messages`]: what the host said, as the kernel wants it
//! - [`resolver`]: Docker's DNS, which is on the host
//! - [`connect`]: connections that the host passes on

mod connect;
mod device;
mod messages;
mod resolver;

use std::{
    collections::HashMap,
    fs::{self, File},
    io, mem,
    os::fd::{AsFd, AsRawFd},
    panic::resume_unwind,
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
};

use ampoule_agent_api::{
    agent::{Address, ConfigureNetworkRequest, Interface, Neighbour, Route},
    netlink::Netlink,
};
use netlink_packet_core::{Emitable, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{link::LinkMessage, route::RouteMessage};
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

/// What network namespaces were last told, by the containers that they are of; the guest's own by an empty id.
#[derive(Default)]
pub struct Told(Mutex<HashMap<String, ConfigureNetworkRequest>>);

impl Told {
    /// Gives a network namespace all that the host says: this one, or that of a process, which then gets the devices too;
    /// and takes what was told earlier and is not there any more. The sockets are to be served if the host has a server of
    /// names.
    pub fn configure(
        &self,
        request: &ConfigureNetworkRequest,
        process: Option<u32>,
    ) -> Result<Option<Sockets>, StepError> {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let earlier = told.insert(request.container_id.clone(), request.clone());
        Change { earlier: &earlier.unwrap_or_default(), request }.make(process)
    }

    /// That of a container which is gone.
    pub fn forget(&self, container: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(container);
    }
}

/// From what was told to what is told now.
struct Change<'a> {
    earlier: &'a ConfigureNetworkRequest,
    request: &'a ConfigureNetworkRequest,
}

impl Change<'_> {
    fn make(&self, process: Option<u32>) -> Result<Option<Sockets>, StepError> {
        let new: Vec<_> = without(&self.request.interfaces, &self.earlier.interfaces).collect();
        for gone in without(&self.earlier.interfaces, &self.request.interfaces) {
            if let Some(process) = process {
                // Of the agent's own processes this is one that is there for sure.
                inside(process, || Guest::new()?.hand_over(gone, 1))?;
            }
            device::release(&gone.mac).map_err(at(STEP, &gone.name))?;
        }
        if !new.is_empty() {
            device::find(&new)?;
        }
        let Some(process) = process else { return self.make_own(&new) };
        let mut guest = Guest::new()?;
        new.iter().try_for_each(|interface| guest.hand_over(interface, process))?;
        inside(process, || self.make_own(&new))
    }

    /// In this thread's network namespace, which has the devices.
    fn make_own(&self, new: &[&Interface]) -> Result<Option<Sockets>, StepError> {
        let Self { earlier, request } = self;
        let mut guest = Guest::new()?;
        guest.find(&request.interfaces)?;
        guest.rename(new)?;
        // Their routes go with them.
        let routes = left_out(&earlier.routes, &request.routes);
        routes.for_each(|route| guest.leave_route(route));
        for interface in &request.interfaces {
            let was = earlier.interfaces.iter().find(|was| is_same(was, interface));
            match was {
                Some(was) => guest.readdress(was, interface)?,
                None => guest.set_up(interface)?,
            }
        }
        request.routes.iter().try_for_each(|route| guest.route(route))?;
        let neighbours = left_out(&earlier.neighbours, &request.neighbours);
        neighbours.for_each(|neighbour| guest.leave_neighbour(neighbour));
        request.neighbours.iter().try_for_each(|neighbour| guest.neighbour(neighbour))?;
        let sockets = (request.resolver_port > 0).then(Sockets::bind).transpose();
        sockets.map_err(at(STEP, "127.0.0.11 port 53"))
    }
}

/// What is told of it otherwise can be changed; for another name, MAC or MTU its device has to come anew.
fn is_same(one: &Interface, other: &Interface) -> bool {
    (&one.name, &one.mac, one.mtu) == (&other.name, &other.mac, other.mtu)
}

fn without<'a>(
    all: &'a [Interface],
    these: &'a [Interface],
) -> impl Iterator<Item = &'a Interface> {
    all.iter().filter(|one| !these.iter().any(|other| is_same(one, other)))
}

fn left_out<'a, T: PartialEq>(earlier: &'a [T], now: &'a [T]) -> impl Iterator<Item = &'a T> {
    earlier.iter().filter(|one| !now.contains(one))
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

    /// Moves a device into the network namespace of a process.
    fn hand_over(&mut self, interface: &Interface, process: u32) -> Result<(), StepError> {
        self.find(std::slice::from_ref(interface))?;
        let message = messages::hand_over(self.index(&interface.name)?, process, SOME_NAME);
        self.change(libc::RTM_SETLINK, 0, &message, &interface.name)
    }

    fn find(&mut self, interfaces: &[Interface]) -> Result<(), StepError> {
        let mut devices = self.devices()?;
        for Interface { name, mac, .. } in interfaces {
            let missing =
                || refuse(STEP, name, format_args!("no device has the MAC {}", text(mac)));
            // Several of one MAC are in the order in which the host has them, but for those that have their names.
            let found =
                devices.iter().position(|device| device.mac == *mac && device.name == *name);
            let found = found.or_else(|| devices.iter().position(|device| device.mac == *mac));
            let index = devices.remove(found.ok_or_else(missing)?).index;
            self.indexes.insert(name.clone(), index);
        }
        Ok(())
    }

    fn devices(&mut self) -> Result<Vec<Device>, StepError> {
        self.netlink.list(libc::RTM_GETLINK, &LinkMessage::default()).map_err(at(STEP, "devices"))
    }

    /// Calls the interfaces as the host does. None may have another one's name while that still has it.
    fn rename(&mut self, interfaces: &[&Interface]) -> Result<(), StepError> {
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

    /// One that has been set up before. Of what is to go much has gone by itself, or has never come.
    fn readdress(&mut self, was: &Interface, interface: &Interface) -> Result<(), StepError> {
        let name = &interface.name;
        let index = self.index(name)?;
        for address in left_out(&was.addresses, &interface.addresses) {
            if let Some(message) = messages::address(index, address) {
                let _ = self.netlink.change(libc::RTM_DELADDR, 0, &message);
            }
        }
        interface.addresses.iter().try_for_each(|address| self.address(name, index, address))
    }

    fn address(&mut self, name: &str, index: u32, address: &Address) -> Result<(), StepError> {
        let object =
            format!("{name}: address {}", messages::prefix(&address.ip, address.prefix_length));
        let message =
            messages::address(index, address).ok_or_else(|| refuse(STEP, &object, "not valid"))?;
        self.change(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &message, &object)
    }

    fn route(&mut self, route: &Route) -> Result<(), StepError> {
        let to = messages::prefix(&route.destination, route.prefix_length);
        let object = format!("route to {to}");
        let message = self.route_message(route)?;
        let message = message.ok_or_else(|| refuse(STEP, &object, "not valid"))?;
        let made = self.netlink.change(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, &message);
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(at(STEP, &object)),
        }
    }

    /// It may have gone with its interface or an address.
    fn leave_route(&mut self, route: &Route) {
        if let Ok(Some(message)) = self.route_message(route) {
            let _ = self.netlink.change(libc::RTM_DELROUTE, 0, &message);
        }
    }

    fn route_message(&self, route: &Route) -> Result<Option<RouteMessage>, StepError> {
        let hops = route.next_hops.iter().map(|hop| Ok((self.index(&hop.interface)?, hop)));
        Ok(messages::route(route, &hops.collect::<Result<Vec<_>, StepError>>()?))
    }

    fn neighbour(&mut self, neighbour: &Neighbour) -> Result<(), StepError> {
        let object = format!("neighbour {}", messages::prefix(&neighbour.ip, 0));
        let index = self.index(&neighbour.interface)?;
        let message = messages::neighbour(index, neighbour)
            .ok_or_else(|| refuse(STEP, &object, "not valid"))?;
        self.change(libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &message, &object)
    }

    fn leave_neighbour(&mut self, neighbour: &Neighbour) {
        let index = self.index(&neighbour.interface);
        if let Some(message) = index.ok().and_then(|index| messages::neighbour(index, neighbour)) {
            let _ = self.netlink.change(libc::RTM_DELNEIGH, 0, &message);
        }
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
