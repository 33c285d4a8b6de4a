//! Test suites of file systems: on a directory of the host, and on the same directory through a share.

use std::{collections::BTreeMap, env, fs, path::Path, process::Command};

use ampoule_tests::{detached, program, scaled, skip};
use tempfile::TempDir;

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/files");

/// What pjdfstest finds otherwise on a share: tests whose names end so, and why.
const DIFFERENCES: [(&str, &str); 2] = [
    ("::block", "a device made by a guest would be one of the host's: EPERM"),
    ("::char", "a device made by a guest would be one of the host's: EPERM"),
];

/// A file system of its own, as the one below the bed's has no extended attributes of users.
struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let (image, mounted) = (dir.path().join("image"), dir.path().join("mounted"));
        fs::create_dir(&mounted).unwrap();
        let file = fs::File::create(&image).unwrap();
        file.set_len(6 << 30).unwrap();
        program(with("mkfs.ext4", &["-q"], &image)).output().ended_with(0);
        let mut mount = with("mount", &["-o", "loop"], &image);
        mount.arg(&mounted);
        program(mount).output().ended_with(0);
        for folder in ["host", "share"] {
            fs::create_dir(mounted.join(folder)).unwrap();
        }
        Self(dir)
    }

    fn folder(&self, name: &str) -> String {
        self.0.path().join("mounted").join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mounted = self.0.path().join("mounted");
        program(with("umount", &["--lazy"], &mounted)).output();
    }
}

fn with(program: &str, options: &[&str], path: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(options).arg(path);
    command
}

/// What became of each of pjdfstest's tests, by its report.
fn verdicts(report: &str) -> BTreeMap<&str, &str> {
    let lines = report.lines().filter(|line| line.contains("::") && !line.starts_with('\t'));
    lines.filter_map(|line| line.split_once(' ')).map(|(name, how)| (name, how.trim())).collect()
}

#[test]
fn a_share_does_what_the_directory_does() {
    let (Some(suites), Some(posix)) = (env::var_os("AMPOULE_SUITES"), env::var_os("AMPOULE_POSIX"))
    else {
        return skip("a_share_does_what_the_directory_does", "the public suites were not built");
    };
    let (suites, posix) = (suites.into_string().unwrap(), posix.into_string().unwrap());
    let disk = Disk::new();
    let (host, share) = (disk.folder("host"), disk.folder("share"));
    let volumes =
        [format!("{share}:/share"), format!("{suites}:/suites:ro"), format!("{FILES}:/files:ro")];
    let posix = format!("{posix}:/posix:ro");
    let volumes = volumes.iter().chain([&posix]).flat_map(|volume| ["-v", volume]);
    let sandbox = detached(volumes.chain(["debian", "sleep", "3600"]));

    let groups =
        if scaled(0, 1) == 1 { &[""][..] } else { &["ftruncate::", "open::", "symlink::"] };
    let try_all = |suites: &str, files: &str, place: &str, run: &dyn Fn(&str) -> String| {
        let config = format!("-c {files}/pjdfstest.toml");
        let commands =
            groups.iter().map(|group| format!("{suites}/pjdfstest {config} -p {place} {group}"));
        commands.map(|command| run(&command)).collect::<String>()
    };
    let on_host = try_all(&suites, FILES, &host, &|command| {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]);
        program(shell).output().text() + "\n"
    });
    let on_share =
        try_all("/suites", "/files", "/share", &|command| sandbox.sh(command).text() + "\n");
    let (on_host, on_share) = (verdicts(&on_host), verdicts(&on_share));
    assert!(on_share.len() >= scaled(50, 390), "{on_share:?}");
    for (test, expected) in on_host {
        let found = on_share[test];
        let differs = DIFFERENCES.iter().any(|(names, _)| test.ends_with(names));
        // Without CAP_SYS_ADMIN it can mount nothing to try.
        if ![expected, found].contains(&"skipped") {
            assert_eq!(found != expected, differs, "{test}: {expected} on the host, here {found}");
        }
    }

    let operations = scaled(300, 20_000);
    let script = format!("/suites/fsx -f /files/fsx.toml -N {operations} -S 1 /share/f");
    let out = sandbox.sh(&script).ended_with(0);
    assert!(out.text().contains("A-OK") || out.error().contains("A-OK"), "{out:?}");

    let checks = match scaled(0, 1) {
        1 => "",
        _ => {
            "access_control extended names holes large_files temporary mappings renames_with device_nodes record_locks"
        }
    };
    sandbox.sh(&format!("POSIX_ENTRIES=1000 /posix share /share {checks}")).ended_with(0);
}
