//! Streams that containerd opens at our socket ([`crate::task::streaming`]).
//!
//! Its clients come and go as those of a FIFO do: what one has not taken, the next one gets. How much is under way to one
//! is for the reader to say, message by message.

use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::oneshot,
};

use crate::task::streaming::{Client, Clients, Frame};

/// containerd's own: bytes in one message, and bytes under way.
const MESSAGE: usize = 32 * 1024;
const WINDOW: usize = 2 * MESSAGE;

/// Passes on an output. `drained` is dropped when a client has had all of it; who comes later still, is told its end.
pub async fn pass_on_output(
    mut from: UnixStream,
    mut clients: Clients,
    drained: oneshot::Sender<()>,
) {
    let mut drained = Some(drained);
    let mut rest = Rest { bytes: Vec::with_capacity(MESSAGE), over: false };
    while let Some(mut client) = clients.next().await {
        // A client that leaves is not the end.
        if rest.pass_on(&mut from, &mut client).await.is_ok() && client.end().await.is_ok() {
            drained = None;
        }
    }
    drop(drained);
}

/// What no client has taken yet.
struct Rest {
    bytes: Vec<u8>,
    /// There comes no more.
    over: bool,
}

impl Rest {
    async fn pass_on(&mut self, from: &mut UnixStream, client: &mut Client) -> io::Result<()> {
        let mut room = 0_usize;
        while !self.over || !self.bytes.is_empty() {
            let now = room.min(self.bytes.len());
            if now > 0 {
                client.data(&self.bytes[..now]).await?;
                self.bytes.drain(..now);
                room -= now;
                continue;
            }
            tokio::select! {
                frame = client.next() => match frame {
                    Some(Frame::Room(more)) => room = room.saturating_add(more),
                    Some(Frame::Data(_)) => {}
                    None => return Err(io::ErrorKind::BrokenPipe.into()),
                },
                read = from.read_buf(&mut self.bytes), if self.bytes.is_empty() => {
                    self.over = !read.is_ok_and(|read| read > 0);
                }
            }
        }
        Ok(())
    }
}

/// Passes on the input, until its end was asked for and the last client has closed it.
pub async fn pass_on_input(
    mut clients: Clients,
    mut closing: oneshot::Receiver<()>,
    mut to: UnixStream,
) {
    loop {
        let client = tokio::select! {
            // One that has come has something to say, as like as not.
            biased;
            client = clients.next() => client,
            _ = &mut closing => None,
        };
        let Some(client) = client else { break };
        if feed(client, &mut to).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// Fails when the process takes no more.
async fn feed(mut client: Client, to: &mut UnixStream) -> io::Result<()> {
    let mut room = 0;
    loop {
        if room < WINDOW {
            if client.room(WINDOW).await.is_err() {
                return Ok(());
            }
            room += WINDOW;
        }
        match client.next().await {
            Some(Frame::Data(bytes)) => {
                to.write_all(&bytes).await?;
                room = room.saturating_sub(bytes.len());
            }
            Some(Frame::Room(_)) => {}
            None => return Ok(()),
        }
    }
}
