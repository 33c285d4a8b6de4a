//! The guest's cgroup v2 tree: `/agent` for the agent alone, `/containers/ID` for each container.
//!
//! A [`Cgroup`] owns one container's directory; limits are in [`limits`], the device program in
//! [`devices`].

mod devices;
mod limits;

use std::{
    fs,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags, open},
    process::Pid,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::{
    oci::Resources,
    plan::{StepError, at, refuse},
};

const ROOT: &str = "/sys/fs/cgroup";
const AGENT: &str = "/sys/fs/cgroup/agent";
const CONTAINERS: &str = "/sys/fs/cgroup/containers";
/// Most processes listed: more than pid_max allows in a guest of ours.
const MAX_PIDS: usize = 1 << 16;

/// Moves the agent into a leaf of its own and hands the controllers on to the containers.
pub fn set_up() -> io::Result<()> {
    for directory in [AGENT, CONTAINERS] {
        match fs::create_dir(directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    fs::write("/sys/fs/cgroup/agent/cgroup.procs", "0")?;
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    let all: String = controllers.split_whitespace().map(|c| format!("+{c} ")).collect();
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", &all)?;
    fs::write("/sys/fs/cgroup/containers/cgroup.subtree_control", &all)
}

/// The directory of the agent's own cgroup.
pub fn of_agent() -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(open(AGENT, flags, Mode::empty())?)
}

/// Ends every process of every container.
pub fn kill_all() -> io::Result<()> {
    fs::write("/sys/fs/cgroup/containers/cgroup.kill", "1")
}

/// The cgroup of one container, until [`Cgroup::remove`].
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup of a container, with its limits. The id is a plain name.
    pub fn create(id: &str, resources: &Resources) -> Result<Self, StepError> {
        let path = Path::new(CONTAINERS).join(id);
        fs::create_dir(&path).map_err(at("cgroup", id))?;
        let made = Self::configure(path.clone(), resources);
        if made.is_err() {
            let _ = fs::remove_dir(&path);
        }
        made
    }

    fn configure(path: PathBuf, resources: &Resources) -> Result<Self, StepError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(&path, flags, Mode::empty()).map_err(at("cgroup", path.display()))?;
        let cgroup = Self { path, directory };
        cgroup.limit(resources)?;
        devices::attach(cgroup.directory(), &resources.devices)?;
        Ok(cgroup)
    }

    /// Sets what is named of all but the devices.
    pub fn limit(&self, resources: &Resources) -> Result<(), StepError> {
        if resources.memory.check_before_update {
            self.expect_less_than(resources.memory.limit.unwrap_or(0))?;
        }
        limits::of(resources)?.iter().try_for_each(|limit| self.set(limit))
    }

    /// Refuses a memory limit that the OOM killer would have to enforce at once.
    fn expect_less_than(&self, limit: i64) -> Result<(), StepError> {
        let used = self.read("memory.current").map_err(at("cgroup", "memory.current"))?;
        match used.trim().parse::<i64>().is_ok_and(|used| limit <= 0 || used <= limit) {
            true => Ok(()),
            false => Err(refuse("cgroup", format_args!("memory limit {limit}"), "more is in use")),
        }
    }

    fn set(&self, limit: &limits::Limit) -> Result<(), StepError> {
        let object = format_args!("{} = {:?}", limit.file, limit.value);
        match self.write(limit) {
            // A guest without swap, or without pages of that size, has nothing to limit.
            Err(e) if e.kind() == io::ErrorKind::NotFound && limits::may_be_missing(limit) => {
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(refuse("cgroup", object, "the guest kernel has no such control"))
            }
            result => result.map_err(at("cgroup", object)),
        }
    }

    /// Without O_CREAT, which makes the kernel answer EACCES for a file that is not there.
    fn write(&self, limit: &limits::Limit) -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).open(self.path.join(&limit.file))?;
        file.write_all(limit.value.as_bytes())
    }

    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The directory for one more process. Once a container has handed controllers on to cgroups of its
    /// own (systemd does), only leaves may hold processes: then it is the leaf of its init.
    pub fn directory_beside(&self, init: Pid) -> io::Result<OwnedFd> {
        if self.read("cgroup.subtree_control")?.trim().is_empty() {
            return self.directory.try_clone();
        }
        let own = fs::read_to_string(format!("/proc/{}/cgroup", init.as_raw_pid()))?;
        let path = own.trim().strip_prefix("0::").unwrap_or_default();
        let path = PathBuf::from(format!("{ROOT}{path}"));
        if !path.starts_with(&self.path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(open(path, flags, Mode::empty())?)
    }

    /// One of the cgroup's files.
    pub fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path.join(file))
    }

    /// Ends every process in here, at once.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Stops (or resumes) every process and waits until that is so.
    pub async fn freeze(&self, frozen: bool, bound: Duration) -> io::Result<()> {
        let value = if frozen { "1" } else { "0" };
        fs::write(self.path.join("cgroup.freeze"), value)?;
        self.event("frozen", value, bound).await
    }

    pub fn is_frozen(&self) -> bool {
        self.read("cgroup.freeze").is_ok_and(|value| value.trim() == "1")
    }

    /// Times the kernel killed something in here for lack of memory.
    pub fn oom_kills(&self) -> u64 {
        self.read("memory.events").ok().and_then(|events| kills(&events)).unwrap_or(0)
    }

    /// Every process in here and below.
    pub fn pids(&self) -> io::Result<Vec<Pid>> {
        let mut pids = Vec::new();
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            let procs = match fs::read_to_string(directory.join("cgroup.procs")) {
                // Removed meanwhile, or a threaded cgroup, whose processes its parent lists.
                Err(_) if directory != self.path => continue,
                procs => procs?,
            };
            pids.extend(procs.lines().filter_map(|l| l.parse().ok().and_then(Pid::from_raw)));
            if pids.len() > MAX_PIDS {
                return Err(io::Error::other("too many processes"));
            }
            directories.extend(children(&directory));
        }
        Ok(pids)
    }

    /// Waits until no process is left.
    pub async fn empty(&self, bound: Duration) -> io::Result<()> {
        self.event("populated", "0", bound).await
    }

    /// Removes the cgroup, and what the container made below it, once it is empty.
    pub async fn remove(&self, bound: Duration) -> io::Result<()> {
        let end = Instant::now() + bound;
        self.empty(bound).await?;
        // The last process has gone, but its exit may still hold the directory for a moment.
        loop {
            match remove_tree(&self.path) {
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                result => return result,
            }
        }
    }

    /// Waits until [`Self::oom_kills`] is more than `known`.
    pub async fn wait_oom(&self, known: u64) -> io::Result<u64> {
        let more = |events: &str| kills(events).filter(|&kills| kills > known);
        changed(self.path.join("memory.events"), more).await
    }

    /// Waits for a line of `cgroup.events`.
    async fn event(&self, key: &str, value: &str, bound: Duration) -> io::Result<()> {
        let reached = |events: &str| (field(events, key) == Some(value)).then_some(());
        let reached = changed(self.path.join("cgroup.events"), reached);
        timeout(bound, reached).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// Waits for what is looked for in a file of events, whose changes the kernel announces as priority events.
async fn changed<T>(path: PathBuf, find: impl Fn(&str) -> Option<T>) -> io::Result<T> {
    let file = fs::File::open(&path)?;
    // SAFETY: the file is moved in, and is not replaced.
    let changes = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY)? };
    loop {
        if let Some(found) = find(&fs::read_to_string(&path)?) {
            return Ok(found);
        }
        changes.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

fn kills(memory_events: &str) -> Option<u64> {
    field(memory_events, "oom_kill")?.parse().ok()
}

/// The value of a "key value" line.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.split_once(' ').filter(|(k, _)| *k == key)).map(|(_, v)| v)
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// Deepest first, without recursion: the container chose the depth.
fn remove_tree(path: &Path) -> io::Result<()> {
    let mut order = vec![path.to_owned()];
    let mut next = 0;
    while let Some(directory) = order.get(next) {
        let below = children(directory);
        order.extend(below);
        next += 1;
    }
    order.iter().rev().try_for_each(fs::remove_dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_flat_keyed_files() {
        let events = "low 0\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(field(events, "oom_kill"), Some("1"));
        assert_eq!(field(events, "oom"), Some("2"));
        assert_eq!(field(events, "nothing"), None);
    }

    #[test]
    fn trees_are_removed_deepest_first() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("c");
        fs::create_dir_all(root.join("a/b/c")).unwrap();
        fs::create_dir_all(root.join("d")).unwrap();
        remove_tree(&root).unwrap();
        assert!(!root.exists());
    }
}
