//! The threads of further pairs of queues: the n-th serves the n-th further pair of each network device, and nothing else.
//! They end with the process.

use std::{io, sync::Arc, thread::Builder};

use ampoule_vmm_api::{StopCause, seccomp::Filter};
use event_manager::{EventManager, SubscriberOps};

use super::pair::Pair;
use crate::{error::describe, stop::StopLatch, virtio::worker::Worker};

const STACK_SIZE: usize = 256 << 10;
/// Events at a time: of two queues and a tap, for each of a few devices.
const EVENTS: usize = 16;

type EventLoop = EventManager<Worker<Pair>>;

/// Their event loops, before they are started.
#[derive(Default)]
pub struct Threads(Vec<EventLoop>);

impl Threads {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the further pairs of a device, one for each thread.
    pub fn add(
        &mut self,
        workers: impl Iterator<Item = Worker<Pair>>,
    ) -> Result<(), event_manager::Error> {
        for (number, worker) in workers.enumerate() {
            if number == self.0.len() {
                self.0.push(EventManager::new_with_capacity(EVENTS)?);
            }
            self.0[number].add_subscriber(worker);
        }
        Ok(())
    }

    /// Starts them, under a filter.
    pub fn start(self, filter: &Arc<Filter>, latch: &StopLatch) -> io::Result<()> {
        for (number, events) in (1..).zip(self.0) {
            let (filter, latch) = (filter.clone(), latch.clone());
            let thread = Builder::new().name(format!("queues{number}")).stack_size(STACK_SIZE);
            thread.spawn(move || serve(events, &filter, &latch))?;
        }
        Ok(())
    }
}

fn serve(mut events: EventLoop, filter: &Filter, latch: &StopLatch) {
    if let Err(e) = filter.install() {
        return latch.raise(StopCause::Internal, format!("the thread of a pair of queues: {e}"));
    }
    loop {
        if let Err(e) = events.run() {
            return latch.raise(StopCause::Internal, describe(&e));
        }
    }
}
