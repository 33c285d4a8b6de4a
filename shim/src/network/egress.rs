//! `--egress`: what a sandbox with `--network user` reaches is a list, and it is the host's kernel that holds it to that.
//!
//! passt is in a cgroup of its own, about whose sockets programs (BPF) of ours decide: they are TCP's or UDP's, and are
//! connected and send to nothing but the addresses and ports of a set. It holds for whatever a guest sends, and for a passt
//! that a guest has taken over: that has no power over cgroups, or over the set.
//!
//! - [`program`]: the programs
//! - [`cgroup`]: where they are
//! - [`names`], [`dns`]: the guest's server of names, which puts addresses into the set before it tells of them
//!
//! It is in force before passt is executed, or passt is not: see [`enter`].

mod cgroup;
mod dns;
mod names;
mod program;

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    os::fd::{AsFd, RawFd},
    sync::{Mutex, PoisonError},
};

use ampoule_agent_api::bpf::Set;

use super::{NetworkError, Result};
use crate::cli::{Destination, Egress, Host, MAX_DESTINATIONS};
pub use cgroup::Cgroup;
pub use names::Names;

/// Room in the set: all destinations of the longest list, with as many addresses as are kept of each.
const ROOM: u32 = (MAX_DESTINATIONS * names::KEPT) as u32;
/// Of an address, as IPv6 has it, and a port in network order in a word.
type Key = [u8; 20];

/// A cgroup for passt in which the list is in force, and the server of names that belongs to it.
pub fn enforce(list: &Egress) -> Result<(Cgroup, Names)> {
    let failed = |what| move |source| NetworkError::Egress(what, source);
    let set = Set::new(ROOM).map_err(failed("make a set of addresses (bpf)"))?;
    let programs = program::all(&set).map_err(failed("load programs (bpf)"))?;
    let allowed = Allowed { set, counts: Mutex::default() };
    for Destination { host, port } in &list.0 {
        if let Host::Address(address) = host {
            allowed.open(*address, *port).map_err(failed("allow an address (bpf)"))?;
        }
    }
    let cgroup = Cgroup::new().map_err(failed("make a cgroup (v2) for passt"))?;
    for program in programs {
        program
            .attach(cgroup.as_fd())
            .map_err(failed("put programs on the cgroup of passt (bpf)"))?;
    }
    Ok((cgroup, Names::new(list, allowed)))
}

/// The addresses and ports that there may be connections to. A port that is `None` is all.
#[derive(Debug)]
struct Allowed {
    set: Set<20>,
    /// How many names, or the list itself, want each.
    counts: Mutex<HashMap<Key, usize>>,
}

impl Allowed {
    fn open(&self, address: IpAddr, port: Option<u16>) -> io::Result<()> {
        let key = key(address, port);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(key).or_default();
        if *count == 0 {
            self.set.insert(&key)?;
        }
        *count += 1;
        Ok(())
    }

    fn close(&self, address: IpAddr, port: Option<u16>) -> io::Result<()> {
        let key = key(address, port);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&key) {
            Some(count @ 2..) => *count -= 1,
            Some(_) => {
                self.set.remove(&key)?;
                counts.remove(&key);
            }
            None => {}
        }
        Ok(())
    }
}

fn key(address: IpAddr, port: Option<u16>) -> Key {
    let address = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    let mut key = [0; 20];
    key[..16].copy_from_slice(&address.octets());
    key[16..18].copy_from_slice(&port.unwrap_or(0).to_be_bytes());
    key
}

/// What [`enter`] fails with where the programs have no say, as with network classes of cgroup v1 before Linux 5.15.
pub const NOT_IN_FORCE: i32 = libc::ENOTSUP;

/// In a child, before it executes passt: moves it into the cgroup, and tries whether an address is refused there that is
/// in no list.
///
/// # Safety
/// Between fork and exec no more is done than system calls on numbers and on memory of its own; `entrance` is open.
pub unsafe fn enter(entrance: RawFd) -> io::Result<()> {
    let nowhere = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: libc::INADDR_ANY },
        sin_zero: [0; 8],
    };
    let size = size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY: the buffer is of this length, the address of this size, and the socket is the one just made.
    unsafe {
        if libc::write(entrance, c"0".as_ptr().cast(), 1) != 1 {
            return Err(io::Error::last_os_error());
        }
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let connected = libc::connect(socket, (&raw const nowhere).cast(), size);
        let refused = connected < 0 && *libc::__errno_location() == libc::EPERM;
        libc::close(socket);
        if refused { Ok(()) } else { Err(io::Error::from_raw_os_error(NOT_IN_FORCE)) }
    }
}

#[cfg(test)]
mod tests;
