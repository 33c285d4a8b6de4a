//! getrandom(2), answered from a seed: the runner of each process loads a filter that hands the call to us
//! (seccomp_unotify(2)). The numbers in a call are the container's: a bad address is an error to it, and a length is
//! worked off in pieces.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use libseccomp::{ScmpNotifReq, ScmpNotifResp, ScmpNotifRespFlags, notify_id_valid};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::Pid,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::yield_now,
};

use super::Random;

/// Bytes made at a time.
const PIECE: usize = 16 * 1024;
const BOTH: u64 = (libc::GRND_RANDOM | libc::GRND_INSECURE) as u64;
const KNOWN: u64 = BOTH | libc::GRND_NONBLOCK as u64;

/// Answers until the last process under the filter has ended.
pub fn serve(listener: OwnedFd, random: Arc<Random>) -> io::Result<()> {
    // SAFETY: the descriptor is owned, so it stays open and the same until this is dropped.
    let listener = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
    let listener = listener.map_err(io::Error::from)?;
    tokio::spawn(async move {
        while let Ok(mut ready) = listener.readable().await {
            match pending(listener.get_ref()) {
                Pending::Call => {
                    // One whose caller was killed meanwhile is gone.
                    if let Ok(call) = ScmpNotifReq::receive(listener.as_raw_fd()) {
                        answer(listener.get_ref(), &call, &random).await;
                    }
                }
                Pending::Nothing => ready.clear_ready(),
                Pending::End => return,
            }
        }
    });
    Ok(())
}

enum Pending {
    Call,
    Nothing,
    End,
}

/// To receive is to wait, unless it is known that there is something.
fn pending(listener: &OwnedFd) -> Pending {
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut fds, Some(&at_once)) {
        Ok(_) if fds[0].revents().contains(PollFlags::IN) => Pending::Call,
        Ok(_) if fds[0].revents().is_empty() => Pending::Nothing,
        _ => Pending::End,
    }
}

async fn answer(listener: &OwnedFd, call: &ScmpNotifReq, random: &Random) {
    let [address, length, flags, ..] = call.data.args;
    let given = match flags {
        flags if flags & !KNOWN != 0 || flags & BOTH == BOTH => Err(libc::EINVAL),
        _ => give(listener, call, address, length, random).await,
    };
    let flags = ScmpNotifRespFlags::empty();
    let response = match given {
        Ok(bytes) => ScmpNotifResp::new_val(call.id, bytes, flags),
        Err(errno) => ScmpNotifResp::new_error(call.id, -errno, flags),
    };
    // It fails if the caller has gone.
    let _ = response.respond(listener.as_raw_fd());
}

/// Writes what was asked for into the caller's memory; says how much of it could be.
async fn give(
    listener: &OwnedFd,
    call: &ScmpNotifReq,
    address: u64,
    length: u64,
    random: &Random,
) -> Result<i64, i32> {
    let (length, mut done) = (length.min(i32::MAX as u64), 0);
    let mut piece = [0; PIECE];
    while done < length {
        let bytes = &mut piece[..PIECE.min((length - done) as usize)];
        random.draw(call.pid, bytes).map_err(|_| libc::EFAULT)?;
        // The id of a caller that has gone may be another thread's already.
        notify_id_valid(listener.as_raw_fd(), call.id).map_err(|_| libc::EINTR)?;
        let written = match write_memory(call.pid, address.wrapping_add(done), bytes) {
            Ok(written) => written,
            Err(_) if done > 0 => break,
            Err(_) => return Err(libc::EFAULT),
        };
        done += written as u64;
        if written < bytes.len() {
            break;
        }
        yield_now().await;
    }
    Ok(done as i64)
}

fn write_memory(thread: u32, address: u64, bytes: &[u8]) -> io::Result<usize> {
    let thread =
        i32::try_from(thread).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    let ours = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let theirs = libc::iovec { iov_base: address as *mut _, iov_len: bytes.len() };
    // SAFETY: `ours` is a live slice, which is only read; `theirs` means something in the other process alone.
    let written = unsafe { libc::process_vm_writev(thread.as_raw_pid(), &ours, 1, &theirs, 1, 0) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}
