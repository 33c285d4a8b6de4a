//! Pods through containerd's CRI plugin: the same tests with runc, which proves every expectation, and with ampoule.

use std::{fs, time::Instant};

use ampoule_tests::{
    containerd::Containerd,
    cri::{NamespaceOption, Pod},
    host,
};

host!(runc_1_6 = Runc V1_6: a_pod a_pod_that_shares_processes containerd_killed);
host!(runc_1_7 = Runc V1_7: a_pod a_pod_that_shares_processes containerd_killed);
host!(ampoule_1_6 = Ampoule V1_6: a_pod a_pod_that_shares_processes containerd_killed);
host!(ampoule_1_7 = Ampoule V1_7: a_pod);

/// As the kubelet has them by default: processes are each container's own.
const OWN_PROCESSES: NamespaceOption = NamespaceOption { network: 0, pid: 1, ipc: 0 };

const SERVE: &str =
    "trap 'echo bye; exit 43' TERM; echo out; echo err >&2; while :; do sleep 0.1; done";

fn a_pod(containerd: &Containerd) {
    let pod = Pod::run(containerd, "web", OWN_PROCESSES);
    let status = pod.status();
    let (state, ip) = status.status.map(|s| (s.state, s.network.unwrap_or_default().ip)).unwrap();
    assert_eq!(state, 0);
    // What stands for the pod on the host is in the pod's network namespace.
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    let mut enter = containerd.inside.command("nsenter");
    enter.args(["--net", "--target", &info["pid"].to_string(), "ip", "-brief", "address"]);
    let addresses = ampoule_tests::program(enter).output().ended_with(0).text();
    assert!(!ip.is_empty() && addresses.contains(&ip), "{ip} is not in {addresses}");

    let web = pod.start("web", 0, 0, SERVE);
    let side = pod.start("side", 0, 0, SERVE);
    let done = pod.exec(&web, "echo out; echo err >&2; exit 3", 60).unwrap();
    assert_eq!((&*done.stdout, &*done.stderr, done.exit_code), (&b"out\n"[..], &b"err\n"[..], 3));
    assert_eq!(pod.sh(&web, "hostname"), "web");
    // The pod's network is the guest's, with the bridge of the host on its other side, by IPv4 and by IPv6.
    assert!(pod.sh(&side, "ip -4 -o address show eth0").contains(&ip), "{ip}");
    for gateway in ["10.88.0.1", "fd88::1"] {
        pod.sh(&web, &format!("ping -c 1 -w 20 {gateway}"));
    }
    pod.sh(&web, "nc -lk -p 80 -e cat >/dev/null 2>&1 & sleep 1");
    let addresses = pod.sh(&web, "ip -6 -o address show eth0 scope global");
    let ipv6 = addresses.split_whitespace().nth(3).and_then(|a| a.split('/').next()).unwrap();
    for address in [&*ip, ipv6] {
        let mut echo = containerd.inside.command("bash");
        echo.args([
            "-c",
            "exec 3<>/dev/tcp/$0/80; echo hello >&3; read -t 30 line <&3; echo $line",
        ]);
        echo.arg(address);
        assert_eq!(ampoule_tests::program(echo).output().ended_with(0).text(), "hello");
    }
    // Apart: files and processes. Shared: network, shared memory, host name.
    pod.sh(&web, "echo x > /own; echo y > /dev/shm/common; nc -l -p 8080 > /heard 2>&1 & sleep 1");
    assert_eq!(pod.sh(&side, "ls /own 2>/dev/null; cat /dev/shm/common; hostname"), "y\nweb");
    assert_eq!(
        pod.sh(
            &side,
            "cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l | xargs test 8 -gt && echo few"
        ),
        "sh\nfew"
    );
    pod.sh(&side, "echo hello | nc 127.0.0.1 8080");
    assert_eq!(pod.sh(&web, "sleep 1; cat /heard"), "hello");
    let probes = Instant::now();
    for _ in 0..20 {
        pod.sh(&web, "true");
    }
    eprintln!("20 probes took {:?}", probes.elapsed());
    assert!(pod.exec(&side, "sleep 600", 1).unwrap_err().message().contains("timeout"));

    pod.sh(&web, "echo from web > /volume/file; echo last words > /dev/termination-log");
    assert_eq!(fs::read_to_string(pod.volume().join("file")).unwrap(), "from web\n");
    assert_eq!(fs::read_to_string(pod.termination_log("web")).unwrap(), "last words\n");
    fs::write(pod.volume().join("later"), "from the host\n").unwrap();
    let seen = "cat /volume/file /config/later; ! touch /config/x && ! [ -s /dev/termination-log ]";
    assert_eq!(pod.sh(&side, seen), "from web\nfrom the host");

    let (cpu, memory) = pod.stats(&web);
    assert!(cpu > 0 && memory > 0, "{cpu} {memory}");

    // One ends, the other does not notice; the first comes again.
    pod.stop_container(&side, 10);
    assert_eq!(pod.exited(&side).exit_code, 43);
    assert_eq!(
        pod.log("side", 0)
            .iter()
            .filter(|(stream, text)| stream == "stderr" && text == "err")
            .count(),
        1
    );
    assert_eq!(pod.log("side", 0).last(), Some(&("stdout".into(), "bye".into())));
    assert_eq!(pod.container(&web).state, 1);
    pod.remove_container(&side);
    let side = pod.start("side", 1, 0, "cat /volume/file && exit 5");
    let ended = pod.exited(&side);
    assert_eq!((ended.exit_code, &*ended.reason), (5, "Error"));
    containerd.expects("out of memory of a member", || {
        let script = "dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 2; exit 1";
        let ended = pod.exited(&pod.start("hog", 0, 64 << 20, script));
        assert_eq!((ended.exit_code, &*ended.reason), (1, "OOMKilled"));
    });
    assert_eq!(pod.container(&web).state, 1);

    pod.stop();
    assert_eq!(pod.status().status.unwrap().state, 1);
    assert_eq!(pod.exited(&web).exit_code, 137);
    pod.stop();
    pod.remove();
}

fn a_pod_that_shares_processes(containerd: &Containerd) {
    let pod = Pod::run(containerd, "shared", NamespaceOption { network: 0, pid: 0, ipc: 0 });
    let one = pod.start("one", 0, 0, "exec sleep 1234");
    let two = pod.start("two", 0, 0, SERVE);
    let seen = pod.sh(&two, "cat /proc/1/comm; ps -o args");
    assert!(seen.starts_with("pause") && seen.contains("sleep 1234"), "{seen}");
    pod.sh(&two, "pkill -KILL -f 'sleep 1234'");
    assert_eq!(pod.exited(&one).exit_code, 137);
    assert_eq!(pod.container(&two).state, 1);
    // The end of the pod's first process is the end of all.
    pod.sh(&two, "echo still");
    pod.stop();
    pod.remove();
}

fn containerd_killed(containerd: &Containerd) {
    let pods = ["a", "b"].map(|name| Pod::run(containerd, name, OWN_PROCESSES));
    let members = pods.each_ref().map(|pod| pod.start("member", 0, 0, SERVE));
    containerd.kill();
    containerd.start_again();
    for (pod, member) in pods.iter().zip(&members) {
        assert_eq!((pod.status().status.unwrap().state, pod.container(member).state), (0, 1));
        assert_eq!(pod.exec(member, "exit 3", 60).unwrap().exit_code, 3);
        pod.stop_container(member, 10);
        assert_eq!(pod.exited(member).exit_code, 43);
        assert_eq!(pod.log("member", 0).last(), Some(&("stdout".into(), "bye".into())));
        pod.stop();
        pod.remove();
    }
}
