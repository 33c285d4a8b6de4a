//! The event loop of a command: tokio's, on the thread that calls.

use std::{io, os::unix::net::UnixStream};

use tokio::runtime::{Builder, Runtime};

/// Pairs of descriptors that a loop is made of, and one to spare.
const PAIRS: usize = 5;

/// Makes one. Where tokio finds no descriptors for its signals it panics: whether there are enough is tried first.
pub fn event_loop() -> io::Result<Runtime> {
    let room: io::Result<Vec<_>> = (0..PAIRS).map(|_| UnixStream::pair()).collect();
    drop(room?);
    Builder::new_current_thread().enable_all().build()
}
