//! What this host holds of things that a sandbox could leave behind.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::root;

/// A VM's memory, its namespaces and its kernel threads go shortly after its process.
const GRACE: Duration = Duration::from_secs(30);

/// Things by kind and name, and how many there are of each.
#[derive(Clone)]
pub struct Footprint {
    things: BTreeMap<String, usize>,
    /// Bytes that the host could still give to programs.
    pub available: u64,
}

impl Footprint {
    pub fn now() -> Self {
        let mut footprint = Self { things: BTreeMap::new(), available: available() };
        footprint.processes();
        footprint.lines("/proc/self/mountinfo", "mount", 4);
        footprint.lines("/proc/net/unix", "socket", 7);
        footprint.folders("cgroup", Path::new("/sys/fs/cgroup"));
        for folder in [root(), "/run/ampoule".into(), env::temp_dir(), "/dev/shm".into()] {
            footprint.files(&folder);
        }
        footprint.loop_devices();
        footprint
    }

    /// Fails the test unless everything becomes what it was, but for `slack` bytes of memory.
    #[track_caller]
    pub fn assert_unchanged(&self, slack: u64) {
        let deadline = Instant::now() + GRACE;
        loop {
            let now = Self::now();
            let lost = self.available.saturating_sub(now.available);
            let changed = self.difference(&now);
            if changed.is_empty() && lost <= slack {
                return;
            }
            let late = Instant::now() > deadline;
            assert!(!late, "{} KiB of memory lost; before and after: {changed:#?}", lost >> 10);
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn difference(&self, now: &Self) -> Vec<String> {
        let names = self.things.keys().chain(now.things.keys().filter(|n| !self.has(n)));
        let counts =
            |name: &String| [self, now].map(|at| at.things.get(name).copied().unwrap_or(0));
        let changed = names.map(|name| (name, counts(name))).filter(|(_, [was, is])| was != is);
        changed.map(|(name, [was, is])| format!("{name}: {was}, {is}")).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.things.contains_key(name)
    }

    fn count(&mut self, kind: &str, name: &str) {
        *self.things.entry(format!("{kind} {name}")).or_default() += 1;
    }

    /// Processes and kernel threads, apart from the kernel's pool of workers; the descriptors of each.
    fn processes(&mut self) {
        for process in entries(Path::new("/proc")) {
            let Ok(name) = fs::read_to_string(process.join("comm")) else { continue };
            let name = name.trim_end();
            if name.starts_with("kworker/") {
                continue;
            }
            let pid = process.file_name().unwrap_or_default().to_string_lossy();
            self.count("process", &format!("{pid} {name}"));
            for _ in entries(&process.join("fd")) {
                self.count("descriptors of", &format!("{pid} {name}"));
            }
        }
    }

    /// The lines of a file of the kernel, each named by the field of this number, if it has one.
    fn lines(&mut self, file: &str, kind: &str, field: usize) {
        for line in fs::read_to_string(file).unwrap_or_default().lines() {
            self.count(kind, line.split_whitespace().nth(field).unwrap_or("without a name"));
        }
    }

    fn folders(&mut self, kind: &str, top: &Path) {
        for path in entries(top).into_iter().filter(|path| path.is_dir()) {
            self.count(kind, &path.display().to_string());
            self.folders(kind, &path);
        }
    }

    fn files(&mut self, top: &Path) {
        for path in entries(top) {
            self.count("file", &path.display().to_string());
            if path.is_dir() && !path.is_symlink() {
                self.files(&path);
            }
        }
    }

    fn loop_devices(&mut self) {
        for device in entries(Path::new("/sys/block")) {
            if let Ok(file) = fs::read_to_string(device.join("loop/backing_file")) {
                self.count("loop device of", file.trim_end());
            }
        }
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn available() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.expect("MemAvailable") << 10
}
