//! What the host refuses `ampoule`: room, descriptors, writing. Whatever is refused at whichever step, the command
//! works or says why in the shape of all errors, and leaves nothing behind. (What needs a VM is in the end-to-end tests.)

#![allow(clippy::unwrap_used)]

mod user;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use user::{User, stderr, with_descriptors};

/// No command of these tests takes longer.
const LIMIT: Duration = Duration::from_secs(20);

/// A user who has an image in `root`, and no guest kernel: each run of his ends in its boot.
fn user() -> User {
    let mut user = User::new();
    user.write("root/bin/true", "");
    user.write("root/noise", &"noise".repeat(60_000));
    user.environment = vec![
        ("AMPOULE_KERNEL", "/no/such/kernel".into()),
        // Below the store, so that what lies in the way of one lies in the way of all.
        ("TMPDIR", user.path("store/tmp-of-all")),
    ];
    user
}

fn image(user: &User) -> String {
    format!("dir:{}", user.path("root").display())
}

/// A tar of that root file system.
fn tar(user: &User) -> PathBuf {
    let path = user.path("root.tar");
    let mut archive = tar::Builder::new(fs::File::create(&path).unwrap());
    archive.append_dir_all("", user.path("root")).unwrap();
    archive.finish().unwrap();
    path
}

/// The files below the store that outlive no command: temporary files, locks, records of runs.
fn left(user: &User) -> Vec<PathBuf> {
    let folders = ["tmp", "locks", "run/sandboxes", "tmp-of-all"];
    let files =
        folders.iter().filter_map(|folder| fs::read_dir(user.path("store").join(folder)).ok());
    files.flatten().map(|entry| entry.unwrap().path()).collect()
}

/// A file system of its own over a folder; gone when dropped.
struct Mount(PathBuf);

impl Mount {
    /// `None`, said aloud, where that needs another user.
    fn new(path: PathBuf, options: &str) -> Option<Self> {
        fs::create_dir_all(&path).unwrap();
        let mount = Self(path);
        if mount.set(options) {
            return Some(mount);
        }
        eprintln!("SKIPPED: mounting a file system needs root");
        std::mem::forget(mount);
        None
    }

    fn set(&self, options: &str) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "none"]).arg(&self.0).status().unwrap().success()
    }

    fn change(&self, options: &str) {
        assert!(self.set(&format!("remount,{options}")), "{options}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Ends within the limit, or fails the test.
fn end(mut child: Child) -> Output {
    let deadline = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it hangs: {}", stderr(&child.wait_with_output().unwrap()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

fn spawn(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The error of a command that failed, from its `--json`.
fn error(output: &Output) -> Value {
    let text = stderr(output);
    let line = text.lines().find(|line| line.starts_with("{\"error\":"));
    let json: Value = serde_json::from_str(line.unwrap_or_else(|| panic!("{output:?}"))).unwrap();
    assert_eq!(json["error"]["exit_code"].as_i64(), output.status.code().map(i64::from), "{text}");
    json["error"].clone()
}

/// Whether a command worked; if it failed, then for the reason that is expected, with a hint.
fn works(output: &Output, reason: &str) -> bool {
    if output.status.success() {
        return true;
    }
    let error = error(output);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(reason), "{error}");
    assert!(error["hint"].is_string(), "{error}");
    false
}

/// As [`works`], for a run: it works if it comes as far as its boot.
fn boots(output: &Output, reason: &str) -> bool {
    let error = error(output);
    error["object"] == "/no/such/kernel" || works(output, reason)
}

#[test]
fn programs_get_their_errors_as_json() {
    let user = user();
    let root = image(&user);
    for (args, phase, object) in [
        (&["run", &root, "/bin/true"][..], "boot", "/no/such/kernel"),
        (&["run", "-d", &root, "/bin/true"], "boot", "/no/such/kernel"),
        (&["run", "--pull", "never", "x"], "image", "x:latest"),
        (&["run", "127.0.0.1:1/x"], "pull", "127.0.0.1:1/x:latest"),
        (&["run", "--env-file", "/no/env", &root], "options", "/no/env"),
        (&["run", "--memory", "1m", &root], "options", "--memory"),
        (&["run", "dir:/no/dir"], "image", "/no/dir"),
        (&["image", "import", "/no/tar", "x"], "image", "/no/tar"),
        (&["stop", "nobody"], "sandbox", "nobody"),
        (&["cp", "nobody:/x", "."], "sandbox", "nobody"),
        (&["exec", "nobody", "ls"], "sandbox", "nobody"),
    ] {
        let output = end(spawn(user.command(&[&["--json"], args].concat())));
        assert!(output.stdout.is_empty() && stderr(&output).lines().count() == 1, "{output:?}");
        let error = error(&output);
        assert_eq!((&error["phase"], &error["object"]), (&phase.into(), &object.into()), "{error}");
        assert_eq!(error["exit_code"], 125);
    }
    assert_eq!(left(&user), [] as [PathBuf; 0]);
}

#[test]
fn a_disk_that_fills_up_at_any_point_of_an_import_is_named() {
    let user = user();
    let tar = tar(&user);
    for source in [tar.to_str().unwrap(), "-"] {
        let Some(store) = Mount::new(user.path("store"), "size=16k") else { return };
        let mut failed = 0;
        for kilobytes in (16..).step_by(44) {
            store.change(&format!("size={kilobytes}k"));
            let mut command = user.command(&["--json", "image", "import", source, "x"]);
            command.stdin(fs::File::open(&tar).unwrap());
            if works(&end(spawn(command)), "No space left") {
                break;
            }
            assert_eq!(left(&user), [] as [PathBuf; 0], "with {kilobytes} kB");
            failed += 1;
        }
        assert!(failed > 5, "{failed}");
        assert_eq!(user.ok(&["images", "-q"]), "docker.io/library/x:latest\n");
        assert_eq!(user.count("rootfs"), 1);
    }
}

/// A file system with so few inodes refuses the making of each file in turn.
#[test]
fn a_run_that_cannot_make_the_nth_file_says_so_and_leaves_nothing() {
    let user = user();
    let root = image(&user);
    for args in
        [&["--json", "run", &root, "/bin/true"][..], &["--json", "run", "-d", &root, "/bin/true"]]
    {
        let Some(store) = Mount::new(user.path("store"), "nr_inodes=1") else { return };
        let mut failed = 0;
        for inodes in 1.. {
            store.change(&format!("nr_inodes={inodes}"));
            if boots(&end(spawn(user.command(args))), "No space left") {
                break;
            }
            assert_eq!(left(&user), [] as [PathBuf; 0], "with {inodes} inodes");
            failed += 1;
        }
        assert!(failed > 5, "{failed}");
        assert_eq!(left(&user), [] as [PathBuf; 0]);
    }
}

#[test]
fn a_state_folder_without_room_is_named() {
    let user = user();
    let root = image(&user);
    let command = || user.command(&["--json", "run", &root, "/bin/true"]);
    assert!(boots(&end(spawn(command())), ""));
    let Some(_state) = Mount::new(user.path("store/run"), "size=4k") else { return };
    fs::write(user.path("store/run/full"), [0; 4096]).unwrap();
    let output = end(spawn(command()));
    assert!(!boots(&output, "No space left"));
    let error = error(&output);
    assert_eq!(error["phase"], "state");
    assert!(error["object"].as_str().unwrap().contains("store/run"), "{error}");
    assert_eq!(left(&user), [] as [PathBuf; 0]);
}

#[test]
fn a_read_only_run_is_named_and_what_only_reads_works() {
    let user = user();
    let root = image(&user);
    let command = |args: &[&str]| end(spawn(user.command(&[&["--json"], args].concat())));
    assert!(boots(&command(&["run", &root, "/bin/true"]), ""));
    let Some(state) = Mount::new(user.path("store/run"), "ro") else { return };
    for args in [&["run", &root, "/bin/true"][..], &["run", "-d", &root, "/bin/true"]] {
        let output = command(args);
        assert!(!boots(&output, "Read-only file system"));
        assert_eq!(error(&output)["phase"], "state");
    }
    assert_eq!(command(&["ps", "-a"]).stdout, b"[]\n");
    assert!(user.error(&["stop", "web"]).contains("there is none"));
    drop(state);
    let Some(_store) = Mount::new(user.path("store"), "ro") else { return };
    assert!(!works(&command(&["images"]), "Read-only file system"));
}

/// With each limit one more of the opened files is refused.
#[test]
fn whichever_descriptor_is_refused_the_command_works_or_says_so() {
    let user = user();
    let root = image(&user);
    let tar = tar(&user);
    user.ok(&["image", "import", tar.to_str().unwrap(), "old"]);
    for args in [
        &["image", "import", tar.to_str().unwrap(), "new"][..],
        &["image", "inspect", "old"],
        &["images"],
        &["image", "prune"],
        &["image", "rm", "new"],
        &["ps", "-a"],
        &["run", &root, "/bin/true"],
        &["run", "-d", &root, "/bin/true"],
    ] {
        for limit in 3.. {
            let output = with_descriptors(limit, user.command(&[&["--json"], args].concat()));
            if output.status.code() == Some(127) {
                // Too few for the C library to load the program.
                continue;
            }
            let done = match args[0] {
                "run" => boots(&output, "Too many open files"),
                _ => works(&output, "Too many open files"),
            };
            assert_eq!(left(&user), [] as [PathBuf; 0], "{args:?} with {limit} descriptors");
            if done {
                break;
            }
        }
    }
}

#[test]
fn of_runs_with_one_name_at_a_time_one_has_it() {
    let user = user();
    let root = image(&user);
    assert!(boots(&end(spawn(user.command(&["--json", "run", &root, "/bin/true"]))), ""));
    for _ in 0..5 {
        let args = ["--json", "run", "--name", "one", &root, "/bin/true"];
        let runs: Vec<Child> = (0..8).map(|_| spawn(user.command(&args))).collect();
        let booted = runs.into_iter().map(end);
        assert!(booted.filter(|output| boots(output, "the name is in use")).count() > 0);
        assert_eq!(left(&user), [] as [PathBuf; 0]);
    }
    assert!(Path::new(&user.path("store/run/names")).exists());
}
