//! What a sandbox leaves on its host: nothing, but for what `run -d` keeps until `rm`.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::root;

/// How long what is ending may take to be gone.
const GRACE: Duration = Duration::from_secs(2);

/// The folder for temporary files of a sandbox's `ampoule run`, and a mark of all its processes.
pub(crate) fn temporary(name: &str) -> PathBuf {
    Path::new("/tmp").join(format!("of-{name}"))
}

/// PIDs of the VMMs started for a sandbox, zombies aside.
pub fn processes_of(name: &str) -> Vec<i32> {
    called("ampoule-vmm", name)
}

/// The PID of its file server.
pub fn file_server_of(name: &str) -> Option<i32> {
    called("ampoule-fsd", name).first().copied()
}

/// PIDs of a program's processes for a sandbox.
fn called(program: &str, name: &str) -> Vec<i32> {
    let args =
        |args: &[&[u8]]| args[0].ends_with(program.as_bytes()) && args.contains(&name.as_bytes());
    processes(|folder| {
        let cmdline = fs::read(folder.join("cmdline")).unwrap_or_default();
        args(&cmdline.split(|b| *b == 0).collect::<Vec<_>>())
    })
}

/// PIDs of all that descends from its `ampoule run`.
fn descendants(name: &str) -> Vec<i32> {
    let mark = format!("TMPDIR={}", temporary(name).display());
    processes(|folder| {
        let environment = fs::read(folder.join("environ")).unwrap_or_default();
        environment.split(|b| *b == 0).any(|variable| variable == mark.as_bytes())
    })
}

fn processes(wanted: impl Fn(&Path) -> bool) -> Vec<i32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        wanted(&entry.path()).then_some(pid)
    });
    pids.collect()
}

/// Fails the test if a process, a socket, a mount, a loop device, a cgroup or a file of the sandbox is still there.
#[track_caller]
pub fn assert_nothing_left(name: &str) {
    let deadline = Instant::now() + GRACE;
    loop {
        let left = leftovers(name);
        if left.is_empty() {
            let _ = fs::remove_dir(temporary(name));
            return;
        }
        assert!(Instant::now() < deadline, "left behind by {name}: {left:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn leftovers(name: &str) -> Vec<String> {
    let servers = called("ampoule-fsd", name);
    let pids = [processes_of(name), servers, descendants(name)].concat();
    let mut left: Vec<String> = pids.iter().map(|pid| format!("process {pid}")).collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    left.extend(mounts.lines().filter(|l| l.contains(name)).map(|l| format!("mount {l}")));
    // A socket's file lies in its sandbox's folder.
    for folder in
        [root().join("run"), root().join("scratch"), "/run/ampoule".into(), "/sys/fs/cgroup".into()]
    {
        find(&folder, name, &mut left);
    }
    let temporary = fs::read_dir(temporary(name)).into_iter().flatten().flatten();
    left.extend(temporary.map(|entry| format!("temporary {}", entry.path().display())));
    left.extend(loops());
    left
}

/// Files and folders, also cgroups, that are called after the sandbox.
fn find(folder: &Path, name: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(name) {
            found.push(format!("file {}", entry.path().display()));
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&entry.path(), name, found);
        }
    }
}

/// Loop devices over files of the store: no test makes one.
fn loops() -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let files =
        devices.filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    files
        .filter(|file| Path::new(file).starts_with(root()))
        .map(|file| format!("loop device of {file}"))
        .collect()
}
