//! What lies at /dev/random and /dev/urandom of a container with a seed: a FUSE file system that is one file
//! (linux/fuse.h, 7.31). Unlike a pipe it knows who reads, gives as much as is asked for, and forgets what is written.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    sync::Arc,
};

use rustix::mount::MountAttrFlags;
use tokio::io::unix::AsyncFd;

use super::{Random, STEP};
use crate::{
    mount,
    plan::{StepError, at},
};

const DEVICE: &str = "/dev/fuse";
/// Longest request: a write of [`MAX_WRITE`] with its headers. The kernel wants to see 8 KiB at least.
const REQUEST: usize = 16 * 1024;
const MAX_WRITE: u32 = 4096;
/// Most bytes of a read: the kernel's own limit without a larger one being agreed on.
const MAX_READ: u32 = 128 * 1024;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const VERSION: [u32; 2] = [7, 31];
/// Each read comes to us, at no position.
const OPEN_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 4;
/// A regular file that anyone may read and write.
const MODE: u32 = 0o100_666;
/// Seconds the kernel may remember the attributes.
const REMEMBER: u64 = 3600;

/// The file as a detached mount; it is served for as long as it is mounted somewhere.
pub fn mount(random: Arc<Random>) -> Result<OwnedFd, StepError> {
    let mut open = OpenOptions::new();
    let open = open.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let device = open.open(DEVICE).map_err(at(STEP, DEVICE))?;
    let (fd, mode) = (format!("fd={}", device.as_raw_fd()), format!("rootmode={MODE:o}"));
    let options = ["source=random", &fd, &mode, "user_id=0", "group_id=0", "allow_other"];
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mounted = mount::new("fuse", options, attributes).map_err(at(STEP, DEVICE))?;
    // SAFETY: the file is owned, so its descriptor stays open and the same until this is dropped.
    let device = unsafe { AsyncFd::register(device) };
    let device = device.map_err(io::Error::from).map_err(at(STEP, DEVICE))?;
    tokio::spawn(async move { serve(&device, &random).await });
    Ok(mounted)
}

async fn serve(device: &AsyncFd<File>, random: &Random) {
    let mut request = vec![0; REQUEST];
    loop {
        let Ok(mut ready) = device.readable().await else { return };
        match device.get_ref().read(&mut request) {
            Ok(length) => {
                if let Some(reply) = reply(&request[..length], random) {
                    // It fails if whoever asked was killed.
                    let _ = device.get_ref().write(&reply);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            // A request that was taken back.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ENOENT)) => {}
            // Unmounted.
            Err(_) => return,
        }
        drop(ready);
        tokio::task::yield_now().await;
    }
}

/// The answer, header and all; some requests have none.
fn reply(request: &[u8], random: &Random) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u32::from_le_bytes(request.get(at..at + 4)?.try_into().ok()?));
    let (opcode, unique, thread) = (word(4)?, request.get(8..16)?, word(32)?);
    let size = || word(IN_HEADER + 16).unwrap_or(0);
    let body = match opcode {
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        INIT => Ok(initial()),
        GETATTR | SETATTR => Ok(attributes()),
        OPEN => Ok(words(&[0, 0, OPEN_FLAGS, 0])),
        READ => {
            let mut bytes = vec![0; size().min(MAX_READ) as usize];
            random.draw(thread, &mut bytes).map(|()| bytes).map_err(|_| libc::EIO)
        }
        WRITE => Ok(words(&[size(), 0])),
        RELEASE | FLUSH => Ok(Vec::new()),
        _ => Err(libc::ENOSYS),
    };
    let (error, body) = match body {
        Ok(body) => (0, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let length = (OUT_HEADER + body.len()) as u32;
    Some([&length.to_le_bytes()[..], &error.to_le_bytes(), unique, &body].concat())
}

/// struct fuse_init_out: no feature is taken up.
fn initial() -> Vec<u8> {
    let background = 16 << 16 | 16;
    let [major, minor] = VERSION;
    let mut all = vec![major, minor, 0, 0, background, MAX_WRITE, 1];
    all.resize(16, 0);
    words(&all)
}

/// struct fuse_attr_out.
fn attributes() -> Vec<u8> {
    let mut all = vec![REMEMBER as u32, 0, 0, 0];
    // ino, size, blocks, three times, three times' nanoseconds
    all.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // mode, links, user, group, device, block size, flags
    all.extend([MODE, 1, 0, 0, 0, 4096, 0]);
    words(&all)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn random() -> Random {
        Random { seed: [0; 32], drawn: Default::default() }
    }

    fn request(opcode: u32, body: &[u32]) -> Vec<u8> {
        let length = (IN_HEADER + 4 * body.len()) as u32;
        words(&[&[length, opcode, 7, 0, 1, 0, 0, 0, 1, 0], body].concat())
    }

    #[test]
    fn answers_have_the_sizes_of_the_protocol() {
        for (opcode, body, length) in
            [(INIT, 64, 80), (GETATTR, 16, 120), (OPEN, 8, 32), (WRITE, 40, 24), (FLUSH, 24, 16)]
        {
            let answer = reply(&request(opcode, &vec![0; body / 4]), &random()).unwrap();
            assert_eq!((answer.len(), &answer[4..8], answer[8]), (length, &[0; 4][..], 7));
        }
        assert!(reply(&request(FORGET, &[0; 2]), &random()).is_none());
        let unknown = reply(&request(999, &[]), &random()).unwrap();
        assert_eq!(unknown[4..8], (-libc::ENOSYS).to_le_bytes());
    }

    proptest! {
        #[test]
        fn no_request_is_too_odd(request in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = reply(&request, &random());
        }
    }
}
