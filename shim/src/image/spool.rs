//! The bytes of an image's files between the layer they come in and the place they get.
//!
//! One file without a name, append only, owned by one conversion and gone with it however that ends.
//! Blocks of zeros become holes, so that neither a sparse file nor a decompression bomb costs disk.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::sparse::{self, is_zero};
use super::tree::Extent;

/// Files start at a multiple of this, so that file systems that share blocks can share them.
const ALIGN: u64 = 4096;
const BUFFER: usize = 128 << 10;

pub struct Spool {
    file: File,
    end: u64,
    buffer: Vec<u8>,
}

impl Spool {
    /// Takes a new, empty file without a name.
    pub fn new(file: File) -> Self {
        Self { file, end: 0, buffer: vec![0; BUFFER] }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Stores a file of `size` bytes: `parts` of it come from `source` in order, the rest is zero.
    pub fn store(
        &mut self,
        source: &mut impl Read,
        size: u64,
        parts: &[Extent],
    ) -> io::Result<Extent> {
        let extent = self.reserve(size)?;
        for part in parts {
            self.fill(source, extent.offset + part.offset, part.length)?;
        }
        Ok(extent)
    }

    /// Stores the first `size` bytes of another file.
    pub fn copy(&mut self, source: &File, size: u64) -> io::Result<Extent> {
        let extent = self.reserve(size)?;
        sparse::copy(source, Extent { offset: 0, length: size }, &self.file, extent.offset)?;
        Ok(extent)
    }

    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Room for a file, all zeros.
    fn reserve(&mut self, size: u64) -> io::Result<Extent> {
        let end = self.end.checked_add(size).and_then(|end| end.checked_next_multiple_of(ALIGN));
        let end = end.filter(|end| *end <= i64::MAX as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        self.file.set_len(end)?;
        let offset = std::mem::replace(&mut self.end, end);
        Ok(Extent { offset, length: size })
    }

    fn fill(&mut self, source: &mut impl Read, at: u64, length: u64) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let want = BUFFER.min(usize::try_from(length - done).unwrap_or(BUFFER));
            source.read_exact(&mut self.buffer[..want])?;
            write_blocks(&self.file, &self.buffer[..want], at + done)?;
            done += want as u64;
        }
        Ok(())
    }
}

/// Writes all but whole blocks of zeros, neighbours in one go.
fn write_blocks(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let mut written = 0;
    let mut end = 0;
    for block in bytes.chunks(ALIGN as usize) {
        if is_zero(block) {
            file.write_all_at(&bytes[written..end], at + written as u64)?;
            written = end + block.len();
        }
        end += block.len();
    }
    file.write_all_at(&bytes[written..end], at + written as u64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn read(spool: &Spool, extent: Extent) -> Vec<u8> {
        let mut bytes = vec![0; extent.length as usize];
        spool.read_at(&mut bytes, extent.offset).unwrap();
        bytes
    }

    #[test]
    fn files_come_back_as_they_went_in() {
        let mut spool = Spool::new(tempfile::tempfile().unwrap());
        let pattern: Vec<u8> =
            (0..300_000u32).map(|i| if i % 50_000 < 20_000 { 0 } else { 7 }).collect();
        let whole = [Extent { offset: 0, length: pattern.len() as u64 }];
        let first = spool.store(&mut &pattern[..], pattern.len() as u64, &whole).unwrap();
        let empty = spool.store(&mut io::empty(), 0, &[]).unwrap();
        let parts = [Extent { offset: 10, length: 2 }, Extent { offset: 5000, length: 1 }];
        let holed = spool.store(&mut &b"abc"[..], 6000, &parts).unwrap();
        assert_eq!(read(&spool, first), pattern);
        assert_eq!((empty.length, holed.offset % ALIGN), (0, 0));
        let mut expected = vec![0; 6000];
        (expected[10], expected[11], expected[5000]) = (b'a', b'b', b'c');
        assert_eq!(read(&spool, holed), expected);
    }

    #[test]
    fn zeros_take_no_room() {
        let mut spool = Spool::new(tempfile::tempfile().unwrap());
        let length = 2 << 20;
        let whole = [Extent { offset: 0, length }];
        spool.store(&mut io::repeat(0), length, &whole).unwrap();
        spool.store(&mut io::empty(), 1 << 42, &[]).unwrap();
        assert!(spool.file().metadata().unwrap().blocks() * 512 <= 64 << 10);
    }

    #[test]
    fn a_body_that_ends_early_and_a_size_beyond_all_files_are_errors() {
        let mut spool = Spool::new(tempfile::tempfile().unwrap());
        let whole = [Extent { offset: 0, length: 10 }];
        assert!(spool.store(&mut &b"short"[..], 10, &whole).is_err());
        assert!(spool.store(&mut io::empty(), u64::MAX, &[]).is_err());
    }
}
