//! The console ring: a memfd of [`SIZE`] bytes that the shim makes, the VMM writes through a mapping and the
//! shim reads with `pread`. It needs no message, cannot fill up, and outlives a VMM killed with -9.
//!
//! Layout: a little-endian `u64` count of all bytes ever written, then [`RING`] bytes of ring.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

const HEADER: usize = 8;
/// Bytes of console kept.
pub const RING: usize = 16 * 1024 - HEADER;
/// Size of the memfd.
pub const SIZE: usize = HEADER + RING;

/// The shim's end.
#[derive(Debug)]
pub struct ConsoleReader(File);

impl ConsoleReader {
    /// Makes the memory. Its size is sealed, so that no side can make the other fault.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let fd = memfd_create("ampoule-console", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, SIZE as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let writer = fd.try_clone()?;
        Ok((Self(fd.into()), writer))
    }

    /// The last bytes of the console, oldest first, at most [`RING`]. The guest wrote them: escape before use.
    pub fn tail(&self) -> io::Result<Vec<u8>> {
        let mut header = [0; HEADER];
        self.0.read_exact_at(&mut header, 0)?;
        let written = u64::from_le_bytes(header);
        let mut ring = vec![0; RING];
        self.0.read_exact_at(&mut ring, HEADER as u64)?;
        if written <= RING as u64 {
            ring.truncate(written as usize);
        } else {
            ring.rotate_left((written % RING as u64) as usize);
        }
        Ok(ring)
    }
}

/// The VMM's end.
#[derive(Debug)]
pub struct ConsoleWriter {
    map: *mut u8,
    written: u64,
}

// SAFETY: the mapping belongs to this value alone, and is only written through `&mut self`.
unsafe impl Send for ConsoleWriter {}

impl ConsoleWriter {
    /// Maps the memory a [`ConsoleReader`] made.
    ///
    /// # Errors
    /// `InvalidInput` if it is not [`SIZE`] bytes with a sealed size.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        let size = rustix::fs::fstat(&fd)?.st_size;
        if size != SIZE as i64 || !seals.contains(SealFlags::SHRINK) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the console memory must be {SIZE} bytes with a sealed size"),
            ));
        }
        // SAFETY: a fresh shared mapping of a file that cannot shrink; nothing else is at that address.
        let map = unsafe {
            mmap(
                std::ptr::null_mut(),
                SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )?
        };
        Ok(Self { map: map.cast(), written: 0 })
    }

    /// Appends bytes, over the oldest ones if need be.
    pub fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            let at = HEADER + (self.written % RING as u64) as usize;
            // SAFETY: `at` is below SIZE, the length of the mapping, which lives as long as `self`.
            unsafe { self.map.add(at).write_volatile(byte) };
            self.written += 1;
        }
        // SAFETY: the mapping is page-aligned and at least 8 bytes long, and lives as long as `self`.
        let count = unsafe { &*self.map.cast::<AtomicU64>() };
        count.store(self.written.to_le(), Ordering::Release);
    }
}

impl Drop for ConsoleWriter {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this size and nobody else has its address.
        let _ = unsafe { munmap(self.map.cast(), SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_what_was_written_last() {
        let (reader, fd) = ConsoleReader::new().unwrap();
        let mut writer = ConsoleWriter::new(fd).unwrap();
        assert_eq!(reader.tail().unwrap(), b"");
        writer.write(b"hello\n");
        assert_eq!(reader.tail().unwrap(), b"hello\n");
        let long: Vec<u8> = (0..3 * RING + 5).map(|i| i as u8).collect();
        writer.write(&long);
        assert_eq!(reader.tail().unwrap(), &long[long.len() - RING..]);
        drop(writer);
        assert_eq!(reader.tail().unwrap().len(), RING);
    }

    #[test]
    fn memory_of_another_shape_is_refused() {
        let fd = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(ConsoleWriter::new(fd).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
