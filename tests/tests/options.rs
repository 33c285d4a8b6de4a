//! Options of `run` that shape the container, as the container sees them.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use ampoule_tests::{Disk, program, run};
use tempfile::TempDir;

/// What a shell script says in a container run with these options.
#[track_caller]
fn says(options: &[&str], script: &str) -> String {
    let words = [options, &["alpine", "sh", "-c", script]].concat();
    run(words).output().ended_with(0).text()
}

const CAP_BND: &str = "grep CapBnd /proc/self/status | cut -f2";

#[test]
fn capabilities() {
    assert_eq!(says(&["--cap-drop", "ALL"], CAP_BND), "0000000000000000");
    // CAP_NET_ADMIN is number 12, CAP_SYS_ADMIN 21.
    assert_eq!(says(&["--cap-drop", "all", "--cap-add", "net_admin"], CAP_BND), "0000000000001000");
    let mounts = "mkdir /m && mount -t tmpfs none /m && echo mounted";
    assert_eq!(says(&["--cap-add", "SYS_ADMIN"], mounts), "mounted");
    run(["alpine", "sh", "-c", mounts]).output().ended_with(1);
}

#[test]
fn a_privileged_container_is_root_of_the_guest_alone() {
    let script = "grep Seccomp: /proc/self/status | cut -f2; echo 1 > /proc/sys/vm/swappiness && \
                  cat /proc/sys/vm/swappiness; mkdir /sys/fs/cgroup/x && echo made";
    assert_eq!(says(&["--privileged"], script), "0\n1\nmade");
    let script = "ls /dev/fuse /dev/kmsg /dev/net/tun; truncate -s 8M /i && losetup $(losetup -f) /i && losetup -a; \
                  ls /dev/kvm /dev/[hsv]d* 2>/dev/null";
    let devices = run(["--privileged", "alpine", "sh", "-c", script]).output().text();
    assert_eq!(devices, "/dev/fuse\n/dev/kmsg\n/dev/net/tun\n/dev/loop0: 0 /i");
}

#[test]
fn a_volume_of_its_own_is_no_part_of_the_roots_overlay() {
    let script = "cat /etc/apk/arch; cd /etc/apk && mkdir u w && \
                  mount -t overlay o -o lowerdir=/etc,upperdir=u,workdir=w /mnt && touch /mnt/x && ls u; touch /x";
    let options = ["--privileged", "--read-only", "-v", "/etc/apk", "alpine", "sh", "-c", script];
    let out = run(options).output().ended_with(1);
    assert_eq!(out.text(), "x86_64\nx");
    assert!(out.error().contains("Read-only file system"), "{}", out.error());
}

#[test]
fn an_images_volumes_begin_with_its_content_beside_a_read_only_root() {
    let folder = TempDir::new().unwrap();
    let layout = format!("{}/image", folder.path().display());
    let archive = std::env::var("AMPOULE_ALPINE_ARCHIVE").expect("see tests/run");
    for line in [
        format!("skopeo --insecure-policy copy --quiet oci-archive:{archive} oci:{layout}:1"),
        format!("umoci config --image {layout}:1 --config.volume /etc/apk --config.volume /new"),
    ] {
        let mut words = line.split(' ');
        let mut command = Command::new(words.next().unwrap());
        command.args(words);
        program(command).output().ended_with(0);
    }
    let script = "cat /etc/apk/arch; touch /etc/apk/x /new/x && ls /new; touch /x";
    let image = format!("oci:{layout}:1");
    let out = run(["--read-only", &image, "sh", "-c", script]).output().ended_with(1);
    assert_eq!(out.text(), "x86_64\nx");
}

#[test]
fn disks_of_the_host() {
    let (disk, other) = (Disk::new(), Disk::new());
    let options = [
        "--cap-add",
        "SYS_ADMIN",
        "--device",
        &format!("{}:/dev/xvda", disk.device),
        "--device",
        &format!("{}:/dev/disks/other:r", other.device),
    ];
    // The guest writes its caches out in the end.
    let script = "mount -t ext4 /dev/xvda /mnt && cat /mnt/host && echo from the guest > /mnt/guest; \
        dd if=/dev/disks/other bs=16M 2>/dev/null | wc -c; echo x 2>/dev/null > /dev/disks/other || echo refused; \
        stat -c '%F %a' /dev/xvda; ls /dev/vd* /dev/loop* 2>/dev/null; true";
    let said = says(&options, script);
    let mode = fs::metadata(&disk.device).unwrap().permissions().mode() & 0o7777;
    let expected = format!("from the host\n16777216\nrefused\nblock special file {mode:o}");
    assert_eq!(said, expected);
    assert_eq!(disk.read("guest"), "from the guest");
    assert_eq!(disk.read("host"), "from the host");

    let given = |device: &str| run(["--device", device, "alpine", "true"]).output();
    disk.while_mounted(|| {
        given(&disk.device).ended_with(125).says(&[
            "disks",
            &disk.device,
            "is in use",
            "read-only",
        ]);
    });
    given("/dev/null").ended_with(125).says(&["--device /dev/null", "not a block device"]);
    given("/dev/nosuch").ended_with(125).says(&["--device", "/dev/nosuch", "No such file"]);
}

#[test]
fn limits_sysctls_mounts_and_names() {
    let options =
        ["--ulimit", "nofile=100:200", "--sysctl", "net.core.somaxconn=77", "--hostname", "web"];
    let script = "ulimit -Sn; ulimit -Hn; cat /proc/sys/net/core/somaxconn; hostname";
    assert_eq!(says(&options, script), "100\n200\n77\nweb");
    let options = ["--tmpfs", "/t:size=1m,mode=1777", "--shm-size", "2m"];
    let script = "df -k /t /dev/shm | awk 'NR > 1 { print $2 }'; stat -c %a /t";
    assert_eq!(says(&options, script), "1024\n2048\n1777");
}

#[test]
fn entrypoint_and_variables() {
    let out = run(["--entrypoint", "/bin/echo", "alpine", "a", "b"]).output().ended_with(0);
    assert_eq!(out.text(), "a b");
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("env");
    fs::write(&file, "# two\nA=1\nB=2\n").unwrap();
    assert_eq!(says(&["--env-file", file.to_str().unwrap(), "-e", "B=3"], "echo $A$B"), "13");
}

#[test]
fn seccomp_and_no_new_privileges() {
    let status = "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status | cut -f2 | tr -d '\\n'";
    assert_eq!(says(&[], status), "02");
    let options = ["--security-opt", "seccomp=unconfined", "--security-opt", "no-new-privileges"];
    assert_eq!(says(&options, status), "10");
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("profile.json");
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
    fs::write(&file, profile).unwrap();
    let option = format!("seccomp={}", file.display());
    let out = says(&["--security-opt", &option], "mkdir /x 2>&1 || true");
    assert!(out.contains("No space left"), "{out}");
    fs::write(&file, "{").unwrap();
    let out = run(["--security-opt", &option, "alpine", "true"]).output().ended_with(125);
    out.says(&["profile.json", "EOF"]);
}

#[test]
fn an_init_reaps_and_passes_signals_on() {
    let script = "(true &); sleep 1; echo $$; ps -o stat | grep -c Z; cat /proc/1/comm; exit 7";
    let out = run(["--init", "alpine", "sh", "-c", script]).output().ended_with(7).text();
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0] != "1" && lines[1] == "0", "{out}");
    // Alone, it would be PID 1 and deaf to SIGTERM.
    let script = "echo ready; exec sleep 60";
    let mut running = run(["--init", "alpine", "sh", "-c", script]).spawn();
    running.wait_for("ready");
    running.signal(rustix::process::Signal::TERM);
    running.finish().ended_with(143);
    run(["--init", "alpine", "/no/such"]).output().ended_with(127);
}
