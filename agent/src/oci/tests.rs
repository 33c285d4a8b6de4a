use proptest::prelude::*;
use serde_json::json;

use super::*;

fn minimal() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]}
    })
}

/// Sets `pointer` (a JSON pointer whose parents may be missing) to `value`.
fn with(pointer: &str, value: Value) -> Vec<u8> {
    let mut spec = minimal();
    let mut at = &mut spec;
    for key in pointer.trim_start_matches('/').split('/') {
        at = &mut at[key];
    }
    *at = value;
    serde_json::to_vec(&spec).unwrap()
}

fn refusal(json: &[u8]) -> String {
    let error = container(json).unwrap_err();
    assert_eq!(error.fault, crate::plan::Fault::Spec);
    error.to_string()
}

#[test]
fn the_minimum_is_accepted() {
    let spec = container(&serde_json::to_vec(&minimal()).unwrap()).unwrap();
    assert_eq!(spec.process.args, ["true"]);
    assert!(spec.linux.has_own(NamespaceKind::Pid));
    assert!(!spec.linux.has_own(NamespaceKind::Ipc));
}

#[test]
fn what_is_not_enforced_is_refused_by_name() {
    let table = [
        ("/process/apparmorProfile", json!("docker-default"), "apparmorProfile"),
        ("/process/selinuxLabel", json!("a:b:c"), "selinuxLabel"),
        ("/process/scheduler", json!({"policy": "SCHED_FIFO", "new": 1}), "new"),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}, {"type": "RLIMIT_CPU", "soft": 2, "hard": 2}]),
            "RLIMIT_CPU twice",
        ),
        ("/process/commandLine", json!("x"), "commandLine"),
        ("/process/args", json!([]), "process.args"),
        ("/process/cwd", json!("relative"), "process.cwd"),
        ("/process/env", json!(["A=\0"]), "NUL"),
        ("/process/user/uid", json!(u32::MAX), "process.user"),
        ("/process/user/uid", json!(-1), "-1"),
        ("/hooks", json!({"prestart": [{"path": "/bin/x"}]}), "prestart"),
        ("/hooks", json!({"startContainer": [{"path": "/bin/x", "new": 1}]}), "new"),
        ("/windows", json!({"layerFolders": ["x"]}), "windows"),
        ("/mounts", json!([{"destination": "/a", "uidMappings": [{}]}]), "containerID"),
        ("/linux/mountLabel", json!("x"), "mountLabel"),
        ("/linux/intelRdt", json!({"closID": "x"}), "intelRdt"),
        ("/linux/personality", json!({"domain": "LINUX32", "flags": ["x"]}), "flags"),
        ("/linux/timeOffsets", json!({"monotonic": {"secs": 1}}), "timeOffsets"),
        ("/linux/netDevices", json!({"eth0": {"name": "x"}}), "netDevices"),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "net"}]), "net"),
        ("/linux/namespaces", json!([{"type": "pid"}]), "mount namespace"),
        ("/linux/namespaces", json!([{"type": "mount", "path": "/proc/9/ns/mnt"}]), "mount"),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "mount"}]), "twice"),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "user"}]), "uidMappings"),
        (
            "/linux/uidMappings",
            json!([{"containerID": 0, "hostID": 0, "size": 1}]),
            "without a user namespace",
        ),
        ("/linux/resources/network", json!({"classID": 7}), "network"),
        ("/linux/resources/rdma", json!({"mlx5_1": {"hcaHandles": 3}}), "rdma"),
        ("/linux/resources/memory/swappiness", json!(60), "swappiness"),
        ("/linux/resources/memory/kernel", json!(1000), "memory.kernel"),
        ("/linux/resources/memory/disableOOMKiller", json!(true), "disableOOMKiller"),
        ("/linux/resources/cpu/realtimeRuntime", json!(100), "realtimeRuntime"),
        ("/linux/resources/blockIO", json!({"weight": 10}), "blockIO"),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}),
            "listenerPath",
        ),
        ("/futureMember", json!({"a": 1}), "futureMember"),
    ];
    for (pointer, value, name) in table {
        let message = refusal(&with(pointer, value));
        assert!(message.contains(name), "{pointer}: {message}");
    }
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    let table = [
        ("/process/apparmorProfile", json!("")),
        ("/process/selinuxLabel", Value::Null),
        ("/hooks", json!({"prestart": []})),
        ("/linux/intelRdt", json!({})),
        ("/linux/resources/network", json!({"priorities": []})),
        ("/linux/resources/memory", json!({"disableOOMKiller": false, "kernel": 0})),
        ("/annotations", json!({"a": "b", "c": ""})),
        ("/linux/cgroupsPath", json!("/docker/1234")),
    ];
    for (pointer, value) in table {
        container(&with(pointer, value)).unwrap();
    }
}

#[test]
fn empty_arguments_are_kept() {
    let spec = container(&with("/process/args", json!(["sh", "-c", "", "x"]))).unwrap();
    assert_eq!(spec.process.args, ["sh", "-c", "", "x"]);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = container(&bytes);
    }
}

#[test]
fn id_maps_are_lines_of_three_numbers() {
    let maps = [
        IdMapping { container_id: 0, host_id: 100_000, size: 65_536 },
        IdMapping { container_id: 65_536, host_id: 1, size: 1 },
    ];
    assert_eq!(id_map(&maps), "0 100000 65536\n65536 1 1\n");
}
