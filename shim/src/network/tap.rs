//! Taps: an interface of the namespace whose other end are descriptors, the VMM's: one for each of its queues. It is gone when
//! nobody has any of them any more.

use std::{
    ffi::CStr,
    fs::OpenOptions,
    io, mem,
    os::fd::{AsRawFd, OwnedFd},
};

use super::{NetworkError, Result};

/// Of their names: by it they are known for ours.
pub const PREFIX: &str = "ampoule";
/// Each frame comes with a header about its checksum and segments.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

#[derive(Debug)]
pub struct Tap {
    pub name: String,
    /// At least one.
    pub queues: Vec<OwnedFd>,
}

/// Without that header: the kernel hands over whole frames, their checksums done.
const PLAIN: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI;
/// Where they come from.
pub const DEVICE: &CStr = c"/dev/net/tun";

/// Makes one for an interface, with so many queues, in the network namespace of this thread.
pub fn make(interface: &str, queues: u8) -> Result<Tap> {
    let tuns = (0..queues).map(|_| {
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        tun.map(OwnedFd::from).map_err(|source| NetworkError::Interface {
            name: interface.into(),
            what: "open /dev/net/tun, from which a tap is made",
            source,
        })
    });
    with_queues(tuns.collect::<Result<_>>()?, interface)
}

/// Makes one for an interface of [`DEVICE`], in the network namespace in which that was opened.
pub fn of(tun: OwnedFd, interface: &str) -> Result<Tap> {
    with_queues(vec![tun], interface)
}

fn with_queues(queues: Vec<OwnedFd>, interface: &str) -> Result<Tap> {
    let several = if queues.len() > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    // The kernel puts the first number there that is free.
    let mut name = format!("{PREFIX}%d");
    for tun in &queues {
        name = request(tun, &name, FLAGS | several).map_err(|source| NetworkError::Interface {
            name: interface.into(),
            what: "make a tap for it",
            source,
        })?;
    }
    Ok(Tap { name, queues })
}

/// Makes one that is an interface itself.
pub fn plain(tun: OwnedFd, name: &str) -> Result<OwnedFd> {
    request(&tun, name, PLAIN).map(|_| tun).map_err(|source| NetworkError::Interface {
        name: name.into(),
        what: "make it",
        source,
    })
}

/// Returns the name.
fn request(tun: &OwnedFd, name: &str, flags: libc::c_int) -> io::Result<String> {
    // SAFETY: ifreq is plain bytes and numbers, for all of which 0 is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays 0.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes a whole ifreq, which this is.
    match unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => {}
        _ => return Err(io::Error::last_os_error()),
    }
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    Ok(name.map(|byte| char::from(*byte as u8)).collect())
}
