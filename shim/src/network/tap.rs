//! Taps: an interface of the namespace whose other end is a descriptor, the VMM's. It is gone when nobody has that any more.

use std::{
    ffi::CStr,
    fs::OpenOptions,
    io, mem,
    os::fd::{AsRawFd, OwnedFd},
};

use super::{NetworkError, Result};

/// Of their names: by it they are known for ours.
pub const PREFIX: &str = "ampoule";
/// One queue; each frame comes with a header about its checksum and segments.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

#[derive(Debug)]
pub struct Tap {
    pub name: String,
    pub fd: OwnedFd,
}

/// Without that header: the kernel hands over whole frames, their checksums done.
const PLAIN: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI;
/// Where they come from.
pub const DEVICE: &CStr = c"/dev/net/tun";

/// Makes one for an interface, in the network namespace of this thread.
pub fn make(interface: &str) -> Result<Tap> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let tun = tun.map_err(|source| NetworkError::Interface {
        name: interface.into(),
        what: "open /dev/net/tun, from which a tap is made",
        source,
    });
    of(tun?.into(), interface)
}

/// Makes one for an interface of [`DEVICE`], in the network namespace in which that was opened.
pub fn of(tun: OwnedFd, interface: &str) -> Result<Tap> {
    // The kernel puts the first number there that is free.
    request(&tun, &format!("{PREFIX}%d"), FLAGS).map(|name| Tap { name, fd: tun }).map_err(
        |source| NetworkError::Interface {
            name: interface.into(),
            what: "make a tap for it",
            source,
        },
    )
}

/// Makes one that is an interface itself.
pub fn plain(tun: OwnedFd, name: &str) -> Result<Tap> {
    request(&tun, name, PLAIN)
        .map(|name| Tap { name, fd: tun })
        .map_err(|source| NetworkError::Interface { name: name.into(), what: "make it", source })
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
