//! Which processors of the host a sandbox runs on: those that its containers name (`linux.resources.cpu.cpus`), all that
//! we may use as long as one of them names none.
//!
//! A guest numbers its own processors; the host's are what a caller means. So the threads of the VM and of its file
//! server are bound to them, which no guest can undo.

use std::{
    collections::BTreeMap,
    fs, io,
    sync::{Mutex, PoisonError},
};

use oci_spec::runtime::{LinuxCpu, Spec};
use rustix::{
    io::Errno,
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::id::Id;

/// More than this is no list.
const MAX_LIST: usize = 4096;
/// Of a wrong list that much is shown.
const SHOWN: usize = 80;
const ONLINE_NODES: &str = "/sys/devices/system/node/online";

#[derive(Debug, thiserror::Error)]
pub enum CpusError {
    #[error("linux.resources.cpu.{field} ({list}): not a list of numbers and ranges, as `0-3,5`")]
    NoList { field: &'static str, list: String },
    #[error("linux.resources.cpu.cpus ({list}): none of them is a processor that we may use")]
    NoneOfOurs { list: String },
    #[error(
        "linux.resources.cpu.mems ({list}): the memory of a VM is on all nodes of the host ({all}); leave it out"
    )]
    Nodes { list: String, all: String },
    #[error("bind a VM to processors")]
    Bind(#[source] io::Error),
}

/// What each container of a sandbox names.
#[derive(Debug, Default)]
pub struct Cpus(Mutex<BTreeMap<Id, Option<CpuSet>>>);

/// The processors that a specification names; one that names none may have all.
pub fn of_spec(spec: &Spec) -> Result<Option<CpuSet>, CpusError> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    resources.and_then(|resources| resources.cpu().as_ref()).map_or(Ok(None), of)
}

/// The same of limits that a container is to have from now on.
pub fn of(cpu: &LinuxCpu) -> Result<Option<CpuSet>, CpusError> {
    if let Some(list) = cpu.mems().as_deref().filter(|list| !list.is_empty()) {
        check_nodes(list)?;
    }
    let Some(list) = cpu.cpus().as_deref().filter(|list| !list.is_empty()) else { return Ok(None) };
    let ours = sched_getaffinity(None).map_err(|e| CpusError::Bind(e.into()))?;
    let mut set = CpuSet::new();
    for n in numbers("cpus", list)?.into_iter().filter(|n| *n < CpuSet::MAX_CPU && ours.is_set(*n))
    {
        set.set(n);
    }
    match set.count() {
        0 => Err(CpusError::NoneOfOurs { list: list.into() }),
        _ => Ok(Some(set)),
    }
}

/// A list of cpuset(7).
fn numbers(field: &'static str, list: &str) -> Result<Vec<usize>, CpusError> {
    let number = |text: &str| text.parse::<u16>().ok().map(usize::from);
    let range = |part: &str| match part.split_once('-') {
        // A set has room for no more.
        Some((from, to)) => Some(number(from)?..=number(to)?.min(CpuSet::MAX_CPU)),
        None => number(part).map(|n| n..=n),
    };
    let wrong = || CpusError::NoList { field, list: list.chars().take(SHOWN).collect() };
    if list.len() > MAX_LIST {
        return Err(wrong());
    }
    let ranges: Option<Vec<_>> = list.trim().split(',').map(|part| range(part.trim())).collect();
    let ranges = ranges.ok_or_else(wrong)?;
    Ok(ranges.into_iter().flatten().collect())
}

fn check_nodes(list: &str) -> Result<(), CpusError> {
    let named = numbers("mems", list)?;
    // Without the file there is but one.
    let all = fs::read_to_string(ONLINE_NODES).unwrap_or_else(|_| "0".into());
    match numbers("mems", &all)?.iter().all(|node| named.contains(node)) {
        true => Ok(()),
        false => Err(CpusError::Nodes { list: list.into(), all: all.trim().into() }),
    }
}

impl Cpus {
    /// What a container names from now on.
    pub fn set(&self, container: &Id, cpus: Option<CpuSet>) {
        self.lock().insert(container.clone(), cpus);
    }

    /// A container that is no more names nothing.
    pub fn forget(&self, container: &Id) {
        self.lock().remove(container);
    }

    /// Binds the threads of these processes, if a container ever named processors.
    pub fn bind(&self, processes: impl IntoIterator<Item = u32>) -> Result<(), CpusError> {
        let named = self.lock().clone();
        if named.values().all(Option::is_none) {
            return Ok(());
        }
        let failed = |e: Errno| CpusError::Bind(e.into());
        let mut all = CpuSet::new();
        for cpus in named.values() {
            let cpus = cpus.map_or_else(|| sched_getaffinity(None), Ok).map_err(failed)?;
            (0..CpuSet::MAX_CPU).filter(|n| cpus.is_set(*n)).for_each(|n| all.set(n));
        }
        for process in processes {
            bind(process, &all).map_err(failed)?;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Id, Option<CpuSet>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All threads that a process has. One that has just ended needs nothing.
fn bind(process: u32, cpus: &CpuSet) -> rustix::io::Result<()> {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { return Ok(()) };
    let ids = threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for id in ids.filter_map(Pid::from_raw) {
        match sched_setaffinity(Some(id), cpus) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn cpu(cpus: &str, mems: &str) -> Result<Option<CpuSet>, CpusError> {
        let json = serde_json::json!({ "cpus": cpus, "mems": mems });
        of(&serde_json::from_value(json).unwrap())
    }

    #[test]
    fn lists_name_processors_that_are_there() {
        let ours = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|n| ours.is_set(*n)).unwrap();
        let set = cpu(&format!("{first},1000-65535"), "").unwrap().unwrap();
        assert!(set.is_set(first) && set.count() == 1);
        assert_eq!(cpu("0-1023", "").unwrap(), Some(ours));
        assert_eq!(cpu("", "").unwrap(), None);
        for list in ["a", "1-", "-", "0,,1", "65536", "-1"] {
            assert!(
                matches!(cpu(list, ""), Err(CpusError::NoList { field: "cpus", .. })),
                "{list}"
            );
        }
        let long = cpu(&"0-65535,".repeat(1 << 20), "").unwrap_err().to_string();
        assert!(long.len() < 200, "{long}");
        assert!(matches!(cpu("1023", ""), Err(CpusError::NoneOfOurs { .. })));
        let all = fs::read_to_string(ONLINE_NODES).unwrap_or_else(|_| "0".into());
        assert_eq!(cpu("", all.trim()).unwrap(), None);
        assert!(matches!(cpu("", "63"), Err(CpusError::Nodes { .. })));
    }

    struct Sleep(Child);

    impl Drop for Sleep {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_sandbox_runs_where_any_of_its_containers_may() {
        let ours = sched_getaffinity(None).unwrap();
        let mut numbers = (0..CpuSet::MAX_CPU).filter(|n| ours.is_set(*n));
        let (Some(one), Some(other)) = (numbers.next(), numbers.next()) else { return };
        let process = Sleep(Command::new("sleep").arg("1000").spawn().unwrap());
        let pid = process.0.id();
        let id = |name: &str| name.parse::<Id>().unwrap();
        let only = |n: usize| cpu(&n.to_string(), "").unwrap();
        let found = || sched_getaffinity(Pid::from_raw(pid as i32)).unwrap();
        let all = Cpus::default();
        all.set(&id("a"), None);
        all.bind([pid]).unwrap();
        assert_eq!(found(), ours);
        all.set(&id("a"), only(one));
        all.bind([pid]).unwrap();
        assert_eq!(Some(found()), only(one));
        all.set(&id("b"), only(other));
        all.bind([pid]).unwrap();
        assert!(found().is_set(one) && found().is_set(other) && found().count() == 2);
        all.forget(&id("a"));
        all.bind([pid]).unwrap();
        assert_eq!(Some(found()), only(other));
    }
}
