//! `ampoule run -v`: directories and files of the host in a container, live in both directions, and nothing beside them.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use ampoule_tests::{Ampoule, Detached, Outcome, detached, file_server_of, program, run, scaled};
use rustix::{
    fs::{FlockOperation, fcntl_lock, flock},
    io::Errno,
    process::{Pid, Signal, kill_process},
};
use tempfile::TempDir;

/// How long what is done to files on one side may take to be seen on the other: what is known of them is kept for 1 s.
const SEEN: Duration = Duration::from_secs(10);

/// A folder `data` that is shared, beside one that is not.
fn host() -> TempDir {
    let host = TempDir::new().unwrap();
    for folder in ["data", "data/sub", "secrets", "mounted"] {
        fs::create_dir(host.path().join(folder)).unwrap();
    }
    let write = |name: &str, text: &str| fs::write(host.path().join(name), text).unwrap();
    write("data/file", "from the host\n");
    write("data/big", &"0123456789abcdef".repeat(100_000));
    write("one", "only this\n");
    write("secrets/key", "the host's key\n");
    symlink("../../../../../../../etc/alpine-release", host.path().join("data/up")).unwrap();
    symlink("../secrets/key", host.path().join("data/aside")).unwrap();
    symlink(host.path().join("secrets"), host.path().join("data/absolute")).unwrap();
    host
}

fn volume(host: &TempDir, name: &str, destination: &str) -> String {
    format!("{}:{destination}", host.path().join(name).display())
}

fn command(words: &[&str]) -> Outcome {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    program(command).output()
}

/// Repeats a script until it succeeds.
fn eventually(sandbox: &Detached, script: &str) {
    let deadline = Instant::now() + SEEN;
    while sandbox.sh(script).code != 0 {
        assert!(Instant::now() < deadline, "not seen: {script}");
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn both_sides_see_the_same_files_until_the_file_server_is_killed() {
    let host = host();
    let at = |name: &str| host.path().join(name);
    let volumes = [
        volume(&host, "data", "/data"),
        volume(&host, "data", "/read:ro"),
        volume(&host, "one", "/etc/one"),
        volume(&host, "mounted", "/mounted"),
    ];
    let mounted = at("mounted");
    let mounted = mounted.to_str().unwrap();
    command(&["mount", "-t", "tmpfs", "tmpfs", mounted]).ended_with(0);
    fs::write(at("mounted/file"), "there\n").unwrap();
    let volumes = volumes.iter().flat_map(|volume| ["-v", volume]);
    let sandbox = detached(volumes.chain(["alpine", "sleep", "600"]));

    let big = "0123456789abcdef".repeat(100_000);
    let script = "cat /data/file /etc/one; wc -c < /data/big; ls /data | tr '\\n' ' '";
    let text = sandbox.sh(script).ended_with(0).text();
    assert_eq!(text, "from the host\nonly this\n1600000\nabsolute aside big file sub up");

    // What the guest writes.
    let script = "set -e; cd /data; echo guest > new; echo more >> file; chmod 640 new; chown 1000:1000 new; \
        mkdir -p a/b; mv new a/b/; ln a/b/new hard; cp big copy; rm big; \
        i=0; while [ $i -lt 100 ]; do echo $i > sub/$i; i=$((i + 1)); done; echo changed > /etc/one";
    sandbox.sh(script).ended_with(0);
    let new = fs::metadata(at("data/a/b/new")).unwrap();
    assert_eq!((new.mode() & 0o7777, new.uid(), new.gid(), new.nlink()), (0o640, 1000, 1000, 2));
    assert_eq!(fs::read_to_string(at("data/file")).unwrap(), "from the host\nmore\n");
    assert!(fs::read_to_string(at("data/copy")).unwrap() == big && !at("data/big").exists());
    assert_eq!(fs::read_to_string(at("one")).unwrap(), "changed\n");
    for n in 0..100 {
        assert_eq!(
            fs::read_to_string(at("data/sub").join(n.to_string())).unwrap(),
            format!("{n}\n")
        );
    }

    // What the host writes.
    fs::write(at("data/later"), "later\n").unwrap();
    fs::write(at("data/file"), "replaced by the host\n").unwrap();
    fs::remove_dir_all(at("data/sub")).unwrap();
    eventually(&sandbox, "grep -q '^later$' /data/later && [ ! -e /data/sub ]");
    eventually(&sandbox, "grep -q '^replaced by the host$' /data/file");

    // What the host has unmounted stays, as it does for any mount namespace that has it.
    command(&["umount", mounted]).ended_with(0);
    assert!(!at("mounted/file").exists());
    sandbox
        .sh("cd /mounted; grep -q there file && echo more >> file && wc -l < file")
        .ended_with(0);

    // What it may not write, by any name.
    let script = "for f in file x; do echo x > /read/$f; done; rm /read/file; chmod 777 /read/file; mkdir /read/d; \
        mv /read/file /read/g; touch /read/file";
    let out = sandbox.sh(script);
    assert_eq!(out.error().matches("Read-only file system").count(), 7, "{}", out.error());
    assert_eq!(fs::read_to_string(at("data/file")).unwrap(), "replaced by the host\n");

    // What it cannot see: a link leads where the container says, which is in the container.
    let out = sandbox.sh("diff /data/up /etc/alpine-release && cat /data/aside /data/absolute/key");
    assert_eq!(out.ended_with(1).error().matches("No such file").count(), 2);
    let out = sandbox.sh(&format!("ls {} /data/.. /etc/one/..", host.path().display()));
    assert!(!(out.text() + &out.error()).contains("secrets"), "{out:?}");

    fsd_is_killed(&sandbox, host.path());
}

/// Errors, not hangs, for those who wait and those who come; the container goes on.
fn fsd_is_killed(sandbox: &Detached, host: &Path) {
    let script =
        "echo waiting > /tmp/state; while echo x >> /data/log; do :; done; echo ended > /tmp/state";
    let exec = ["exec", "-d", &sandbox.0, "sh", "-c", script];
    ampoule_tests::ampoule(exec).output().ended_with(0);
    eventually(sandbox, "[ -s /data/log ]");
    let fsd = file_server_of(&sandbox.0).expect("a file server");
    let confined = fs::read_to_string(format!("/proc/{fsd}/status")).unwrap();
    assert!(confined.contains("NoNewPrivs:\t1") && confined.contains("Seccomp:\t2"), "{confined}");
    assert_eq!(fs::read_dir(format!("/proc/{fsd}/root")).unwrap().count(), 0);
    kill_process(Pid::from_raw(fsd).unwrap(), Signal::KILL).unwrap();
    eventually(sandbox, "grep -q ended /tmp/state");
    let out = sandbox.sh("cat /data/copy; echo x > /data/y; ls /data/a; cat /etc/one; echo alive");
    assert!(out.error().matches("I/O error").count() >= 2, "{}", out.error());
    assert!(out.text().ends_with("alive"), "{}", out.text());
    assert!(!host.join("data/y").exists());
}

/// Takes a lock of a whole file by fcntl(2), as `lock FILE try|wait`, then runs a command.
const LOCK: &str = r#"use Fcntl;
my ($file, $how, @then) = @ARGV;
open my $f, "+<", $file or die "$file: $!";
my $lock = pack("ssx4qqix4", F_WRLCK, 0, 0, 0, 0);
fcntl($f, $how eq "wait" ? F_SETLKW : F_SETLK, $lock) or exit 1;
exit(system(@then) >> 8);
"#;

/// flock(2) and fcntl(2), of whoever comes first; who waits can be killed.
#[test]
fn locks_hold_against_the_host_and_waiting_for_one_can_be_ended() {
    let host = host();
    fs::write(host.path().join("data/lock"), LOCK).unwrap();
    let file = fs::File::options().read(true).write(true).open(host.path().join("data/file"));
    let file = file.unwrap();
    let both = |operation| [flock(&file, operation), fcntl_lock(&file, operation)];
    let volumes = [volume(&host, "data", "/data"), volume(&host, "data", "/read:ro")];
    let volumes = volumes.iter().flat_map(|volume| ["-v", volume]);
    let sandbox = detached(volumes.chain(["-w", "/data", "debian", "sleep", "600"]));
    let background = |script: &str| {
        let exec = ["exec", "-d", &sandbox.0, "sh", "-c", script];
        ampoule_tests::ampoule(exec).output().ended_with(0);
    };

    // The host has them.
    assert_eq!(both(FlockOperation::NonBlockingLockExclusive), [Ok(()); 2]);
    sandbox.sh("flock -n file true").ended_with(1);
    sandbox.sh("perl lock file try true").ended_with(1);
    let began = Instant::now();
    sandbox.sh("timeout -s KILL 1 flock file true").ended_with(137);
    sandbox.sh("timeout -s KILL 1 perl lock file wait true").ended_with(137);
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    background("flock file touch got-flock");
    background("perl lock file wait touch got-fcntl");
    thread::sleep(Duration::from_secs(1));
    assert!(!host.path().join("data/got-flock").exists());
    assert_eq!(both(FlockOperation::Unlock), [Ok(()); 2]);
    eventually(&sandbox, "[ -e got-flock ] && [ -e got-fcntl ]");

    // The guest has them, until it closes the files.
    background("echo $$ > /tmp/flock; exec flock -o file sleep 600");
    background("echo $$ > /tmp/fcntl; exec perl lock file wait sleep 600");
    let until = |expected: [Result<(), Errno>; 2]| {
        let deadline = Instant::now() + SEEN;
        while both(FlockOperation::NonBlockingLockShared) != expected {
            both(FlockOperation::Unlock).into_iter().for_each(Result::unwrap);
            assert!(Instant::now() < deadline, "not {expected:?}");
            thread::sleep(Duration::from_millis(200));
        }
    };
    until([Err(Errno::AGAIN); 2]);
    sandbox.sh("kill -9 $(cat /tmp/flock /tmp/fcntl)").ended_with(0);
    until([Ok(()); 2]);

    // Of what it may only read it locks nothing on the host, and among its own it does.
    assert_eq!(both(FlockOperation::NonBlockingLockExclusive), [Ok(()); 2]);
    sandbox.sh("cd /read; flock -n file sh -c '! flock -n file true'").ended_with(0);
}

/// The sandbox ends with its command, and so does its file server; all that was written is there.
#[test]
fn a_run_leaves_what_it_wrote_and_nothing_else() {
    let host = host();
    fs::set_permissions(host.path().join("data"), fs::Permissions::from_mode(0o777)).unwrap();
    let script = "umask 027; cp big mine; id -u > uid; exit 7";
    let data = volume(&host, "data", "/data");
    let out = run(["-v", &data, "-w", "/data", "-u", "1234:55", "alpine", "sh", "-c", script]);
    out.output().ended_with(7);
    let mine = fs::metadata(host.path().join("data/mine")).unwrap();
    assert_eq!((mine.uid(), mine.gid(), mine.mode() & 0o777), (1234, 55, 0o640));
    assert_eq!(mine.len(), 1_600_000);
    assert_eq!(fs::read_to_string(host.path().join("data/uid")).unwrap(), "1234\n");
}

/// So few descriptors as the shell is given, which root could raise else.
fn with_descriptors(limit: usize, mut ampoule: Ampoule) -> Ampoule {
    let mut shell = Command::new("sh");
    let script =
        format!("ulimit -n {limit}; exec setpriv --bounding-set=-sys_resource \"$0\" \"$@\"");
    shell.args(["-c", &script]).arg(ampoule.command.get_program());
    shell.args(ampoule.command.get_args());
    shell.envs(ampoule.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    ampoule.command = shell;
    ampoule
}

/// Each file that the guest knows costs the file server a descriptor: it is to forget those that it does not use.
#[test]
fn a_directory_has_more_files_than_its_server_descriptors() {
    let (files, limit) = (scaled(3_000, 100_000), scaled(3_000, 20_000));
    let host = host();
    let at = |name: &str| host.path().join("data").join(name);
    fs::create_dir(at("many")).unwrap();
    for n in 0..files {
        fs::File::create(at("many").join(n.to_string())).unwrap();
    }
    let watching = "exec 3</data/file; cd /data/sub; inotifyd - /data/big:c >/tmp/told & \
        while ! grep -qs 'inotify wd:1' /proc/$!/fdinfo/*; do sleep 0.1; done;";
    let all = "for pass in 1 2; do ls -l /data/many | grep -c '^-rw'; done; touch /data/sub/done;";
    let rest = "n=0; while [ ! -s /tmp/told ] && [ $n -lt 100 ]; do n=$((n + 1)); sleep 0.1; done; \
        cut -f 1 /tmp/told | head -n 1; cat <&3; ls";
    let data = volume(&host, "data", "/data");
    let script = [watching, all, rest].concat();
    let run = with_descriptors(limit, run(["-v", &data, "alpine", "sh", "-c", &script]));
    let run = run.spawn();
    let deadline = Instant::now() + Duration::from_secs(600);
    while !at("sub/done").exists() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(100));
    }
    fs::write(at("big"), "changed").unwrap();
    let out = run.finish().ended_with(0);
    let text = format!("{files}\n{files}\nc\nfrom the host\ndone");
    assert_eq!((out.text(), out.error()), (text, String::new()));
}

#[test]
fn what_cannot_be_shared_is_refused_by_name() {
    let host = host();
    let missing = volume(&host, "missing", "/x");
    for (volume, words) in [
        (&*missing, &["missing", "No such file", "make it first"][..]),
        ("/dev/null:/x", &["/dev/null: a device"]),
        ("/:/x", &["/: the whole host"]),
        ("/proc/sys:/x", &["/proc/sys: a part of this host's proc"]),
        ("data:/x", &["./NAME"]),
        ("/srv:x", &["absolute"]),
    ] {
        run(["-v", volume, "alpine", "true"]).output().ended_with(125).says(words);
    }
}
