//! What containers write that is to be on the host: on disks of its, and in the upper directories of their root file
//! systems, where ended and paused containers are looked at, and running ones too.

use std::{collections::HashMap, convert::Infallible, io::ErrorKind, mem, sync::Arc};

use tokio::sync::{oneshot, watch};

use super::{
    ContainerConfig, Exit, HostUpper, ProcessId,
    gate::Gate,
    shares::Lender,
    write_out::{When, WriteOut},
};
use crate::{agent::Agent, id::Id};

/// Belongs to the owner.
pub(super) struct Kept {
    agent: Agent,
    lender: Lender,
    /// Containers that write to disks of the host, until these have it all; whether some are other disks than their roots'.
    disks: HashMap<Id, bool>,
    keeps: watch::Sender<bool>,
    /// Of containers that have not ended.
    uppers: HashMap<Id, Looked>,
    /// Ends that are told when what was written is on the host.
    ends: HashMap<ProcessId, Exit>,
    ending: watch::Sender<Vec<Id>>,
}

/// An upper directory; who looks at it is seen until the gate's other end is dropped.
struct Looked {
    upper: Arc<HostUpper>,
    gate: Option<oneshot::Sender<Infallible>>,
}

impl Kept {
    pub fn new(agent: Agent, lender: Lender) -> Self {
        Self {
            agent,
            lender,
            disks: HashMap::new(),
            keeps: watch::Sender::new(false),
            uppers: HashMap::new(),
            ends: HashMap::new(),
            ending: watch::Sender::default(),
        }
    }

    /// Whether some disk of the host may not have all yet.
    pub fn keeps(&self) -> watch::Receiver<bool> {
        self.keeps.subscribe()
    }

    /// The containers that have ended and write out what they have written.
    pub fn ending(&self) -> watch::Receiver<Vec<Id>> {
        self.ending.subscribe()
    }

    pub fn create(&mut self, config: &mut ContainerConfig) {
        if config.rootfs.is_kept() {
            self.disks.insert(config.id.clone(), config.rootfs.has_kept_devices());
            self.keeps.send_replace(true);
        }
        if let Some(upper) = config.upper.take() {
            let looked = Looked { upper: upper.into(), gate: None };
            self.uppers.insert(config.id.clone(), looked);
        }
    }

    /// From now on its directory is brought up to date when somebody looks.
    pub fn started(&mut self, container: &Id) {
        let Some(write_out) = self.write_out(container, When::Running) else { return };
        let Some(gate) = gate(&write_out.upper) else { return };
        let (close, closed) = oneshot::channel();
        self.uppers.entry(container.clone()).and_modify(|looked| looked.gate = Some(close));
        let server = self.lender.pid();
        tokio::spawn(async move { gate.keep(server, closed, || write_out.run()).await });
    }

    /// How to bring what a container has written to the host, if that is done.
    pub fn write_out(&self, container: &Id, when: When) -> Option<WriteOut> {
        let upper = self.uppers.get(container)?.upper.clone();
        let (agent, lender) = (self.agent.clone(), self.lender.clone());
        Some(WriteOut { upper, container: container.clone(), agent, lender, when })
    }

    /// The end of a process is told at once, or when this has been done.
    pub fn ended(&mut self, process: &ProcessId, exit: Exit) -> Result<WriteOut, Exit> {
        let write_out = match process.exec {
            None => self.write_out(&process.container, When::Ended),
            Some(_) => None,
        };
        let Some(write_out) = write_out else { return Err(exit) };
        self.uppers.remove(&process.container);
        self.ends.insert(process.clone(), exit);
        self.tell_ending();
        Ok(write_out)
    }

    /// What is told now.
    pub fn written_out(&mut self, process: &ProcessId, is_all: bool) -> Option<Exit> {
        if is_all && self.disks.get(&process.container) == Some(&false) {
            self.release(&process.container);
        }
        let exit = self.ends.remove(process);
        self.tell_ending();
        exit
    }

    /// It is no more; what it has written is where it belongs.
    pub fn forget(&mut self, container: &Id) {
        self.uppers.remove(container);
        self.release(container);
    }

    /// The VM has died: what is told now, too.
    pub fn died(&mut self) -> HashMap<ProcessId, Exit> {
        self.uppers.clear();
        let ends = mem::take(&mut self.ends);
        self.tell_ending();
        ends
    }

    fn release(&mut self, container: &Id) {
        self.disks.remove(container);
        self.keeps.send_replace(!self.disks.is_empty());
    }

    fn tell_ending(&self) {
        let ids = self.ends.keys().map(|process| process.container.clone());
        self.ending.send_replace(ids.collect());
    }
}

fn gate(upper: &HostUpper) -> Option<Gate> {
    match upper.gate() {
        Ok(gate) => Some(gate),
        // An ordinary user's, or a kernel that does not ask.
        Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::InvalidInput) => None,
        Err(error) => {
            tracing::warn!(
                %error,
                "while a container runs, its directory on the host is not brought up to date (fs.fanotify.max_user_groups)"
            );
            None
        }
    }
}
