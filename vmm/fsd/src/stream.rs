//! One directory with all that is mounted below, served over a stream to who speaks FUSE at its other end: a message
//! follows the other, each begins with its length. What cannot be answered yet stays in the stream.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

use ampoule_vmm_api::confine::drop_privileges;
use rustix::{
    io::{Errno, read, write},
    thread::set_thread_groups,
};

use crate::{
    abi::{IN_HEADER, MAX_MESSAGE},
    caller::{KEPT, Privileges},
    confine::open_links,
    reply::Reply,
    server::Server,
    worker,
};

/// Threads, so that one file that lets us wait is not all.
const COUNT: usize = 4;
/// Files that the other end may know, and have open.
const MAX_NODES: usize = 100_000;
const MAX_HANDLES: usize = 4096;

/// A server, and the stream that it answers.
pub struct Service {
    server: Server,
    stream: OwnedFd,
    links: OwnedFd,
    reading: Mutex<()>,
    writing: Mutex<()>,
}

impl Service {
    /// Gives up what this process does not need for it. Numbers begin with `first`: of an earlier stream's none may be taken
    /// for one of this.
    ///
    /// # Errors
    /// Which step failed, and why.
    pub fn new(
        root: OwnedFd,
        stream: OwnedFd,
        first: u64,
    ) -> Result<Self, (&'static str, std::io::Error)> {
        let links = open_links().map_err(|e| ("the links to open files", e))?;
        drop_privileges(KEPT).map_err(|e| ("privileges", std::io::Error::other(e)))?;
        // Who serves has no group but a caller's.
        let _ = set_thread_groups(&[]);
        let server = Privileges::kept().and_then(|privileges| {
            Server::of_directory(privileges, MAX_NODES, MAX_HANDLES, root, first)
        });
        let server = server.map_err(|e| ("the root directory", e.into()))?;
        Ok(Self { server, stream, links, reading: Mutex::default(), writing: Mutex::default() })
    }

    /// Answers until the stream ends; a thread may then still wait for a file.
    ///
    /// # Errors
    /// There can be no threads.
    pub fn run(self) -> std::io::Result<()> {
        let service = Arc::new(self);
        let (ended, end) = mpsc::channel();
        for _ in 0..COUNT {
            let (service, ended) = (service.clone(), ended.clone());
            let answer = move || {
                let _ = service.answer_all();
                let _ = ended.send(());
            };
            thread::Builder::new().stack_size(worker::STACK).spawn(answer)?;
        }
        let _ = end.recv();
        Ok(())
    }

    fn answer_all(&self) -> Option<()> {
        worker::prepare(&self.links).ok()?;
        let mut message = vec![0; MAX_MESSAGE];
        let mut reply = Reply::new();
        loop {
            let length = {
                let _turn = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
                self.receive(&mut message)?
            };
            let Some(answer) = self.server.answer(&message[..length], &mut reply) else { continue };
            let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            self.send(answer)?;
        }
    }

    /// The next message's length; `None` at the end, and when the other end does not speak FUSE.
    fn receive(&self, message: &mut [u8]) -> Option<usize> {
        let (header, _) = message.split_at_mut(IN_HEADER);
        self.fill(header)?;
        let length = u32::from_ne_bytes(*header.first_chunk()?) as usize;
        self.fill(message.get_mut(IN_HEADER..length)?)?;
        Some(length)
    }

    fn fill(&self, mut bytes: &mut [u8]) -> Option<()> {
        while !bytes.is_empty() {
            match read(&self.stream, &mut *bytes) {
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => return None,
                Ok(count) => bytes = &mut bytes[count..],
            }
        }
        Some(())
    }

    fn send(&self, mut bytes: &[u8]) -> Option<()> {
        while !bytes.is_empty() {
            match write(&self.stream, bytes) {
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => return None,
                Ok(count) => bytes = &bytes[count..],
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read, Write},
        os::unix::net::UnixStream,
        path::Path,
    };

    use rustix::fs::{Mode, OFlags, open};

    use super::*;
    use crate::abi::{FOPEN_DIRECT_IO, OUT_HEADER, ROOT_ID, opcode};

    const FIRST: u64 = 7 << 40;

    /// The other end of a service of this directory; none without root's capabilities.
    fn serve(directory: &Path) -> Option<UnixStream> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let root = open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        // In a thread, which gives up capabilities.
        thread::spawn(move || Service::new(root, theirs.into(), FIRST).unwrap().run().unwrap());
        Some(ours)
    }

    fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut message = ((IN_HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(opcode.to_ne_bytes());
        message.extend(77u64.to_ne_bytes());
        message.extend(node.to_ne_bytes());
        message.resize(IN_HEADER, 0);
        message.extend(body);
        message
    }

    fn ask(stream: &mut UnixStream, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        // In pieces, as streams have them.
        for piece in message(opcode, node, body).chunks(13) {
            stream.write_all(piece).unwrap();
        }
        let mut header = [0; OUT_HEADER];
        stream.read_exact(&mut header).unwrap();
        let [length, error] = [0, 4].map(|at| *header[at..].first_chunk().unwrap());
        let mut body = vec![0; u32::from_ne_bytes(length) as usize - OUT_HEADER];
        stream.read_exact(&mut body).unwrap();
        match i32::from_ne_bytes(error) {
            0 => Ok(body),
            error => Err(-error),
        }
    }

    fn number(body: &[u8]) -> u64 {
        u64::from_ne_bytes(*body.first_chunk().unwrap())
    }

    #[test]
    fn a_directory_is_the_root_and_nothing_is_above_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("d")).unwrap();
        fs::write(root.join("d/f"), "text").unwrap();
        let Some(mut stream) = serve(&root) else { return };
        let directory = ask(&mut stream, opcode::LOOKUP, ROOT_ID, b"d\0").unwrap();
        assert_eq!(number(&directory), FIRST);
        let file = ask(&mut stream, opcode::LOOKUP, FIRST, b"f\0").unwrap();
        assert_eq!(number(&file), FIRST + 1);
        // Looked up whenever it is needed; and of a number of its own, whatever mount it is in.
        assert_eq!(file[16..36], [&[0; 16][..], &[0; 4]].concat());
        assert_eq!(number(&file[40..]), FIRST + 1);
        let opened = ask(&mut stream, opcode::OPEN, FIRST + 1, &[0; 8]).unwrap();
        assert_eq!((number(&opened), opened[8]), (FIRST, FOPEN_DIRECT_IO as u8));
        let read = [&FIRST.to_ne_bytes()[..], &[0; 8], &100u32.to_ne_bytes()[..], &[0; 20]];
        assert_eq!(ask(&mut stream, opcode::READ, FIRST + 1, &read.concat()).unwrap(), b"text");
        let made = ask(&mut stream, opcode::MKDIR, ROOT_ID, b"\xff\x01\0\0\0\0\0\0new\0").unwrap();
        assert!(number(&made) > FIRST && root.join("new").is_dir());
        for (name, errno) in [
            (&b"..\0"[..], libc::EINVAL),
            (b"d/f\0", libc::EINVAL),
            (b"nosuch\0", libc::ENOENT),
            (b"0\0", libc::ENOENT),
        ] {
            assert_eq!(ask(&mut stream, opcode::LOOKUP, ROOT_ID, name), Err(errno));
        }
        // Of an earlier stream.
        assert_eq!(ask(&mut stream, opcode::GETATTR, 2, &[0; 16]), Err(libc::ESTALE));
    }

    #[test]
    fn who_does_not_speak_fuse_is_not_answered() {
        let dir = tempfile::tempdir().unwrap();
        for length in [0, IN_HEADER - 1, MAX_MESSAGE + 1, u32::MAX as usize] {
            let Some(mut stream) = serve(dir.path()) else { return };
            let mut wrong = message(opcode::GETATTR, ROOT_ID, &[]);
            wrong[..4].copy_from_slice(&(length as u32).to_ne_bytes());
            stream.write_all(&wrong).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
        }
    }
}
