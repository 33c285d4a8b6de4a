//! The one connection to the host: dialled by the agent, which listens on nothing. When it ends, the
//! host has gone.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use ampoule_agent_api::{AGENT_PORT, agent_ttrpc::create_agent};
use futures_util::stream::{self, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
};
use tokio_vsock::VsockStream;
use ttrpc::r#async::{Server, transport::Listener};

use crate::{dial, service::Service};

/// For the host to answer, which waits for that as long as its user says.
const CONNECT: Duration = Duration::from_secs(60);

/// Dials the host.
pub async fn dial() -> io::Result<VsockStream> {
    dial::connect(AGENT_PORT, CONNECT).await
}

/// Serves the host until it goes.
pub async fn serve(stream: VsockStream, service: Service) -> ttrpc::Result<()> {
    let gone = Arc::new(Notify::new());
    let connection = Connection { stream, gone: gone.clone() };
    // The one connection, and no further one ever.
    let connections = stream::iter([Ok(connection)]).chain(stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(create_agent(Arc::new(service)));
    server.start().await?;
    gone.notified().await;
    Ok(())
}

/// The stream, which tells when it has ended.
struct Connection {
    stream: VsockStream,
    gone: Arc<Notify>,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        if result.is_err() || buffer.filled().len() == before {
            self.gone.notify_one();
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
