//! FIFOs of a client's.
//!
//! A FIFO whose last reader goes breaks the writer's pipe, and one whose last writer goes ends the reader's
//! input. Neither is to happen because a client detaches: of every FIFO we have both ends.

use std::{io, path::Path};

use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};

/// A process's input.
#[derive(Debug)]
pub struct Input {
    reader: Receiver,
    keeper: Keeper,
}

/// While it is there, an input does not end.
#[derive(Debug)]
pub struct Keeper {
    _writer: Sender,
}

impl Input {
    pub fn open(path: &Path) -> io::Result<Self> {
        let reader = OpenOptions::new().open_receiver(path)?;
        let writer = OpenOptions::new().open_sender(path)?;
        Ok(Self { reader, keeper: Keeper { _writer: writer } })
    }

    pub fn split(self) -> (Receiver, Keeper) {
        (self.reader, self.keeper)
    }
}

/// A process's output: one descriptor for both ends, so that closing it is the end for whoever reads.
pub fn output(path: &Path) -> io::Result<Sender> {
    OpenOptions::new().read_write(true).open_sender(path)
}
