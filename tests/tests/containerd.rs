//! containerd runs containers: the same tests with runc, which proves every expectation, and with ampoule.

use std::{
    env, fs, thread,
    time::{Duration, Instant},
};

use ampoule_tests::{
    containerd::{Containerd, Event, Runtime, Version},
    host, program, scaled,
    screen::Screen,
    skip,
};
use prost::Message;

host!(runc_1_6 = Runc V1_6: a_run_to_its_end streams a_terminal the_life_of_a_task execs commands_that_cannot_start
    many_waiters limits privileges images late_network containerd_killed the_shim_killed a_storm in_a_row);
host!(runc_1_7 = Runc V1_7: a_run_to_its_end streams a_terminal the_life_of_a_task execs commands_that_cannot_start
    many_waiters limits privileges images containerd_killed the_shim_killed a_storm);
// Without a run to its end, since runc's shim of 2.1 may end before it has told of a deletion.
host!(runc_2_1 = Runc V2_1: the_life_of_a_task containerd_killed the_shim_killed);
host!(ampoule_1_6 = Ampoule V1_6: a_run_to_its_end streams a_terminal the_life_of_a_task execs
    commands_that_cannot_start many_waiters privileges images late_network);
// Apart, for a bed of their own.
host!(ampoule_1_6_trouble = Ampoule V1_6: limits containerd_killed the_shim_killed a_storm in_a_row);
host!(ampoule_1_7_again = Ampoule V1_7: a_run_to_its_end the_life_of_a_task containerd_killed);
host!(ampoule_2_1 = Ampoule V2_1: a_run_to_its_end the_life_of_a_task containerd_killed the_shim_killed);
host!(runc_2_1_erofs = Runc V2_1: erofs_layers);
host!(ampoule_2_1_erofs = Ampoule V2_1: erofs_layers);

fn topics(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| &*event.topic).collect()
}

fn a_run_to_its_end(containerd: &Containerd) {
    let script = "echo $A $PWD; echo err >&2; head -c 8388608 /dev/zero; exit 7";
    let options = ["--rm", "--env", "A=word", "--cwd", "/tmp"];
    let out = containerd.run(&options, "alpine", "a", &["sh", "-c", script]).output().ended_with(7);
    assert_eq!(out.error(), "err\n");
    assert!(out.stdout.starts_with(b"word /tmp\n"));
    assert_eq!(out.stdout.len(), 10 + (8 << 20));

    containerd.event("a", "delete", |event| event.topic == "delete");
    let events = containerd.events("a");
    assert_eq!(topics(&events), ["create", "start", "exit", "delete"]);
    let pid = events[0].number("pid");
    assert!(pid > 0 && events.iter().all(|event| event.number("pid") == pid), "{events:?}");
    assert_eq!(events[2].text("id"), containerd.id("a"));
    assert_eq!((events[2].number("exit_status"), events[3].number("exit_status")), (7, 7));
    assert_eq!(events[2].text("exited_at"), events[3].text("exited_at"));
}

/// `ctr` makes the network of a task that has been created.
fn late_network(containerd: &Containerd) {
    let script = "ip address show eth0; ip route; echo $(ls /proc/sys/net/ipv4/conf); \
        for host in 10.89.0.1 fd89::1; do ping -c 1 -w 20 $host >/dev/null && echo reached $host; done";
    let run = containerd.run(&["--rm", "--cni"], "alpine", "net", &["sh", "-c", script]);
    let said = run.output().ended_with(0).text();
    for word in [
        "mtu 1450",
        "10.89.0.1 dev eth0 scope link",
        "inet 10.89.0.",
        "inet6 fd89::",
        "reached 10.89.0.1",
        "reached fd89::1",
    ] {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    if containerd.runtime == Runtime::Ampoule {
        assert!(said.contains("all default eth0 lo\n"), "no spare device shows: {said}");
        let host = containerd.run(&["--rm", "--net-host"], "alpine", "host", &["true"]).output();
        host.ended_with(1).says(&["linux.namespaces (network)", "the host's network"]);
    }
}

/// Writes to a task's stdin where its client would.
fn types(containerd: &Containerd, create: &Event, text: &str) {
    let fifo = containerd.inside.path(create.body["io"]["stdin"].as_str().unwrap());
    fs::write(fifo, text).unwrap();
}

fn streams(containerd: &Containerd) {
    let sent: Vec<u8> =
        (0..1_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let out = containerd
        .run(&["--rm"], "alpine", "cat", &["cat"])
        .stdin(sent.clone())
        .output()
        .ended_with(0);
    assert!(out.stdout == sent, "{} bytes of {}", out.stdout.len(), sent.len());

    // A client goes and another one comes: what was said meanwhile is not lost, nor is stdin at its end.
    let script = "read go; echo first; echo second >&2; read word; echo got $word; exit 5";
    containerd.run(&["-d"], "alpine", "left", &["sh", "-c", script]).output().ended_with(0);
    let create = containerd.event("left", "create", |event| event.topic == "create");
    types(containerd, &create, "go\n");
    let out = containerd.task(&["attach"], "left", &[]).stdin("word\n").output().ended_with(5);
    assert_eq!((&*out.text(), &*out.error()), ("first\ngot word", "second\n"));
    containerd.remove("left");
}

fn a_terminal(containerd: &Containerd) {
    let (mut screen, slave) = Screen::new();
    let ctr = containerd.run(&["--rm", "-t"], "alpine", "t", &["sh"]);
    // A session of its own, so that the terminal tells ctr of its size.
    let mut setsid = std::process::Command::new("setsid");
    setsid.args(["--ctty", "--wait"]).arg(ctr.command.get_program()).args(ctr.command.get_args());
    let mut child = Screen::on(&slave, program(setsid));
    screen.follows_its_window(|| ());
    screen.interrupts();
    screen.types("exit 5\n");
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

fn the_life_of_a_task(containerd: &Containerd) {
    let script = "trap 'exit 43' TERM; while :; do sleep 0.1; done";
    containerd.run(&["-d"], "alpine", "a", &["sh", "-c", script]).output().ended_with(0);
    let twice = containerd.run(&["-d"], "alpine", "a", &["true"]).output().ended_with(1);
    twice.says(&["already exists"]);
    let (pid, status) = containerd.listed("a").expect("it is listed");
    assert_eq!(status, "RUNNING");
    assert!(
        containerd.inside.processes().iter().any(|process| process.pid == pid),
        "no process {pid}"
    );
    let start = containerd.event("a", "start", |event| event.topic == "start");
    assert_eq!(start.number("pid"), pid as u64);

    containerd.exec(&["--detach"], "a", "beside", &["sleep", "600"]).output().ended_with(0);
    let ps = containerd.task(&["ps"], "a", &[]).output().ended_with(0).text();
    containerd.expects("processes listed by their PIDs on the host", || {
        let first = ps.lines().nth(1).and_then(|line| line.split_whitespace().next());
        let first: i32 = first.and_then(|pid| pid.parse().ok()).expect("a PID");
        let all = containerd.inside.processes();
        let first = all.iter().find(|process| process.pid == first);
        assert_eq!(first.map(|process| process.program()), Some("sh"), "{ps}");
    });
    assert!(ps.contains("beside"), "{ps}");

    let metrics = containerd.task(&["metrics"], "a", &[]).output().ended_with(0).text();
    let usage = metrics.lines().find(|line| line.starts_with("memory.usage"));
    let usage = usage.and_then(|line| line.split_whitespace().last()?.parse::<u64>().ok());
    assert!(usage.is_some_and(|bytes| bytes > 0), "{metrics}");

    containerd.task(&["pause"], "a", &[]).output().ended_with(0);
    assert_eq!(containerd.listed("a").unwrap().1, "PAUSED");
    containerd.exec(&[], "a", "no", &["true"]).output().ended_with(1).says(&["paused"]);
    containerd.task(&["resume"], "a", &[]).output().ended_with(0);
    assert_eq!(containerd.listed("a").unwrap().1, "RUNNING");
    let write = ["sh", "-c", "echo written > /written"];
    containerd.exec(&[], "a", "yes", &write).output().ended_with(0);

    containerd.task(&["delete"], "a", &[]).output().ended_with(1).says(&["must be stopped"]);
    containerd.task(&["kill"], "a", &[]).output().ended_with(0);
    assert_eq!(containerd.exited("a", "a"), 43);
    assert_eq!(containerd.listed("a").unwrap().1, "STOPPED");
    containerd.task(&["kill"], "a", &[]).output().ended_with(1).says(&["not found"]);
    containerd.exec(&[], "a", "late", &["true"]).output().ended_with(1);
    containerd.task(&["delete"], "a", &[]).output();
    containerd.task(&["delete"], "a", &[]).output().ended_with(1).says(&["not found"]);
    assert!(containerd.listed("a").is_none());
    let events = containerd.events("a");
    let own: Vec<&Event> = events.iter().filter(|event| event.text("exec_id").is_empty()).collect();
    let own: Vec<&Event> = own
        .into_iter()
        .filter(|event| ["", &containerd.id("a")].contains(&event.text("id")))
        .collect();
    let topics: Vec<&str> = own.iter().map(|event| &*event.topic).collect();
    let all = ["create", "start", "paused", "resumed", "exit", "delete"];
    let may_lose = (containerd.runtime, containerd.version) == (Runtime::Runc, Version::V2_1);
    assert!(topics == all || may_lose && topics == all[..5], "{topics:?}");
    until_cleared_up(containerd);
    // A new task of the same container, which has what the last one wrote.
    containerd.ctr(["tasks", "start", "--detach", &containerd.id("a")]).output().ended_with(0);
    let read = containerd.exec(&[], "a", "read", &["cat", "/written"]).output().ended_with(0);
    assert_eq!(read.text(), "written");
    containerd.remove("a");
}

/// A containerd that has lost its connection to a shim clears up after it by the container's id, as after every ordinary end;
/// a task of the same container that is there by then would be ended with it, whatever the runtime.
fn until_cleared_up(containerd: &Containerd) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let clears = || {
        let mut all = containerd.inside.processes().into_iter();
        all.any(|process| process.args.iter().any(|arg| arg == "delete"))
    };
    while clears() {
        assert!(Instant::now() < deadline, "the shim's delete does not end");
        thread::sleep(Duration::from_millis(50));
    }
}

fn execs(containerd: &Containerd) {
    let script = "while :; do sleep 0.1; done";
    containerd.run(&["-d"], "alpine", "a", &["sh", "-c", script]).output().ended_with(0);
    let out = containerd
        .exec(&["--cwd", "/tmp"], "a", "x", &["sh", "-c", "pwd; echo err >&2; exit 7"])
        .output();
    let out = out.ended_with(7);
    assert_eq!((&*out.text(), &*out.error()), ("/tmp", "err\n"));
    for (script, code) in
        [("exit 0", 0), ("exit 1", 1), ("exit 126", 126), ("exit 127", 127), ("kill -TERM $$", 143)]
    {
        containerd.exec(&[], "a", "code", &["sh", "-c", script]).output().ended_with(code);
    }
    let out =
        containerd.exec(&["--user", "65534"], "a", "user", &["id", "-u"]).output().ended_with(0);
    assert_eq!(out.text(), "65534");
    let out = containerd.exec(&[], "a", "cat", &["cat"]).stdin("word\n").output().ended_with(0);
    assert_eq!(out.text(), "word");
    let burst = containerd
        .exec(&[], "a", "burst", &["head", "-c", "8388608", "/dev/zero"])
        .output()
        .ended_with(0);
    assert_eq!(burst.stdout.len(), 8 << 20);
    containerd.exec(&[], "a", "none", &["no-such"]).output().ended_with(1).says(&["not found"]);
    containerd
        .exec(&[], "a", "not", &["/etc/passwd"])
        .output()
        .ended_with(1)
        .says(&["ermission denied"]);

    containerd.exec(&["--detach"], "a", "one", &["sleep", "600"]).output().ended_with(0);
    containerd.exec(&["--detach"], "a", "two", &["sleep", "600"]).output().ended_with(0);
    containerd.exec(&[], "a", "two", &["true"]).output().ended_with(1).says(&["already exists"]);
    containerd.task(&["kill", "--exec-id", "one", "-s", "TERM"], "a", &[]).output().ended_with(0);
    assert_eq!(containerd.exited("a", "one"), 143);
    containerd.task(&["delete", "--exec-id", "one"], "a", &[]).output();
    // The end of the first process is the end of all, and is told last.
    containerd.task(&["kill", "-s", "KILL"], "a", &[]).output().ended_with(0);
    assert_eq!(containerd.exited("a", "a"), 137);
    assert_eq!(containerd.exited("a", "two"), 137);
    let id = containerd.id("a");
    let events = containerd.events("a");
    let exits: Vec<&str> =
        events.iter().filter(|event| event.topic == "exit").map(|event| event.text("id")).collect();
    assert_eq!(exits[exits.len() - 2..], ["two", &id]);
    for exec in ["x", "one", "two"] {
        let of = |event: &&Event| [event.text("exec_id"), event.text("id")].contains(&exec);
        let own: Vec<Event> = events.iter().filter(of).cloned().collect();
        assert_eq!(topics(&own), ["exec-added", "exec-started", "exit"], "{own:?}");
        assert!(
            own[1].number("pid") > 0 && own[1].number("pid") == own[2].number("pid"),
            "{own:?}"
        );
    }
    containerd.remove("a");
}

fn commands_that_cannot_start(containerd: &Containerd) {
    for (command, why) in [("no-such", "not found"), ("/etc/passwd", "ermission denied")] {
        let out = containerd.run(&["--rm"], "alpine", "a", &[command]).output().ended_with(1);
        out.says(&[command, why]);
        assert!(containerd.listed("a").is_none());
    }
    let events = containerd.events("a");
    assert!(!topics(&events).contains(&"start"), "{events:?}");
}

#[derive(Clone, PartialEq, Message)]
struct Process {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    exec_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Waited {
    #[prost(uint32, tag = "1")]
    status: u32,
}

const WAIT: &str = "/containerd.services.tasks.v1.Tasks/Wait";

/// Waits for the end of a container's init.
fn waited(containerd: &Containerd, container: &str) -> u32 {
    let process = Process { container_id: containerd.id(container), exec_id: String::new() };
    containerd.grpc.call::<_, Waited>("default", WAIT, process).unwrap().status
}

fn many_waiters(containerd: &Containerd) {
    let process = Process { container_id: containerd.id("a"), exec_id: String::new() };
    containerd.run(&["-d"], "alpine", "a", &["sleep", "600"]).output().ended_with(0);
    let waiting = containerd.grpc.spawn::<_, Waited>(50, "default", WAIT, process);
    thread::sleep(Duration::from_millis(500));
    assert!(!waiting.is_finished());
    containerd.task(&["kill", "-s", "KILL"], "a", &[]).output().ended_with(0);
    let answers = waiting.join().unwrap();
    assert!(
        answers.iter().all(|answer| answer.as_ref().is_ok_and(|w| w.status == 137)),
        "{answers:?}"
    );
    assert_eq!(waited(containerd, "a"), 137);
    containerd.remove("a");
}

/// The first number in some metrics that is called `name`.
fn metric(value: &serde_json::Value, names: &[&str]) -> Option<u64> {
    match value {
        serde_json::Value::Object(fields) => fields.iter().find_map(|(name, value)| {
            value.as_u64().filter(|_| names.contains(&&**name)).or_else(|| metric(value, names))
        }),
        _ => None,
    }
}

fn limits(containerd: &Containerd) {
    let options = ["-d", "--memory-limit", "67108864", "--cpus", "0.1"];
    // What is killed is neither the container's first process nor an exec.
    let script = "while [ ! -e /throttled ]; do :; done; dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 600";
    containerd.run(&options, "alpine", "a", &["sh", "-c", script]).output().ended_with(0);
    containerd.expects("CPU limits", || {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let out =
                containerd.task(&["metrics", "--format", "json"], "a", &[]).output().ended_with(0);
            let metrics = serde_json::from_slice(&out.stdout).unwrap();
            if metric(&metrics, &["nr_throttled", "throttled_periods"])
                .is_some_and(|times| times > 0)
            {
                break;
            }
            assert!(Instant::now() < deadline, "never throttled: {metrics}");
        }
    });
    containerd.expects("out of memory", || {
        containerd.exec(&[], "a", "on", &["touch", "/throttled"]).output().ended_with(0);
        containerd.event("a", "oom", |event| event.topic == "oom");
    });
    containerd.remove("a");
}

fn privileges(containerd: &Containerd) {
    let host = containerd.inside.path("/run/test/shared");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("file"), "from the host\n").unwrap();
    let mut options = vec![
        "--rm",
        "--read-only",
        "--seccomp",
        "--mount",
        "type=tmpfs,src=tmpfs,dst=/tmp,options=size=1m",
    ];
    if containerd.version != Version::V1_6 {
        options.extend(["--hostname", "mine", "--user", "65534:1"]);
    }
    let script = "touch /x; touch /tmp/x; grep -E '^(CapEff|Seccomp|NoNewPrivs):' /proc/self/status; hostname; id -u; id -g";
    let out =
        containerd.run(&options, "alpine", "small", &["sh", "-c", script]).output().ended_with(0);
    assert!(out.error().contains("/x: Read-only file system"), "{}", out.error());
    assert!(!out.error().contains("/tmp/x"), "{}", out.error());
    let text = out.text().replace('\t', " ");
    assert!(text.contains("NoNewPrivs: 1") && text.contains("Seccomp: 2"), "{text}");
    match containerd.version {
        Version::V1_6 => {
            assert!(text.contains("CapEff: 00000000a80425fb") && text.ends_with("0\n0"), "{text}")
        }
        Version::V1_7 | Version::V2_1 => assert!(
            text.contains("CapEff: 0000000000000000") && text.ends_with("mine\n65534\n1"),
            "{text}"
        ),
    }
    let mount = "type=bind,src=/run/test/shared,dst=/host,options=rbind:ro";
    let script = ["sh", "-c", "cat /host/file; echo x > /host/x"];
    let run = containerd.run(&["--rm", "--mount", mount], "alpine", "mounts", &script);
    let out = run.output().ended_with(1);
    assert_eq!(out.text(), "from the host");
    assert!(out.error().contains("Read-only file system"), "{}", out.error());
    // It names every device of the host; a VM has its own.
    let script = "mount -t tmpfs none /mnt && echo mounted; ls /dev/fuse /dev/kvm; grep -c ' /data .*ext4' /proc/mounts";
    let mut options = vec!["--rm", "--privileged"];
    if containerd.runtime == Runtime::Ampoule {
        options.extend(["--mount", "type=scratch,src=scratch,dst=/data"]);
    }
    let run = containerd.run(&options, "alpine", "all", &["sh", "-c", script]).output();
    match containerd.runtime {
        Runtime::Runc => assert!(run.text().starts_with("mounted"), "{run:?}"),
        Runtime::Ampoule => assert_eq!(run.text(), "mounted\n/dev/fuse\n1", "{run:?}"),
    }
}

fn images(containerd: &Containerd) {
    let script = "cd /layers; cat *; ls";
    let out =
        containerd.run(&["--rm"], "layers", "layers", &["sh", "-c", script]).output().ended_with(0);
    assert_eq!(out.text(), "30\n28\n28\nlast\nonly-28\ntop");
    let out = containerd
        .run(&["--rm"], "pause", "static", &["/pause", "--version"])
        .output()
        .ended_with(0);
    assert!(out.text().contains("catatonit"), "{}", out.text());
    let script = "dpkg-query -W libc6 && perl -e 'print 6 * 7'";
    let out =
        containerd.run(&["--rm"], "debian", "glibc", &["sh", "-c", script]).output().ended_with(0);
    assert!(out.text().ends_with("42"), "{}", out.text());
}

/// Of containerd's EROFS snapshotter: a layer alone is the guest's as it is, several are converted once.
fn erofs_layers(containerd: &Containerd) {
    if let Err(why) = containerd.import_as_erofs() {
        return skip("containerd: erofs", &why);
    }
    let is_ampoule = containerd.runtime == Runtime::Ampoule;
    let script = "cat /etc/alpine-release | cut -c 1-2; echo w > /written; cat /written; cat /who; [ ! -e /etc/motd ] || echo motd";
    for (image, said, converted) in
        [("alone", "3.\nw\nmotd", 0), ("above", "3.\nw\nlayer", usize::from(is_ampoule))]
    {
        for id in ["one", "two"] {
            let options = ["--rm", "--snapshotter", "erofs"];
            let run = containerd.run(&options, image, id, &["sh", "-c", script]);
            assert_eq!(run.output().ended_with(0).text(), said, "{image}");
            assert_eq!(containerd.converted(), converted, "{image}, {id}");
        }
    }
    containerd.forget_erofs();
}

fn containerd_killed(containerd: &Containerd) {
    containerd.run(&["-d"], "alpine", "on", &["sleep", "600"]).output().ended_with(0);
    let script = "read word; exit 9";
    containerd.run(&["-d"], "alpine", "ends", &["sh", "-c", script]).output().ended_with(0);
    let before = containerd.listed("on");
    let create = containerd.event("ends", "create", |event| event.topic == "create");
    containerd.kill();
    // It ends while nobody listens.
    types(containerd, &create, "word\n");
    thread::sleep(Duration::from_secs(1));
    containerd.start_again();
    assert_eq!(containerd.listed("on"), before);
    containerd.exec(&[], "on", "x", &["sh", "-c", "exit 3"]).output().ended_with(3);
    if containerd.version != Version::V1_6 {
        // It takes a shim without processes for a leaked one and clears it away.
        containerd.expects("the loss of an ended task", || {
            assert!(containerd.listed("ends").is_none());
        });
    }
    if containerd.version == Version::V1_6 || containerd.runtime == Runtime::Ampoule {
        // Its event may have come before we listened again.
        assert_eq!(containerd.listed("ends").unwrap().1, "STOPPED");
        assert_eq!(waited(containerd, "ends"), 9);
    }
    containerd.task(&["delete"], "ends", &[]).output();
    containerd.ctr(["containers", "rm", &containerd.id("ends")]).output().ended_with(0);
    containerd.remove("on");
}

fn the_shim_killed(containerd: &Containerd) {
    containerd.run(&["-d"], "alpine", "a", &["sleep", "600"]).output().ended_with(0);
    let (pid, _) = containerd.listed("a").unwrap();
    containerd.inside.kill("KILL", containerd.shim("a"));
    assert_eq!(containerd.exited("a", "a"), 137);
    containerd.event("a", "delete", |event| event.topic == "delete");
    assert!(containerd.listed("a").is_none());
    assert!(containerd.inside.processes().iter().all(|process| process.pid != pid));
    containerd.ctr(["containers", "rm", &containerd.id("a")]).output().ended_with(0);
    let again = containerd.run(&["--rm"], "alpine", "a", &["echo", "again"]).output().ended_with(0);
    assert_eq!(again.text(), "again");
}

fn a_storm(containerd: &Containerd) {
    let everyday = env::var("AMPOULE_TEST_STORM").ok().and_then(|n| n.parse().ok());
    let size = scaled(everyday.unwrap_or(20), 20) as i32;
    for _ in 0..2 {
        thread::scope(|scope| {
            for code in 0..size {
                scope.spawn(move || {
                    let (id, script) = (format!("s{code}"), format!("echo {code}; exit {code}"));
                    let command = ["sh", "-c", &script];
                    let out = containerd.run(&["--rm"], "mini", &id, &command).output();
                    assert_eq!(out.ended_with(code).text(), code.to_string());
                });
            }
        });
    }
}

/// Looks every now and then, and not only at the end, whether something is left, to name the first that leaves it.
fn in_a_row(containerd: &Containerd) {
    const LOOK: usize = 20;
    for number in 1..=scaled(2, 500) {
        let out = containerd.run(&["--rm"], "mini", "one", &["echo", "hi"]).output();
        assert_eq!(out.ended_with(0).text(), "hi");
        if number % LOOK == 0 {
            containerd.assert_nothing_left();
            eprintln!("{number} in a row");
        }
    }
}
