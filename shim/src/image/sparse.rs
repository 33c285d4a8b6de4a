//! Files with holes: copying them without filling the holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, copy_file_range, seek};
use rustix::io::Errno;

use super::tree::Extent;

const BUFFER: usize = 256 << 10;

/// Copies `from` in `source` to `to` in `target`, whose range must read as zeros before.
/// Gives the number of bytes that were not holes; the source's own position is moved.
pub fn copy(source: &File, from: Extent, target: &File, to: u64) -> io::Result<u64> {
    let end = from.offset + from.length;
    let (mut at, mut copied) = (from.offset, 0);
    while let Some(data) = next_data(source, at, end)? {
        copy_data(source, data, target, to + (data.offset - from.offset))?;
        copied += data.length;
        at = data.offset + data.length;
    }
    Ok(copied)
}

/// The next run of data in `[at, end)`; all of it, where the file system knows no holes.
pub fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<Extent>> {
    if at >= end {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => {
            return Ok(Some(Extent { offset: at, length: end - at }));
        }
        Err(error) => return Err(error.into()),
    };
    if start >= end {
        return Ok(None);
    }
    let stop = seek(file, SeekFrom::Hole(start))?.min(end);
    Ok(Some(Extent { offset: start, length: stop - start }))
}

/// Copies a run in the kernel where it can (sharing blocks on file systems that do), else by hand.
fn copy_data(source: &File, run: Extent, target: &File, to: u64) -> io::Result<()> {
    let (mut from, mut to, mut left) = (run.offset, to, run.length);
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(usize::MAX);
        match copy_file_range(source, Some(&mut from), target, Some(&mut to), want) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => left -= n as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return copy_by_hand(source, Extent { offset: from, length: left }, target, to);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(source: &File, run: Extent, target: &File, to: u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut done = 0;
    while done < run.length {
        let want = BUFFER.min(usize::try_from(run.length - done).unwrap_or(BUFFER));
        source.read_exact_at(&mut buffer[..want], run.offset + done)?;
        target.write_all_at(&buffer[..want], to + done)?;
        done += want as u64;
    }
    Ok(())
}

/// Whether there are only zeros; in chunks, which the compiler turns into vector instructions.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn holes_stay_holes_and_data_arrives() {
        let source = tempfile::tempfile().unwrap();
        source.set_len(64 << 20).unwrap();
        source.write_all_at(b"early", 8192).unwrap();
        source.write_all_at(b"late", (32 << 20) + 100).unwrap();
        let target = tempfile::tempfile().unwrap();
        target.set_len(65 << 20).unwrap();
        let all = Extent { offset: 4096, length: (64 << 20) - 4096 };
        let copied = copy(&source, all, &target, 1 << 20).unwrap();
        assert!(copied <= 64 << 10, "{copied} bytes copied");
        assert!(target.metadata().unwrap().blocks() * 512 <= 64 << 10);
        let mut text = [0; 5];
        target.read_exact_at(&mut text, (1 << 20) + 4096).unwrap();
        assert_eq!(&text, b"early");
        target.read_exact_at(&mut text, (1 << 20) + (32 << 20) + 100 - 4096).unwrap();
        assert_eq!(&text, b"late\0");
    }

    #[test]
    fn a_source_too_short_is_an_error() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.write_all_at(&[1; 100], 0).unwrap();
        assert!(copy_data(&source, Extent { offset: 50, length: 51 }, &target, 0).is_err());
        assert!(copy_by_hand(&source, Extent { offset: 50, length: 51 }, &target, 0).is_err());
    }
}
