//! The processes of a sandbox: what may be done to each, and what is told of it. Pure: no clock, no VM.
//!
//! ```text
//!  create   created        start     started
//!  ──▶ Creating ──▶ Created ──▶ Starting ──▶ Running
//!                      └───────────┴────────────┴──▶ Stopped ──▶ Deleting ──▶ (gone)
//! ```
//!
//! Two ends are held back so that the order of events is what containerd expects: that of a process that is
//! still `Starting`, and that of an init whose execs have not all ended. Only the owner task has a table.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use super::{Event, Exit, ProcessId};
use crate::{id::Id, vm::Death};

/// Exit status of what a dead VM ran: 128 + SIGKILL.
const KILLED: u8 = 137;

/// Why a request is not possible now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{0}: no such process")]
    NotFound(ProcessId),
    #[error("{0}: exists already")]
    Exists(ProcessId),
    #[error("{process}: {is}, not {wanted}")]
    State { process: ProcessId, is: &'static str, wanted: &'static str },
    #[error(
        "no free disk: a VM has 16 and this one's are all in use; remove containers of its pod, or give this one fewer devices"
    )]
    NoSlot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Creating,
    Created,
    Starting,
    Running,
    Stopped,
    Deleting,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
        }
    }

    fn is_over(self) -> bool {
        matches!(self, Self::Stopped | Self::Deleting)
    }
}

#[derive(Debug)]
struct Entry {
    state: State,
    pid: u32,
    /// Known before it is told, when it is held back.
    exit: Option<Exit>,
    /// Of an init: the kills for lack of memory in its container that were told.
    oom_kills: u64,
}

#[derive(Debug, Default)]
pub(super) struct Table(BTreeMap<ProcessId, Entry>);

impl Table {
    /// Reserves an id. An exec needs a container that has not ended.
    pub fn create(&mut self, process: &ProcessId) -> Result<(), Refused> {
        if process.exec.is_some() {
            let init = ProcessId::init(process.container.clone());
            let entry = self.get(&init)?;
            if entry.exit.is_some() || !matches!(entry.state, State::Created | State::Running) {
                return Err(refused(&init, entry.state, "running"));
            }
        }
        if self.0.contains_key(process) {
            return Err(Refused::Exists(process.clone()));
        }
        let entry = Entry { state: State::Creating, pid: 0, exit: None, oom_kills: 0 };
        self.0.insert(process.clone(), entry);
        Ok(())
    }

    pub fn created(&mut self, process: &ProcessId, pid: u32) -> Vec<Event> {
        let Some(entry) = self.in_state(process, State::Creating) else { return Vec::new() };
        (entry.state, entry.pid) = (State::Created, pid);
        vec![Event::Created { process: process.clone(), pid }]
    }

    pub fn create_failed(&mut self, process: &ProcessId) -> Vec<Event> {
        self.0.remove(process);
        self.settle(&process.container)
    }

    /// From `Created`, and only if it has not ended already.
    pub fn start(&mut self, process: &ProcessId) -> Result<(), Refused> {
        let entry = self.get_mut(process)?;
        if entry.state != State::Created || entry.exit.is_some() {
            return Err(refused(process, entry.state, "created"));
        }
        entry.state = State::Starting;
        Ok(())
    }

    /// An end that raced the start is told after it.
    pub fn started(&mut self, process: &ProcessId) -> Vec<Event> {
        let Some(entry) = self.in_state(process, State::Starting) else { return Vec::new() };
        entry.state = State::Running;
        let mut events = vec![Event::Started { process: process.clone(), pid: entry.pid }];
        events.extend(self.settle(&process.container));
        events
    }

    /// The workload could not be run: the process has ended with this exit.
    pub fn start_failed(&mut self, process: &ProcessId, exit: Exit) -> Vec<Event> {
        let Some(entry) = self.in_state(process, State::Starting) else { return Vec::new() };
        entry.state = State::Created;
        entry.exit = Some(exit);
        self.settle(&process.container)
    }

    /// The first end counts.
    pub fn exited(&mut self, process: &ProcessId, exit: Exit) -> Vec<Event> {
        let Some(entry) = self.0.get_mut(process) else { return Vec::new() };
        entry.exit.get_or_insert(exit);
        self.settle(&process.container)
    }

    /// The kernel has killed this often for lack of a running container's memory.
    pub fn oom(&mut self, container: &Id, kills: u64) -> Vec<Event> {
        let init = ProcessId::init(container.clone());
        match self.0.get_mut(&init) {
            Some(entry) if entry.state == State::Running && kills > entry.oom_kills => {
                entry.oom_kills = kills;
                vec![Event::Oom { container: container.clone() }]
            }
            _ => Vec::new(),
        }
    }

    /// Whether an init's end is held back for execs that have not ended.
    pub fn is_held(&self, container: &Id) -> bool {
        self.0
            .get(&ProcessId::init(container.clone()))
            .is_some_and(|e| e.exit.is_some() && !e.state.is_over())
    }

    /// Execs that outlive their init by too much are given up: they count as killed.
    pub fn give_up_execs(&mut self, container: &Id, at: SystemTime) -> Vec<Event> {
        let killed = Exit { status: KILLED, oom_kills: 0, at, death: None };
        if !self.is_held(container) {
            return Vec::new();
        }
        // One that is still being created has not been told of, and never will be.
        self.0.retain(|p, e| p.container != *container || e.state != State::Creating);
        for (process, entry) in self.of(container) {
            if process.exec.is_some() && !entry.state.is_over() {
                entry.exit.get_or_insert(killed.clone());
                entry.state = State::Running;
            }
        }
        self.settle(container)
    }

    /// The VM is gone: everything in it has ended.
    pub fn ended(&mut self, death: &Arc<Death>, at: SystemTime) -> Vec<Event> {
        self.0.retain(|_, entry| entry.state != State::Creating);
        // Who asked for these hears that the VM has gone, and may ask again.
        let deleting = self.0.values_mut().filter(|entry| entry.state == State::Deleting);
        deleting.for_each(|entry| entry.state = State::Stopped);
        let exit = Exit { status: KILLED, oom_kills: 0, at, death: Some(death.clone()) };
        let mut containers: Vec<Id> = self.0.keys().map(|p| p.container.clone()).collect();
        containers.dedup();
        for entry in self.0.values_mut().filter(|e| !e.state.is_over()) {
            entry.exit.get_or_insert(exit.clone());
            entry.state = State::Running;
        }
        containers.iter().flat_map(|c| self.settle(c)).collect()
    }

    /// How a process ended; `None` while that has not been told.
    pub fn exit(&self, process: &ProcessId) -> Result<Option<Exit>, Refused> {
        let entry = self.get(process)?;
        Ok(if entry.state.is_over() { entry.exit.clone() } else { None })
    }

    /// Of a process that has not ended.
    pub fn pid(&self, process: &ProcessId) -> Result<u32, Refused> {
        match self.get(process)? {
            Entry { state: State::Created | State::Running, exit: None, pid, .. } => Ok(*pid),
            entry => Err(refused(process, entry.state, "running")),
        }
    }

    /// Checks that a container's processes run.
    pub fn running(&self, container: &Id) -> Result<(), Refused> {
        let init = ProcessId::init(container.clone());
        match self.get(&init)?.state {
            State::Created | State::Running => Ok(()),
            other => Err(refused(&init, other, "running")),
        }
    }

    /// From `Stopped`; a container only when its execs have ended.
    pub fn delete(&mut self, process: &ProcessId) -> Result<(), Refused> {
        let alive = self.0.iter().find(|(p, e)| {
            let below = process.exec.is_none() && p.container == process.container;
            (below || *p == process) && e.state != State::Stopped
        });
        if let Some((process, entry)) = alive {
            return Err(refused(process, entry.state, "stopped"));
        }
        self.get_mut(process)?.state = State::Deleting;
        Ok(())
    }

    pub fn delete_failed(&mut self, process: &ProcessId) {
        if let Some(entry) = self.0.get_mut(process) {
            entry.state = State::Stopped;
        }
    }

    /// Forgets a process; a container with its execs.
    pub fn deleted(&mut self, process: &ProcessId) -> Vec<Event> {
        let gone = |p: &ProcessId| {
            p == process || (process.exec.is_none() && p.container == process.container)
        };
        let mut processes: Vec<_> = self.0.keys().filter(|p| gone(p)).cloned().collect();
        processes.reverse();
        self.0.retain(|p, _| !gone(p));
        processes.into_iter().map(|process| Event::Deleted { process }).collect()
    }

    /// Tells the ends of a container's processes that need not be held back (any more).
    fn settle(&mut self, container: &Id) -> Vec<Event> {
        let mut events = Vec::new();
        let mut execs_over = true;
        let init = ProcessId::init(container.clone());
        let mut oom_kills = self.0.get(&init).map_or(0, |entry| entry.oom_kills);
        // Execs sort after their init: walked backwards, it is the last.
        for (process, entry) in self.of(container).rev() {
            if process.exec.is_none() && !execs_over {
                break;
            }
            let told = matches!(entry.state, State::Created | State::Running);
            if let (true, Some(exit)) = (told, &entry.exit) {
                entry.state = State::Stopped;
                if exit.oom_kills > oom_kills {
                    oom_kills = exit.oom_kills;
                    events.push(Event::Oom { container: container.clone() });
                }
                let (process, exit) = (process.clone(), exit.clone());
                events.push(Event::Exited { process, pid: entry.pid, exit });
            }
            execs_over &= entry.state.is_over();
        }
        if let Some(entry) = self.0.get_mut(&init) {
            entry.oom_kills = oom_kills;
        }
        events
    }

    /// A container's processes, the init first.
    fn of<'a>(
        &'a mut self,
        container: &'a Id,
    ) -> impl DoubleEndedIterator<Item = (&'a ProcessId, &'a mut Entry)> {
        self.0.iter_mut().filter(move |(p, _)| p.container == *container)
    }

    /// An answer may come after the VM's death has changed the state already.
    fn in_state(&mut self, process: &ProcessId, state: State) -> Option<&mut Entry> {
        self.0.get_mut(process).filter(|entry| entry.state == state)
    }

    fn get(&self, process: &ProcessId) -> Result<&Entry, Refused> {
        self.0.get(process).ok_or_else(|| Refused::NotFound(process.clone()))
    }

    fn get_mut(&mut self, process: &ProcessId) -> Result<&mut Entry, Refused> {
        self.0.get_mut(process).ok_or_else(|| Refused::NotFound(process.clone()))
    }
}

fn refused(process: &ProcessId, is: State, wanted: &'static str) -> Refused {
    Refused::State { process: process.clone(), is: is.name(), wanted }
}

#[cfg(test)]
mod tests;
