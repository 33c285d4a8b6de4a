//! What a containerd's tasks left behind.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{Containerd, Namespaces, entries};

/// Folders that are empty when there is no task: shims' sockets, bundles, network namespaces, temporary files, sandboxes.
const EMPTY: [&str; 7] = [
    "/run/containerd/s",
    "/run/containerd/io.containerd.runtime.v2.task/default",
    "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "/run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io",
    "/run/netns",
    "/run/test/tmp",
    "/run/test/ampoule/run/sandboxes",
];

impl Containerd {
    /// Waits until nothing is left of the tasks there were.
    pub fn assert_nothing_left(&self) {
        nothing_is_left(|| self.left(), || self.log());
    }

    /// Processes, mounts, sockets, loop devices, files and cgroups that are there without a task. FIFOs are their client's.
    pub fn left(&self) -> Vec<String> {
        let own = ["catatonit", "containerd", "ctr"];
        let processes = self.inside.processes().into_iter();
        let processes = processes.filter(|process| !own.contains(&process.program()));
        let mut left: Vec<String> = processes.map(|process| format!("{process:?}")).collect();
        let things = things(&self.inside).into_iter();
        left.extend(things.filter(|thing| !self.things.contains(thing)));
        let mut files: Vec<PathBuf> =
            EMPTY.iter().flat_map(|folder| entries(&self.inside.path(folder))).collect();
        files.extend(named(Path::new("/sys/fs/cgroup"), &self.name));
        files.extend(named(&self.inside.path("/run/test/ampoule"), &self.name));
        left.extend(files.iter().map(|path| path.display().to_string()));
        left
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("containerd's last words: {}", self.log());
            return;
        }
        self.assert_nothing_left();
    }
}

/// Mounts and named sockets inside, and loop devices, which are the host's.
pub fn things(inside: &Namespaces) -> Vec<String> {
    let mut things: Vec<String> =
        inside.mounts().iter().map(|mount| format!("mount {mount}")).collect();
    let sockets = fs::read_to_string(inside.path("/proc/1/net/unix")).unwrap_or_default();
    let names = sockets.lines().skip(1).filter_map(|line| line.split_whitespace().nth(7));
    things.extend(names.map(|name| format!("socket {name}")));
    let files =
        entries(Path::new("/sys/block")).into_iter().map(|disk| disk.join("loop/backing_file"));
    let loops = files.filter_map(|file| Some((fs::read_to_string(&file).ok()?, file)));
    things.extend(loops.map(|(backing, file)| format!("{} of {}", file.display(), backing.trim())));
    things
}

/// Everything below `folder` whose name contains `name`.
fn named(folder: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in entries(&folder) {
            if path.file_name().is_some_and(|last| last.to_string_lossy().contains(name)) {
                found.push(path);
            } else if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
                folders.push(path);
            }
        }
    }
    found
}

/// Waits until nothing is left.
pub fn nothing_is_left(left: impl Fn() -> Vec<String>, log: impl Fn() -> String) {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let left = left();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {left:#?}\n{}", log());
        thread::sleep(Duration::from_millis(100));
    }
}
