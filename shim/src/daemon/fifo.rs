//! The log: a FIFO in the bundle whose lines containerd copies to its own log.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Takes one line at each write. What the FIFO has no room for is lost, and a missing one takes nothing: no
/// reader, slow or gone, ever holds us up.
#[derive(Debug)]
pub struct Fifo {
    file: Option<File>,
    /// Whose lines these are: containerd's log has those of all.
    prefix: String,
}

impl Fifo {
    pub fn open(path: &Path, id: &str) -> Self {
        let mut options = OpenOptions::new();
        // For reading too, so that there is a reader while containerd is away, and its lines wait for it.
        options.read(true).append(true).custom_flags(libc::O_NONBLOCK);
        Self { file: options.open(path).ok(), prefix: format!("ampoule {id}: ") }
    }
}

impl Write for &Fifo {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(mut file) = self.file.as_ref() {
            let _ = file.write(&[self.prefix.as_bytes(), line].concat());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_full_or_missing_fifo_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        (&Fifo::open(&path, "c1")).write_all(b"lost\n").unwrap();
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let fifo = Fifo::open(&path, "c1");
        for _ in 0..10_000 {
            (&fifo).write_all(b"a line of some length\n").unwrap();
        }
        let mut reader = OpenOptions::new();
        let mut reader = reader.read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut start = [0; 35];
        reader.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"ampoule c1: a line of some length\na");
        fs::remove_file(&path).unwrap();
    }
}
