//! Against a real server that goes away and comes back.

use std::path::Path;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::Empty,
    events::task::{TaskExit, TaskStart},
    shim_async::{Events, create_events},
    topics::{TASK_EXIT_EVENT_TOPIC, TASK_START_EVENT_TOPIC},
};
use protobuf::Message;
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;

const LONG: Duration = Duration::from_secs(20);

/// containerd, as far as events are concerned.
#[derive(Default)]
struct Containerd {
    taken: Mutex<Vec<Envelope>>,
    /// How many it refuses, and how, before it takes one.
    refuses: Mutex<Vec<Code>>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        if let Some(code) = self.refuses.lock().unwrap().pop() {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no")));
        }
        self.taken.lock().unwrap().push(request.envelope.unwrap());
        Ok(Empty::new())
    }
}

impl Containerd {
    async fn serve(self: &Arc<Self>, path: &Path) -> Server {
        let _ = std::fs::remove_file(path);
        let address = format!("unix://{}", path.display());
        let server = Server::new().bind(&address).unwrap();
        let mut server = server.register_service(create_events(self.clone()));
        server.start().await.unwrap();
        server
    }

    /// The PIDs of the exits, in the order of their arrival.
    fn exits(&self) -> Vec<u32> {
        let taken = self.taken.lock().unwrap();
        let exits = taken.iter().filter(|event| event.topic == TASK_EXIT_EVENT_TOPIC);
        exits.map(|e| TaskExit::parse_from_bytes(&e.event.value).unwrap().pid).collect()
    }
}

fn exit(pid: u32) -> TaskExit {
    TaskExit { pid, container_id: "c1".into(), ..Default::default() }
}

#[tokio::test]
async fn an_event_is_in_an_envelope_with_its_namespace_topic_and_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let containerd = Arc::new(Containerd::default());
    let _server = containerd.serve(&path).await;
    let publisher = Publisher::new(Some(path.display().to_string()), "k8s.io".into());
    let start = TaskStart { container_id: "c1".into(), pid: 7, ..Default::default() };
    publisher.publish(TASK_START_EVENT_TOPIC, start.clone());
    publisher.flush(LONG).await;
    let taken = containerd.taken.lock().unwrap();
    let [event] = &taken[..] else { panic!("{taken:?}") };
    assert_eq!((&*event.namespace, &*event.topic), ("k8s.io", "/tasks/start"));
    assert_eq!(event.event.type_url, "containerd.events.TaskStart");
    assert_eq!(event.event.value, start.write_to_bytes().unwrap());
    let at: SystemTime = event.timestamp.clone().unwrap().into();
    assert!(at.elapsed().unwrap() < LONG);
}

#[tokio::test]
async fn events_wait_for_a_containerd_that_is_away_and_stay_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let containerd = Arc::new(Containerd::default());
    let publisher = Publisher::new(Some(format!("unix://{}", path.display())), "n".into());
    publisher.publish(TASK_EXIT_EVENT_TOPIC, exit(0));
    publisher.flush(Duration::from_millis(50)).await;
    for round in 0..3 {
        let mut server = containerd.serve(&path).await;
        publisher.publish(TASK_EXIT_EVENT_TOPIC, exit(2 * round + 1));
        publisher.flush(LONG).await;
        server.shutdown().await.unwrap();
        drop(server);
        // Into a connection that is broken.
        publisher.publish(TASK_EXIT_EVENT_TOPIC, exit(2 * round + 2));
        publisher.flush(Duration::from_millis(50)).await;
    }
    let _server = containerd.serve(&path).await;
    publisher.flush(LONG).await;
    assert_eq!(containerd.exits(), [0, 1, 2, 3, 4, 5, 6]);
}

#[tokio::test]
async fn what_is_refused_for_good_does_not_hold_up_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let containerd = Arc::new(Containerd::default());
    *containerd.refuses.lock().unwrap() = vec![Code::INVALID_ARGUMENT, Code::UNAVAILABLE];
    let _server = containerd.serve(&path).await;
    let publisher = Publisher::new(Some(path.display().to_string()), "n".into());
    for pid in [1, 2, 3] {
        publisher.publish(TASK_EXIT_EVENT_TOPIC, exit(pid));
    }
    publisher.flush(LONG).await;
    assert_eq!(containerd.exits(), [2, 3]);
}

#[tokio::test]
async fn without_an_address_nothing_waits() {
    let publisher = Publisher::new(None, "n".into());
    publisher.publish(TASK_EXIT_EVENT_TOPIC, exit(1));
    publisher.flush(LONG).await;
    assert_eq!(publisher.queue.lock().len(), 0);
}

#[tokio::test]
async fn of_too_many_the_oldest_go() {
    let publisher = Publisher::new(Some("/no/such/socket".into()), "n".into());
    for pid in 0..=MOST as u32 {
        publisher.publish(TASK_EXIT_EVENT_TOPIC, exit(pid));
    }
    let queue = publisher.queue.lock();
    let first = TaskExit::parse_from_bytes(&queue[0].event.value).unwrap();
    assert_eq!((queue.len(), first.pid), (MOST, 1));
}
