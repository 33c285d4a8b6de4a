//! What a hostile container or image tries, against its guest and its host: it fails in the guest, the guest goes on, and
//! the host does not notice.
//!
//! Others are tested where their subject is: limits and OOM in `limits`, streams in `refusals`, ids and hooks in `oci`,
//! `spec` and the shim's unit tests, shared files in `volumes` and in `ampoule-fsd`'s tests, frames in the VMM's.

use std::{
    fs,
    io::Read,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime},
};

use ampoule_tests::{Detached, ampoule, detached, root, run, stage};
use tempfile::TempDir;

/// A folder with Alpine's root file system, for a hostile image to be made of it.
fn alpine() -> TempDir {
    let folder = TempDir::new().unwrap();
    let tar =
        std::env::var_os("AMPOULE_ALPINE_TAR").expect("AMPOULE_ALPINE_TAR names an Alpine root");
    let unpacked = Command::new("tar").arg("-xf").arg(tar).arg("-C").arg(folder.path()).status();
    assert!(unpacked.unwrap().success());
    folder
}

fn image(folder: &TempDir) -> String {
    format!("dir:{}", folder.path().display())
}

/// What the host has at a path: to be the same afterwards.
fn seen(path: &str) -> (u64, i64, i64, u64) {
    let of = fs::symlink_metadata(path).unwrap();
    (of.ino(), of.mtime(), of.mtime_nsec(), of.size())
}

const OF_THE_HOST: [&str; 7] =
    ["/etc", "/etc/passwd", "/etc/shadow", "/etc/hosts", "/etc/resolv.conf", "/tmp", "/root"];

#[test]
fn links_of_an_image_lead_nowhere_but_into_the_container() {
    let folder = alpine();
    let path = folder.path();
    let before = OF_THE_HOST.map(seen);
    // Where mounts and what the agent writes go to.
    symlink("../../../../../etc", path.join("up")).unwrap();
    symlink("/proc/1/root/proc/self/cwd/../../etc", path.join("magic")).unwrap();
    for file in ["etc/hosts", "etc/hostname", "etc/resolv.conf"] {
        let _ = fs::remove_file(path.join(file));
        symlink("/up/../../../root/written", path.join(file)).unwrap();
    }
    let data = TempDir::new().unwrap();
    fs::write(data.path().join("file"), "of the volume").unwrap();
    let volume = format!("{}:/up/v", data.path().display());
    let script = "cat /etc/v/file; awk '$2 ~ /\\/v$/ { print $2 }' /proc/mounts";
    let out = run(["-v", &volume, &image(&folder), "sh", "-c", script]).output().ended_with(0);
    assert_eq!(out.text(), "of the volume/etc/v");
    // A link of /proc is no place to mount on.
    let magic = run(["--tmpfs", "/magic/x", &image(&folder), "true"]).output();
    magic.ended_with(125).says(&["/magic/x", "Too many levels of symbolic links"]);
    assert!(!Path::new("/etc/x").exists() && !Path::new("/etc/v").exists());
    assert_eq!(OF_THE_HOST.map(seen)[..5], before[..5]);
    assert!(!Path::new("/root/written").exists());
}

#[test]
fn an_images_files_are_read_with_a_bound_and_not_waited_for() {
    let folder = alpine();
    let passwd = folder.path().join("etc/passwd");
    let named = || {
        let began = Instant::now();
        let out = run(["--user", "someone", &image(&folder), "true"]).output();
        assert!(began.elapsed() < Duration::from_secs(60), "{out:?}");
        out.ended_with(125).says(&["someone", "/etc/passwd of the image cannot be read"])
    };
    fs::remove_file(&passwd).unwrap();
    assert!(Command::new("mkfifo").arg(&passwd).status().unwrap().success());
    named();
    fs::remove_file(&passwd).unwrap();
    symlink("/dev/zero", &passwd).unwrap();
    named();
    fs::remove_file(&passwd).unwrap();
    fs::File::create(&passwd).unwrap().set_len(10 << 30).unwrap();
    named();
    // What covers a folder of the image is not mounted where a link in its place leads.
    let place = folder.path().join("proc");
    fs::remove_dir_all(&place).unwrap();
    symlink("/etc", place).unwrap();
    let out = run([&image(&folder), "true"]).output();
    out.ended_with(125).says(&["/proc", "Too many levels of symbolic links"]);
}

#[test]
fn a_mount_does_not_follow_a_folder_that_becomes_a_link_meanwhile() {
    let shared = TempDir::new().unwrap();
    let [real, link] = ["real", "link"].map(|name| shared.path().join(name));
    fs::create_dir(&real).unwrap();
    symlink("/etc", &link).unwrap();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let swapping = {
        let (real, link) = (real.clone(), link.clone());
        thread::spawn(move || {
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    &real,
                    rustix::fs::CWD,
                    &link,
                    rustix::fs::RenameFlags::EXCHANGE,
                )
                .unwrap();
            }
        })
    };
    let volume = format!("{}:/vol", shared.path().display());
    let script = "cat /etc/alpine-release; awk '$3 == \"tmpfs\" { print $2 }' /proc/mounts";
    for _ in 0..4 {
        let words = ["-v", &volume, "--tmpfs", "/vol/real:size=1m", "alpine", "sh", "-c", script];
        let out = run(words).output();
        // In the container it is on one of both folders, or on none; the host's are as they were.
        assert!([0, 1, 125].contains(&out.code), "{out:?}");
        assert!(
            !fs::read_to_string("/proc/mounts").unwrap().contains(shared.path().to_str().unwrap())
        );
    }
    drop(stop);
    swapping.join().unwrap();
}

/// Every block device and some character devices by number, tried for reading and writing.
const EVERY_DEVICE: &str = "cd /tmp; n=0; for major in $(seq 1 260); do mknod b$major b $major 0 && \
    { head -c 1 b$major >/dev/null 2>&1 && echo block $major is read; \
      dd if=/dev/zero of=b$major bs=1 count=1 conv=notrunc 2>/dev/null && echo block $major is written; }; done; \
    for minor in 1 2 4 11; do mknod m$minor c 1 $minor && true <m$minor 2>/dev/null && echo char 1:$minor is open; done; \
    for minor in 200 228 229 232 236 237 238 241; do mknod x$minor c 10 $minor && true <x$minor 2>/dev/null && echo char 10:$minor is open; done; \
    echo tried";

#[test]
fn an_ordinary_containers_attempts_fail_in_the_guest() {
    let sandbox = detached(["--pids-limit", "200", "alpine", "sleep", "600"]);
    let fails = |script: &str, word: &str| {
        let out = sandbox.sh(script);
        assert_ne!(out.code, 0, "{script}: {}", out.text());
        assert!(out.error().contains(word), "{script}: {}", out.error());
    };
    // The kernel's switches.
    fails("echo '|/x' > /proc/sys/kernel/core_pattern", "Read-only");
    fails("echo c > /proc/sysrq-trigger", "");
    fails("echo /x > /sys/kernel/uevent_helper", "");
    fails("mkdir /c && mount -t cgroup none /c", "denied");
    fails("mount -t proc proc /mnt", "denied");
    fails("mount -o remount,rw /proc/sys", "denied");
    fails("umount /proc/kcore", "ermitted");
    fails("mkdir /sys/fs/cgroup/x", "Read-only");
    fails("echo 0 > /sys/fs/cgroup/pids.max", "");
    fails("unshare -U true", "ermitted");
    fails("unshare -m true", "ermitted");
    fails("nsenter -t 1 -m true", "ermitted");
    fails("chroot /proc/1/root/.. insmod /x.ko", "");
    // BusyBox's date shows it all the same.
    fails("date -s '2001-01-01 00:00:00'; exit 1", "can't set date: Operation not permitted");
    fails("dmesg", "ermitted");
    fails("hostname x", "");
    // Devices made by number; fewer than the default's would be a mistake of the test.
    assert_eq!(sandbox.sh(EVERY_DEVICE).text(), "tried");
    // Descriptors and folders of whoever starts processes here.
    let fds = sandbox.sh("ls -l /proc/1/fd /proc/self/fd | sed -n 's/.*-> //p' | sort -u");
    for target in fds.text().lines() {
        let usual = ["/dev/null", "pipe:", "/proc/", "socket:", "anon_inode:"];
        assert!(usual.iter().any(|start| target.starts_with(start)), "{target}");
        assert!(!target.starts_with("anon_inode:"), "{target}");
    }
    for cwd in ["/proc/self/fd/3", "/proc/self/fd/8/../..", "/proc/1/root/proc/self/fd/5"] {
        let out = ampoule(["exec", "-w", cwd, &sandbox.0, "ls", "../../../.."]).output();
        assert_ne!(out.code, 0, "{cwd}: {}", out.text());
    }
    the_agent_is_not_rewritten(&sandbox);
    a_storm_of_execs(&sandbox);
}

/// CVE-2019-5736: an exec of a script whose interpreter is /proc/self/exe would run, and show, the one who enters.
fn the_agent_is_not_rewritten(sandbox: &Detached) {
    let watch = "printf '#!/proc/self/exe\\n' > /evil; chmod +x /evil; \
        (while :; do for p in /proc/[0-9]*; do \
            [ \"$(readlink $p/exe)\" = /bin/busybox ] || ls -l $p/exe; \
            case $(readlink $p/exe) in /bin/busybox) ;; *) (true >> $p/exe) && echo written; esac; \
        done; done) >/found 2>/dev/null & echo $!";
    let watcher = sandbox.sh(&format!("{watch} > /watcher")).ended_with(0);
    drop(watcher);
    for _ in 0..5 {
        let out = ampoule(["exec", &sandbox.0, "/evil"]).output();
        assert_ne!(out.code, 0, "{out:?}");
    }
    let found = sandbox.sh("kill $(cat /watcher); cat /found").ended_with(0).text();
    assert!(!found.contains("written"), "{found}");
}

/// Commands that are none, users who cannot be, many at once: errors, and all is as before.
fn a_storm_of_execs(sandbox: &Detached) {
    let name = &*sandbox.0;
    ampoule(["exec", name, "/no/such"]).output().ended_with(127).says(&["/no/such", "not found"]);
    let nobody = ampoule(["exec", "-u", "4294967296", name, "true"]).output();
    nobody.ended_with(125).says(&["4294967296", "no such user"]);
    let running: Vec<_> = (0..8).map(|_| ampoule(["exec", name, "true"]).spawn()).collect();
    running.into_iter().for_each(|each| drop(each.finish().ended_with(0)));
    assert_eq!(sandbox.sh("echo still").text(), "still");
}

/// The beginnings of the disks that sandboxes share, as far as the test would write.
fn shared_disks() -> Vec<(PathBuf, Vec<u8>)> {
    let stored = fs::read_dir(root().join("rootfs")).unwrap().map(|entry| entry.unwrap().path());
    let images = stored.filter(|path| path.extension().is_some_and(|e| e == "erofs"));
    let disks = images.chain([stage().join("share/ampoule/guest.erofs")]);
    let begins = |path: PathBuf| {
        let mut bytes = Vec::new();
        fs::File::open(&path).unwrap().take(1 << 16).read_to_end(&mut bytes).unwrap();
        (path, bytes)
    };
    disks.map(begins).collect()
}

/// Root of the guest, with Perl to make calls that no command makes.
#[test]
fn root_of_the_guest_reaches_neither_the_host_nor_what_sandboxes_share() {
    let disks = shared_disks();
    assert!(disks.len() > 1);
    let host =
        ["core_pattern", "hostname", "modprobe"].map(|name| format!("/proc/sys/kernel/{name}"));
    let of_host = || host.clone().map(|path| fs::read_to_string(path).unwrap());
    let before = of_host();
    let sandbox = detached(["--privileged", "debian", "sleep", "600"]);
    let sh = |script: &str| sandbox.sh(script).ended_with(0).text();

    sh("echo '|/x' > /proc/sys/kernel/core_pattern; echo /x > /proc/sys/kernel/modprobe; \
        hostname x; date -s '2001-01-01 00:00:00'");
    assert!(
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() > 1_600_000_000
    );
    assert_eq!(of_host(), before);

    // Disks: what is read-only is so at the VMM, whatever the guest's kernel believes.
    let script = "cd /tmp; for disk in /sys/class/block/vd*; do n=${disk##*/}; \
        [ $(cat $disk/ro) = 1 ] || continue; mknod $n b $(tr : ' ' < $disk/dev); echo 0 > $disk/ro 2>/dev/null; \
        blockdev --setrw $n 2>/dev/null; \
        if dd if=/dev/urandom of=$n bs=4096 count=4 conv=notrunc,fsync 2>/dev/null; then echo $n written; else echo $n kept; fi; done";
    let written = sh(script);
    assert!(written.contains("vda kept") && !written.contains("written"), "{written}");
    assert!(shared_disks() == disks, "{written}");

    // Memory and ports of the machine.
    sh("mknod /tmp/mem c 1 1; for at in 0 640 786432 3407872 4161536 33554432; do \
        timeout 20 dd if=/tmp/mem of=/dev/null bs=4096 count=4 skip=$at 2>/dev/null; done; true");
    // No host is reached over vsock but the VMM, which passes on to nobody.
    let vsock = "perl -MSocket -e 'my $n = 0; for my $cid (1, 2, 3, 4, 0xffffffff) { \
        for my $port (1, 2, 22, 1023 .. 1026, 2375, 5000, 0xffffffff) { \
            socket(my $s, 40, SOCK_STREAM, 0) or next; setsockopt($s, 40, 6, pack(\"q q\", 0, 200000)); \
            $n++ if connect($s, pack(\"S S L L x4\", 40, 0, $port, $cid)); } } print $n'";
    assert_eq!(sh(vsock), "0");
    // The agent's own connections cannot be had by somebody else's; it goes on.
    assert_eq!(sh("echo still"), "still");
    drop(sandbox);
    run(["alpine", "true"]).output().ended_with(0);
}

#[test]
fn who_ends_its_guest_ends_only_that() {
    let other = detached(["alpine", "sleep", "600"]);
    // A panic of the guest's kernel, on running out of the container's memory; and a restart.
    let panics = "echo 2 > /proc/sys/vm/panic_on_oom; dd if=/dev/zero of=/dev/null bs=128M count=1; sleep 60";
    for (script, code) in [(panics, 137), ("reboot -f; sleep 60", 129)] {
        let out = run(["--privileged", "--memory", "64m", "alpine", "sh", "-c", script]).output();
        assert_eq!(out.code, code, "{script}: {out:?}");
        assert!(out.took < Duration::from_secs(60), "{script}: {:?}", out.took);
    }
    assert_eq!(other.sh("echo still").ended_with(0).text(), "still");
}

#[test]
fn names_and_sockets_give_no_way_in() {
    for name in ["../x", "a/b", "-rf", "", "x\u{0}y", "ü", &"x".repeat(300)] {
        if name.contains('\0') {
            continue;
        }
        let out = ampoule(["run", &format!("--name={name}"), "alpine", "true"]).output();
        assert!([2, 125].contains(&out.code), "{name}: {out:?}");
    }
    let sandbox = detached(["alpine", "sleep", "600"]);
    let abstracts = fs::read_to_string("/proc/net/unix").unwrap();
    let ours = abstracts.lines().filter(|line| line.contains('@') && line.contains("ampoule"));
    assert_eq!(ours.count(), 0, "{abstracts}");
    // The socket of its verbs is for its owner alone.
    let listing = Command::new("find").args(["/run/ampoule", "-type", "s"]).output().unwrap();
    let sockets = String::from_utf8(listing.stdout).unwrap();
    let of_it = sockets.lines().filter(|path| path.contains(&sandbox.0));
    for socket in of_it {
        let closed = Path::new(socket)
            .ancestors()
            .any(|part| fs::metadata(part).is_ok_and(|of| of.is_dir() && of.mode() & 0o077 == 0));
        assert!(closed || fs::metadata(socket).unwrap().mode() & 0o077 == 0, "{socket}");
    }
}
