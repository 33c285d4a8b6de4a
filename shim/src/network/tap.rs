//! Taps: an interface of the namespace whose other end is a descriptor, the VMM's. It is gone when nobody has that any more.

use std::{
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

/// Makes one for an interface, in the network namespace of this thread.
pub fn make(interface: &str) -> Result<Tap> {
    let failed = |what| {
        let name = interface.to_owned();
        move |source| NetworkError::Interface { name, what, source }
    };
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let fd = OwnedFd::from(tun.map_err(failed("open /dev/net/tun, from which a tap is made"))?);
    // SAFETY: ifreq is plain bytes and numbers, for all of which 0 is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The kernel puts the first number there that is free.
    for (to, from) in request.ifr_name.iter_mut().zip(PREFIX.bytes().chain(*b"%d")) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes a whole ifreq, which this is.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => {}
        _ => return Err(failed("make a tap for it")(io::Error::last_os_error())),
    }
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    Ok(Tap { name: name.map(|byte| char::from(*byte as u8)).collect(), fd })
}
