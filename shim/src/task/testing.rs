//! What tests of the services share.

use std::sync::Arc;

use tokio::net::UnixStream;
use ttrpc::r#async::{
    Client, Server,
    transport::{Listener, Socket},
};

use super::{Tasks, services};

/// A server of these tasks, and a client that is connected to it.
pub async fn served(tasks: &Arc<Tasks>) -> (Server, Client) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let connections = futures_util::stream::iter([Ok::<_, std::io::Error>(theirs)]);
    let connections = futures_util::StreamExt::chain(connections, futures_util::stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(services(tasks.clone()));
    server.start().await.unwrap();
    (server, Client::new(Socket::from(ours)))
}
