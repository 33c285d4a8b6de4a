//! The agent from the host's side: containers and their processes, on a real kernel. See `guest`.

// Tests may unwrap: a panic is how a test fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fields;
mod guest;

use std::time::Duration;

use ampoule_agent_api::agent::{root_fs::Upper, *};
use guest::{CAPABILITIES, Guest, context, process, sh, spec};
use serde_json::json;
use ttrpc::Code;

fn code(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn the_life_of_a_container() {
    let guest = Guest::boot().await;
    let hello = HelloRequest { hostname: "sandbox".into(), ..Default::default() };
    let hello = guest.agent.hello(context(), &hello).await.unwrap();
    assert!(!hello.kernel_release.is_empty());

    let mut run =
        guest.create("web", sh("echo out; echo err >&2; hostname; exit 7")).await.unwrap();
    let twice = guest.create("web", sh("true")).await.err().unwrap();
    assert_eq!(code(twice).0, Code::ALREADY_EXISTS);
    guest.start(&run).await.unwrap();
    let again = code(guest.start(&run).await.err().unwrap());
    assert_eq!(again.0, Code::FAILED_PRECONDITION);
    let output = guest.wait(&mut run).await;
    assert_eq!((output.status, output.oom_kills), (7, 0));
    assert_eq!(output.text(), "out\ninside\n");
    assert_eq!(output.stderr, b"err\n");
    // Also after the end, until it is deleted.
    assert_eq!(guest.agent.wait(context(), &run.request()).await.unwrap().status, 7);
    assert_eq!(code(guest.signal(&run, 15, false).await.err().unwrap()).0, Code::NOT_FOUND);
    guest.agent.delete(context(), &run.request()).await.unwrap();
    let gone = guest.agent.wait(context(), &run.request()).await.err().unwrap();
    assert_eq!(code(gone).0, Code::NOT_FOUND);
    guest.shutdown().await;
}

#[tokio::test]
async fn exit_codes() {
    let guest = Guest::boot().await;
    for (script, status) in
        [("exit 0", 0), ("exit 1", 1), ("exit 255", 255), ("kill -9 $$", 0), ("sleep 0", 0)]
    {
        // PID 1 of a PID namespace does not die of its own signals.
        assert_eq!(guest.run(sh(script)).await.status, status, "{script}");
    }
    for (command, failure) in [
        ("no-such-command", start_response::Failure::NOT_FOUND),
        ("/no/such/command", start_response::Failure::NOT_FOUND),
        ("/etc/passwd", start_response::Failure::NOT_EXECUTABLE),
        ("/etc", start_response::Failure::NOT_EXECUTABLE),
    ] {
        let run = guest.create("c", spec(&[command])).await.unwrap();
        let started = guest.start(&run).await.unwrap();
        assert_eq!(started.failure.enum_value(), Ok(failure), "{command}");
        assert!(started.message.starts_with(&format!("exec: {command}: ")), "{}", started.message);
        guest.agent.delete(context(), &run.request()).await.unwrap();
    }
    guest.shutdown().await;
}

#[tokio::test]
async fn a_process_is_exactly_what_its_spec_says() {
    let guest = Guest::boot().await;
    let mut spec =
        sh("cat /proc/self/status; ls /proc/self/fd | wc -l; ulimit -n; umask; pwd; echo $HOME; \
                       cat /proc/self/oom_score_adj; readlink /proc/self/fd/0 | cut -c1-4");
    spec["process"]["user"] =
        json!({"uid": 1234, "gid": 55, "additionalGids": [66, 77], "umask": 0o27});
    spec["process"]["cwd"] = json!("/made/for/it");
    spec["process"]["oomScoreAdj"] = json!(321);
    spec["process"]["capabilities"]["ambient"] = json!(["CAP_CHOWN"]);
    spec["process"]["capabilities"]["inheritable"] = json!(["CAP_CHOWN"]);
    let output = guest.run(spec).await;
    let text = output.text();
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(field("Uid"), ["1234"; 4]);
    assert_eq!(field("Gid"), ["55"; 4]);
    assert_eq!(field("Groups"), ["66", "77"]);
    // After the exec of a plain program, a user other than root has the ambient ones.
    let chown = format!("{:016x}", 1);
    let all = format!("{:016x}", 1u64 | 1 << 5 | 1 << 7 | 1 << 27);
    assert_eq!(CAPABILITIES.len(), 4);
    for name in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(name), [chown.as_str()], "{name}");
    }
    assert_eq!(field("CapBnd"), [all.as_str()]);
    assert_eq!(field("NoNewPrivs"), ["1"]);
    assert_eq!(field("Seccomp"), ["2"]);
    assert_eq!(field("SigBlk"), ["0000000000000000"]);
    // Signal 32 belongs to C libraries; some shell that started this test may ignore it.
    let ignored = u64::from_str_radix(field("SigIgn")[0], 16).unwrap();
    assert_eq!(ignored & !(1 << 31), 0);
    // ls has its own descriptor of the directory besides 0, 1 and 2.
    let rest: Vec<_> = text.lines().rev().take(7).collect();
    assert_eq!(rest, ["pipe", "321", "/", "/made/for/it", "0027", "512", "4"]);
    guest.shutdown().await;
}

#[tokio::test]
async fn roots_have_exactly_their_capabilities() {
    let guest = Guest::boot().await;
    for no_new_privileges in [true, false] {
        let mut spec = sh("grep -E 'Cap|Seccomp:|NoNew' /proc/1/status; chroot / true");
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let output = guest.run(spec).await;
        let caps = format!("{:016x}", 1u64 | 1 << 5 | 1 << 7 | 1 << 27);
        for name in ["CapPrm", "CapEff", "CapBnd"] {
            assert!(output.text().contains(&format!("{name}:\t{caps}")), "{}", output.text());
        }
        for line in ["CapInh:\t0000000000000000", "CapAmb:\t0000000000000000", "Seccomp:\t2"] {
            assert!(output.text().contains(line), "{}", output.text());
        }
        let bit = format!("NoNewPrivs:\t{}", u8::from(no_new_privileges));
        assert!(output.text().contains(&bit), "{}", output.text());
        // errno 99 of the profile.
        assert!(String::from_utf8_lossy(&output.stderr).contains("not available"), "seccomp");
    }
    guest.shutdown().await;
}

#[tokio::test]
async fn the_file_system_is_the_containers_own() {
    let guest = Guest::boot().await;
    let output = guest
        .run(sh("
            echo pid $$; cat /etc/alpine-release; ls -ld /dev/null /dev/fd /dev/ptmx | cut -c1
            echo x >/dev/null; head -c 4 /dev/zero | wc -c; echo tea >/dev/stdout
            wc -c </proc/kcore; ls /sys/firmware | wc -l
            (echo 1 >/proc/sys/kernel/panic) 2>&1 | grep -c 'Read-only'
            (echo b >/proc/sysrq-trigger) 2>&1 | grep -c 'Read-only'
            (mkdir /sys/fs/cgroup/x) 2>&1 | grep -c 'Read-only'
            cat /proc/self/cgroup; wc -l </proc/net/dev; ip -o link | grep -c 'LOOPBACK,UP'
            awk '$2 ~ /ampoule|^\\/mnt/' /proc/mounts | wc -l
            echo data >/root/file && cat /root/file
            mknod /tmp/disk b 7 0 && (cat /tmp/disk) 2>&1 | grep -c 'not permitted'
            ls /run/ampoule 2>/dev/null | wc -l; ls / | tr '\\n' ' '"))
        .await;
    let lines: Vec<_> = output.text().lines().collect();
    assert_eq!(lines[0], "pid 1");
    assert!(lines[1].starts_with('3'), "{}", output.text());
    assert_eq!(lines[2..8], ["l", "c", "l", "4", "tea", "0"], "{}", output.text());
    assert_eq!(lines[8..12], ["0", "1", "1", "1"], "{}", output.text());
    assert_eq!(lines[12..15], ["0::/", "3", "1"], "{}", output.text());
    assert_eq!(lines[15..19], ["0", "data", "1", "0"], "{}", output.text());
    // The next container begins afresh.
    assert_eq!(guest.run(sh("cat /root/file")).await.status, 1);
    guest.shutdown().await;
}

#[tokio::test]
async fn every_kind_of_root() {
    let guest = Guest::boot().await;
    for (upper, status) in [(Upper::TMPFS, 0), (Upper::NONE, 1), (Upper::DISK, 0)] {
        let run = guest.create_on("c", sh("echo x >/file && mv /etc /etc2"), upper).await.unwrap();
        let output = guest.finish(run).await;
        assert_eq!(
            output.status,
            status,
            "{upper:?}: {:?}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let mut read_only = sh("(echo x >/file) 2>&1 | grep -c Read-only");
    read_only["root"]["readonly"] = json!(true);
    assert_eq!(guest.run(read_only).await.text(), "1\n");
    guest.shutdown().await;
}

#[tokio::test]
async fn further_processes() {
    let guest = Guest::boot().await;
    let mut init = guest.create("c", sh("echo 1 >/dev/shm/a; exec sleep 1000")).await.unwrap();
    let early = guest.exec("c", "e", process(&["true"])).await.err().unwrap();
    assert_eq!(code(early).0, Code::FAILED_PRECONDITION);
    guest.start(&init).await.unwrap();

    let script = "cat /dev/shm/a; hostname; cat /proc/1/comm; cat /proc/self/cgroup; \
                  for n in pid mnt net ipc uts cgroup user; do \
                  [ $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) ] || echo $n; done; \
                  ls /proc/self/fd | wc -l; grep Seccomp: /proc/self/status; exit 9";
    let wait_for_init = "until [ -e /dev/shm/a ]; do sleep 0.05; done; ";
    let script = format!("{wait_for_init}{script}");
    let run = guest.exec("c", "e1", process(&["sh", "-c", &script])).await.unwrap();
    let taken = guest.exec("c", "e1", process(&["true"])).await.err().unwrap();
    assert_eq!(code(taken).0, Code::ALREADY_EXISTS);
    let output = guest.finish(run).await;
    assert_eq!(output.status, 9);
    assert_eq!(output.text(), "1\ninside\nsleep\n0::/\n4\nSeccomp:\t2\n");

    let run = guest.exec("c", "e2", process(&["nope"])).await.unwrap();
    let started = guest.start(&run).await.unwrap();
    assert_eq!(started.failure.enum_value(), Ok(start_response::Failure::NOT_FOUND));

    // Named users are the container's.
    let mut named = process(&["id"]);
    named["user"] = json!({"username": "daemon"});
    let run = guest.exec("c", "e3", named).await.unwrap();
    let output = guest.finish(run).await;
    assert!(output.text().starts_with("uid=2(daemon) gid=2(daemon) groups="), "{}", output.text());

    // An exec still running ends with init.
    let mut last = guest.exec("c", "e4", process(&["sleep", "1000"])).await.unwrap();
    guest.start(&last).await.unwrap();
    let pids = ContainerRequest { container_id: "c".into(), ..Default::default() };
    let pids = guest.agent.pids(context(), &pids).await.unwrap();
    assert!(pids.processes.iter().any(|p| p.exec_id == "e4" && p.command == "sleep"), "{pids}");
    guest.signal(&init, libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait(&mut init).await.status, 137);
    assert_eq!(guest.wait(&mut last).await.status, 137);
    guest.shutdown().await;
}

#[tokio::test]
async fn many_at_once_do_not_mix() {
    let guest = Guest::boot().await;
    let init = guest.create("c", spec(&["sleep", "1000"])).await.unwrap();
    guest.start(&init).await.unwrap();
    let runs = (0..20).map(|n| {
        let guest = &guest;
        async move {
            let id = format!("e{n}");
            let run = guest.exec("c", &id, process(&["echo", &id])).await.unwrap();
            assert_eq!(guest.finish(run).await.text(), format!("{id}\n"));
        }
    });
    futures_util::future::join_all(runs).await;
    let containers = (0..4).map(|n| {
        let guest = &guest;
        async move {
            let id = format!("c{n}");
            let run = guest.create(&id, spec(&["echo", &id])).await.unwrap();
            assert_eq!(guest.finish(run).await.text(), format!("{id}\n"));
        }
    });
    futures_util::future::join_all(containers).await;
    guest.shutdown().await;
}

#[tokio::test]
async fn streams_carry_everything() {
    let guest = Guest::boot().await;
    let mut run = guest.create("c", spec(&["cat"])).await.unwrap();
    guest.start(&run).await.unwrap();
    let data: Vec<u8> = (0..4 << 20).map(|n: u32| (n ^ n >> 8) as u8).collect();
    let mut stdin = run.stdin.take().unwrap();
    let sent = data.clone();
    tokio::spawn(async move {
        tokio::io::AsyncWriteExt::write_all(&mut stdin, &sent).await.unwrap();
        stdin.shutdown(std::net::Shutdown::Write).unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
    });
    let output = guest.wait(&mut run).await;
    assert_eq!(output.status, 0);
    assert!(output.stdout == data, "{} bytes of {}", output.stdout.len(), data.len());
    guest.agent.delete(context(), &run.request()).await.unwrap();

    // What is written last is not lost.
    let init = guest.create("c", spec(&["sleep", "1000"])).await.unwrap();
    guest.start(&init).await.unwrap();
    for n in 0..50 {
        let script = format!("head -c 70000 /dev/zero; echo end {n}");
        let run = guest.exec("c", &format!("e{n}"), process(&["sh", "-c", &script])).await.unwrap();
        let output = guest.finish(run).await;
        assert!(output.stdout.ends_with(format!("\0end {n}\n").as_bytes()), "{n}");
    }
    // A request to close stdin, without a half-close.
    let mut run = guest.exec("c", "close", process(&["cat"])).await.unwrap();
    guest.start(&run).await.unwrap();
    run.write(b"sent before").await;
    guest.agent.close_stdin(context(), &run.request()).await.unwrap();
    assert_eq!(guest.wait(&mut run).await.text(), "sent before");
    guest.shutdown().await;
}

#[tokio::test]
async fn terminals() {
    let guest = Guest::boot().await;
    let mut spec = sh("tty; until [ \"$(stty size)\" = '50 100' ]; do sleep 0.1; done; \
                       read line; echo got $line; ls -l /dev/console | cut -c1; \
                       [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo terminal; stat -c %u /dev/pts/0");
    spec["process"]["terminal"] = json!(true);
    spec["process"]["user"] = json!({"uid": 33});
    let mut run = guest.create("c", spec).await.unwrap();
    guest.start(&run).await.unwrap();
    run.write(b"tea\n").await;
    let resize =
        ResizePtyRequest { container_id: "c".into(), width: 100, height: 50, ..Default::default() };
    guest.agent.resize_pty(context(), &resize).await.unwrap();
    let output = guest.wait(&mut run).await;
    // The echo comes whenever the terminal got it.
    let text = output.text().replacen("tea\r\n", "", 1);
    assert_eq!(text, "/dev/pts/0\r\ngot tea\r\nc\r\nterminal\r\n33\r\n");
    guest.agent.delete(context(), &run.request()).await.unwrap();

    let init = guest.create("c", self::spec(&["sleep", "1000"])).await.unwrap();
    guest.start(&init).await.unwrap();
    let mut tty = process(&["sh", "-c", "tty; stty size"]);
    tty["terminal"] = json!(true);
    tty["consoleSize"] = json!({"height": 11, "width": 22});
    let run = guest.exec("c", "t", tty).await.unwrap();
    assert_eq!(guest.finish(run).await.text(), "/dev/pts/0\r\n11 22\r\n");
    let without = guest.agent.resize_pty(context(), &resize).await.err().unwrap();
    assert_eq!(code(without).0, Code::FAILED_PRECONDITION);
    guest.shutdown().await;
}

#[tokio::test]
async fn signals() {
    let guest = Guest::boot().await;
    let mut run = guest
        .create("c", sh("trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.1; done"))
        .await
        .unwrap();
    guest.start(&run).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    guest.signal(&run, libc::SIGTERM, false).await.unwrap();
    let output = guest.wait(&mut run).await;
    assert_eq!((output.status, output.text()), (3, "ready\nterm\n"));
    guest.agent.delete(context(), &run.request()).await.unwrap();

    let mut run = guest.create("c", sh("sleep 1000 & sleep 1000 & wait")).await.unwrap();
    let request = run.request();
    guest.start(&run).await.unwrap();
    let wrong = guest.signal(&run, 99, false).await.err().unwrap();
    assert_eq!(code(wrong).0, Code::INVALID_ARGUMENT);
    let running = guest.agent.delete(context(), &request).await.err().unwrap();
    assert_eq!(code(running).0, Code::FAILED_PRECONDITION);
    guest.signal(&run, libc::SIGKILL, true).await.unwrap();
    assert_eq!(guest.wait(&mut run).await.status, 137);
    guest.agent.delete(context(), &request).await.unwrap();

    // Never started: killed, or deleted at once.
    let mut run = guest.create("c", sh("true")).await.unwrap();
    guest.signal(&run, libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait(&mut run).await.status, 137);
    guest.agent.delete(context(), &request).await.unwrap();
    guest.create("c", sh("true")).await.unwrap();
    guest.agent.delete(context(), &request).await.unwrap();
    guest.shutdown().await;
}

#[tokio::test]
async fn limits_hold() {
    let guest = Guest::boot().await;
    let mut spec = sh("tail /dev/zero");
    spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    let output = guest.run(spec).await;
    // The shell is PID 1 and outlives its child.
    assert!(output.oom_kills > 0 && output.status != 0, "{} {}", output.status, output.oom_kills);

    let mut spec = sh("i=0; while [ $i -lt 50 ]; do sleep 5 & i=$((i+1)); done; echo all");
    spec["linux"]["resources"]["pids"] = json!({"limit": 16});
    let output = guest.run(spec).await;
    assert!(!output.text().contains("all") && output.status != 0, "{}", output.text());

    let mut spec = sh("cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.high");
    spec["linux"]["resources"]["cpu"] = json!({"quota": 50000, "period": 100000, "shares": 512});
    spec["linux"]["resources"]["unified"] = json!({"memory.high": "104857600"});
    assert_eq!(guest.run(spec).await.text(), "50000 100000\n104857600\n");
    guest.shutdown().await;
}

#[tokio::test]
async fn pausing_and_counting() {
    let guest = Guest::boot().await;
    let run = guest.create("c", sh("while :; do :; done")).await.unwrap();
    guest.start(&run).await.unwrap();
    let request = ContainerRequest { container_id: "c".into(), ..Default::default() };
    guest.agent.pause(context(), &request).await.unwrap();
    let paused = guest.exec("c", "e", process(&["true"])).await.err().unwrap();
    assert_eq!(code(paused).0, Code::FAILED_PRECONDITION);
    let busy = async || {
        let stats = guest.agent.stats(context(), &request).await.unwrap();
        assert!(stats.memory_current > 0 && stats.pids_current == 1);
        stats.cpu_stat["usage_usec"]
    };
    let before = busy().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(busy().await, before);
    guest.agent.resume(context(), &request).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(busy().await > before);
    let twice = guest.agent.resume(context(), &request).await.err().unwrap();
    assert_eq!(code(twice).0, Code::FAILED_PRECONDITION);
    guest.shutdown().await;
}

#[tokio::test]
async fn without_its_host_the_guest_ends() {
    let guest = Guest::boot().await;
    let run = guest.create("c", spec(&["sleep", "1000"])).await.unwrap();
    guest.start(&run).await.unwrap();
    guest.create("d", sh("true")).await.unwrap();
    guest.abandon().await;
}

#[tokio::test]
async fn containers_of_a_pod_share_namespaces() {
    let guest = Guest::boot().await;
    let (request, run) = {
        let run = guest.create("a", spec(&["sleep", "1000"])).await.unwrap();
        guest.start(&run).await.unwrap();
        (ContainerRequest { container_id: "a".into(), ..Default::default() }, run)
    };
    let pids = guest.agent.pids(context(), &request).await.unwrap();
    let pid = pids.processes[0].pid;
    let mut second =
        sh("cat /proc/1/comm; hostname; echo $$ | grep -c ^1$; ip -o link | grep -c 'LOOPBACK,UP'");
    second["hostname"] = json!("");
    let joined = [("pid", "pid"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts")]
        .map(|(kind, file)| json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}));
    let own = ["mount", "cgroup"].map(|kind| json!({"type": kind}));
    second["linux"]["namespaces"] = joined.iter().chain(&own).cloned().collect();
    let b = guest.create("b", second.clone()).await.unwrap();
    assert_eq!(guest.finish(b).await.text(), "sleep\ninside\n0\n1\n");

    // Without a PID namespace of its own, what its init leaves behind still ends with it.
    second["process"]["args"] = json!(["sh", "-c", "sleep 1000 & echo gone"]);
    let b = guest.create("b", second).await.unwrap();
    assert_eq!(guest.finish(b).await.text(), "gone\n");

    // In the guest's own.
    let mut third = sh("hostname; cat /proc/1/comm");
    third["hostname"] = json!("");
    third["linux"]["namespaces"] = json!([{"type": "mount"}]);
    let hello = HelloRequest { hostname: "sandbox".into(), ..Default::default() };
    guest.agent.hello(context(), &hello).await.unwrap();
    let c = guest.create("c", third).await.unwrap();
    assert_eq!(guest.finish(c).await.text(), "sandbox\nampoule-agent\n");
    drop(run);
    guest.shutdown().await;
}

#[tokio::test]
async fn a_user_namespace() {
    let guest = Guest::boot().await;
    let mut spec = sh("id -u; cat /proc/self/uid_map | tr -s ' '; echo x >/dev/null; \
                       grep CapEff /proc/self/status; ls -l /dev/null | cut -c1; touch /dev/shm/done; exec sleep 1000");
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    let mut run = guest.create("c", spec).await.unwrap();
    guest.start(&run).await.unwrap();
    let mut exec = process(&[
        "sh",
        "-c",
        "until [ -e /dev/shm/done ]; do sleep 0.1; done; id -u; tr -s ' ' </proc/self/uid_map",
    ]);
    exec["user"] = json!({"uid": 7});
    let exec = guest.exec("c", "e", exec).await.unwrap();
    assert_eq!(guest.finish(exec).await.text(), "7\n 0 100000 65536\n");
    guest.signal(&run, libc::SIGKILL, false).await.unwrap();
    let output = guest.wait(&mut run).await;
    let caps = format!("{:016x}", 1u64 | 1 << 5 | 1 << 7 | 1 << 27);
    assert_eq!(output.text(), format!("0\n 0 100000 65536\nCapEff:\t{caps}\nc\n"));
    guest.shutdown().await;
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_leaves_nothing() {
    let guest = Guest::boot().await;
    let refused = async |pointer: &str, value: serde_json::Value| {
        let mut spec = sh("true");
        *spec.pointer_mut(pointer).unwrap() = value;
        code(guest.create("c", spec).await.err().unwrap())
    };
    let table = [
        (
            "/linux",
            json!({"namespaces": [{"type": "mount"}], "intelRdt": {"closID": "x"}}),
            "intelRdt",
        ),
        ("/mounts/0", json!({"destination": "/x", "type": "nfs"}), "nfs"),
        (
            "/mounts/0",
            json!({"destination": "/x", "type": "bind", "source": "/tmp", "options": ["idmap"]}),
            "idmap",
        ),
        ("/linux/seccomp/defaultAction", json!("SCMP_ACT_NOTIFY"), "SCMP_ACT_NOTIFY"),
        ("/process/user", json!({"username": "nobody-of-that-name"}), "nobody-of-that-name"),
        ("/process/capabilities/bounding", json!(["CAP_MAGIC"]), "CAP_MAGIC"),
        ("/process/rlimits/0/type", json!("RLIMIT_LUCK"), "RLIMIT_LUCK"),
        ("/linux/resources/devices/0/access", json!("x"), "devices"),
    ];
    for (pointer, value, word) in table {
        let (code, message) = refused(pointer, value).await;
        assert_eq!(code, Code::INVALID_ARGUMENT, "{pointer}: {message}");
        assert!(message.contains(word), "{pointer}: {message}");
    }
    for cwd in ["/proc/self/fd/3", "/proc/self/fd/4/../..", "/etc/passwd"] {
        let (_, message) = refused("/process/cwd", json!(cwd)).await;
        assert!(!message.is_empty());
    }
    let bad_id = guest.create("../x", sh("true")).await.err().unwrap();
    assert_eq!(code(bad_id).0, Code::INVALID_ARGUMENT);
    // The id, the disks and the cgroup are free again.
    let run = guest.create_on("c", sh("true"), Upper::DISK).await;
    assert_eq!(guest.finish(run.unwrap()).await.status, 0);
    guest.shutdown().await;
}
