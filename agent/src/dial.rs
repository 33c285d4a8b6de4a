//! Connections to the host's ports (vsock(7)).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt::socket_error};
use tokio::io::{Interest, unix::AsyncFd};
use tokio_vsock::{VMADDR_CID_HOST, VsockStream};

/// `linux/vm_sockets.h`
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;

/// Connects to a port. The kernel by itself gives up after 2 s, which a slow host may need.
pub async fn connect(port: u32, limit: Duration) -> io::Result<VsockStream> {
    VsockStream::new(vsock::VsockStream::from(connect_socket(port, limit).await?))
}

/// The same, for another process.
pub async fn connect_socket(port: u32, limit: Duration) -> io::Result<OwnedFd> {
    let family = AddressFamily::from_raw(libc::AF_VSOCK as u16);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    set_limit(&socket, limit)?;
    begin(&socket, port)?;
    // SAFETY: the descriptor stays what it is as long as it is registered.
    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::WRITABLE)? };
    drop(socket.writable().await?);
    socket_error(&socket)??;
    Ok(socket.into_inner())
}

fn set_limit(socket: &OwnedFd, limit: Duration) -> io::Result<()> {
    let limit = libc::timeval { tv_sec: limit.as_secs() as libc::time_t, tv_usec: 0 };
    // SAFETY: the value is what the option takes, of the size that is told, and outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const limit).cast(),
            size_of_val(&limit) as libc::socklen_t,
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn begin(socket: &OwnedFd, port: u32) -> io::Result<()> {
    // SAFETY: all zeros are an address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (VMADDR_CID_HOST, port);
    let size = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is of the socket's family and of the size that is told, and outlives the call.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // It is writable when that has ended, either way.
            e if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
            e => Err(e),
        },
    }
}
