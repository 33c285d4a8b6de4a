//! The threads that answer: each takes a message from the socket, answers it, and takes the next. What cannot be
//! answered yet stays in the socket, so that nothing is queued here.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
    process::fchdir,
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::{abi::MAX_MESSAGE, reply::Reply, server::Server};

/// How many. They wait for disks, not for processors.
pub const COUNT: usize = 8;
/// Bytes of a thread's stack.
pub const STACK: usize = 256 << 10;

/// Makes the calling thread one that may answer: with a umask and a working directory of its own, the latter
/// `links`, a mount of `/proc/self/fd`.
pub fn prepare(links: impl AsFd) -> Result<(), Errno> {
    // SAFETY: CLONE_FILES, the flag that is not safe, is not asked for.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    fchdir(links)
}

/// Answers until the socket ends.
pub fn serve(server: &Server, requests: &OwnedFd) {
    let mut message = vec![0; MAX_MESSAGE];
    let mut reply = Reply::new();
    loop {
        let length = match recv(requests, &mut message[..], RecvFlags::TRUNC) {
            Err(Errno::INTR) => continue,
            Ok((_, 0)) | Err(_) => return,
            Ok((_, length)) => length,
        };
        // One that is too long is cut short, so its header does not say its length.
        let message = &message[..length.min(MAX_MESSAGE)];
        let Some(answer) = server.answer(message, &mut reply) else { continue };
        if send_all(requests, answer).is_err() {
            return;
        }
    }
}

fn send_all(requests: &OwnedFd, answer: &[u8]) -> Result<(), Errno> {
    loop {
        match send(requests, answer, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return sent.map(|_| ()),
        }
    }
}
