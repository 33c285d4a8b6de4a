//! How messages of FUSE are to be: what the kernel is answered when the file system is mounted. The file server is not
//! asked, and takes these for granted.

use std::os::fd::{AsFd, OwnedFd};

use ampoule_fsd_api::abi::{
    IN_HEADER, MAJOR, MAX_DATA, MAX_PAGES, MINOR, OUT_HEADER, init, opcode,
};
use rustix::io::{Errno, read, write};

/// FUSE_MIN_READ_BUFFER
const BUFFER: usize = 8192;

/// Without these files would get wrong modes, or messages other shapes. Linux 5.14 has them all.
const NEEDED: u64 = init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::MAX_PAGES
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT;
const WANTED: u64 = NEEDED | init::ASYNC_READ | init::PARALLEL_DIROPS;

/// Requests that wait for nobody, at a time.
const MAX_BACKGROUND: u16 = 16;

/// Answers the kernel's first message, which is there since the file system is.
///
/// # Errors
/// EPROTO if this kernel is too old.
pub fn answer(device: &OwnedFd) -> Result<(), Errno> {
    let mut message = [0; BUFFER];
    let length = read(device, &mut message)?;
    let answer = answer_to(&message[..length]).ok_or(Errno::PROTO)?;
    write(device.as_fd(), &answer).map(drop)
}

/// struct fuse_init_out for struct fuse_init_in
fn answer_to(message: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| {
        message.get(at..)?.first_chunk().map(|bytes: &[u8; 4]| u32::from_ne_bytes(*bytes))
    };
    let (major, minor, readahead) = (word(IN_HEADER)?, word(IN_HEADER + 4)?, word(IN_HEADER + 8)?);
    let flags = u64::from(word(IN_HEADER + 12)?) & WANTED;
    if word(4)? != opcode::INIT || major != MAJOR || flags & NEEDED != NEEDED {
        return None;
    }
    let pages = u32::from(MAX_PAGES);
    let background = u32::from(MAX_BACKGROUND) | u32::from(MAX_BACKGROUND / 4 * 3) << 16;
    let body = [
        MAJOR,
        MINOR.min(minor),
        readahead.min(MAX_DATA as u32),
        flags as u32,
        background,
        MAX_DATA as u32,
        // Time stamps are as fine as the guest's.
        1,
        pages,
    ];
    let mut answer = ((OUT_HEADER + 64) as u32).to_ne_bytes().to_vec();
    answer.extend([0; 4]);
    answer.extend(message.get(8..16)?);
    answer.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
    answer.resize(OUT_HEADER + 64, 0);
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(major: u32, flags: u64) -> Vec<u8> {
        let mut message = vec![0; IN_HEADER + 64];
        message[4..8].copy_from_slice(&opcode::INIT.to_ne_bytes());
        message[8] = 9;
        for (at, word) in (IN_HEADER..).step_by(4).zip([major, 38, 1 << 20, flags as u32]) {
            message[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        message
    }

    #[test]
    fn nothing_is_agreed_on_but_what_the_file_server_expects() {
        let answer = answer_to(&message(MAJOR, u64::from(u32::MAX))).unwrap();
        assert_eq!(answer.len(), 80);
        assert_eq!((answer[0], answer[8]), (80, 9));
        assert_eq!(answer[28..32], (WANTED as u32).to_ne_bytes());
        for refused in [message(MAJOR, NEEDED & !init::SETXATTR_EXT), message(8, WANTED)] {
            assert_eq!(answer_to(&refused), None);
        }
        assert_eq!(answer_to(&message(MAJOR, WANTED)[..50]), None);
    }
}
