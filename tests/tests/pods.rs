//! Pods through containerd's CRI plugin: the same tests with runc, which proves every expectation, and with ampoule.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    thread,
    time::{Duration, Instant},
};

use ampoule_tests::{
    Disk,
    containerd::{BY_SHIM, Containerd, LIMIT, Runtime, Version},
    cri::{ContainerConfig, Device, NamespaceOption, Pod, Streams, UserNamespace},
    host, program, scaled,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

host!(runc_1_6 = Runc V1_6: a_pod a_pod_that_shares_processes streams containerd_killed);
host!(runc_1_7 = Runc V1_7: a_pod a_pod_that_shares_processes streams containerd_killed);
host!(runc_1_7_again = Runc V1_7: a_pod_with_users);
host!(runc_2_1 = Runc V2_1: a_pod streams by_podsandbox);
host!(ampoule_1_6 = Ampoule V1_6: a_pod a_pod_that_shares_processes streams containerd_killed);
host!(ampoule_1_7_again = Ampoule V1_7: a_pod streams a_pod_with_users);
host!(ampoule_2_1 = Ampoule V2_1: by_podsandbox by_shim a_pod_with_users);
host!(ampoule_2_1_again = Ampoule V2_1: a_pod streams streams_by_shim a_pod_with_users_by_shim);

/// As the kubelet has them by default: processes are each container's own.
const OWN_PROCESSES: NamespaceOption = NamespaceOption { network: 0, pid: 1, ipc: 0, users: None };

const SERVE: &str = "echo $$ > /pid; trap 'echo bye; exit 43' TERM; echo out; echo err >&2; \
    while :; do sleep 0.1; done";

/// Which process serves: its number, and when it began.
const SERVER: &str = "pid=$(cat /pid); echo $pid $(cut -d ' ' -f 22 /proc/$pid/stat)";

/// Ten a second: as many as a kubelet makes of a pod's containers, and more.
const BETWEEN_PROBES: Duration = Duration::from_millis(100);

fn a_pod(containerd: &Containerd) {
    let pod = Pod::run(containerd, "web", OWN_PROCESSES);
    let status = pod.status();
    let (state, ip) = status.status.map(|s| (s.state, s.network.unwrap_or_default().ip)).unwrap();
    assert_eq!(state, 0);
    // What stands for the pod on the host is in the pod's network namespace.
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    let mut enter = containerd.inside.command("nsenter");
    enter.args(["--net", "--target", &info["pid"].to_string(), "ip", "-brief", "address"]);
    let addresses = program(enter).output().ended_with(0).text();
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
        assert_eq!(program(echo).output().ended_with(0).text(), "hello");
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
    a_member_comes_again(&pod, &web);
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
    a_block_volume(&pod);
    containerd.expects("out of memory of a member", || {
        let script = "dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 2; exit 1";
        let hog = pod.start("hog", 0, 64 << 20, script);
        let ended = pod.exited(&hog);
        assert_eq!((ended.exit_code, &*ended.reason), (1, "OOMKilled"));
        let told = containerd.out_of_memory();
        assert!(!told.is_empty() && told.iter().all(|id| *id == hog), "{told:?} of {hog}");
    });
    assert_eq!(pod.container(&web).state, 1);

    pod.stop();
    assert_eq!(pod.status().status.unwrap().state, 1);
    assert_eq!(pod.exited(&web).exit_code, 137);
    pod.stop();
    pod.remove();
}

/// As the kubelet has a raw block volume; and gives it to the next container when one has ended.
fn a_block_volume(pod: &Pod) {
    let disk = Disk::new();
    let with = |name: &str, permissions: &str, script: &str| {
        let container_path = "/dev/block/data".into();
        let device = Device {
            container_path,
            host_path: disk.device.clone(),
            permissions: permissions.into(),
        };
        let config = pod.container_of(name, 0, 0, script);
        let container = pod.start_this(ContainerConfig { devices: vec![device], ..config });
        let code = pod.exited(&container).exit_code;
        pod.remove_container(&container);
        code
    };
    let write = "printf 'raw bytes' | dd of=/dev/block/data conv=notrunc && \
        head -c 16777216 /dev/block/data | wc -c | grep -x 16777216";
    assert_eq!(with("writer", "rwm", write), 0);
    assert_eq!(&disk.start()[..9], b"raw bytes");
    let read = "[ \"$(head -c 9 /dev/block/data)\" = 'raw bytes' ] && ! echo x > /dev/block/data && exit 7";
    assert_eq!(with("reader", "r", read), 7);
    assert_eq!(&disk.start()[..9], b"raw bytes");
}

fn a_pod_that_shares_processes(containerd: &Containerd) {
    let pod = Pod::run(containerd, "shared", NamespaceOption { pid: 0, ..OWN_PROCESSES });
    let one = pod.start("one", 0, 0, "exec sleep 1234");
    let two = pod.start("two", 0, 0, SERVE);
    let seen = pod.sh(&two, "cat /proc/1/comm; ps -o args");
    assert!(seen.starts_with("pause") && seen.contains("sleep 1234"), "{seen}");
    pod.sh(&two, "pkill -KILL -f 'sleep 1234'");
    assert_eq!(pod.exited(&one).exit_code, 137);
    assert_eq!(pod.container(&two).state, 1);
    a_member_comes_again(&pod, &two);
    // The end of the pod's first process is the end of all.
    pod.sh(&two, "echo still");
    pod.stop();
    pod.remove();
}

/// Kubernetes' `hostUsers: false`.
fn a_pod_with_users(containerd: &Containerd) {
    a_pod_with_users_of(containerd.runtime.name(), containerd);
}

fn a_pod_with_users_by_shim(containerd: &Containerd) {
    a_pod_with_users_of(BY_SHIM, containerd);
}

fn a_pod_with_users_of(handler: &str, containerd: &Containerd) {
    const FIRST: u32 = 100_000;
    // containerd 1.7 changes the owners of a root file system, and of volumes never.
    let maps = containerd.version == Version::V2_1;
    let disk = maps.then(|| containerd.with_mappable_files());
    let users = NamespaceOption { users: Some(UserNamespace::at(FIRST)), ..OWN_PROCESSES };
    let pod = Pod::run_by(handler, containerd, "users", users);
    let [web, side] = ["web", "side"].map(|name| pod.start(name, 0, 0, SERVE));
    let of_host = |id: u32| if maps { id } else { FIRST + id };
    let volume = pod.volume();
    fs::set_permissions(&volume, Permissions::from_mode(0o777)).unwrap();
    fs::write(volume.join("file"), "").unwrap();
    chown(volume.join("file"), Some(of_host(7)), Some(of_host(8))).unwrap();
    for member in [&web, &side] {
        let map = pod.sh(member, "cat /proc/self/uid_map /proc/1/gid_map | xargs");
        assert_eq!(map, "0 100000 65536 0 100000 65536");
        let owners =
            pod.sh(member, "touch /new; stat -c '%u %g' / /bin/busybox /new /volume/file | xargs");
        assert_eq!(owners, "0 0 0 0 0 0 7 8");
    }
    pod.sh(&web, "touch /volume/new; echo common > /dev/shm/common");
    let new = fs::metadata(volume.join("new")).unwrap();
    assert_eq!((new.uid(), new.gid()), (of_host(0), of_host(0)));
    // The network is one, and the pod's users have power over it.
    let ip = pod.status().status.unwrap().network.unwrap().ip;
    assert!(pod.sh(&side, "cat /dev/shm/common; ip -4 -o address show eth0").contains(&ip), "{ip}");
    pod.sh(&side, "ping -c 1 -w 20 10.88.0.1");
    pod.sh(&web, "nc -lk -s 127.0.0.1 -p 8081 -e cat >/dev/null 2>&1 & sleep 1");
    assert_eq!(pod.sh(&side, "echo hello | nc -w 5 127.0.0.1 8081"), "hello");
    let mut forwarded = pod.port_forward(8081);
    forwarded.sends("hello\n");
    forwarded.answers("hello\n");
    // Over the guest they have none.
    let power = "! chown 7 /proc/sys/kernel/panic && ! mknod /disk b 253 0 && ! dmesg";
    pod.sh(&side, power);
    if containerd.runtime == Runtime::Ampoule {
        let refused = pod.refuses_users("other", UserNamespace::at(200_000));
        assert!(refused.message().contains("linux.uidMappings"), "{refused}");
    }
    pod.stop_container(&side, 10);
    assert_eq!(pod.exited(&side).exit_code, 43);
    pod.stop();
    pod.remove();
    drop(disk);
}

/// A container is killed, removed and created again, beside one that is probed all the time: that is still the same
/// process then, and every probe has succeeded; what each of the container's lives has said is there, and their shim has
/// kept nothing.
fn a_member_comes_again(pod: &Pod<'_>, stays: &str) {
    let server = pod.sh(stays, SERVER);
    let descriptors = pod.descriptors();
    let lives = 0..scaled(2, 50) as u32;
    thread::scope(|scope| {
        scope.spawn(|| probe(pod, stays));
        for life in lives.clone() {
            let id = pod.start("mortal", life, 0, &format!("echo life {life}; exec sleep 600"));
            pod.logs("mortal", life, &format!("life {life}"));
            pod.stop_container(&id, 0);
            assert_eq!(pod.exited(&id).exit_code, 137);
            pod.remove_container(&id);
        }
    });
    for life in lives {
        assert_eq!(pod.log("mortal", life), [("stdout".into(), format!("life {life}"))]);
    }
    assert_eq!(pod.sh(stays, SERVER), server);
    assert_eq!(pod.container(stays).state, 1);
    let deadline = Instant::now() + LIMIT;
    while pod.descriptors() > descriptors {
        assert!(Instant::now() < deadline, "{descriptors} descriptors, {}", pod.descriptors());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Waits for none before it makes the next one.
fn probe(pod: &Pod<'_>, id: &str) {
    // Each has some descriptors, and on a slow machine hundreds may be under way.
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    thread::scope(|scope| {
        for number in 0..scaled(20, 300) {
            scope.spawn(move || {
                assert_eq!(pod.sh(id, &format!("echo {number}")), number.to_string());
            });
            thread::sleep(BETWEEN_PROBES);
        }
    });
}

/// What `kubectl exec -it`, `attach` and `port-forward` are made of.
fn streams(containerd: &Containerd) {
    streams_of(Pod::run(containerd, "streams", OWN_PROCESSES));
}

/// The same over the shim's socket.
fn streams_by_shim(containerd: &Containerd) {
    streams_of(Pod::run_by(BY_SHIM, containerd, "streams", OWN_PROCESSES));
}

fn streams_of(pod: Pod<'_>) {
    let web = pod.start("web", 0, 0, SERVE);
    let script = "read word; echo got $word; echo err >&2; exit 3";
    for (protocol, status) in [("v4.channel.k8s.io", "3"), ("channel.k8s.io", "exit code 3")] {
        let mut exec = pod.exec_streams_by(protocol, &web, false, script);
        exec.sends("hello\n");
        let ended = exec.end();
        assert_eq!((&*ended.stdout, &*ended.stderr), ("got hello\n", "err\n"));
        assert!(ended.status.ends_with(status), "{}", ended.status);
    }
    let burst = pod.exec_streams(&web, false, "head -c 2000000 /dev/zero").end();
    assert_eq!((burst.stdout.len(), &*burst.status), (2_000_000, "0"));
    a_terminal(pod.exec_streams(&web, true, "exec sh"), "5");

    // A client goes and another one comes: the container's stdin stays.
    let echo = "while read word; do echo got $word; echo err >&2; [ $word != end ] || exit 7; done";
    let config = ContainerConfig { stdin: true, ..pod.container_of("echo", 0, 0, echo) };
    let echo = pod.start_this(config);
    for word in ["one", "end"] {
        let mut attached = pod.attach(&echo, false);
        // It hears of what is said from now on, which may be a little later.
        let heard = (0..20).any(|_| {
            attached.sends(&format!("{word}\n"));
            attached.says_within(Duration::from_secs(5), &format!("got {word}\n"))
        });
        assert!(heard, "no {word}");
        if word == "end" {
            // containerd may close it before it has passed on the last words: those are in the log.
            attached.end();
        }
    }
    assert_eq!(pod.exited(&echo).exit_code, 7);
    let log = pod.log("echo", 0);
    for line in [("stdout", "got one"), ("stdout", "got end"), ("stderr", "err")] {
        assert!(log.contains(&(line.0.into(), line.1.into())), "no {line:?} in {log:?}");
    }
    let config =
        ContainerConfig { stdin: true, tty: true, ..pod.container_of("tty", 0, 0, "exec sh") };
    let tty = pod.start_this(config);
    a_terminal(pod.attach(&tty, true), "0");
    assert_eq!(pod.exited(&tty).exit_code, 5);

    // Of servers on all addresses, and of those on the loopback alone; and of none.
    for (port, address) in [(8080, "0.0.0.0"), (8081, "127.0.0.1")] {
        pod.sh(&web, &format!("nc -lk -s {address} -p {port} -e cat >/dev/null 2>&1 & sleep 1"));
        let mut forwarded = pod.port_forward(port);
        forwarded.sends("hello\n");
        forwarded.answers("hello\n");
    }
    let failed = pod.port_forward(8082).fails();
    assert!(failed.contains("refused") || failed.contains("reset"), "{failed}");
    pod.stop();
    pod.remove();
}

/// Checks a shell on a terminal: it follows the window's size, Ctrl-C ends what it runs, and its end is told.
fn a_terminal(mut shell: Streams, status: &str) {
    for (columns, rows) in [(80, 24), (132, 43)] {
        shell.resizes(columns, rows);
        shell.sends(&format!("until stty size | grep '^{rows} {columns}'; do sleep 0.1; done\n"));
        shell.says(&format!("{rows} {columns}\r\n"));
    }
    shell.sends("sleep 1000\n");
    thread::sleep(Duration::from_millis(500));
    shell.sends("\x03");
    shell.sends("echo still-$((1+2))-here\n");
    shell.says("still-3-here");
    shell.sends("exit 5\n");
    assert_eq!(shell.end().status, status);
}

fn containerd_killed(containerd: &Containerd) {
    let names = (0..scaled(2, 10)).map(|number| format!("pod-{number}"));
    let pods: Vec<_> = names.map(|name| Pod::run(containerd, &name, OWN_PROCESSES)).collect();
    let members: Vec<_> = pods.iter().map(|pod| pod.start("member", 0, 0, SERVE)).collect();
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

/// The handler is the one that `ampoule install` adds when containerd is started again.
fn by_podsandbox(containerd: &Containerd) {
    if containerd.runtime == Runtime::Runc {
        return a_pod_of_containerd_2(containerd, "runc", || {});
    }
    let file = containerd.config();
    let read = || fs::read_to_string(&file).unwrap();
    let before = read();
    a_pod_of_containerd_2(containerd, "ampoule", || {
        containerd.install(&[]);
        let mut dump = containerd.command("containerd");
        dump.args(["--config", "/run/test/config.toml", "config", "dump"]);
        let dumped = program(dump).output().ended_with(0).text();
        assert!(dumped.contains("pod_annotations = ['io.ampoule.*']"), "{dumped}");
    });
    containerd.install(&["--undo"]);
    // But for the handler that was there.
    let kept = before.lines().filter(|line| read().lines().any(|now| now == *line)).count();
    assert!(
        !read().contains("runtimes.ampoule]") && kept + 2 >= before.lines().count(),
        "{}",
        read()
    );
}

/// containerd makes the VM by the Sandbox service, and has its streams over the shim's socket.
fn by_shim(containerd: &Containerd) {
    a_pod_of_containerd_2(containerd, BY_SHIM, || {});
}

fn a_pod_of_containerd_2(containerd: &Containerd, handler: &str, meanwhile: impl FnOnce()) {
    let pod = Pod::run_by(handler, containerd, "web", OWN_PROCESSES);
    let web = pod.start("web", 0, 0, SERVE);
    let done = pod.exec(&web, "echo out; echo err >&2; exit 3", 60).unwrap();
    assert_eq!((&*done.stdout, &*done.stderr, done.exit_code), (&b"out\n"[..], &b"err\n"[..], 3));
    let mut exec = pod.exec_streams(&web, false, "read word; hostname; echo got $word");
    exec.sends("hello\n");
    assert_eq!(exec.end().stdout, "web\ngot hello\n");
    assert!(pod.sh(&web, "cat /image/etc/os-release").contains("Alpine"));
    assert!(pod.stats(&web).1 > 0);
    // It ends with much still to read: containerd cancels the reading of a stream when it knows.
    let burst = "yes $(printf %0300d 1) | head -n 1000; exit 4";
    assert_eq!(pod.exited(&pod.start("burst", 0, 0, burst)).exit_code, 4);
    assert_eq!(pod.log("burst", 0).len(), 1000);
    // A stream's connection ends with it, though containerd would leave it open.
    let descriptors = containerd.inside.path(format!("/proc/{}/fd", containerd.shim_of(&pod.id)));
    let open = || fs::read_dir(&descriptors).unwrap().count();
    let before = open();
    for _ in 0..3 {
        pod.sh(&web, "true");
    }
    assert!(open() < before + 5, "{before} descriptors became {}", open());

    containerd.kill();
    meanwhile();
    containerd.start_again();
    assert_eq!((pod.status().status.unwrap().state, pod.container(&web).state), (0, 1));
    assert_eq!(pod.exec(&web, "exit 3", 60).unwrap().exit_code, 3);
    pod.stop_container(&web, 10);
    assert_eq!(pod.exited(&web).exit_code, 43);
    assert_eq!(pod.log("web", 0).last(), Some(&("stdout".into(), "bye".into())));
    let again = pod.start("web", 1, 0, "echo again; exit 5");
    assert_eq!(pod.exited(&again).exit_code, 5);
    assert_eq!(pod.log("web", 1), [("stdout".into(), "again".into())]);
    pod.stop();
    assert_eq!(pod.status().status.unwrap().state, 1);
    pod.remove();
}
