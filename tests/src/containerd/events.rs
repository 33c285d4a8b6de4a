//! What `ctr events` prints.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use prost::Message;
use serde_json::Value;

use super::{Grpc, LIMIT, grpc::Any};

/// An event of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Without `/tasks/`.
    pub topic: String,
    pub body: Value,
}

impl Event {
    pub fn text(&self, field: &str) -> &str {
        self.body[field].as_str().unwrap_or_default()
    }

    /// A number; what protobuf leaves out is 0.
    pub fn number(&self, field: &str) -> u64 {
        self.body[field].as_u64().unwrap_or(0)
    }

    pub fn is_of_task(&self, id: &str) -> bool {
        self.text("container_id") == id
    }

    /// `2026-11-21 08:44:48.64 +0000 UTC default /tasks/start {"container_id":"b","pid":225}`
    fn parse(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once(" /tasks/")?;
        let (topic, body) = rest.split_once(' ')?;
        Some(Self { topic: topic.into(), body: serde_json::from_str(body).ok()? })
    }
}

/// Events so far, over all lives of a containerd.
#[derive(Default)]
pub struct Events(Arc<Mutex<Vec<Event>>>);

#[derive(Clone, PartialEq, Message)]
struct Publish {
    #[prost(string, tag = "1")]
    topic: String,
    #[prost(message, optional, tag = "2")]
    event: Option<Any>,
}

impl Events {
    pub fn all(&self) -> Vec<Event> {
        self.0.lock().expect("events").clone()
    }

    /// Reads what `ctr events` prints from now on. Returns when it does so: an event of our own has come through.
    pub fn follow(&self, ctr: &mut Command, grpc: &Grpc) {
        let mut ctr = ctr
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("ctr");
        let lines = BufReader::new(ctr.stdout.take().expect("piped")).lines();
        let events = self.0.clone();
        let before = self.all().len();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some(event) = Event::parse(&line) {
                    events.lock().expect("events").push(event);
                }
            }
            let _ = ctr.wait();
        });
        let deadline = Instant::now() + LIMIT;
        while !self.all()[before..].iter().any(|event| event.topic == "probe") {
            assert!(Instant::now() < deadline, "no events");
            let event = Any { type_url: "containerd.events.TaskPaused".into(), value: Vec::new() };
            let probe = Publish { topic: "/tasks/probe".into(), event: Some(event) };
            let publish = "/containerd.services.events.v1.Events/Publish";
            let _ = grpc.call::<_, ()>("default", publish, probe);
            thread::sleep(Duration::from_millis(50));
        }
    }
}
