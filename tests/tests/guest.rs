//! What a container sees: a kernel, a machine and namespaces that are the sandbox's own.

use std::fs;

use ampoule_tests::run;

fn sh(options: &[&str], image: &str, script: &str) -> String {
    let mut args = options.to_vec();
    args.extend([image, "--", "sh", "-c", script]);
    run(args).output().ended_with(0).text()
}

#[test]
fn the_kernel_is_not_the_hosts() {
    let release = sh(&[], "alpine", "uname -r; cat /etc/alpine-release");
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.starts_with("6.12."), "{release}");
    assert!(!release.starts_with(host.trim()), "{release}");
    assert!(release.contains("\n3."), "{release}");
}

#[test]
fn the_workload_is_pid_1_of_its_own_namespace() {
    assert_eq!(sh(&[], "alpine", "echo $$; ls -d /proc/[0-9]* | wc -l").lines().next(), Some("1"));
    let out = run(["alpine", "--", "ps", "-o", "pid,args"]).output().ended_with(0).text();
    let lines: Vec<&str> = out.lines().map(str::trim).collect();
    assert_eq!(lines[1..], ["1 ps -o pid,args"]);
}

#[test]
fn the_hostname_is_the_sandboxs() {
    let mut running = run(["alpine", "--", "hostname"]).spawn();
    let name = running.name().to_string();
    running.wait_for(&name);
    running.finish().ended_with(0);
}

#[test]
fn programs_of_every_libc_run() {
    assert!(sh(&[], "debian", "cat /etc/debian_version; ldd --version").contains("12."));
    assert!(sh(&[], "alpine", "ldd 2>&1; true").contains("musl"));
    assert_eq!(sh(&[], "mini", "echo static"), "static");
    let says = |options: &[&str], image: &str| {
        run([options, &[image, "/libc"]].concat()).output().ended_with(0).text()
    };
    assert_eq!(says(&[], "static"), "static true");
    assert_eq!(says(&["--read-only", "--user", "nonroot"], "distroless"), "libc.so.6 true");
    assert_eq!(says(&[], "compat"), "ld-musl true");
}

#[test]
fn there_is_loopback_and_nothing_else() {
    assert_eq!(sh(&[], "alpine", "ls /sys/class/net"), "lo");
    let ping = "ping -c 1 127.0.0.1 >/dev/null && echo up";
    assert_eq!(sh(&[], "alpine", ping), "up");
}

#[test]
fn the_devices_are_the_usual_ones() {
    let out = sh(&[], "alpine", "ls /dev; head -c 4 /dev/urandom | wc -c; echo x > /dev/null");
    for node in
        ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "fd", "stdout"]
    {
        assert!(out.lines().any(|l| l == node), "no /dev/{node} in {out}");
    }
    assert!(!out.contains("vd"), "a disk is visible: {out}");
}

#[test]
fn a_disk_cannot_be_reached_by_making_its_node() {
    let script = "mknod /tmp/vda b 254 0; dd if=/tmp/vda of=/dev/null count=1 2>&1; \
                  mknod /tmp/vdb b 253 0; dd if=/tmp/vdb of=/dev/null count=1 2>&1; true";
    let out = sh(&[], "alpine", script);
    assert!(!out.contains("1+0 records in"), "{out}");
}

#[test]
fn capabilities_seccomp_and_no_new_privileges_are_dockers() {
    let out = sh(&[], "alpine", "grep -E '^(CapEff|CapBnd|Seccomp|NoNewPrivs):' /proc/self/status");
    assert!(out.contains("CapEff:\t00000000a80425fb"), "{out}");
    assert!(out.contains("CapBnd:\t00000000a80425fb"), "{out}");
    assert!(out.contains("Seccomp:\t2"), "{out}");
}

#[test]
fn sensitive_paths_are_masked_or_read_only() {
    let script = "cat /proc/kcore | wc -c; echo 1 > /proc/sys/kernel/panic; echo b > /proc/sysrq-trigger; true";
    let out = run(["alpine", "--", "sh", "-c", script]).output().ended_with(0);
    assert_eq!(out.text(), "0");
    out.says(&["Read-only file system"]);
}

#[test]
fn only_the_three_streams_are_open() {
    assert_eq!(sh(&[], "alpine", "ls /proc/self/fd | tr '\\n' ' '"), "0 1 2 3");
    assert_eq!(sh(&[], "alpine", "echo there > /dev/stdout"), "there");
}
