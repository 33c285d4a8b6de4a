//! Bad input and sudden deaths: the message names phase, object and cause within 2 s, and nothing is left.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use ampoule_tests::{ampoule, file_server_of, program, run, stage};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long after a fault its message must be there: 2 s of a processor, five times that of the bed's emulated one.
fn prompt() -> Duration {
    Duration::from_secs(if env::var_os("AMPOULE_BED").is_some() { 10 } else { 2 })
}

fn kernel() -> PathBuf {
    stage().join("share/ampoule/vmlinux")
}

fn guest() -> PathBuf {
    stage().join("share/ampoule/guest.erofs")
}

/// A copy of a file, changed.
fn spoilt(folder: &TempDir, source: &Path, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = fs::read(source).unwrap();
    change(&mut bytes);
    let path = folder.path().join(source.file_name().unwrap());
    fs::write(&path, bytes).unwrap();
    path
}

fn with_kernel(path: &Path) -> ampoule_tests::Outcome {
    run(["alpine", "true"]).env("AMPOULE_KERNEL", path).output()
}

#[test]
fn a_missing_kernel_is_named() {
    let out = with_kernel(Path::new("/no/such/vmlinux")).ended_with(125);
    assert!(out.took < prompt(), "{:?}", out.took);
    out.says(&["/no/such/vmlinux", "No such file"]);
}

#[test]
fn a_kernel_that_is_none_is_named_with_the_reason() {
    let folder = TempDir::new().unwrap();
    type Spoil = fn(&mut Vec<u8>);
    let cases: [(&str, Spoil); 4] = [
        ("cut short", |b| b.truncate(200_000)),
        ("ELF", |b| b[0] = b'X'),
        ("machine", |b| b[18] = 0xb7),
        ("ELF", |b| b.clear()),
    ];
    for (word, change) in cases {
        let path = spoilt(&folder, &kernel(), change);
        let out = with_kernel(&path).ended_with(125);
        assert!(out.took < prompt(), "{:?}", out.took);
        out.says(&[word, "kernel"]);
    }
}

#[test]
fn a_corrupt_guest_image_ends_with_the_console() {
    let folder = TempDir::new().unwrap();
    let path = spoilt(&folder, &guest(), |b| b[..64 * 1024].fill(0xa5));
    let out = run(["alpine", "true"]).env("AMPOULE_GUEST", &path).output().ended_with(125);
    out.says(&["panic", "VFS"]);
    let path = spoilt(&folder, &guest(), |b| b.truncate(512));
    run(["alpine", "true"]).env("AMPOULE_GUEST", &path).output().ended_with(125).says(&["panic"]);
    let out = run(["alpine", "true"]).env("AMPOULE_GUEST", "/no/guest").output().ended_with(125);
    out.says(&["/no/guest", "No such file"]);
}

#[test]
fn a_corrupt_rootfs_image_is_an_error_of_that_container() {
    let folder = TempDir::new().unwrap();
    let root = folder.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::create_dir(root.join("bin")).unwrap();
    fs::write(root.join("bin/x"), "x").unwrap();
    let image = format!("dir:{}", root.display());
    let store = folder.path().join("store");
    let first = run([&image, "--", "/bin/x"]).env("AMPOULE_ROOT", &store).output();
    assert_eq!(first.code, 126, "{}", first.error());
    let erofs = find(&store, ".erofs");
    fs::set_permissions(&erofs, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    // The superblock's checksum covers the first block; a file that fails it is made anew by the store.
    let mut bytes = fs::read(&erofs).unwrap();
    bytes[4096..].fill(0x5a);
    fs::write(&erofs, bytes).unwrap();
    let out = run([&image, "--", "/bin/x"]).env("AMPOULE_ROOT", &store).output();
    assert!([125, 126, 127].contains(&out.code), "{}: {}", out.code, out.error());
    out.says(&["ampoule: run: "]);
}

fn find(folder: &Path, suffix: &str) -> PathBuf {
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else if entry.file_name().to_string_lossy().ends_with(suffix) {
                return entry.path();
            }
        }
    }
    panic!("no *{suffix} in {}", folder.display());
}

/// The guest learns that what it wrote is not there, and goes on.
#[test]
fn a_host_without_room_for_a_scratch_disk_is_an_io_error_inside() {
    let (folder, tar) = (TempDir::new().unwrap(), env::var("AMPOULE_ALPINE_TAR").unwrap());
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=48m", "tmpfs"]).arg(folder.path());
    program(mount).output().ended_with(0);
    let import = ampoule(["image", "import", &tar, "alpine"]);
    import.env("AMPOULE_ROOT", folder.path()).output().ended_with(0);
    // The root waits for no disk; it says of what was not written when it is asked the next time.
    let script = "dd if=/dev/urandom of=/big bs=1M count=64; sync; dd if=/big of=/x bs=4k count=1 conv=fsync; echo $?; \
        rm /big; ls -d /etc";
    let out = run(["alpine", "sh", "-c", script]).env("AMPOULE_ROOT", folder.path()).output();
    let mut unmount = Command::new("umount");
    unmount.arg("--lazy").arg(folder.path());
    program(unmount).output();
    assert_eq!(out.text(), "1\n/etc", "{}", out.error());
    out.ended_with(0).says(&["I/O error"]);
}

#[test]
fn an_unknown_image_is_named_with_a_way_out() {
    let out = run(["alpin", "true"]).output().ended_with(125);
    assert!(out.took < prompt(), "{:?}", out.took);
    out.says(&["alpin", "ampoule image import"]);
    run(["oci:/no/such/dir", "true"]).output().ended_with(125).says(&["/no/such/dir"]);
}

#[test]
fn kvm_that_is_missing_or_refused_is_named() {
    // In a mount namespace of its own, so that other tests keep their /dev/kvm.
    for (prepare, words) in [
        ("mount --bind /dev/null /dev/kvm && exec", "not a KVM"),
        ("mount -t tmpfs none /dev && exec", "No such file"),
        // root without its capabilities is an ordinary owner.
        (
            "mount -t tmpfs none /mnt && mknod -m 0 /mnt/kvm c 10 232 && mount --bind /mnt/kvm /dev/kvm && \
          exec setpriv --bounding-set=-all",
            "Permission denied",
        ),
    ] {
        let program = stage().join("bin/ampoule");
        let script = format!("{prepare} {} run alpine true", program.display());
        let mut command = ampoule([""; 0]);
        command.command = Command::new("unshare");
        command
            .command
            .args(["-m", "sh", "-c", &script])
            .env("AMPOULE_ROOT", ampoule_tests::root());
        let out = command.output().ended_with(125);
        assert!(out.took < prompt(), "{:?}", out.took);
        out.says(&["/dev/kvm", words]);
    }
}

/// A guest image whose `/sbin/ampoule-agent` is a shell script.
fn guest_with_agent(folder: &TempDir, script: &str) -> PathBuf {
    let image = folder.path().join("guest.erofs");
    let build = format!(
        "cd {folder} && mkdir root && fsck.erofs --extract=root {guest} >&2 && \
         printf '%s\\n' '#!/bin/sh' '{script}' > root/sbin/ampoule-agent && \
         mkfs.erofs --quiet {image} root >&2",
        folder = folder.path().display(),
        guest = guest().display(),
        image = image.display(),
    );
    let made = Command::new("bash").args(["-c", &build]).status().unwrap();
    assert!(made.success(), "no guest image: {build}");
    image
}

#[test]
fn a_guest_without_an_agent_panics_and_the_run_shows_the_console() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("empty.erofs");
    fs::create_dir(folder.path().join("root")).unwrap();
    let mut mkfs = Command::new("mkfs.erofs");
    assert!(
        mkfs.arg("--quiet").arg(&image).arg(folder.path().join("root")).status().unwrap().success()
    );
    let out = run(["alpine", "true"]).env("AMPOULE_GUEST", &image).output().ended_with(125);
    out.says(&["the guest kernel panicked", "Kernel panic - not syncing"]);
}

#[test]
fn an_agent_that_dies_ends_the_run_with_the_console() {
    let folder = TempDir::new().unwrap();
    let image = guest_with_agent(&folder, "exit 3");
    let out = run(["alpine", "true"]).env("AMPOULE_GUEST", &image).output().ended_with(125);
    out.says(&["the guest kernel panicked", "Attempted to kill init"]);
}

/// A sandbox with all the processes that one can have.
const SHARING: [&str; 7] =
    ["-v", "/etc:/host:ro", "alpine", "--", "sh", "-c", "ls /host >&2; echo ready; sleep 60"];

#[test]
fn a_vmm_killed_with_sigkill_ends_every_process_with_137() {
    let mut running = run(SHARING).spawn();
    running.wait_for("ready");
    assert!(file_server_of(running.name()).is_some());
    let pid = Pid::from_raw(running.vmm()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    let began = Instant::now();
    let out = running.finish();
    assert!(began.elapsed() < prompt(), "{:?}", began.elapsed());
    out.ended_with(137).says(&["ampoule-vmm", "SIGKILL"]);
}

#[test]
fn a_dead_ampoule_takes_its_vm_and_its_file_server_along() {
    let mut running = run(SHARING).spawn();
    running.wait_for("ready");
    assert!(file_server_of(running.name()).is_some());
    running.signal(Signal::KILL);
    running.child.wait().unwrap();
    // Its record is all it could not take along; whoever lists sandboxes clears it away.
    ampoule(["ps"]).output().ended_with(0);
    running.finish().ended_with(137);
}
