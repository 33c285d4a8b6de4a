//! The log of a detached container, in the format of the Kubernetes container runtime interface:
//!
//! ```text
//! 2026-11-21T05:51:40.000000001Z stdout F a line
//! 2026-11-21T05:51:41.000000001Z stderr P what was written without a line end
//! ```
//!
//! Every byte is kept, and which of them came without a line end. The log is two files at most: when `log` has
//! grown to its limit it becomes `log.1`, and what was there is lost.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::timestamp::Timestamp;

/// Size in bytes past which a new file is begun.
const LIMIT: u64 = 8 << 20;

/// Which stream something was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

/// The writing end.
#[derive(Debug)]
pub struct Log {
    folder: PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

impl Log {
    pub fn create(folder: &Path) -> io::Result<Self> {
        Ok(Self { folder: folder.into(), file: create(folder)?, size: 0, limit: LIMIT })
    }

    /// Writes what was read from a stream at once.
    pub fn write(&mut self, source: Source, at: Timestamp, bytes: &[u8]) -> io::Result<()> {
        if self.size >= self.limit {
            fs::rename(self.folder.join("log"), self.folder.join("log.1"))?;
            (self.file, self.size) = (create(&self.folder)?, 0);
        }
        let entries = entries(source, at, bytes);
        self.file.write_all(&entries)?;
        self.size += entries.len() as u64;
        Ok(())
    }
}

fn create(folder: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(folder.join("log"))
}

fn entries(source: Source, at: Timestamp, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 64);
    let source = if source == Source::Stdout { "stdout" } else { "stderr" };
    for piece in bytes.split_inclusive(|b| *b == b'\n') {
        let (tag, text) = match piece.strip_suffix(b"\n") {
            Some(line) => ("F", line),
            None => ("P", piece),
        };
        out.extend(format!("{at} {source} {tag} ").bytes());
        out.extend(text);
        out.push(b'\n');
    }
    out
}

/// One entry of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub at: String,
    pub source: Source,
    /// As it was written, with its line end if it had one.
    pub bytes: Vec<u8>,
}

impl Entry {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |b| *b == b' ');
        let at = String::from_utf8(parts.next()?.to_vec()).ok()?;
        let source = match parts.next()? {
            b"stdout" => Source::Stdout,
            b"stderr" => Source::Stderr,
            _ => return None,
        };
        let whole = parts.next()? == b"F";
        let mut bytes = parts.next()?.strip_suffix(b"\n")?.to_vec();
        if whole {
            bytes.push(b'\n');
        }
        Some(Self { at, source, bytes })
    }
}

/// The reading end: what has been written so far, and later what has been written since.
#[derive(Debug)]
pub struct Reader {
    folder: PathBuf,
    file: Option<BufReader<File>>,
    /// The older file is read before the current one.
    older: bool,
}

impl Reader {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.into(), file: None, older: true }
    }

    /// The next entry; `None` if there is no more now.
    pub fn read(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if self.file.is_none() && !self.open()? {
                return Ok(None);
            }
            // Before the end is met: what was written before the file was replaced must not be missed.
            let replaced = self.older || self.is_replaced();
            let Some(file) = &mut self.file else { return Ok(None) };
            let mut line = Vec::new();
            let length = file.read_until(b'\n', &mut line)?;
            if line.ends_with(b"\n") {
                if let Some(entry) = Entry::parse(&line) {
                    return Ok(Some(entry));
                }
            } else if replaced {
                (self.file, self.older) = (None, false);
            } else {
                // An entry that is just being written is read again when it is whole.
                file.seek(SeekFrom::Current(-i64::try_from(length).unwrap_or(0)))?;
                return Ok(None);
            }
        }
    }

    fn open(&mut self) -> io::Result<bool> {
        let name = if self.older { "log.1" } else { "log" };
        match File::open(self.folder.join(name)) {
            Ok(file) => self.file = Some(BufReader::new(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.older => {
                self.older = false;
                return self.open();
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        }
        Ok(true)
    }

    fn is_replaced(&self) -> bool {
        let open = self.file.as_ref().and_then(|file| file.get_ref().metadata().ok());
        let current = fs::metadata(self.folder.join("log")).ok();
        match (open, current) {
            (Some(open), Some(current)) => open.ino() != current.ino(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const AT: Timestamp = Timestamp(UNIX_EPOCH);

    fn rest(reader: &mut Reader) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(entry) = reader.read().unwrap() {
            all.extend(entry.bytes);
        }
        all
    }

    #[test]
    fn entries_are_those_of_the_container_runtime_interface() {
        let bytes = entries(Source::Stderr, AT, b"one\ntwo");
        let text = "1970-01-01T00:00:00.000000000Z stderr F one\n1970-01-01T00:00:00.000000000Z stderr P two\n";
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
    }

    #[test]
    fn what_was_written_is_read_to_the_byte_and_followed() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::create(folder.path()).unwrap();
        let mut reader = Reader::new(folder.path());
        assert_eq!(reader.read().unwrap(), None);
        let bytes = b"a\n\n\xff\x00 b\r\nwithout end";
        log.write(Source::Stdout, AT, bytes).unwrap();
        assert_eq!(rest(&mut reader), bytes);
        log.write(Source::Stderr, AT, b"more").unwrap();
        let entry = reader.read().unwrap().unwrap();
        assert_eq!((entry.source, &entry.bytes[..]), (Source::Stderr, &b"more"[..]));
        assert_eq!(reader.read().unwrap(), None);
    }

    #[test]
    fn a_log_is_two_files_at_most_and_a_reader_goes_along() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log { limit: 100, ..Log::create(folder.path()).unwrap() };
        let mut reader = Reader::new(folder.path());
        let mut seen = Vec::new();
        for n in 0..20 {
            log.write(Source::Stdout, AT, format!("line {n}\n").as_bytes()).unwrap();
            seen.extend(rest(&mut reader));
        }
        let all: String = (0..20).map(|n| format!("line {n}\n")).collect();
        assert_eq!(String::from_utf8(seen).unwrap(), all);
        let late = String::from_utf8(rest(&mut Reader::new(folder.path()))).unwrap();
        assert!(all.ends_with(&late) && late.len() < all.len(), "{late}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
