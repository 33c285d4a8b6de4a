//! The task that owns a sandbox. Everything reaches it as one of three: a request of a handle, the end of a
//! call to the agent, a report of the VM. It never waits for anything else: calls run beside it.

mod create;
mod network;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ampoule_agent_api::agent::{StartResponse, WaitResponse};
use tokio::{
    net::UnixStream,
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{
    BootRecord, ConsoleConfig, ContainerConfig, Created, Event, ExecConfig, Exit, ProcessId, Reply,
    SandboxError, Streams, answer,
    boot::Booted,
    disks::{Disks, Turn},
    follower::{Follower, Looked},
    kept::Kept,
    shares::Shares,
    table::Table,
    wire::{UNKNOWN, exit, exit_of, failure, listen},
    write_out::When,
};
use crate::{
    agent::{Agent, AgentError, Code},
    id::Id,
    text::one_line,
    vm::{Cause, Death, Disk, Report, Vm},
};

/// How long execs may outlive their init, which takes them along, before they are given up.
const EXECS_GRACE: Duration = Duration::from_secs(2);
/// Between two reports of a container's kills for lack of memory: a hostile agent may report without end.
const OOM_PAUSE: Duration = Duration::from_millis(100);
/// How long the VMM usually may take to attach or detach a disk.
const DISK_LIMIT: Duration = Duration::from_secs(5);

/// What a handle asks for.
pub(super) enum Input {
    CreateContainer(Box<ContainerConfig>, Reply<Created>),
    CreateExec(Box<ExecConfig>, Reply<Created>),
    CreateConsole(ConsoleConfig, Reply<Created>),
    Start(ProcessId, Reply<()>),
    Wait(ProcessId, Reply<Exit>),
    Freeze(Id, bool, Reply<()>),
    Delete(ProcessId, Reply<()>),
    AttachDisk(Disk, Reply<u8>),
    DetachDisk(u8, Reply<()>),
    AttachNetwork(Id, Reply<()>),
    Listen(Reply<(u32, UnixStream)>),
    BootRecord(Reply<BootRecord>),
    Shutdown,
}

/// How a call ended.
enum Done {
    Created(ProcessId, Result<u32, SandboxError>, Streams, Reply<Created>),
    Started(ProcessId, Result<StartResponse, AgentError>, Reply<()>),
    Exited(ProcessId, Result<WaitResponse, AgentError>),
    WrittenOut(ProcessId, bool),
    Frozen(Id, bool, Result<(), AgentError>, Reply<()>),
    Deleted(ProcessId, Result<(), AgentError>, Reply<()>),
    Oom(Id, Result<u64, AgentError>),
    ExecsOverdue(Id),
    DiskOverdue(u8, Turn),
    NetworkLooked(Looked, Option<Reply<()>>),
    NetworkTold(Vec<u8>, Result<(), AgentError>, Option<Reply<()>>),
}

/// The state of a sandbox. `vm` is there until the VM has died, `death` from then on.
pub(super) struct Owner {
    vm: Option<Vm>,
    death: Option<Arc<Death>>,
    agent: Agent,
    record: BootRecord,
    table: Table,
    disks: Disks,
    network: Follower,
    shares: Shares,
    calls: JoinSet<Done>,
    waiters: HashMap<ProcessId, Vec<Reply<Exit>>>,
    kept: Kept,
    queue: mpsc::Receiver<Input>,
    events: mpsc::UnboundedSender<Event>,
    end: watch::Sender<Option<Arc<Death>>>,
}

impl Owner {
    pub fn new(
        booted: Booted,
        queue: mpsc::Receiver<Input>,
        events: mpsc::UnboundedSender<Event>,
        end: watch::Sender<Option<Arc<Death>>>,
    ) -> Self {
        let kept = Kept::new(booted.agent.clone(), booted.shares.lender().clone());
        Self {
            vm: Some(booted.vm),
            death: None,
            agent: booted.agent,
            record: booted.record,
            table: Table::default(),
            disks: Disks::new(booted.spare_slots),
            network: Follower::new(booted.network, booted.told),
            shares: booted.shares,
            calls: JoinSet::new(),
            waiters: HashMap::new(),
            kept,
            queue,
            events,
            end,
        }
    }

    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Serves until the last handle is gone: after the VM's death too, so that ends can be asked for.
    pub async fn run(mut self) {
        self.follow_network();
        loop {
            tokio::select! {
                biased;
                Some(done) = self.calls.join_next() => if let Ok(done) = done { self.done(done) },
                input = self.queue.recv() => match input {
                    Some(input) => self.input(input),
                    None => return,
                },
                // Last, because a hostile VMM may report without end.
                report = next(&mut self.vm) => match report {
                    Report::Event(event) => self.event(&event),
                    Report::Died(death) => {
                        // With what they have of the host's.
                        self.calls.shutdown().await;
                        self.died(death.into());
                    }
                },
            }
        }
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::CreateContainer(config, reply) => self.create_container(*config, reply),
            Input::CreateExec(config, reply) => self.create_exec(*config, reply),
            Input::CreateConsole(config, reply) => self.create_console(&config, reply),
            Input::Start(process, reply) => self.start(process, reply),
            Input::Wait(process, reply) => self.wait(process, reply),
            Input::Freeze(container, on, reply) => self.freeze(container, on, reply),
            Input::Delete(process, reply) => self.delete(process, reply),
            Input::AttachDisk(disk, reply) => self.attach(&disk, reply),
            Input::DetachDisk(slot, reply) => self.detach(slot, reply),
            Input::AttachNetwork(container, reply) => self.attach_network(container, reply),
            Input::Listen(reply) => {
                let listening = self.alive().and_then(|vm| listen(vm).map_err(SandboxError::Vm));
                answer(reply, listening);
            }
            Input::BootRecord(reply) => answer(reply, Ok(self.record.clone())),
            Input::Shutdown => {
                if let Some(vm) = &mut self.vm {
                    vm.stop();
                }
            }
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Created(process, result, streams, reply) => {
                self.created(process, result, streams, reply);
            }
            Done::Started(process, result, reply) => self.started(process, result, reply),
            Done::Exited(process, result) => self.exited(process, result),
            Done::WrittenOut(process, is_all) => self.written_out(&process, is_all),
            Done::Frozen(container, on, result, reply) => {
                if result.is_ok() {
                    let event =
                        if on { Event::Paused { container } } else { Event::Resumed { container } };
                    self.publish(vec![event]);
                }
                self.pass_on(reply, result.map_err(SandboxError::from));
            }
            Done::Deleted(process, result, reply) => self.deleted(&process, result, reply),
            Done::Oom(container, Ok(kills)) => {
                let events = self.table.oom(&container, kills);
                self.publish(events);
                self.watch_memory(container, kills, OOM_PAUSE);
            }
            // The container has ended, or its VM has.
            Done::Oom(_, Err(_)) => {}
            Done::ExecsOverdue(container) => {
                let events = self.table.give_up_execs(&container, SystemTime::now());
                self.publish(events);
            }
            Done::DiskOverdue(slot, turn) => self.disks.overdue(slot, turn),
            Done::NetworkLooked(looked, reply) => self.network_looked(looked, reply),
            Done::NetworkTold(unplugged, result, reply) => {
                self.network_told(unplugged, result, reply);
            }
        }
    }

    // Starting and ending.

    fn start(&mut self, process: ProcessId, reply: Reply<()>) {
        let admitted = self.alive().map(|_| ()).and_then(|()| Ok(self.table.start(&process)?));
        if let Err(error) = admitted {
            return answer(reply, Err(error));
        }
        let agent = self.agent.clone();
        self.calls.spawn(async move {
            let result = agent.start(&process.request()).await;
            Done::Started(process, result, reply)
        });
    }

    fn started(
        &mut self,
        process: ProcessId,
        result: Result<StartResponse, AgentError>,
        reply: Reply<()>,
    ) {
        let init = process.exec.is_none().then(|| process.container.clone());
        let (events, result) = match result.map(|response| failure(&response)) {
            Ok(None) => {
                if let Some(container) = &init {
                    self.watch_memory(container.clone(), 0, Duration::ZERO);
                }
                (self.table.started(&process), Ok(()))
            }
            Ok(Some((status, source))) => {
                let events = self.table.start_failed(&process, exit(status));
                (events, Err(SandboxError::Start { process, source }))
            }
            Err(error) => {
                (self.table.start_failed(&process, exit(UNKNOWN)), Err(SandboxError::from(error)))
            }
        };
        self.publish(events);
        let started = init.filter(|_| result.is_ok());
        self.pass_on(reply, result);
        // Nobody waits for this.
        if let Some(container) = started {
            self.kept.started(&container);
        }
    }

    /// Hears of it when the kernel kills for lack of a container's memory, more often than it did.
    fn watch_memory(&mut self, container: Id, known: u64, after: Duration) {
        let agent = self.agent.clone();
        self.calls.spawn(async move {
            tokio::time::sleep(after).await;
            let kills = agent.wait_oom(container.as_str(), known).await;
            Done::Oom(container, kills)
        });
    }

    fn exited(&mut self, process: ProcessId, result: Result<WaitResponse, AgentError>) {
        let exit = match result {
            Ok(end) => exit_of(&end),
            Err(AgentError::Refused { .. }) => exit(UNKNOWN),
            // The VM is dying, or will be made to: its death ends this process.
            Err(error) => return self.agent_lost(&error),
        };
        match self.kept.ended(&process, exit) {
            Err(exit) => self.ended(&process, exit),
            Ok(write_out) => {
                self.calls.spawn(async move { Done::WrittenOut(process, write_out.run().await) });
            }
        }
    }

    fn written_out(&mut self, process: &ProcessId, is_all: bool) {
        if let Some(exit) = self.kept.written_out(process, is_all) {
            self.ended(process, exit);
        }
    }

    fn ended(&mut self, process: &ProcessId, exit: Exit) {
        let events = self.table.exited(process, exit);
        self.publish(events);
        if process.exec.is_none() && self.table.is_held(&process.container) {
            let container = process.container.clone();
            self.calls.spawn(async move {
                tokio::time::sleep(EXECS_GRACE).await;
                Done::ExecsOverdue(container)
            });
        }
    }

    fn wait(&mut self, process: ProcessId, reply: Reply<Exit>) {
        match self.table.exit(&process) {
            Ok(Some(exit)) => answer(reply, Ok(exit)),
            Ok(None) => {
                let waiters = self.waiters.entry(process).or_default();
                waiters.retain(|w| !w.is_closed());
                waiters.push(reply);
            }
            Err(error) => answer(reply, Err(error.into())),
        }
    }

    fn freeze(&mut self, container: Id, on: bool, reply: Reply<()>) {
        let admitted =
            self.alive().map(|_| ()).and_then(|()| Ok(self.table.running(&container)?));
        if let Err(error) = admitted {
            return answer(reply, Err(error));
        }
        let agent = self.agent.clone();
        // Engines look at the files of what they have paused.
        let write_out = match on {
            true => self.kept.write_out(&container, When::Paused),
            false => None,
        };
        self.calls.spawn(async move {
            let result = match on {
                true => agent.pause(container.as_str()).await,
                false => agent.resume(container.as_str()).await,
            };
            if let (Ok(()), Some(write_out)) = (&result, write_out) {
                write_out.run().await;
            }
            Done::Frozen(container, on, result, reply)
        });
    }

    fn delete(&mut self, process: ProcessId, reply: Reply<()>) {
        if let Err(error) = self.table.delete(&process) {
            return answer(reply, Err(error.into()));
        }
        if self.vm.is_none() {
            return self.deleted(&process, Ok(()), reply);
        }
        let agent = self.agent.clone();
        self.calls.spawn(async move {
            let result = agent.delete(&process.request()).await;
            Done::Deleted(process, result, reply)
        });
    }

    fn deleted(&mut self, process: &ProcessId, result: Result<(), AgentError>, reply: Reply<()>) {
        match result {
            Ok(()) | Err(AgentError::Refused { code: Code::NOT_FOUND, .. }) => {
                let events = self.table.deleted(process);
                self.publish(events);
                self.gone_with(process);
                answer(reply, Ok(()));
            }
            Err(error) => {
                self.table.delete_failed(process);
                self.pass_on(reply, Err(error.into()));
            }
        }
    }

    /// A container's shares go with it; what it has written is where it belongs.
    fn gone_with(&mut self, process: &ProcessId) {
        if process.exec.is_none() {
            self.shares.forget(&process.container);
            self.kept.forget(&process.container);
        }
    }

    // Disks.

    fn attach(&mut self, disk: &Disk, reply: Reply<u8>) {
        let Some(vm) = &self.vm else { return answer(reply, Err(self.gone())) };
        let moving = self.disks.attach(vm, disk, reply);
        self.watch_disk(moving);
    }

    fn detach(&mut self, slot: u8, reply: Reply<()>) {
        let Some(vm) = &self.vm else { return answer(reply, Err(self.gone())) };
        let moving = self.disks.detach(vm, slot, reply);
        self.watch_disk(moving);
    }

    fn watch_disk(&mut self, moving: Option<(u8, Turn)>) {
        if let Some((slot, turn)) = moving {
            let limit = self.agent.pace().limit(DISK_LIMIT);
            self.calls.spawn(async move {
                tokio::time::sleep(limit).await;
                Done::DiskOverdue(slot, turn)
            });
        }
    }

    // The VM.

    fn event(&mut self, event: &ampoule_vmm_api::Event) {
        use ampoule_vmm_api::Event as Vmm;
        self.record.note(event);
        match event {
            Vmm::DiskAttached { slot } => self.disks.attached(*slot),
            Vmm::DiskDetached { slot } => self.disks.detached(*slot),
            Vmm::RequestFailed { request, error } => {
                let (request, error) = (one_line(request, 100), one_line(error, 500));
                tracing::warn!(request, error, "the VMM refused a request");
                self.disks.refused();
            }
            _ => {}
        }
    }

    /// The road every process of a dead VM takes: ended with 137, told, and its waiters answered. Calls that
    /// were under way are dropped; whoever asked finds the reason in `end`.
    fn died(&mut self, death: Arc<Death>) {
        self.vm = None;
        self.death = Some(death.clone());
        self.disks.forget();
        self.network.end();
        self.shares.end();
        for (process, exit) in self.kept.died() {
            self.ended(&process, exit);
        }
        let events = self.table.ended(&death, SystemTime::now());
        self.publish(events);
        self.publish(vec![Event::Stopped { death: death.clone() }]);
        self.end.send_replace(Some(death));
    }

    fn alive(&self) -> Result<&Vm, SandboxError> {
        self.vm.as_ref().ok_or_else(|| self.gone())
    }

    fn gone(&self) -> SandboxError {
        SandboxError::Gone(self.death.clone().unwrap_or_else(|| Arc::new(Death::lost())))
    }

    /// Answers a call's caller; if the agent is gone, with the reason that its VM's death will give.
    fn pass_on<T>(&mut self, reply: Reply<T>, result: Result<T, SandboxError>) {
        match result {
            Err(SandboxError::Agent(error @ AgentError::Disconnected { .. })) => {
                self.agent_lost(&error);
            }
            result => answer(reply, result),
        }
    }

    fn agent_lost(&mut self, error: &AgentError) {
        if let Some(vm) = &mut self.vm {
            vm.doom(Cause::GivenUp(error.to_string()));
        }
    }

    /// Tells events in order, and the ends among them to those who wait.
    fn publish(&mut self, events: Vec<Event>) {
        for event in events {
            if let Event::Exited { process, exit, .. } = &event {
                for waiter in self.waiters.remove(process).unwrap_or_default() {
                    answer(waiter, Ok(exit.clone()));
                }
            }
            // Nobody has to listen.
            let _ = self.events.send(event);
        }
    }
}

async fn next(vm: &mut Option<Vm>) -> Report {
    match vm {
        Some(vm) => vm.next().await,
        None => std::future::pending().await,
    }
}
