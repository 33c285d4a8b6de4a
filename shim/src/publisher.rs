//! Events, to containerd: in order, over a connection that comes back when containerd does.
//!
//! [`Publisher::publish`] only queues; one task delivers, the oldest first, and goes on to the next when containerd
//! has taken one. An event may so arrive twice, if containerd goes just when it has taken it, but none is left
//! out: except that of more than [`MOST`] that wait the oldest are, which only a containerd that stays away for
//! long brings about, and one that comes back asks every task for its state.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::ForwardRequest,
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
};
use protobuf::{MessageFull, well_known_types::any::Any};
use tokio::{
    net::UnixStream,
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use ttrpc::{Code, r#async::transport::Socket, context};

/// Events that may wait.
const MOST: usize = 4096;
/// For containerd to take one.
const LIMIT: Duration = Duration::from_secs(5);
/// Between two attempts: at first, doubled each time, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A queue of events; clones feed the same one, and with the last it ends.
#[derive(Clone, Debug)]
pub struct Publisher {
    namespace: String,
    queue: Arc<Queue>,
    /// None without an address.
    _courier: Option<Arc<Courier>>,
}

impl Publisher {
    /// `ttrpc_address` is what containerd gives as `TTRPC_ADDRESS`; without one, events go nowhere. To be
    /// called in a tokio runtime.
    pub fn new(ttrpc_address: Option<String>, namespace: String) -> Self {
        let queue = Arc::new(Queue::default());
        let courier = ttrpc_address
            .map(|address| Arc::new(Courier(tokio::spawn(deliver(address, queue.clone())))));
        Self { namespace, queue, _courier: courier }
    }

    /// Queues an event and returns at once. Those of [`containerd_shim_protos::topics`] have the types of
    /// [`containerd_shim_protos::events::task`].
    pub fn publish<E: MessageFull>(&self, topic: &'static str, event: E) {
        if self._courier.is_none() {
            return;
        }
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                tracing::error!(topic, %error, "an event cannot be written");
                return;
            }
        };
        let event =
            Any { type_url: E::descriptor().full_name().into(), value, ..Default::default() };
        self.queue.push(Envelope {
            timestamp: Some(SystemTime::now().into()).into(),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: Some(event).into(),
            ..Default::default()
        });
    }

    /// Waits until all that was queued has been delivered, but no longer than `limit`.
    pub async fn flush(&self, limit: Duration) {
        let mut waiting = self.queue.waiting.subscribe();
        let left = timeout(limit, waiting.wait_for(|waiting| *waiting == 0)).await;
        if left.is_err() {
            tracing::warn!(events = *self.queue.waiting.borrow(), "containerd takes no events");
        }
    }
}

/// Ends with the last publisher.
#[derive(Debug)]
struct Courier(JoinHandle<()>);

impl Drop for Courier {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug, Default)]
struct Queue {
    events: Mutex<VecDeque<Envelope>>,
    /// How many.
    waiting: watch::Sender<usize>,
}

impl Queue {
    fn push(&self, event: Envelope) {
        let mut events = self.lock();
        events.push_back(event);
        if events.len() > MOST {
            let oldest = events.pop_front();
            tracing::error!(
                topic = oldest.map(|event| event.topic),
                "containerd has missed an event"
            );
        }
        self.waiting.send_replace(events.len());
    }

    /// The oldest, which stays.
    async fn first(&self) -> Envelope {
        let mut waiting = self.waiting.subscribe();
        loop {
            if let Some(event) = self.lock().front() {
                return event.clone();
            }
            // The sender is ours.
            let _ = waiting.changed().await;
        }
    }

    /// It is done with, unless it had to go in the meantime.
    fn pop(&self, event: &Envelope) {
        let mut events = self.lock();
        if events.front() == Some(event) {
            events.pop_front();
        }
        self.waiting.send_replace(events.len());
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn deliver(address: String, queue: Arc<Queue>) {
    let mut connection = None;
    let mut pause = PAUSE.0;
    loop {
        let event = queue.first().await;
        match forward(&address, &mut connection, &event).await {
            Ok(()) => pause = PAUSE.0,
            Err(Failure::Refused(error)) => {
                tracing::error!(topic = event.topic, %error, "containerd refuses an event");
            }
            Err(Failure::Away(error)) => {
                tracing::debug!(topic = event.topic, error, "containerd is away");
                connection = None;
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE.1);
                continue;
            }
        }
        queue.pop(&event);
    }
}

enum Failure {
    /// Another attempt would fail too.
    Refused(ttrpc::Error),
    Away(String),
}

async fn forward(
    address: &str,
    connection: &mut Option<EventsClient>,
    event: &Envelope,
) -> Result<(), Failure> {
    let client = match connection {
        Some(client) => client,
        None => connection.insert(connect(address).await?),
    };
    let request = ForwardRequest { envelope: Some(event.clone()).into(), ..Default::default() };
    let answer = client.forward(context::with_duration(LIMIT), &request);
    match timeout(LIMIT, answer).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(ttrpc::Error::RpcStatus(status))) if !may_pass(status.code()) => {
            Err(Failure::Refused(ttrpc::Error::RpcStatus(status)))
        }
        Ok(Err(error)) => Err(Failure::Away(error.to_string())),
        Err(_) => Err(Failure::Away("no answer".into())),
    }
}

/// What a containerd answers that is starting or ending.
fn may_pass(code: Code) -> bool {
    use Code::{ABORTED, CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE};
    [ABORTED, CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE].contains(&code)
}

/// Connecting to a socket whose backlog is full blocks, or would.
async fn connect(address: &str) -> Result<EventsClient, Failure> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    match timeout(LIMIT, UnixStream::connect(path)).await {
        Ok(Ok(stream)) => Ok(EventsClient::new(Client::new(Socket::from(stream)))),
        Ok(Err(error)) => Err(Failure::Away(error.to_string())),
        Err(_) => Err(Failure::Away("no connection".into())),
    }
}

#[cfg(test)]
mod tests;
