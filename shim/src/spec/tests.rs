use serde_json::json;

use super::{fields::By, *};

/// A spec that passes, as a caller would write it.
fn base() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "hostname": "h",
        "root": { "path": "/var/lib/x/rootfs", "readonly": true },
        "process": {
            "args": ["sh"], "cwd": "/", "user": { "uid": 1, "gid": 2 },
            "apparmorProfile": "docker-default", "oomScoreAdj": 5,
            "selinuxLabel": "system_u:system_r:container_t:s0:c1,c2",
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
                "memory": { "limit": 1048576, "kernel": 0, "swappiness": null, "disableOOMKiller": false },
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
        ("/linux/rootfsPropagation", json!("rprivate")),
        ("/linux/devices/0/path", json!("/dev/null")),
    ] {
        assert_eq!(guest.pointer(pointer), Some(&value), "{pointer}");
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_the_name_of_its_field() {
    let hook = json!([{ "path": "/bin/x" }]);
    let mapping = json!([{ "hostID": 1, "containerID": 0, "size": 1 }]);
    for (pointer, value, field) in [
        ("/hooks/prestart", hook.clone(), "hooks.prestart"),
        ("/hooks/createRuntime", hook.clone(), "hooks.createRuntime"),
        ("/hooks/createContainer", hook.clone(), "hooks.createContainer"),
        ("/hooks/poststop", hook, "hooks.poststop"),
        ("/windows", json!({ "layerFolders": ["c:"] }), "windows"),
        ("/vm", json!({ "kernel": { "path": "/k" } }), "vm"),
        ("/process/apparmorProfile", json!("mine"), "process.apparmorProfile"),
        ("/process/selinuxLabel", json!("u:r:mine_t:s0"), "process.selinuxLabel"),
        ("/process/selinuxLabel", json!("container_t"), "process.selinuxLabel"),
        ("/linux/mountLabel", json!("u:r:mine_t:s0"), "linux.mountLabel"),
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
        (
            "/linux/devices/-",
            json!({ "path": "/dev/null", "type": "c", "major": 8, "minor": 0 }),
            "linux.devices[1] (/dev/null)",
        ),
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
        ("/ociVersion", json!("2.0.0"), "ociVersion"),
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
fn a_tmpfs_is_mapped_by_its_own_mappings_or_the_containers() {
    let map = |id: u32| json!([{ "containerID": 0, "hostID": id, "size": 10 }]);
    let mut json = with("/linux/namespaces/-", json!({ "type": "user" }));
    json["linux"]["uidMappings"] = map(1);
    json["linux"]["gidMappings"] = map(2);
    let tmpfs =
        json!({ "destination": "/data", "type": "tmpfs", "options": ["size=1m", "ridmap"] });
    let mut own = tmpfs.clone();
    own["uidMappings"] = map(3);
    own["gidMappings"] = map(4);
    for (mount, ids) in [(tmpfs, [1, 2]), (own, [3, 4])] {
        let mut json = json.clone();
        json["mounts"].as_array_mut().unwrap().push(mount);
        let guest = converted(json).unwrap();
        let mount = guest["mounts"].as_array().unwrap().last().unwrap();
        let first = |name: &str| mount[name][0]["hostID"].clone();
        assert_eq!([first("uidMappings"), first("gidMappings")], ids);
        assert_eq!(mount["options"], json!(["size=1m"]));
    }
    let mqueue = json!({ "destination": "/data", "type": "mqueue", "options": ["idmap"] });
    json["mounts"].as_array_mut().unwrap().push(mqueue);
    assert!(converted(json).unwrap_err().to_string().contains("only a tmpfs"));
}

#[test]
fn an_execs_process_goes_the_same_way() {
    let process = |json: Value| serde_json::from_value::<Process>(json).unwrap();
    let user = json!({ "uid": 0, "gid": 0 });
    let good = process(
        json!({ "args": ["ls"], "cwd": "/", "user": user, "apparmorProfile": "unconfined" }),
    );
    assert_eq!(guest_process(&good).unwrap().apparmor_profile(), &None);
    for (name, value) in [("cwd", "x"), ("apparmorProfile", "mine"), ("commandLine", "ls")] {
        let mut bad = serde_json::to_value(&good).unwrap();
        bad[name] = value.into();
        let refused = guest_process(&process(bad)).unwrap_err().to_string();
        assert!(refused.starts_with(&format!("process.{name}: ")), "{refused}");
    }
}

#[test]
fn what_the_guest_has_of_its_own_takes_the_hosts_place() {
    let bind = json!({
        "destination": "/etc/hosts", "type": "bind", "source": "/pods/1/hosts",
        "options": ["rbind", "rprivate", "ro"],
    });
    let mut json = with("/mounts/-", bind);
    let data = json!({
        "destination": "/data", "type": "none", "source": "/srv", "options": ["bind", "ro"],
    });
    json["mounts"].as_array_mut().unwrap().push(data);
    json["linux"]["namespaces"][1]["path"] = "/proc/7/ns/net".into();
    assert!(converted(json.clone()).is_err());
    let spec: Spec = serde_json::from_value(json).unwrap();
    let counterparts = Counterparts {
        binds: [("/pods/1/hosts".to_string(), "/run/files/0".to_string())].into(),
        shares: [(3, 5)].into(),
        namespaces_of: Some(42),
        ..Default::default()
    };
    let guest = serde_json::to_value(guest_spec(&spec, &counterparts).unwrap()).unwrap();
    assert_eq!(guest["mounts"][2]["source"], "/run/files/0");
    assert_eq!(guest["mounts"][2]["options"], json!(["rbind", "rprivate", "ro"]));
    let data = json!({
        "destination": "/data", "type": "share", "source": "5", "options": ["bind", "ro"],
    });
    assert_eq!(guest["mounts"][3], data);
    assert_eq!(guest["linux"]["namespaces"][1]["path"], "/proc/42/ns/net");
    assert_eq!(guest["linux"]["namespaces"][0].get("path"), None);
}

#[test]
fn a_scratch_disk_is_for_the_root_and_for_volumes() {
    for (kind, read_only, needed) in
        [("tmpfs", true, false), ("tmpfs", false, true), ("scratch", true, true)]
    {
        let mut json = with("/mounts/-", json!({ "destination": "/data", "type": kind }));
        json["root"]["readonly"] = read_only.into();
        let spec: Spec = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(needs_scratch(&spec), needed, "{kind} {read_only}");
        assert_eq!(converted(json).unwrap()["mounts"][2]["type"], kind);
    }
}

#[test]
fn the_network_of_the_sandbox_is_the_guests_own() {
    let spec = |namespaces: Value| -> Spec {
        serde_json::from_value(with("/linux/namespaces", namespaces)).unwrap()
    };
    let counterparts =
        Counterparts { network: true, namespaces_of: Some(42), ..Default::default() };
    let first = spec(json!([{ "type": "pid" }, { "type": "network" }]));
    let guest = serde_json::to_value(guest_spec(&first, &counterparts).unwrap()).unwrap();
    assert_eq!(guest["linux"]["namespaces"], json!([{ "type": "pid" }]));
    let member = spec(json!([{ "type": "network", "path": "/proc/7/ns/net" }]));
    let guest = serde_json::to_value(guest_spec(&member, &counterparts).unwrap()).unwrap();
    assert_eq!(guest["linux"]["namespaces"][0]["path"], "/proc/42/ns/net");
    let users = spec(json!([{ "type": "user" }, { "type": "network" }]));
    let refused = guest_spec(&users, &counterparts).unwrap_err().to_string();
    assert!(refused.starts_with("linux.namespaces (user): "), "{refused}");
    assert!(has_own_users(&users) && !has_own_users(&member));
    // Where the network is the container's own.
    let own = Counterparts { network: false, ..counterparts };
    let guest = serde_json::to_value(guest_spec(&users, &own).unwrap()).unwrap();
    assert_eq!(guest["linux"]["namespaces"], json!([{ "type": "user" }, { "type": "network" }]));
}

#[test]
fn an_update_obeys_the_same_rules() {
    let update = |json: Value| -> Result<Value> {
        Ok(serde_json::from_slice(&guest_resources(json.to_string().as_bytes())?).unwrap())
    };
    let changed = json!({
        "memory": { "limit": 5, "swappiness": 0, "useHierarchy": true },
        "devices": [{ "allow": true, "access": "rwm" }],
        "pids": { "limit": 7 },
    });
    assert_eq!(
        update(changed).unwrap(),
        json!({ "memory": { "limit": 5 }, "pids": { "limit": 7 } })
    );
    assert_eq!(update(json!({ "cpu": { "cpus": "0-1" } })).unwrap(), json!({}));
    let refused = update(json!({ "rdma": { "a": 1 } })).unwrap_err().to_string();
    assert!(refused.starts_with("linux.resources.rdma: "), "{refused}");
    assert!(guest_resources(b"{").is_err());
}

const STRICT: Terms = Terms { strict: true, cgroup: false };
const LENIENT: Terms = Terms { strict: false, cgroup: false };

/// Every row nobody sees to, with a value that asks for something.
fn refused_rows() -> impl Iterator<Item = (&'static fields::Field, Value)> {
    let rows = fields::FIELDS.iter().filter(|row| matches!(row.by, By::Refused | By::Strict));
    rows.map(|row| {
        let mut parts = row.path.rsplit('.');
        let value = json!({ parts.next().unwrap(): "x" });
        (
            row,
            parts.fold(value, |below, part| match part.strip_suffix("[]") {
                Some(list) => json!({ list: [below] }),
                None => json!({ part: below }),
            }),
        )
    })
}

#[test]
fn every_field_nobody_sees_to_is_refused_by_its_name_with_the_way_out() {
    for (row, mut json) in refused_rows() {
        let refused = decide(&mut json, "", STRICT).unwrap_err().to_string();
        let field = row.path.replace("[]", "[0]");
        assert!(refused.starts_with(&format!("{field}: {}", row.note)), "{refused}");
        assert_eq!(refused.contains("strict = false"), row.by == By::Strict, "{refused}");
        let has_way_out = row.note.contains("; ") || row.note.starts_with("use ");
        assert!(has_way_out, "{}: {}", row.path, row.note);
    }
}

#[test]
fn without_strict_what_protects_nobody_is_taken_out_and_named() {
    for (row, mut json) in refused_rows() {
        match decide(&mut json, "", LENIENT) {
            Err(SpecError::Unsupported { .. }) => assert_eq!(row.by, By::Refused, "{}", row.path),
            Ok(ignored) => {
                assert_eq!(row.by, By::Strict, "{}", row.path);
                assert_eq!(ignored, [row.path]);
                assert!(is_nothing(&json), "{json}");
            }
            other => panic!("{}: {other:?}", row.path),
        }
    }
}

#[test]
fn what_a_cgroup_of_the_host_is_for_is_kept_where_there_is_one_and_never_the_guests() {
    let device = json!([{ "major": 8, "minor": 0, "rate": 1 }]);
    let json = with("/linux/resources/blockIO", json!({ "throttleReadBpsDevice": device }));
    let field = "linux.resources.blockIO.throttleReadBpsDevice";
    let refused = decide(&mut json.clone(), "", STRICT).unwrap_err().to_string();
    assert!(refused.starts_with(&format!("{field}: {}", fields::NO_CGROUP)), "{refused}");
    assert_eq!(decide(&mut json.clone(), "", LENIENT).unwrap(), [field]);
    let mut kept = json.clone();
    assert!(decide(&mut kept, "", Terms { cgroup: true, ..STRICT }).unwrap().is_empty());
    assert_eq!(kept.pointer("/linux/resources/blockIO"), json.pointer("/linux/resources/blockIO"));
    assert!(converted(json).unwrap_err().to_string().starts_with(field));
}

#[test]
fn a_field_that_is_not_known_is_refused_or_named() {
    for (pointer, field) in [
        ("/new", "new"),
        ("/process/new", "process.new"),
        ("/mounts/1/new", "mounts[1].new"),
        ("/linux/resources/cpu/new", "linux.resources.cpu.new"),
    ] {
        let json = with(pointer, json!({ "a": [1] }));
        let refused = decide(&mut json.clone(), "", STRICT).unwrap_err();
        assert!(matches!(&refused, SpecError::Unknown { field: named } if named == field));
        let mut lenient = json.clone();
        assert_eq!(decide(&mut lenient, "", LENIENT).unwrap(), [field]);
        assert_eq!(lenient.pointer(pointer), None);
        // Asks for nothing.
        assert!(decide(&mut with(pointer, json!({ "a": [] })), "", STRICT).unwrap().is_empty());
    }
    let mut process = json!({ "args": ["ls"], "new": 1 });
    assert!(decide(&mut process.clone(), "process", STRICT).is_err());
    assert_eq!(decide(&mut process, "process", LENIENT).unwrap(), ["process.new"]);
    assert!(decide_resources(br#"{ "cpu": { "realtimePeriod": 1 } }"#, STRICT).is_err());
    let lenient = br#"{ "cpu": { "realtimePeriod": 1, "shares": 7 } }"#;
    let lenient = decide_resources(lenient, LENIENT).unwrap();
    assert_eq!(lenient.1, ["linux.resources.cpu.realtimePeriod"]);
    assert_eq!(lenient.0, br#"{"cpu":{"shares":7}}"#);
}

#[test]
fn what_is_decided_already_is_left_as_it_is() {
    let mut json = base();
    assert!(decide(&mut json, "", STRICT).unwrap().is_empty());
    for there in ["/annotations", "/root/path", "/process/apparmorProfile", "/linux/cgroupsPath"] {
        assert_eq!(json.pointer(there), base().pointer(there), "{there}");
    }
}

#[test]
fn every_field_of_the_specification_is_decided() {
    let known = schema::fields_of::<Spec>();
    assert!(known.len() > 150 && known.contains("linux.seccomp.syscalls[].args[].op"), "{known:?}");
    let decided = |path: &str| {
        let rows = fields::FIELDS.iter();
        fields::has_below(path)
            || rows.clone().any(|row| row.path == path || fields::is_below(path, row.path))
    };
    let open: Vec<_> = known.iter().filter(|path| !decided(path)).collect();
    assert!(open.is_empty(), "nobody decided on {open:?}");
    // Of a later specification than the crate's.
    let newer = ["freebsd"];
    for row in fields::FIELDS.iter().filter(|row| !newer.contains(&row.path)) {
        assert!(known.contains(row.path), "{} is no field", row.path);
    }
    let mut paths: Vec<_> = fields::FIELDS.iter().map(|row| row.path).collect();
    paths.sort_unstable();
    assert!(paths.windows(2).all(|pair| pair[0] != pair[1]), "a row is there twice");
}

#[test]
fn the_page_is_what_the_table_says() {
    let page_there = include_str!("../../oci-spec.md");
    assert!(page() == page_there, "run: ampoule features --table > shim/oci-spec.md");
}
