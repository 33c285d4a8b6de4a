//! A backing descriptor and the I/O on it. Owned by one slot; only its thread does I/O.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use ampoule_vmm_api::DiskConfig;
use rustix::{
    fs::{FallocateFlags, FileType, SeekFrom},
    io::Errno,
};
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::request::{Operation, Range, Refusal, SECTOR};
use crate::virtio::{buffers::Buffers, retry};

const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Why a descriptor cannot back a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("disk id {0:?} is not ASCII of at most {ID_BYTES} bytes")]
    Id(String),
    #[error("disk {0:?} is neither a regular file nor a block device")]
    Type(String),
    #[error("the size of disk {id:?} cannot be found out")]
    Size { id: String, source: io::Error },
}

/// A disk. The descriptor belongs to it.
#[derive(Debug)]
pub struct Disk {
    backing: OwnedFd,
    id: [u8; ID_BYTES],
    read_only: bool,
    sectors: u64,
    /// Written to since the last successful flush, by all we know. A flush of a clean disk costs nothing.
    dirty: bool,
}

impl Disk {
    pub fn new(config: &DiskConfig, backing: OwnedFd) -> Result<Self, DiskError> {
        if !config.id.is_ascii() || config.id.len() > ID_BYTES {
            return Err(DiskError::Id(config.id.clone()));
        }
        let mut id = [0; ID_BYTES];
        id[..config.id.len()].copy_from_slice(config.id.as_bytes());
        let sectors = size(config, &backing)? / SECTOR;
        Ok(Self { backing, id, read_only: config.read_only, sectors, dirty: true })
    }

    /// Capacity. A last piece of less than a sector is out of reach.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Does a request; says how many bytes of data it wrote to the guest.
    pub fn execute(&mut self, operation: Operation<'_>) -> Result<u32, Refusal> {
        match operation {
            Operation::Read { sector, into } => self.read(sector, &into),
            Operation::GetId { into } => Ok(into.copy_from(&self.id) as u32),
            _ if self.read_only => Err(Refusal::IoError),
            Operation::Write { sector, from } => self.write(sector, &from),
            Operation::Flush => self.flush(),
            Operation::Discard(range) => self.punch(range),
            Operation::WriteZeroes { range, unmap: true } => self.punch(range),
            Operation::WriteZeroes { range, unmap: false } => {
                self.allocate(range, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE)
            }
        }
    }

    /// A short read (the file shrank) is an error.
    fn read(&self, sector: u64, into: &Buffers<'_>) -> Result<u32, Refusal> {
        let offset = self.offset(sector, into.len() as u64 / SECTOR)?;
        let iovecs = into.iovecs();
        let read = retry(|| {
            // SAFETY: the iovecs lie in guest memory, which `into` borrows; a buffer has at most as many
            // pieces as a queue has entries (times the regions of memory), so the count fits.
            unsafe {
                libc::preadv(self.backing.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, offset)
            }
        });
        if read.ok() == Some(into.len()) { Ok(into.len() as u32) } else { Err(Refusal::IoError) }
    }

    /// A short write (the file system is full) is an error.
    fn write(&mut self, sector: u64, from: &Buffers<'_>) -> Result<u32, Refusal> {
        let offset = self.offset(sector, from.len() as u64 / SECTOR)?;
        let iovecs = from.iovecs();
        self.dirty = true;
        let written = retry(|| {
            // SAFETY: as in `read`.
            unsafe {
                libc::pwritev(
                    self.backing.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as i32,
                    offset,
                )
            }
        });
        if written.ok() == Some(from.len()) { Ok(0) } else { Err(Refusal::IoError) }
    }

    fn flush(&mut self) -> Result<u32, Refusal> {
        if self.dirty {
            rustix::fs::fdatasync(&self.backing).map_err(|_| Refusal::IoError)?;
            self.dirty = false;
        }
        Ok(0)
    }

    /// Frees a range, which then reads as zeroes, in files and block devices alike.
    fn punch(&mut self, range: Range) -> Result<u32, Refusal> {
        self.allocate(range, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)
    }

    /// What the backing cannot do is unsupported, and the guest writes zeroes itself.
    fn allocate(&mut self, range: Range, flags: FallocateFlags) -> Result<u32, Refusal> {
        let offset = self.offset(range.sector, range.sectors.into())?;
        self.dirty = true;
        let len = u64::from(range.sectors) * SECTOR;
        match rustix::fs::fallocate(&self.backing, flags, offset as u64, len) {
            Ok(()) => Ok(0),
            Err(Errno::OPNOTSUPP) => Err(Refusal::Unsupported),
            Err(_) => Err(Refusal::IoError),
        }
    }

    /// Where a range begins, in bytes, if all of it is on the disk; checked before anything is multiplied.
    fn offset(&self, sector: u64, sectors: u64) -> Result<i64, Refusal> {
        let end = sector.checked_add(sectors).ok_or(Refusal::IoError)?;
        if end > self.sectors {
            return Err(Refusal::IoError);
        }
        i64::try_from(sector * SECTOR).map_err(|_| Refusal::IoError)
    }
}

/// Bytes of a regular file or a block device.
fn size(config: &DiskConfig, backing: &OwnedFd) -> Result<u64, DiskError> {
    let failed = |e: Errno| DiskError::Size { id: config.id.clone(), source: e.into() };
    let stat = rustix::fs::fstat(backing).map_err(failed)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(stat.st_size as u64),
        FileType::BlockDevice => rustix::fs::seek(backing, SeekFrom::End(0)).map_err(failed),
        _ => Err(DiskError::Type(config.id.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d05_a_flush_storm_costs_one_flush() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * 1024).unwrap();
        let config = DiskConfig { id: "d".into(), read_only: false };
        let mut disk = Disk::new(&config, file.into()).unwrap();
        let range = Range { sector: 0, sectors: 8 };
        for _ in 0..2 {
            assert!(disk.dirty, "a new disk may have been written to before");
            for _ in 0..100 {
                assert_eq!(disk.execute(Operation::Flush), Ok(0));
                assert!(!disk.dirty, "so that the next flush is free");
            }
            disk.execute(Operation::Discard(range)).unwrap();
        }
    }
}
