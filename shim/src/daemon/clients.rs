//! Those who are connected, until they have left.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};

#[derive(Clone, Debug, Default)]
pub struct Clients(watch::Sender<()>);

impl Clients {
    /// One more.
    pub fn come<C>(&self, connection: C) -> Client<C> {
        Client { connection, _counted: self.0.subscribe() }
    }

    /// Waits until nobody is connected any more: a client closes when it has taken its answers, and not before.
    pub async fn gone(&self) {
        self.0.closed().await;
    }
}

/// A connection that counts as long as it is there.
#[derive(Debug)]
pub struct Client<C> {
    connection: C,
    _counted: watch::Receiver<()>,
}

impl<C: AsyncRead + Unpin> AsyncRead for Client<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(context, buffer)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Client<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::timeout,
    };

    use super::*;

    #[tokio::test]
    async fn a_client_counts_until_its_connection_is_dropped() {
        let clients = Clients::default();
        clients.gone().await;
        let (ours, mut theirs) = duplex(8);
        let mut client = clients.come(ours);
        client.write_all(b"an").await.unwrap();
        theirs.write_all(b"to").await.unwrap();
        let mut bytes = [0; 2];
        theirs.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"an");
        client.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"to");
        timeout(Duration::from_millis(20), clients.gone()).await.unwrap_err();
        drop(client);
        clients.gone().await;
    }
}
