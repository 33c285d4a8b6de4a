//! What tests of the services share.

use std::{pin::pin, sync::Arc};

use futures_util::{Stream, StreamExt, stream};
use protobuf::{
    Message,
    well_known_types::{
        any::Any,
        wrappers::{BytesValue, Int32Value, StringValue},
    },
};
use tokio::{io::AsyncWriteExt, net::UnixStream};
use ttrpc::{
    MessageHeader, Request, Response,
    r#async::{
        Client, Server,
        transport::{Listener, Socket},
    },
    proto::{FLAG_NO_DATA, FLAG_REMOTE_CLOSED, FLAG_REMOTE_OPEN, GenMessage},
};

use super::{Streaming, Tasks, services};

fn one(connection: UnixStream) -> impl Stream<Item = std::io::Result<UnixStream>> {
    stream::iter([Ok(connection)]).chain(stream::pending())
}

/// A server of these tasks, and a client that is connected to it.
pub async fn served(tasks: &Arc<Tasks>) -> (Server, Client) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = Server::new()
        .add_listener(Listener::new(tasks.streaming.clone().sort(one(theirs))))
        .register_service(services(tasks.clone()));
    server.start().await.unwrap();
    (server, Client::new(Socket::from(ours)))
}

/// containerd's end of a stream at our socket.
pub struct Dialled(UnixStream);

impl Dialled {
    /// Calls a method as containerd does, with the first message of the stream.
    pub async fn call(streaming: &Arc<Streaming>, method: &str, kind: &str, id: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let calls = streaming.clone().sort(one(theirs));
        tokio::spawn(async move {
            let mut calls = pin!(calls);
            calls.next().await
        });
        let mut dialled = Self(ours);
        let request = Request {
            service: "containerd.services.streaming.v1.Streaming".into(),
            method: method.into(),
            ..Default::default()
        };
        let request = request.write_to_bytes().unwrap();
        let mut header = MessageHeader::new_request(1, request.len() as u32);
        header.set_flags(FLAG_REMOTE_OPEN);
        dialled.write(header, request).await;
        dialled.send(kind, StringValue { value: id.into(), ..Default::default() }).await;
        dialled
    }

    /// Opens a stream, which is acknowledged.
    pub async fn open(streaming: &Arc<Streaming>, id: &str) -> Self {
        let init = "containerd.services.streaming.v1.StreamInit";
        let mut dialled = Self::call(streaming, "Stream", init, id).await;
        assert_eq!(dialled.any().await.unwrap().type_url, "google.protobuf.Empty");
        dialled
    }

    async fn write(&mut self, header: MessageHeader, payload: Vec<u8>) {
        let mut bytes = Vec::new();
        GenMessage { header, payload }.write_to(&mut bytes).await.unwrap();
        // It may have been refused already.
        let _ = self.0.write_all(&bytes).await;
    }

    async fn send(&mut self, kind: &str, value: impl Message) {
        let value = value.write_to_bytes().unwrap();
        let any = Any { type_url: kind.into(), value, ..Default::default() };
        let bytes = any.write_to_bytes().unwrap();
        self.write(MessageHeader::new_data(1, bytes.len() as u32), bytes).await;
    }

    pub async fn data(&mut self, bytes: &[u8]) {
        let value = BytesValue { value: bytes.into(), ..Default::default() };
        self.send("containerd.types.transfer.Data", value).await;
    }

    pub async fn room(&mut self, value: i32) {
        let value = Int32Value { value, ..Default::default() };
        self.send("containerd.types.transfer.WindowUpdate", value).await;
    }

    pub async fn close(&mut self) {
        let mut header = MessageHeader::new_data(1, 0);
        header.set_flags(FLAG_REMOTE_CLOSED | FLAG_NO_DATA);
        self.write(header, Vec::new()).await;
    }

    /// `None` at the end, whether told or not.
    async fn any(&mut self) -> Option<Any> {
        let frame = GenMessage::read_from(&mut self.0).await.ok()?;
        let closes = frame.header.flags & FLAG_REMOTE_CLOSED != 0;
        (!closes).then(|| Any::parse_from_bytes(&frame.payload).unwrap())
    }

    /// The next bytes of an output.
    pub async fn read(&mut self) -> Option<Vec<u8>> {
        let any = self.any().await?;
        assert_eq!(any.type_url, "containerd.types.transfer.Data");
        Some(BytesValue::parse_from_bytes(&any.value).unwrap().value)
    }

    /// How much more input is wanted.
    pub async fn wanted(&mut self) -> Option<i32> {
        let any = self.any().await?;
        assert_eq!(any.type_url, "containerd.types.transfer.WindowUpdate");
        Some(Int32Value::parse_from_bytes(&any.value).unwrap().value)
    }

    /// Why the call was refused.
    pub async fn refused(&mut self) -> String {
        let frame = GenMessage::read_from(&mut self.0).await.unwrap();
        Response::parse_from_bytes(&frame.payload).unwrap().status.message.clone()
    }
}
