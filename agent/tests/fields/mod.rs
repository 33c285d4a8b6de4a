//! Fields of the OCI spec, each with what it does and what of it is refused.

use ampoule_agent_api::agent::*;
use serde_json::{Value, json};

use crate::{
    code,
    guest::{Guest, Output, context, process, sh, spec},
};

/// Runs a script in a container that differs from the usual one by `changes`.
async fn run(guest: &Guest, script: &str, changes: &[(&str, Value)]) -> Output {
    guest.run(changed(sh(script), changes)).await
}

/// What a container that differs so is refused with.
async fn refusal(guest: &Guest, changes: &[(&str, Value)]) -> String {
    let refused = guest.create("c", changed(sh("true"), changes)).await.err();
    code(refused.unwrap_or_else(|| panic!("{changes:?} was taken"))).1
}

/// Sets members, whose parents are there, by their JSON pointers.
fn changed(mut json: Value, changes: &[(&str, Value)]) -> Value {
    for (pointer, value) in changes {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        match json.pointer_mut(parent).unwrap() {
            Value::Array(list) => list.push(value.clone()),
            members => members[name] = value.clone(),
        }
    }
    json
}

#[tokio::test]
async fn scheduling_of_cpu_and_io() {
    let guest = Guest::boot().await;
    // Nice, real-time priority and policy of proc_pid_stat(5).
    let script = "awk '{print $19, $40, $41}' /proc/self/stat; ionice -p $$";
    for (scheduler, io, expected) in [
        (
            json!({"policy": "SCHED_BATCH", "nice": 5}),
            json!({"class": "IOPRIO_CLASS_BE", "priority": 6}),
            "5 0 3\nbest-effort: prio 6\n",
        ),
        (
            json!({"policy": "SCHED_FIFO", "priority": 7}),
            json!({"class": "IOPRIO_CLASS_IDLE"}),
            "0 7 1\nidle\n",
        ),
    ] {
        let changes = [("/process/scheduler", scheduler), ("/process/ioPriority", io)];
        assert_eq!(run(&guest, script, &changes).await.text(), expected);
    }
    for (field, value, word) in [
        ("/process/scheduler", json!({"policy": "SCHED_FIFO", "priority": 100}), "scheduler"),
        ("/process/scheduler", json!({"policy": "SCHED_LUCK"}), "SCHED_LUCK"),
        ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 8}), "8"),
    ] {
        let message = refusal(&guest, &[(field, value)]).await;
        assert!(message.contains(word), "{message}");
    }
    guest.shutdown().await;
}

#[tokio::test]
async fn execs_have_their_cpus_and_the_containers_where_they_name_none() {
    let guest = Guest::boot().await;
    let beyond = json!({"initial": "900"});
    let init = changed(spec(&["sleep", "1000"]), &[("/process/execCPUAffinity", beyond.clone())]);
    let init = guest.create("c", init).await.unwrap();
    guest.start(&init).await.unwrap();
    let mut own = process(&["grep", "Cpus_allowed_list", "/proc/self/status"]);
    let inherited = guest.exec("c", "e1", own.clone()).await.err().unwrap();
    assert!(code(inherited).1.contains("cpu affinity: 900"));
    own["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
    let run = guest.exec("c", "e2", own.clone()).await.unwrap();
    assert_eq!(guest.finish(run).await.text(), "Cpus_allowed_list:\t0\n");
    own["execCPUAffinity"] = json!({"final": "1-0"});
    let wrong = guest.exec("c", "e3", own).await.err().unwrap();
    assert!(code(wrong).1.contains("process.execCPUAffinity"));
    guest.shutdown().await;
}

#[tokio::test]
async fn personality_and_clocks_are_the_containers_own() {
    let guest = Guest::boot().await;
    let namespaces = |spec: &Value| {
        let mut all = spec["linux"]["namespaces"].as_array().unwrap().clone();
        all.push(json!({"type": "time"}));
        Value::Array(all)
    };
    let offsets = json!({"boottime": {"secs": 5_000_000}, "monotonic": {"secs": 7, "nanosecs": 1}});
    let changes = |offsets: &Value| {
        [
            ("/linux/namespaces", namespaces(&sh(""))),
            ("/linux/timeOffsets", offsets.clone()),
            ("/linux/personality", json!({"domain": "LINUX32"})),
        ]
    };
    let shown = "cat /proc/self/personality; cut -d. -f1 /proc/uptime | cut -c1; \
                 cut -d. -f1 /proc/uptime | wc -c";
    let wait = format!("{shown}; touch /dev/shm/done; exec sleep 1000");
    let mut run = guest.create("c", changed(sh(&wait), &changes(&offsets))).await.unwrap();
    guest.start(&run).await.unwrap();
    let script = format!("until [ -e /dev/shm/done ]; do sleep 0.1; done; {shown}");
    let exec = guest.exec("c", "e", process(&["sh", "-c", &script])).await.unwrap();
    let expected = "00000008\n5\n8\n";
    assert_eq!(guest.finish(exec).await.text(), expected);
    guest.signal(&run, libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait(&mut run).await.text(), expected);
    guest.agent.delete(context(), &run.request()).await.unwrap();

    let message = refusal(&guest, &changes(&json!({"realtime": {"secs": 1}}))).await;
    assert!(message.contains("realtime"), "{message}");
    let message = refusal(&guest, &[("/linux/timeOffsets", offsets)]).await;
    assert!(message.contains("linux.timeOffsets"), "{message}");
    let message = refusal(&guest, &[("/linux/personality", json!({"domain": "SOLARIS"}))]).await;
    assert!(message.contains("SOLARIS"), "{message}");
    guest.shutdown().await;
}

#[tokio::test]
async fn devices_are_made_as_they_are_described() {
    let guest = Guest::boot().await;
    let devices = json!([
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600},
        {"path": "/dev/pipe", "type": "p"},
    ]);
    let script =
        "stat -c '%a %u %g %t:%T' /dev/fuse /dev/null /dev/zero; [ -p /dev/pipe ] && echo fifo";
    let output = run(&guest, script, &[("/linux/devices", devices)]).await;
    assert_eq!(output.text(), "640 5 6 a:e5\n600 0 0 1:3\n666 0 0 1:5\nfifo\n");
    let odd = json!([{"path": "/dev/odd", "type": "x"}]);
    let message = refusal(&guest, &[("/linux/devices", odd)]).await;
    assert!(message.contains("/dev/odd"), "{message}");
    guest.shutdown().await;
}

#[tokio::test]
async fn mounts_have_their_options_and_propagation() {
    let guest = Guest::boot().await;
    let mount = |options: &[&str]| json!({"destination": "/a", "type": "tmpfs", "source": "tmpfs", "options": options});
    let script =
        "grep ' /a ' /proc/self/mountinfo; df -k /a | tail -n 1; grep ' / / ' /proc/self/mountinfo";
    let options = ["nosuid", "noatime", "ro", "size=2m", "nr_inodes=9", "shared"];
    let changes = [("/mounts/-", mount(&options)), ("/linux/rootfsPropagation", json!("rshared"))];
    let output = run(&guest, script, &changes).await;
    let lines: Vec<_> = output.text().lines().collect();
    for word in ["ro,nosuid,noatime", "shared:", "size=2048k", "nr_inodes=9"] {
        assert!(lines[0].contains(word), "{word}: {}", lines[0]);
    }
    assert!(lines[1].contains(" 2048 ") && lines[2].contains("shared:"), "{lines:?}");
    let copied = json!({"destination": "/etc/apk", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "ro", "mode=711"]});
    let plain = json!({"destination": "/var/empty", "type": "tmpfs", "source": "tmpfs"});
    let script =
        "stat -c %a /etc/apk /etc/apk/world /var/empty; cat /etc/apk/arch; touch /etc/apk/x";
    let output = run(&guest, script, &[("/mounts/-", copied), ("/mounts/-", plain)]).await;
    assert_eq!(output.text(), "711\n644\n555\nx86_64\n");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Read-only"), "{said}");
    let volume = json!({"destination": "/etc/apk", "type": "scratch", "source": "scratch"});
    let script = "cd /etc/apk; cat arch; echo x > arch; cat arch; grep -c ' /etc/apk .* tmpfs ' /proc/self/mountinfo";
    let output = run(&guest, script, &[("/mounts/-", volume)]).await;
    assert_eq!(output.text(), "x86_64\nx\n1\n");
    let message = refusal(&guest, &[("/mounts/-", mount(&["sise=2m"]))]).await;
    assert!(message.contains("sise"), "{message}");
    let message = refusal(&guest, &[("/linux/rootfsPropagation", json!("public"))]).await;
    assert!(message.contains("linux.rootfsPropagation"), "{message}");
    guest.shutdown().await;
}

#[tokio::test]
async fn names_and_sysctls() {
    let guest = Guest::boot().await;
    let changes = [
        ("/domainname", json!("example.org")),
        ("/linux/sysctl", json!({"kernel.msgmax": "9000", "net/ipv4/ip_default_ttl": "33"})),
    ];
    let script = "cd /proc/sys; cat kernel/domainname kernel/msgmax net/ipv4/ip_default_ttl";
    assert_eq!(run(&guest, script, &changes).await.text(), "example.org\n9000\n33\n");
    let message = refusal(&guest, &[("/linux/sysctl", json!({"kernel.magic": "1"}))]).await;
    assert!(message.contains("kernel.magic"), "{message}");
    let message = refusal(&guest, &[("/linux/sysctl", json!({"../self/comm": "1"}))]).await;
    assert!(message.contains("sysctl"), "{message}");
    guest.shutdown().await;
}

#[tokio::test]
async fn resources_are_files_of_the_containers_cgroup() {
    let guest = Guest::boot().await;
    let resources = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "cpu": {"quota": 50_000, "period": 100_000, "burst": 20_000, "cpus": "0", "mems": "0"},
        "memory": {"limit": 64 << 20, "reservation": 32 << 20},
        "pids": {"limit": 99},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "7MB", "limit": 0}],
        "unified": {"cpu.weight": "77"},
    });
    let script = "cd /sys/fs/cgroup; cat cpu.max cpu.max.burst cpuset.cpus memory.max memory.low pids.max \
                  hugetlb.2MB.max cpu.weight";
    let output = run(&guest, script, &[("/linux/resources", resources)]).await;
    assert_eq!(
        output.text(),
        "50000 100000\n20000\n0\n67108864\n33554432\n99\n0\n77\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let idle = [("/linux/resources", json!({"cpu": {"idle": 1}}))];
    assert_eq!(run(&guest, "cat /sys/fs/cgroup/cpu.idle", &idle).await.text(), "1\n");
    let unknown = json!({"unified": {"memory.luck": "1"}});
    let message = refusal(&guest, &[("/linux/resources", unknown)]).await;
    assert!(message.contains("memory.luck") && message.contains("no such control"), "{message}");

    let init = guest.create("c", sh("exec sleep 1000")).await.unwrap();
    guest.start(&init).await.unwrap();
    let update = async |memory: Value| {
        let request = UpdateRequest {
            container_id: "c".into(),
            resources: serde_json::to_vec(&json!({ "memory": memory })).unwrap(),
            ..Default::default()
        };
        guest.agent.update(context(), &request).await
    };
    update(json!({"limit": 64 << 20, "checkBeforeUpdate": true})).await.unwrap();
    let below = update(json!({"limit": 4096, "checkBeforeUpdate": true})).await.err().unwrap();
    assert!(code(below).1.contains("more is in use"));
    guest.shutdown().await;
}

#[tokio::test]
async fn hooks_run_before_the_command_as_what_it_will_be() {
    let guest = Guest::boot().await;
    let hook = |script: &str, timeout: u32| json!({"path": "/bin/sh", "args": ["ash", "-c", script], "env": ["A=b"], "timeout": timeout});
    let hooks = |list: &[Value]| [("/hooks", json!({ "startContainer": list }))];
    let script = "cat > /dev/shm/state; echo $0 $A $HOME $(id -u) $(readlink /proc/self/ns/pid) > /dev/shm/said";
    let user = ("/process/user", json!({"uid": 7, "gid": 7}));
    let mut changes = hooks(&[hook(script, 9), hook("exec sleep 0 &", 9)]).to_vec();
    changes.push(user);
    let shown =
        "cat /dev/shm/state; echo; cat /dev/shm/said; echo $(id -u) $(readlink /proc/self/ns/pid)";
    let output = run(&guest, shown, &changes).await;
    let lines: Vec<_> = output.text().lines().collect();
    let state: Value = serde_json::from_str(lines[0]).unwrap();
    let version = sh("")["ociVersion"].clone();
    let expected = json!({
        "ociVersion": version.as_str().unwrap_or_default(), "id": "c", "status": "created", "pid": 1, "bundle": "/",
    });
    assert_eq!(state, expected);
    assert_eq!(lines[1], format!("ash b {}", lines[2]));

    for (hook, words) in [
        (hook("echo no luck >&2; exit 3", 9), ["startContainer[1] (/bin/sh)", "3: no luck"]),
        (hook("exec sleep 1000", 1), ["startContainer[1] (/bin/sh)", "not done within 1 s"]),
        (json!({"path": "/no/hook"}), ["startContainer[1] (/no/hook)", "No such file"]),
    ] {
        let changes = hooks(&[json!({"path": "/bin/true"}), hook]);
        let run = guest.create("c", changed(sh("touch /dev/shm/ran"), &changes)).await.unwrap();
        let message = code(guest.start(&run).await.err().unwrap()).1;
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        guest.agent.delete(context(), &run.request()).await.unwrap();
    }
    let message = refusal(&guest, &hooks(&[json!({"path": "bin/true"})])).await;
    assert!(message.contains("not an absolute path"), "{message}");
    guest.shutdown().await;
}
