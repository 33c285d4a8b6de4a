use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::task::testing::Dialled;

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn whoever_opens_a_stream_is_its_processs_before_and_after() {
    let streaming = Arc::new(Streaming::default());
    let mut early = Dialled::open(&streaming, "c-stdout").await;
    early.room(7).await;
    let mut clients = streaming.take("c-stdout").unwrap();
    assert!(streaming.take("c-stdout").is_none(), "taken twice");
    let mut client = clients.next().await.unwrap();
    assert_eq!(client.next().await, Some(Frame::Room(7)));
    drop(early);
    assert_eq!(client.next().await, None);
    let mut again = Dialled::open(&streaming, "c-stdout").await;
    again.room(-1).await;
    again.data(b"x").await;
    let mut client = timeout(SOON, clients.next()).await.unwrap().unwrap();
    assert_eq!(client.next().await, Some(Frame::Room(0)));
    assert_eq!(client.next().await, Some(Frame::Data(b"x".into())));
    drop((client, clients));
    assert_eq!(again.read().await, None, "the connection ends with its stream");
    assert!(streaming.take("c-stdout").is_some(), "it is free again");
}

#[tokio::test]
async fn who_leaves_before_there_is_a_process_is_forgotten() {
    let streaming = Arc::new(Streaming::default());
    drop(Dialled::open(&streaming, "c-stdin").await);
    let forgotten = async {
        while !streaming.lock().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, forgotten).await.unwrap();
}

#[tokio::test]
async fn what_is_no_stream_is_refused() {
    let streaming = Arc::new(Streaming::default());
    let mut other = Dialled::call(&streaming, "Other", INIT, "c").await;
    assert!(other.refused().await.contains("no method \"Other\""));
    for (kind, id) in [(DATA, "c"), (INIT, "")] {
        let mut broken = Dialled::call(&streaming, METHOD, kind, id).await;
        assert!(broken.refused().await.contains("StreamInit"));
    }
    assert!(streaming.lock().is_empty());
}
