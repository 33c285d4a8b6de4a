//! containerd's Streaming service, over which its CRI plugin has the streams of processes where a runtime's `io_type` is
//! `streaming`. It dials our socket once more for each stream, before it creates the process; when it was started again,
//! it does so again with the same id.
//!
//! ```text
//!   Request, StreamInit: its id  ──▶
//!                                ◀── Empty: here it is
//!   WindowUpdate: so many bytes  ──▶                              an output
//!                                ◀── Data, as long as there is room
//!   Data, as long as there is room ▶                              the input
//!                                ◀── WindowUpdate
//!   a closing message            ◀─▶
//! ```
//!
//! Here a connection is one stream, and ends with it: containerd before 2.3 leaves its own end open, and a server that
//! waits for it would soon have no descriptors left. So these connections are read by frames, and ttrpc's own server gets
//! the others.

use std::{
    collections::HashMap,
    future::ready,
    io::{self, Cursor},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{Stream, StreamExt};
use protobuf::{
    Message,
    well_known_types::{
        any::Any,
        empty::Empty,
        wrappers::{BytesValue, Int32Value, StringValue},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Chain, Join, join},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};
use ttrpc::{
    Code, MessageHeader, Request, Response, get_status,
    proto::{
        FLAG_NO_DATA, FLAG_REMOTE_CLOSED, GenMessage, GenMessageError, MESSAGE_TYPE_DATA,
        MESSAGE_TYPE_REQUEST,
    },
};

const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const METHOD: &str = "Stream";
// Messages of one field each, whose bytes are those of its type's wrapper.
const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW: &str = "containerd.types.transfer.WindowUpdate";

/// A connection for ttrpc's server, with the frame that was read of it already.
pub type Call = Join<Chain<Cursor<Vec<u8>>, OwnedReadHalf>, OwnedWriteHalf>;

/// Streams by their ids.
#[derive(Debug, Default)]
pub struct Streaming(Mutex<HashMap<String, Slot>>);

#[derive(Debug)]
enum Slot {
    /// Opened, for a process that is still to come.
    Open(Client),
    /// Taken, by a process whose client may come, or come again.
    Taken(mpsc::UnboundedSender<Client>),
}

impl Streaming {
    /// Keeps those connections that are streams, and passes on the others.
    pub fn sort(
        self: Arc<Self>,
        connections: impl Stream<Item = io::Result<UnixStream>>,
    ) -> impl Stream<Item = io::Result<Call>> {
        let sorted = connections.map(move |connection| {
            let streaming = self.clone();
            async move {
                match connection {
                    Ok(connection) => streaming.receive(connection).await.map(Ok),
                    Err(error) => Some(Err(error)),
                }
            }
        });
        // A silent one holds up nobody else.
        sorted.buffer_unordered(usize::MAX).filter_map(ready)
    }

    async fn receive(self: Arc<Self>, connection: UnixStream) -> Option<Call> {
        let (mut from, to) = connection.into_split();
        let first = match GenMessage::read_from(&mut from).await {
            Ok(first) => first,
            Err(GenMessageError::ReturnError(..) | GenMessageError::InternalError(_)) => {
                return None;
            }
        };
        let request = Request::parse_from_bytes(&first.payload).unwrap_or_default();
        if first.header.type_ == MESSAGE_TYPE_REQUEST && request.service == SERVICE {
            tokio::spawn(self.serve(first.header.stream_id, request.method, from, to));
            return None;
        }
        let mut bytes = Vec::new();
        first.write_to(&mut bytes).await.ok()?;
        Some(join(Cursor::new(bytes).chain(from), to))
    }

    /// From the client's first words to the last.
    async fn serve(
        self: Arc<Self>,
        number: u32,
        method: String,
        mut from: OwnedReadHalf,
        to: OwnedWriteHalf,
    ) {
        let mut to = Sender { number, to };
        if method != METHOD {
            return to
                .refuse(Code::UNIMPLEMENTED, &format!("{SERVICE} has no method {method:?}"))
                .await;
        }
        let Some(id) = init(&mut from).await else {
            return to.refuse(Code::INVALID_ARGUMENT, "a stream begins with a StreamInit").await;
        };
        if to.send("google.protobuf.Empty", &Empty::new()).await.is_err() {
            return;
        }
        let (frames, received) = mpsc::channel(1);
        self.offer(&id, Client { to, frames: received });
        loop {
            let frame = tokio::select! {
                frame = frame(&mut from) => frame,
                () = frames.closed() => None,
            };
            let Some(frame) = frame else { break };
            if frames.send(frame).await.is_err() {
                break;
            }
        }
        drop(frames);
        self.forget(&id);
    }

    fn offer(&self, id: &str, client: Client) {
        let mut slots = self.lock();
        match slots.get(id) {
            Some(Slot::Taken(process)) => drop(process.send(client)),
            // A client that comes again has lost its first connection.
            Some(Slot::Open(_)) | None => drop(slots.insert(id.into(), Slot::Open(client))),
        }
    }

    /// Drops a client that has left before there was a process for it.
    fn forget(&self, id: &str) {
        let mut slots = self.lock();
        if let Some(Slot::Open(client)) = slots.get(id)
            && client.frames.is_closed()
        {
            slots.remove(id);
        }
    }

    /// The clients of the stream of this id, for the one process that it belongs to.
    pub fn take(self: &Arc<Self>, id: &str) -> Option<Clients> {
        let mut slots = self.lock();
        if let Some(Slot::Taken(_)) = slots.get(id) {
            return None;
        }
        let (process, clients) = mpsc::unbounded_channel();
        if let Some(Slot::Open(client)) = slots.insert(id.into(), Slot::Taken(process.clone())) {
            drop(process.send(client));
        }
        Some(Clients { id: id.into(), clients, streaming: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those who open one stream, one after the other.
#[derive(Debug)]
pub struct Clients {
    id: String,
    clients: mpsc::UnboundedReceiver<Client>,
    streaming: Arc<Streaming>,
}

impl Clients {
    /// Waits for the next one.
    pub async fn next(&mut self) -> Option<Client> {
        self.clients.recv().await
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.streaming.lock().remove(&self.id);
    }
}

/// What a client says.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    Data(Vec<u8>),
    /// It has room for so many more bytes.
    Room(usize),
}

/// Who has a stream open.
#[derive(Debug)]
pub struct Client {
    to: Sender,
    frames: mpsc::Receiver<Frame>,
}

impl Client {
    /// `None` when it has closed the stream, or is gone.
    pub async fn next(&mut self) -> Option<Frame> {
        self.frames.recv().await
    }

    pub async fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        let value = BytesValue { value: bytes.into(), ..Default::default() };
        self.to.send(DATA, &value).await
    }

    pub async fn room(&mut self, bytes: usize) -> io::Result<()> {
        let value = i32::try_from(bytes).unwrap_or(i32::MAX);
        self.to.send(WINDOW, &Int32Value { value, ..Default::default() }).await
    }

    /// Tells it the end, and waits until it has read everything before that.
    pub async fn end(mut self) -> io::Result<()> {
        self.to.close().await?;
        while self.next().await.is_some() {}
        Ok(())
    }
}

/// Our side of a connection.
#[derive(Debug)]
struct Sender {
    /// Of the stream, as the client counts them.
    number: u32,
    to: OwnedWriteHalf,
}

impl Sender {
    async fn send(&mut self, name: &str, value: &impl Message) -> io::Result<()> {
        let value = value.write_to_bytes()?;
        let any = Any { type_url: name.into(), value, ..Default::default() }.write_to_bytes()?;
        let length = u32::try_from(any.len()).map_err(io::Error::other)?;
        self.write(MessageHeader::new_data(self.number, length), any).await
    }

    async fn close(&mut self) -> io::Result<()> {
        let mut header = MessageHeader::new_data(self.number, 0);
        header.set_flags(FLAG_REMOTE_CLOSED | FLAG_NO_DATA);
        self.write(header, Vec::new()).await
    }

    async fn refuse(mut self, code: Code, why: &str) {
        let status = Some(get_status(code, why)).into();
        let response = Response { status, ..Default::default() }.write_to_bytes();
        let Ok(bytes) = response else { return };
        let Ok(length) = u32::try_from(bytes.len()) else { return };
        // It hears of it, or has gone.
        let _ = self.write(MessageHeader::new_response(self.number, length), bytes).await;
    }

    /// In one piece, so that a connection that ends has whole frames.
    async fn write(&mut self, header: MessageHeader, payload: Vec<u8>) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(payload.len() + 10);
        let frame = GenMessage { header, payload };
        frame.write_to(&mut bytes).await.map_err(io::Error::other)?;
        self.to.write_all(&bytes).await
    }
}

/// The id of a stream.
async fn init(from: &mut OwnedReadHalf) -> Option<String> {
    let any = message(from).await.filter(|any| any.type_url.ends_with(INIT))?;
    let id = StringValue::parse_from_bytes(&any.value).ok()?.value;
    Some(id).filter(|id| !id.is_empty())
}

async fn frame(from: &mut OwnedReadHalf) -> Option<Frame> {
    loop {
        let any = message(from).await?;
        if any.type_url.ends_with(DATA) {
            return Some(Frame::Data(BytesValue::parse_from_bytes(&any.value).ok()?.value));
        }
        if any.type_url.ends_with(WINDOW) {
            let update = Int32Value::parse_from_bytes(&any.value).ok()?.value;
            return Some(Frame::Room(usize::try_from(update).unwrap_or(0)));
        }
        tracing::warn!(kind = any.type_url, "a stream's message that is not known was left out");
    }
}

/// `None` for a closing one, and at the end of the connection.
async fn message(from: &mut OwnedReadHalf) -> Option<Any> {
    let message = GenMessage::read_from(from).await.ok()?;
    let header = message.header;
    let closes = header.type_ != MESSAGE_TYPE_DATA || header.flags & FLAG_REMOTE_CLOSED != 0;
    if closes { None } else { Any::parse_from_bytes(&message.payload).ok() }
}

#[cfg(test)]
mod tests;
