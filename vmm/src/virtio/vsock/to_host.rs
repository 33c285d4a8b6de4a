//! The guest's bytes on their way to the host: straight into the stream while it takes them, else into a
//! buffer that never holds more than the guest was given credit for. The buffer exists only while the
//! host is slow.

use std::collections::VecDeque;

use super::{
    credit::{CreditLie, Window},
    stream::{Sent, Stream},
};
use crate::virtio::buffers::Buffers;

/// One direction of a connection.
#[derive(Debug)]
pub struct ToHost {
    pub window: Window,
    buffer: VecDeque<u8>,
    /// The guest sends no more.
    ended: bool,
    /// The host has all there ever was, and its end of stream.
    complete: bool,
    /// The host reads no more.
    gone: bool,
}

impl ToHost {
    /// `size` is what the guest may have on the way, in bytes.
    pub fn new(size: u32) -> Self {
        Self {
            window: Window::new(size),
            buffer: VecDeque::new(),
            ended: false,
            complete: false,
            gone: false,
        }
    }

    /// Takes a payload in.
    pub fn take(&mut self, stream: &Stream, payload: Buffers<'_>) -> Result<(), CreditLie> {
        self.window.receive(payload.len() as u32)?;
        let mut rest = payload;
        if self.buffer.is_empty() && !self.gone && !rest.is_empty() {
            let sent = stream.send(&rest);
            rest = rest.split_at(self.sent(sent)).1;
        }
        if self.gone {
            self.window.forward(rest.len() as u32);
        } else if !rest.is_empty() {
            let mut bytes = vec![0; rest.len()];
            rest.copy_to(&mut bytes);
            self.buffer.extend(bytes);
        }
        Ok(())
    }

    /// Goes on after the stream became writable.
    pub fn flush(&mut self, stream: &Stream) {
        while !self.buffer.is_empty() {
            let (front, back) = self.buffer.as_slices();
            let sent = stream.send_bytes([front, back]);
            match self.sent(sent) {
                0 => break,
                count => drop(self.buffer.drain(..count)),
            }
        }
        if self.buffer.is_empty() {
            self.buffer = VecDeque::new();
            self.end_if_complete(stream);
        }
    }

    /// The guest sends no more: the host reads what there is, and then its end of stream.
    pub fn end(&mut self, stream: &Stream) {
        self.ended = true;
        self.end_if_complete(stream);
    }

    /// The host reads no more: what comes is thrown away, and the guest need not wait.
    pub fn give_up(&mut self) {
        self.gone = true;
        self.window.forward(self.buffer.len() as u32);
        self.buffer = VecDeque::new();
    }

    /// The host is slow: call [`flush`](Self::flush) when it can be written to.
    pub fn is_blocked(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Nothing more will reach the host: it has all, or wants no more.
    pub fn is_done(&self) -> bool {
        self.complete || self.gone
    }

    /// The host reads no more.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    fn end_if_complete(&mut self, stream: &Stream) {
        if self.ended && self.buffer.is_empty() && !self.is_done() {
            self.complete = true;
            stream.end();
        }
    }

    /// Accounts for an attempt to write; says how many bytes are gone.
    fn sent(&mut self, sent: Sent) -> usize {
        match sent {
            Sent::Bytes(count) => {
                self.window.forward(count as u32);
                count
            }
            Sent::Full => 0,
            Sent::Gone => {
                self.give_up();
                0
            }
        }
    }
}
