use serde_json::json;

use super::*;

/// A spec that passes, as a caller would write it.
fn base() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "hostname": "h",
        "root": { "path": "/var/lib/x/rootfs", "readonly": true },
        "process": {
            "args": ["sh"], "cwd": "/", "user": { "uid": 1, "gid": 2 },
            "apparmorProfile": "docker-default", "selinuxLabel": "x", "oomScoreAdj": 5,
        },
        "annotations": { "io.katacontainers.config.hypervisor.path": "/bin/evil" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] },
        ],
        "hooks": { "prestart": [] },
        "linux": {
            "cgroupsPath": "/docker/abc",
            "rootfsPropagation": "rprivate",
            "namespaces": [{ "type": "pid" }, { "type": "network", "path": "" }],
            "devices": [{ "path": "/dev/null", "type": "c", "major": 1, "minor": 3 }],
            "resources": {
                "memory": { "limit": 1048576, "kernel": 5, "swappiness": 60, "disableOOMKiller": false },
                "blockIO": { "weight": 0 },
                "cpu": { "quota": 50000, "period": 100000, "cpus": "", "mems": "" },
                "pids": { "limit": 7 },
            },
            "maskedPaths": ["/proc/kcore"],
        },
    })
}

fn converted(json: Value) -> Result<Value> {
    let spec: Spec = serde_json::from_value(json).unwrap();
    Ok(serde_json::to_value(guest_spec(&spec, &Counterparts::default())?).unwrap())
}

/// `base` with the value at `pointer`, whose parent must exist, replaced.
fn with(pointer: &str, value: Value) -> Value {
    let mut json = base();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    match json.pointer_mut(parent).unwrap() {
        Value::Array(list) if name == "-" => list.push(value),
        other => other[name] = value,
    }
    json
}

#[test]
fn what_means_something_on_the_host_only_is_dropped() {
    let guest = converted(base()).unwrap();
    for gone in [
        "/annotations",
        "/hooks",
        "/process/apparmorProfile",
        "/process/selinuxLabel",
        "/linux/cgroupsPath",
        "/linux/rootfsPropagation",
        "/linux/devices",
        "/linux/namespaces/1/path",
        "/linux/resources/memory/kernel",
        "/linux/resources/memory/swappiness",
        "/linux/resources/blockIO",
    ] {
        assert_eq!(guest.pointer(gone), None, "{gone}");
    }
    assert!(!guest.to_string().contains("/var/lib"));
}

#[test]
fn everything_else_passes_or_is_rewritten() {
    let guest = converted(base()).unwrap();
    for (pointer, value) in [
        ("/hostname", json!("h")),
        ("/root", json!({ "path": "rootfs", "readonly": true })),
        ("/process/args", json!(["sh"])),
        ("/process/user/uid", json!(1)),
        ("/process/oomScoreAdj", json!(5)),
        ("/mounts/0/type", json!("proc")),
        ("/mounts/1/type", json!("cgroup2")),
        ("/mounts/1/options", json!(["ro"])),
        ("/linux/namespaces/0/type", json!("pid")),
        ("/linux/resources/memory/limit", json!(1_048_576)),
        ("/linux/resources/cpu/quota", json!(50_000)),
        ("/linux/resources/pids/limit", json!(7)),
        ("/linux/maskedPaths", json!(["/proc/kcore"])),
    ] {
        assert_eq!(guest.pointer(pointer), Some(&value), "{pointer}");
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_the_name_of_its_field() {
    let hook = json!([{ "path": "/bin/x" }]);
    let mapping = json!([{ "hostID": 1, "containerID": 0, "size": 1 }]);
    let rate = json!([{ "major": 8, "minor": 0, "rate": 1 }]);
    for (pointer, value, field) in [
        ("/hooks/prestart", hook.clone(), "hooks.prestart"),
        ("/hooks/createRuntime", hook.clone(), "hooks.createRuntime"),
        ("/hooks/poststop", hook, "hooks.poststop"),
        ("/windows", json!({ "layerFolders": ["c:"] }), "windows"),
        ("/linux/intelRdt", json!({ "closID": "x" }), "linux.intelRdt"),
        ("/linux/personality", json!({ "domain": "LINUX32" }), "linux.personality"),
        ("/linux/rootfsPropagation", json!("shared"), "linux.rootfsPropagation"),
        ("/linux/resources/cpu/cpus", json!("0-3"), "linux.resources.cpu.cpus"),
        ("/linux/resources/blockIO/weight", json!(10), "linux.resources.blockIO.weight"),
        (
            "/linux/resources/blockIO/throttleReadBpsDevice",
            rate,
            "linux.resources.blockIO.throttleReadBpsDevice",
        ),
        (
            "/linux/resources/memory/disableOOMKiller",
            json!(true),
            "linux.resources.memory.disableOOMKiller",
        ),
        ("/linux/namespaces/-", json!({ "type": "time" }), "linux.namespaces[2] (time).type"),
        (
            "/linux/namespaces/-",
            json!({ "type": "network", "path": "/proc/1/ns/net" }),
            "linux.namespaces[2] (network).path",
        ),
        (
            "/linux/devices/-",
            json!({ "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 }),
            "linux.devices[1] (/dev/sda)",
        ),
        (
            "/mounts/-",
            json!({ "destination": "/data", "type": "bind", "source": "/", "options": ["rbind"] }),
            "mounts[2] (/data).type",
        ),
        (
            "/mounts/-",
            json!({ "destination": "/data", "type": "none", "source": "/", "options": ["rbind"] }),
            "mounts[2] (/data).type",
        ),
        (
            "/mounts/-",
            json!({ "destination": "/data", "type": "overlay", "source": "overlay" }),
            "mounts[2] (/data).type",
        ),
        (
            "/mounts/-",
            json!({ "destination": "/data", "type": "tmpfs", "uidMappings": mapping }),
            "mounts[2] (/data).uidMappings",
        ),
        ("/process/scheduler", json!({ "policy": "SCHED_FIFO" }), "process.scheduler"),
    ] {
        match converted(with(pointer, value)) {
            Err(SpecError::Unsupported { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{pointer}: {other:?}"),
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_too() {
    let mount = |to: &str| json!({ "destination": to, "type": "tmpfs" });
    for (pointer, value, field) in [
        ("/process/args", json!([]), "process.args"),
        ("/process/cwd", json!("tmp"), "process.cwd"),
        ("/mounts/-", mount("data"), "mounts[2] (data).destination"),
        ("/mounts/-", mount("/a/../../b"), "mounts[2] (/a/../../b).destination"),
    ] {
        match converted(with(pointer, value)) {
            Err(SpecError::Invalid { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{pointer}: {other:?}"),
        }
    }
    let mut json = base();
    json.as_object_mut().unwrap().remove("process");
    assert!(matches!(converted(json), Err(SpecError::Invalid { .. })));
}

#[test]
fn an_execs_process_goes_the_same_way() {
    let process = |json: Value| serde_json::from_value::<Process>(json).unwrap();
    let user = json!({ "uid": 0, "gid": 0 });
    let good = process(json!({ "args": ["ls"], "cwd": "/", "user": user, "apparmorProfile": "x" }));
    assert_eq!(guest_process(&good).unwrap().apparmor_profile(), &None);
    let bad = process(json!({ "args": ["ls"], "cwd": "x", "user": user }));
    assert!(guest_process(&bad).is_err());
}

#[test]
fn what_the_guest_has_of_its_own_takes_the_hosts_place() {
    let bind = json!({
        "destination": "/etc/hosts", "type": "bind", "source": "/pods/1/hosts",
        "options": ["rbind", "rprivate", "ro"],
    });
    let mut json = with("/mounts/-", bind);
    json["linux"]["namespaces"][1]["path"] = "/proc/7/ns/net".into();
    assert!(converted(json.clone()).is_err());
    let spec: Spec = serde_json::from_value(json).unwrap();
    let counterparts = Counterparts {
        binds: [("/pods/1/hosts".to_string(), "/run/files/0".to_string())].into(),
        namespaces_of: Some(42),
    };
    let guest = serde_json::to_value(guest_spec(&spec, &counterparts).unwrap()).unwrap();
    assert_eq!(guest["mounts"][2]["source"], "/run/files/0");
    assert_eq!(guest["mounts"][2]["options"], json!(["rbind", "rprivate", "ro"]));
    assert_eq!(guest["linux"]["namespaces"][1]["path"], "/proc/42/ns/net");
    assert_eq!(guest["linux"]["namespaces"][0].get("path"), None);
}

#[test]
fn an_update_obeys_the_same_rules() {
    let update = |json: Value| -> Result<Value> {
        Ok(serde_json::from_slice(&guest_resources(json.to_string().as_bytes())?).unwrap())
    };
    let changed = json!({
        "memory": { "limit": 5, "swappiness": 60 },
        "devices": [{ "allow": true, "access": "rwm" }],
        "pids": { "limit": 7 },
    });
    assert_eq!(
        update(changed).unwrap(),
        json!({ "memory": { "limit": 5 }, "pids": { "limit": 7 } })
    );
    let refused = update(json!({ "cpu": { "cpus": "0-1" } })).unwrap_err().to_string();
    assert!(refused.starts_with("linux.resources.cpu.cpus: "), "{refused}");
    assert!(guest_resources(b"{").is_err());
}
