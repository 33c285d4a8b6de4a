//! Who may connect, and until when.

use std::{io, time::Duration};

use futures_util::stream::{Stream, unfold};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    time::sleep,
};

/// After an accept that failed: of descriptors or memory there may be more in a moment.
const PAUSE: Duration = Duration::from_millis(100);

/// Closes the socket, also to those who have connected and were not accepted, when it is dropped.
#[derive(Debug)]
pub struct Door(#[expect(dead_code, reason = "the other end sees it go")] watch::Sender<()>);

/// The connections, of our own user and root only.
pub fn open(listener: UnixListener) -> (Door, impl Stream<Item = io::Result<UnixStream>>) {
    let (door, open) = watch::channel(());
    (Door(door), unfold((listener, open), next))
}

type State = (UnixListener, watch::Receiver<()>);

async fn next((listener, mut open): State) -> Option<(io::Result<UnixStream>, State)> {
    loop {
        let accepted = tokio::select! {
            biased;
            _ = open.changed() => return None,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) if is_trusted(&stream) => return Some((Ok(stream), (listener, open))),
            Ok(_) => tracing::warn!("somebody else connected, and was sent away"),
            Err(error) => {
                tracing::error!(%error, "a connection cannot be accepted");
                sleep(PAUSE).await;
            }
        }
    }
}

/// The file's mode says the same; this holds for whoever got in before it.
fn is_trusted(stream: &UnixStream) -> bool {
    let us = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == us || peer.uid() == 0)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_closed_door_lets_nobody_in_or_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (door, connections) = open(UnixListener::bind(&path).unwrap());
        {
            let mut connections = pin!(connections);
            let _first = UnixStream::connect(&path).await.unwrap();
            connections.next().await.unwrap().unwrap();
            let _waits = UnixStream::connect(&path).await.unwrap();
            drop(door);
            assert!(connections.next().await.is_none());
        }
        assert!(UnixStream::connect(&path).await.is_err());
    }
}
