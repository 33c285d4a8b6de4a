//! Fields of the OCI spec, the same specs with runc and with ampoule: what each does where it is set, that it does not
//! where it is not, and bad values. All containers of a runtime are one pod, whose first one holds the namespaces.

use std::{
    collections::HashMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
};

use ampoule_shim::spec::fields::{By, FIELDS};
use ampoule_tests::{Runtime, oci::Bundle, program, skip};
use serde_json::{Value, json};

/// The containers that have their fields set; they cannot all be had at once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum In {
    Main,
    /// A container with users of its own.
    Users,
}

/// What fields do.
struct Case {
    /// Rows of the table; all below them is meant.
    fields: &'static [&'static str],
    container: In,
    /// JSON pointer, and value; `-` adds to a list.
    set: Vec<(&'static str, Value)>,
    /// A line of shell; what it prints with the fields, spaces for line ends.
    probe: &'static str,
    prints: &'static str,
    /// What it prints without them, if that is the same everywhere.
    prints_without: Option<&'static str>,
    /// Why runc does nothing of it.
    not_runc: Option<&'static str>,
}

const NEWER: &str = "runc 1.1 does not know it";

fn case(
    fields: &'static [&'static str],
    set: impl Into<Vec<(&'static str, Value)>>,
    probe: &'static str,
    prints: &'static str,
) -> Case {
    let set = set.into();
    Case { fields, container: In::Main, set, probe, prints, prints_without: None, not_runc: None }
}

impl Case {
    fn without(self, prints: &'static str) -> Self {
        Self { prints_without: Some(prints), ..self }
    }

    fn of_users(self) -> Self {
        Self { container: In::Users, ..self }
    }

    fn but_runc(self, why: &'static str) -> Self {
        Self { not_runc: Some(why), ..self }
    }
}

fn mount(kind: &str, destination: &str, options: &[&str]) -> Value {
    json!({"type": kind, "source": "spring", "destination": destination, "options": options})
}

/// Of a file that has another name with cgroup v1, which this machine may have.
macro_rules! cgroup {
    ($v2:literal, $v1:literal) => {
        concat!("cd /sys/fs/cgroup; cat ", $v2, " ", $v1, " 2>/dev/null | tail -n 1")
    };
}

fn cases() -> Vec<Case> {
    let mut all = processes();
    all.extend(files());
    all.extend(kernel());
    all.extend(resources());
    all.extend(seccomp());
    all
}

fn processes() -> Vec<Case> {
    let capabilities = json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETPCAP"], "permitted": ["CAP_KILL", "CAP_CHOWN"],
        "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"],
    });
    let user = json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 0o27});
    let limit = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    vec![
        case(
            &["process.user.uid", "process.user.gid", "process.user.additionalGids"],
            [("/process/user", user)],
            "id -u; id -g; id -G",
            "1000 1001 1001 7 8",
        )
        .without("0 0 0"),
        case(&["process.user.umask"], [], "umask", "0027").without("0022"),
        case(
            &["process.capabilities"],
            [("/process/capabilities", capabilities)],
            "grep Cap /proc/self/status | cut -c18-24",
            "0000020 0000020 0000020 0000121 0000020",
        ),
        case(
            &["process.rlimits"],
            [("/process/rlimits", limit)],
            "ulimit -Sn; ulimit -Hn",
            "100 200",
        ),
        case(
            &["process.noNewPrivileges"],
            [("/process/noNewPrivileges", json!(true))],
            "grep NoNewPrivs /proc/self/status | cut -f2",
            "1",
        )
        .without("0"),
        case(
            &["process.oomScoreAdj"],
            [("/process/oomScoreAdj", json!(567))],
            "cat /proc/self/oom_score_adj",
            "567",
        ),
        case(
            &["process.cwd"],
            [("/process/cwd", json!("/tmp/made/for/it"))],
            "echo $at",
            "/tmp/made/for/it",
        )
        .without("/"),
        case(&["process.env"], [("/process/env/-", json!("FIELD=set"))], "echo $FIELD", "set")
            .without(""),
        case(&["process.args"], [("/process/args/-", json!("added"))], "echo $#", "2").without("1"),
        case(
            &["process.ioPriority"],
            [("/process/ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 6}))],
            "ionice -p $$",
            "best-effort: prio 6",
        )
        .but_runc(NEWER),
        case(
            &["process.scheduler.policy", "process.scheduler.nice"],
            [("/process/scheduler", json!({"policy": "SCHED_BATCH", "nice": 5}))],
            "awk '{print $19, $41}' /proc/self/stat",
            "5 3",
        )
        .but_runc(NEWER),
    ]
}

fn files() -> Vec<Case> {
    let device = json!({
        "path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o606, "uid": 5, "gid": 6,
    });
    let rule = json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"});
    let bind = json!({
        "type": "bind", "source": "SHARED", "destination": "/shared",
        "options": ["rbind", "ro", "noexec", "rslave"],
    });
    let options = ["size=1m", "mode=1743", "nosuid", "noexec", "noatime", "shared"];
    let mounts = [
        ("/mounts/-", mount("tmpfs", "/t", &options)),
        ("/mounts/-", mount("tmpfs", "/etc/apk", &["tmpcopyup", "ro"])),
        ("/mounts/-", mount("mqueue", "/dev/mqueue", &["nosuid"])),
        ("/mounts/-", bind),
    ];
    vec![
        case(
            &["root.readonly"],
            [("/root/readonly", json!(true))],
            "awk '$5 == \"/\" {print $6}' /proc/self/mountinfo | cut -d, -f1",
            "ro",
        )
        .without("rw"),
        case(
            &["mounts[].destination", "mounts[].type", "mounts[].source", "mounts[].options"],
            mounts,
            "awk '$2 == \"/t\" {print $1, $3, $4}' /proc/mounts | cut -d, -f1-4; \
             stat -c %a /t; df -k /t | awk 'NR > 1 {print $2}'; grep -c ' /t .*shared:' /proc/self/mountinfo",
            "spring tmpfs rw,nosuid,noexec,noatime 1743 1024 1",
        ),
        case(
            &["mounts[].options"],
            [],
            "grep -c ' /etc/apk tmpfs ro' /proc/mounts; cat /etc/apk/arch; grep -c ' mqueue ' /proc/mounts",
            "1 x86_64 1",
        )
        .without("0 x86_64 0"),
        case(
            &["mounts[].source"],
            [],
            "cat /shared/file; touch /shared/new && echo written; cp /bin/busybox /tmp/b; \
             /shared/run && echo run",
            "of the host",
        ),
        case(
            &["linux.devices"],
            [("/linux/devices", json!([device]))],
            "stat -c '%F %t:%T %a %u %g' /dev/kmsg",
            "character special file 1:b 606 5 6",
        )
        .without("character special file 1:b 666 0 0"),
        case(
            &["linux.resources.devices"],
            [("/linux/resources/devices/-", rule)],
            ": >/dev/kmsg && echo w; : </dev/kmsg && echo r",
            "w",
        )
        .without(""),
        case(
            &["linux.maskedPaths"],
            [("/linux/maskedPaths", json!(["/proc/version", "/media"]))],
            "wc -c </proc/version",
            "0",
        ),
        case(
            &["linux.readonlyPaths"],
            [("/linux/readonlyPaths", json!(["/proc/irq", "/proc/no-such"]))],
            "awk '$5 == \"/proc/irq\" {print $6}' /proc/self/mountinfo | cut -d, -f1",
            "ro",
        )
        .without(""),
        case(
            &["linux.rootfsPropagation"],
            [("/linux/rootfsPropagation", json!("rshared"))],
            "awk '$5 == \"/\"' /proc/self/mountinfo | grep -c shared:",
            "1",
        )
        .without("0")
        .but_runc("with runc it is that of the host's mounts"),
    ]
}

fn kernel() -> Vec<Case> {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let namespaces = |kinds: &[&str]| -> Vec<_> {
        kinds.iter().map(|kind| ("/linux/namespaces/-", json!({"type": kind}))).collect()
    };
    vec![
        case(&["hostname"], [("/hostname", json!("field"))], "hostname", "field").without("pod"),
        case(
            &["domainname"],
            [("/domainname", json!("example.org"))],
            "cat /proc/sys/kernel/domainname",
            "example.org",
        )
        .but_runc(NEWER),
        case(
            &["linux.namespaces[].type"],
            namespaces(&["cgroup", "uts"]),
            "cut -d: -f3 /proc/self/cgroup | sort -u; echo $$",
            "/ 1",
        ),
        case(
            &["linux.namespaces[].path"],
            [("/linux/namespaces/-", json!({"type": "ipc", "path": "/proc/POD/ns/ipc"}))],
            "cat /proc/sys/kernel/msgmax",
            "7777",
        )
        .without("8192"),
        case(
            &["linux.uidMappings", "linux.gidMappings", "linux.namespaces[].type"],
            [
                ("/linux/namespaces/-", json!({"type": "user"})),
                ("/linux/namespaces/-", pods_uts()),
                ("/linux/uidMappings", map.clone()),
                ("/linux/gidMappings", map),
            ],
            "id -u; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '",
            "0  0 100000 65536  0 100000 65536",
        )
        .of_users(),
        case(
            &["linux.sysctl"],
            [("/linux/sysctl", json!({"net.ipv4.ip_default_ttl": "33"}))],
            "cat /proc/sys/net/ipv4/ip_default_ttl",
            "33",
        )
        .without("64"),
        case(
            &["linux.personality.domain"],
            [("/linux/personality", json!({"domain": "LINUX32"}))],
            "uname -m",
            "i686",
        )
        .but_runc(NEWER),
        case(
            &["linux.timeOffsets"],
            [
                ("/linux/namespaces/-", json!({"type": "time"})),
                ("/linux/timeOffsets", json!({"boottime": {"secs": 5_000_000}})),
            ],
            "cut -c1 /proc/uptime; cut -d. -f1 /proc/uptime | wc -c",
            "5 8",
        )
        .but_runc(NEWER),
    ]
}

fn resources() -> Vec<Case> {
    let cpu = json!({"shares": 512, "quota": 50_000, "period": 100_000});
    let memory = json!({"limit": 96 << 20, "reservation": 32 << 20, "swap": 96 << 20});
    vec![
        case(
            &["mounts[].type"],
            [("/mounts/-", mount("cgroup", "/sys/fs/cgroup", &["ro"]))],
            "grep -c '^[a-z]* /sys/fs/cgroup' /proc/mounts | sed 's/[1-9].*/some/'",
            "some",
        )
        .without("0"),
        case(
            &["linux.resources.cpu.shares"],
            [("/linux/resources/cpu", cpu)],
            // 1024 shares are a weight of 100, or of 39 where 2 to 262144 shares are spread evenly.
            cgroup!("cpu.weight", "cpu/cpu.shares | sed 's/^20$/512/; s/^59$/512/'"),
            "512",
        ),
        case(
            &["linux.resources.cpu.quota", "linux.resources.cpu.period"],
            [],
            cgroup!("cpu.max", "cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us | xargs echo"),
            "50000 100000",
        ),
        case(
            &["linux.resources.memory.limit"],
            [("/linux/resources/memory", memory)],
            cgroup!("memory.max", "memory/memory.limit_in_bytes"),
            "100663296",
        ),
        case(
            &["linux.resources.memory.reservation"],
            [],
            cgroup!("memory.low", "memory/memory.soft_limit_in_bytes"),
            "33554432",
        ),
        case(
            &["linux.resources.pids"],
            [("/linux/resources/pids", json!({"limit": 77}))],
            cgroup!("pids.max", "pids/pids.max"),
            "77",
        ),
        case(
            &["linux.resources.cpu.burst"],
            [("/linux/resources/cpu/burst", json!(20_000))],
            "cat /sys/fs/cgroup/cpu.max.burst",
            "20000",
        )
        .but_runc(NEWER),
    ]
}

/// The default profile, but for some calls.
fn seccomp() -> Vec<Case> {
    let mut profile: Value =
        serde_json::from_str(include_str!("../../../shim/src/seccomp.json")).unwrap();
    for rule in profile["syscalls"].as_array_mut().unwrap() {
        let names = rule["names"].as_array_mut().unwrap();
        names.retain(|name| {
            let name = name.as_str().unwrap();
            !["mkdir", "mkdirat", "chmod", "fchmodat", "fchmodat2", "symlink", "symlinkat"]
                .contains(&name)
        });
    }
    profile["defaultErrnoRet"] = json!(28);
    let rules = profile["syscalls"].as_array_mut().unwrap();
    rules.push(
        json!({"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30}),
    );
    for (name, index) in [("chmod", 1), ("fchmodat", 2), ("fchmodat2", 2)] {
        let even = json!({"index": index, "value": 1, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"});
        rules.push(json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": [even]}));
    }
    vec![
        case(
            &["linux.seccomp.defaultAction", "linux.seccomp.defaultErrnoRet"],
            [("/linux/seccomp", profile)],
            "mkdir /tmp/d$$ 2>&1 | cut -d: -f3",
            " No space left on device",
        )
        .without(""),
        case(
            &[
                "linux.seccomp.syscalls[].names",
                "linux.seccomp.syscalls[].action",
                "linux.seccomp.syscalls[].errnoRet",
            ],
            [],
            "ln -s x /tmp/l$$ 2>&1 | cut -d: -f3",
            " Read-only file system",
        )
        .without(""),
        case(
            &["linux.seccomp.syscalls[].args"],
            [],
            "f=/t/f; touch $f || f=/tmp/f; touch $f; chmod 600 $f && echo even; chmod 601 $f && echo odd",
            "even",
        )
        .without("even odd"),
    ]
}

/// Bad values, and a word of the refusal, ampoule's and runc's where they differ.
const REFUSED: [(&str, &str, &str); 12] = [
    ("/process/cwd", r#""tmp""#, "wd"),
    ("/process/args", "[]", "args"),
    ("/process/rlimits", r#"[{"type": "RLIMIT_LUCK", "soft": 1, "hard": 1}]"#, "RLIMIT_LUCK"),
    ("/process/apparmorProfile", r#""mine""#, "apparmor"),
    ("/process/selinuxLabel", r#""a:b:mine_t:s0""#, "selinux"),
    ("/linux/namespaces/-", r#"{"type": "pid"}"#, "Pid twice|duplicated ns"),
    ("/linux/namespaces/-", r#"{"type": "user"}"#, "apping"),
    ("/linux/rootfsPropagation", r#""public""#, "public"),
    ("/linux/sysctl", r#"{"net.magic": "1"}"#, "magic"),
    ("/linux/seccomp", r#"{"defaultAction": "SCMP_ACT_MAGIC"}"#, "MAGIC"),
    ("/mounts/-", r#"{"type": "nosuchfs", "source": "x", "destination": "/x"}"#, "/x"),
    (
        "/linux/devices",
        r#"[{"path": "/dev/x", "type": "x", "major": 1, "minor": 3}]"#,
        "variant `x`|device type",
    ),
];

/// Rows that no case above is of.
const ELSEWHERE: [(&str, &str); 20] = [
    ("ociVersion", "runc runs any; shim/src/spec/tests.rs refuses 2.0.0"),
    ("root.path", "no container is without"),
    ("process.terminal", "oci.rs, terminal"),
    ("process.consoleSize", "agent/tests/lifecycle.rs, terminals"),
    (
        "process.user.username",
        "runc has it for Windows alone; verbs.rs, exec_runs_a_command_beside_the_first",
    ),
    (
        "process.scheduler",
        "runc 1.1 does not know it; agent/tests/fields, scheduling_of_cpu_and_io",
    ),
    (
        "process.execCPUAffinity",
        "runc 1.1 does not know it; agent/tests/fields, execs_have_their_cpus_...",
    ),
    ("hooks", "spec.rs, hooks_run_at_their_time and hooks_that_fail"),
    ("annotations", "of ampoule alone; pods.rs"),
    ("mounts[].uidMappings", "runc 1.1 does not know it; ampoule_mapped_owners"),
    ("mounts[].gidMappings", "likewise"),
    ("linux.resources.memory.swap", "no swap here, nor in a guest; agent/src/cgroup/limits.rs"),
    (
        "linux.resources.memory.checkBeforeUpdate",
        "runc 1.1 does so with no kernel of today; agent/tests/fields",
    ),
    ("linux.resources.cpu.idle", "runc 1.1 does not know it; agent/src/cgroup/limits.rs"),
    ("linux.resources.cpu.cpus", "cpus.rs: they are the host's"),
    ("linux.resources.cpu.mems", "shim/src/cpus.rs: they are the host's"),
    ("linux.resources.blockIO", "spec/block_io.rs"),
    ("linux.resources.hugepageLimits", "a guest has no huge pages; agent/tests/fields"),
    ("linux.resources.unified", "runc refuses it with cgroup v1; agent/tests/fields"),
    ("linux.seccomp.flags", "nothing that a container sees; agent/src/init/seccomp"),
];

/// `set` in a spec, where the pod's process and what the host shares are known.
fn set(spec: &mut Value, pointer: &str, value: &Value, known: &HashMap<&str, String>) {
    let mut text = value.to_string();
    for (name, is) in known {
        text = text.replace(name, is);
    }
    let value: Value = serde_json::from_str(&text).unwrap();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    match spec.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}")) {
        Value::Array(list) => list.push(value),
        members => members[name] = value,
    }
}

fn pods_uts() -> Value {
    json!({"type": "uts", "path": "/proc/POD/ns/uts"})
}

/// A spec that sets as little as can be.
fn base(args: &[&str]) -> Value {
    let kinds = ["pid", "network", "mount"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"args": args, "cwd": "/", "env": ["PATH=/bin:/sbin:/usr/bin"], "user": {"uid": 0, "gid": 0}},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
        ],
        "linux": {
            "namespaces": kinds,
            "devices": [{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
    })
}

/// All probes in one script: the number of each before its lines.
fn script(cases: &[Case], container: Option<In>) -> String {
    let mut script = String::from("at=$PWD; exec 2>/dev/null\n");
    for (n, case) in cases.iter().enumerate() {
        if container.is_none_or(|container| case.container == container) {
            script += &format!("echo ={n}\n({})\n", case.probe);
        }
    }
    script + "exit 0"
}

/// What each probe printed, by its number.
fn printed(text: &str) -> HashMap<usize, String> {
    let parts = text.split('=').filter_map(|part| part.split_once('\n').or(Some((part, ""))));
    let numbered =
        parts.filter_map(|(n, lines)| Some((n.parse().ok()?, lines.trim_end().replace('\n', " "))));
    numbered.collect()
}

fn every_field(name: &str, runtime: Runtime) {
    let pod = Bundle::new(runtime, &["/pause"], |spec| {
        *spec = base(&["/pause"]);
        for kind in ["ipc", "uts"] {
            set(spec, "/linux/namespaces/-", &json!({"type": kind}), &HashMap::new());
        }
        spec["hostname"] = json!("pod");
        spec["linux"]["sysctl"] = json!({"kernel.msgmax": "7777"});
    });
    let pod = match pod {
        Ok(pod) => pod,
        Err(why) => return skip(name, &why),
    };
    // Root of a user namespace is another user here.
    fs::set_permissions(pod.path(""), Permissions::from_mode(0o711)).unwrap();
    fs::write(pod.path("rootfs/pause"), "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(pod.path("rootfs/pause"), Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(pod.path("shared")).unwrap();
    fs::write(pod.path("shared/file"), "of the host\n").unwrap();
    fs::copy("/bin/true", pod.path("shared/run")).unwrap();
    pod.sh("$R run --detach --bundle . --pid-file pid $I </dev/null >out 2>&1").ended_with(0);
    let known = HashMap::from([
        ("POD", pod.pid("pid").as_raw_nonzero().to_string()),
        ("SHARED", pod.path("shared").display().to_string()),
    ]);

    let mut cases = cases();
    cases.retain(|case| runtime == Runtime::Ampoule || case.not_runc.is_none());
    let run = |container: Option<In>, all: Option<In>| {
        let mut spec = base(&["sh", "-c", &script(&cases, all), "sh", "one"]);
        for case in cases.iter().filter(|case| Some(case.container) == container) {
            for (pointer, value) in &case.set {
                set(&mut spec, pointer, value, &known);
            }
        }
        if container.is_none() {
            set(&mut spec, "/linux/namespaces/-", &pods_uts(), &known);
            set(&mut spec, "/linux/namespaces/-", &json!({"type": "ipc"}), &known);
        }
        let member = pod.beside(spec);
        let out = member.verb(&["run", "--bundle", ".", &member.id]).output().ended_with(0);
        printed(&out.text())
    };
    let with =
        [In::Main, In::Users].map(|container| (container, run(Some(container), Some(container))));
    let without = run(None, None);
    let mut wrong = Vec::new();
    for (n, case) in cases.iter().enumerate() {
        let (_, with) = with.iter().find(|(container, _)| *container == case.container).unwrap();
        let (with, without) = (&with[&n], &without[&n]);
        let absent =
            case.prints_without.map_or(without != case.prints, |expected| without == expected);
        if with != case.prints || !absent {
            wrong.push(format!("{:?}: {with:?}, without it {without:?}", case.fields));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    refusals(&pod, &known);
}

fn refusals(pod: &Bundle, known: &HashMap<&str, String>) {
    let mut wrong = Vec::new();
    for (pointer, value, words) in REFUSED {
        let mut spec = base(&["true"]);
        set(&mut spec, "/linux/namespaces/-", &pods_uts(), known);
        set(&mut spec, pointer, &serde_json::from_str(value).unwrap(), known);
        let member = pod.beside(spec);
        let out = member.verb(&["run", "--bundle", ".", &member.id]).output();
        if out.code != 1 || !words.split('|').any(|word| out.error().contains(word)) {
            wrong.push(format!("{pointer}: {} {}", out.code, out.error()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn runc_every_field() {
    every_field("runc_every_field", Runtime::Runc);
}

#[test]
fn ampoule_every_field() {
    every_field("ampoule_every_field", Runtime::Ampoule);
}

/// Debian's runc has none of this: the other side is what the host's own files say.
#[test]
fn ampoule_mapped_owners() {
    let disk = tempfile::tempdir().unwrap();
    let at = |name: &str| disk.path().join(name);
    let source = at("mounted").display().to_string();
    let map = |first: u32, size: u32| json!([{"containerID": 0, "hostID": first, "size": size}]);
    let bind = |to: &str, options: &[&str], mappings: Option<Value>| {
        let mut bind = mount("bind", to, options);
        bind["source"] = json!(source);
        if let Some(mappings) = mappings {
            bind["uidMappings"] = mappings.clone();
            bind["gidMappings"] = mappings;
        }
        bind
    };
    let script = "stat -c '%u %g' /own/file /other/file /plain/file /memory /shifted; touch /memory/new; \
        stat -c '%u %g' /memory/new; touch /own/new /other/new; echo x >/plain/file";
    let mut shifted = mount("tmpfs", "/shifted", &["mode=777"]);
    shifted["uidMappings"] = map(100_500, 100);
    shifted["gidMappings"] = map(100_600, 100);
    let bundle = Bundle::new(Runtime::Ampoule, &[], |spec| {
        *spec = base(&["sh", "-c", script]);
        for mount in [
            bind("/own", &["bind", "idmap"], None),
            bind("/other", &["bind"], Some(map(100_500, 100))),
            bind("/plain", &["rbind"], None),
            mount("tmpfs", "/memory", &["idmap"]),
            shifted.clone(),
        ] {
            set(spec, "/mounts/-", &mount, &HashMap::new());
        }
        set(spec, "/linux/namespaces/-", &json!({"type": "user"}), &HashMap::new());
        spec["linux"]["uidMappings"] = map(100_000, 65_536);
        spec["linux"]["gidMappings"] = map(100_000, 65_536);
    });
    let bundle = match bundle {
        Ok(bundle) => bundle,
        Err(why) => return skip("ampoule_mapped_owners", &why),
    };
    fs::create_dir(at("mounted")).unwrap();
    for name in ["own", "other", "plain", "memory", "shifted"] {
        fs::create_dir(bundle.path("rootfs").join(name)).unwrap();
    }
    let sh = |line: &str| {
        let mut command = std::process::Command::new("sh");
        command.args(["-ec", line]).current_dir(disk.path());
        program(command).output().ended_with(0).text()
    };
    sh("truncate -s 8M image; mkfs.ext4 -q image; mount -o loop image mounted; \
        echo text > mounted/file; chown 7:8 mounted/file; chmod 777 mounted");
    let run = |bundle: &Bundle| bundle.verb(&["run", "--bundle", ".", &bundle.id]).output();
    let out = run(&bundle);
    let found = sh("stat -c '%n %u %g' mounted/new || true; cat mounted/file; umount mounted");
    // As root of the container, and as an id that the last mapping has none for.
    let owners = "7 8\n507 508\n65534 65534\n0 0\n500 600\n0 0";
    assert_eq!(out.text(), owners, "{}", out.error());
    assert!(
        out.error().contains("/other/new") && out.error().contains("/plain/file"),
        "{}",
        out.error()
    );
    assert_eq!(found, "mounted/new 0 0\ntext");
    let refused = |mount: Value, words: &[&str]| {
        let mut spec = base(&["true"]);
        set(&mut spec, "/mounts/-", &mount, &HashMap::new());
        run(&bundle.beside(spec)).ended_with(1).says(words);
    };
    refused(bind("/x", &["bind", "idmap"], None), &["mounted", "`idmap` takes mappings"]);
    refused(mount("tmpfs", "/x", &["idmap"]), &["mounts[3] (/x).uidMappings", "takes mappings"]);
    refused(mount("mqueue", "/x", &["idmap"]), &["mounts[3] (/x).uidMappings", "only a tmpfs"]);
    sh("mkdir a b over; mount -t overlay over -o lowerdir=a:b over");
    let mut unmappable = bind("/x", &["bind"], Some(map(100_000, 10)));
    unmappable["source"] = json!(at("over"));
    refused(unmappable, &["over", "mapping the owners", "file system"]);
    sh("umount over");
}

/// Beside runc's: it takes no VM.
#[test]
fn runc_and_ampoule_are_asked_for_every_field_that_somebody_sees_to() {
    let cases = cases();
    let covered = cases.iter().flat_map(|case| case.fields.iter().copied());
    let named: Vec<&str> = covered.chain(ELSEWHERE.iter().map(|(field, _)| *field)).collect();
    let is_below = |path: &str, above: &str| {
        path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    for row in FIELDS.iter().filter(|row| matches!(row.by, By::Guest | By::Host | By::Cgroup)) {
        assert!(named.iter().any(|above| is_below(row.path, above)), "no test of {}", row.path);
    }
    for name in named {
        assert!(FIELDS.iter().any(|row| is_below(row.path, name)), "{name} is no field");
    }
}
