//! A container as containerd sees it, and the table of all of a sandbox's.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use containerd_shim_protos::api;

use super::{error::TaskError, pod::Pod, process::Process};
use crate::{hooks::Hooks, id::Id, pace::Pace, sandbox::RootFs, spec::Terms};

#[derive(Debug)]
pub struct Container {
    pub id: Id,
    pub bundle: PathBuf,
    /// As containerd gave it, for its event.
    pub mounts: Vec<api::Mount>,
    /// It is CRI's pause container: what it uses is what its pod costs the host.
    pub stands_for_pod: bool,
    pub init: Arc<Process>,
    execs: Mutex<BTreeMap<Id, Arc<Process>>>,
    /// Known as soon as it has one.
    pub place: OnceLock<Place>,
    /// Likewise, before the first of them runs.
    pub hooks: OnceLock<Hooks>,
}

/// Where a container runs.
#[derive(Debug)]
pub struct Place {
    pub pod: Arc<Pod>,
    pub rootfs: RootFs,
    /// The disks came after the boot, and go with the container.
    pub attached: bool,
    /// Execs and updates are refused for fields that protect nobody, too.
    pub strict: bool,
}

impl Container {
    pub fn new(id: Id, bundle: PathBuf, mounts: Vec<api::Mount>, init: Process) -> Self {
        Self {
            id,
            bundle,
            mounts,
            stands_for_pod: false,
            init: Arc::new(init),
            execs: Mutex::default(),
            place: OnceLock::new(),
            hooks: OnceLock::new(),
        }
    }

    /// The pid of all its processes on the host.
    pub fn pid(&self) -> u32 {
        self.place.get().map_or(0, |place| place.pod.pid())
    }

    pub fn pod(&self) -> Result<&Arc<Pod>, TaskError> {
        let place = self.place.get().ok_or_else(|| self.init.refuse("created"))?;
        Ok(&place.pod)
    }

    pub fn pace(&self) -> Pace {
        self.place.get().map_or_else(Pace::default, |place| place.pod.sandbox.pace())
    }

    /// Names what is ignored of what a caller says, where the configuration allows that.
    pub fn log_ignored(&self, fields: &[String]) {
        if !fields.is_empty() {
            tracing::warn!(container = %self.id, ?fields, "ignored, since strict = false");
        }
    }

    /// Nobody makes a cgroup on the host for it.
    pub fn terms(&self) -> Terms {
        let strict = self.place.get().is_none_or(|place| place.strict);
        Terms { strict, cgroup: false }
    }

    /// Runs what is to run when it is gone.
    pub async fn has_gone(&self) {
        if let Some(hooks) = self.hooks.get() {
            hooks.stopped().await;
        }
    }

    /// Its init for an empty exec id.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, TaskError> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        let found = exec.parse().ok().and_then(|id: Id| self.lock().get(&id).cloned());
        found.ok_or_else(|| TaskError::NotFound(format!("exec {exec:?} of {}", self.id)))
    }

    pub fn add(&self, exec: Id, process: Process) -> Result<(), TaskError> {
        let mut execs = self.lock();
        if execs.contains_key(&exec) {
            return Err(TaskError::Exists(process.id.to_string()));
        }
        execs.insert(exec, Arc::new(process));
        Ok(())
    }

    pub fn remove(&self, exec: &Id) {
        self.lock().remove(exec);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Id, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All containers there are, those being created among them.
#[derive(Debug, Default)]
pub struct Table(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    containers: HashMap<String, Arc<Container>>,
    /// No more come.
    closed: bool,
}

impl Table {
    pub fn reserve(&self, container: Arc<Container>) -> Result<(), TaskError> {
        let mut state = self.lock();
        if state.closed {
            return Err(TaskError::Leaving);
        }
        if state.containers.contains_key(container.id.as_str()) {
            return Err(TaskError::Exists(container.init.id.to_string()));
        }
        state.containers.insert(container.id.to_string(), container);
        Ok(())
    }

    pub fn get(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let found = self.lock().containers.get(id).cloned();
        found.ok_or_else(|| TaskError::NotFound(format!("container {id:?}")))
    }

    pub fn remove(&self, id: &Id) {
        self.lock().containers.remove(id.as_str());
    }

    pub fn all(&self) -> Vec<Arc<Container>> {
        self.lock().containers.values().cloned().collect()
    }

    /// Whether nothing runs any more, or is about to, that needs the VM.
    pub fn is_idle(&self) -> bool {
        self.lock().containers.values().all(|c| c.init.status().is_over())
    }

    pub fn is_empty(&self) -> bool {
        self.lock().containers.is_empty()
    }

    /// Lets no further container in, whoever is left.
    pub fn close_for_good(&self) {
        self.lock().closed = true;
    }

    /// Lets no further container in if there is none left; says whether that is so.
    pub fn close(&self) -> bool {
        let mut state = self.lock();
        state.closed |= state.containers.is_empty();
        state.closed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::{
        sandbox::{Exit, ProcessId},
        task::{process::Status, stdio::Wanted},
    };

    fn container(id: &str) -> Arc<Container> {
        let init = Process::init(ProcessId::init(id.parse().unwrap()), Wanted::default());
        Arc::new(Container::new(id.parse().unwrap(), "/b".into(), Vec::new(), init))
    }

    #[test]
    fn an_id_is_taken_once_and_a_closed_table_takes_none() {
        let table = Table::default();
        table.reserve(container("a")).unwrap();
        assert!(matches!(table.reserve(container("a")), Err(TaskError::Exists(_))));
        assert!(!table.close());
        table.reserve(container("b")).unwrap();
        for id in ["a", "b"] {
            table.remove(&id.parse().unwrap());
        }
        assert!(matches!(table.get("a"), Err(TaskError::NotFound(_))));
        assert!(table.close() && table.close());
        assert!(matches!(table.reserve(container("a")), Err(TaskError::Leaving)));
    }

    #[test]
    fn a_sandbox_is_idle_when_all_have_ended_and_none_comes() {
        let table = Table::default();
        let (a, b) = (container("a"), container("b"));
        table.reserve(a.clone()).unwrap();
        let exit = Exit { status: 0, oom_kills: 0, at: SystemTime::now(), death: None };
        assert!(!table.is_idle());
        a.init.set(Status::Stopped(exit));
        assert!(table.is_idle());
        table.reserve(b).unwrap();
        assert!(!table.is_idle());
    }
}
