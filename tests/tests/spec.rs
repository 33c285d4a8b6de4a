//! Fields of the OCI spec that `ctr` has no options for, as containerd hands them on: the same with runc and ampoule.

#[path = "spec/block_io.rs"]
mod block_io;
#[path = "spec/fields.rs"]
mod fields;

use std::fs;

use ampoule_tests::{
    containerd::{Containerd, Runtime},
    host,
};
use serde_json::{Value, json};

host!(runc_1_6 = Runc V1_6: hooks_run_at_their_time hooks_that_fail);
host!(ampoule_1_6 = Ampoule V1_6: hooks_run_at_their_time hooks_that_fail newer_fields);

/// Where hooks of the host write to.
const LOG: &str = "/run/test/hooks";

fn hook(script: &str) -> Value {
    json!({
        "path": "/bin/sh",
        "args": ["sh", "-c", script],
        "env": ["A=b", "PATH=/usr/bin:/bin"],
        "timeout": 20,
    })
}

fn logging(name: &str) -> Value {
    hook(&format!("echo {name} $A $(cat) >> {LOG}"))
}

/// The lines of the hooks' log, each the name of a hook and the state it was given.
fn logged(containerd: &Containerd) -> Vec<(String, Value)> {
    let log = fs::read_to_string(containerd.inside.path(LOG)).unwrap_or_default();
    let lines = log.lines().map(|line| line.split_once(" b ").unwrap());
    lines.map(|(name, state)| (name.to_owned(), serde_json::from_str(state).unwrap())).collect()
}

fn hooks_run_at_their_time(containerd: &Containerd) {
    let elsewhere = "pid=$(sed -n 's/.*\"pid\":\\([0-9]*\\).*/\\1/p'); \
        [ $(readlink /proc/$pid/ns/net) != $(readlink /proc/self/ns/net) ]";
    let command = ["sh", "-c", "cat /tmp/state"];
    containerd.create("alpine", "a", &command, |spec| {
        spec["hooks"] = json!({
            "prestart": [logging("prestart")],
            "createRuntime": [hook(elsewhere), logging("createRuntime")],
            "startContainer": [hook("cat > /tmp/state")],
            "poststart": [logging("poststart")],
            "poststop": [logging("poststop")],
        });
    });
    let out = containerd.task(&["start"], "a", &[]).output().ended_with(0);
    let state: Value = serde_json::from_str(&out.text()).unwrap();
    assert_eq!((&state["id"], &state["status"]), (&json!(containerd.id("a")), &json!("created")));
    let logged = logged(containerd);
    let names: Vec<_> = logged.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names, ["prestart", "createRuntime", "poststart", "poststop"]);
    for ((name, state), status) in logged.iter().zip(["creating", "creating", "running", "stopped"])
    {
        // runc may not have noticed yet that its init has become the command.
        let late = containerd.runtime == Runtime::Runc && state["status"] == "created";
        assert!(state["status"] == status || name == "poststart" && late, "{name}: {state}");
        assert_eq!(state["id"], containerd.id("a"), "{name}");
        assert!(state["bundle"].as_str().unwrap().starts_with('/'), "{name}");
        assert_eq!(state["pid"].as_i64().unwrap_or(0) > 0, name != "poststop", "{name}");
    }
    containerd.ctr(["containers", "rm", &containerd.id("a")]).output().ended_with(0);
}

/// Creates and starts a container with these hooks; what that failed with.
fn failure(containerd: &Containerd, hooks: Value) -> String {
    containerd.create("alpine", "f", &["touch", "/tmp/ran"], |spec| spec["hooks"] = hooks);
    let out = containerd.task(&["start"], "f", &[]).output().ended_with(1);
    assert!(containerd.listed("f").is_none());
    containerd.ctr(["containers", "rm", &containerd.id("f")]).output().ended_with(0);
    out.error().to_owned()
}

fn hooks_that_fail(containerd: &Containerd) {
    let fails = hook("echo no luck >&2; exit 3");
    let stops = json!([logging("poststop")]);
    let error = failure(containerd, json!({ "createRuntime": [fails], "poststop": stops }));
    assert!(error.contains("no luck"), "{error}");
    assert_eq!(logged(containerd).len(), 1);
    let error = failure(containerd, json!({ "startContainer": [fails], "poststop": stops }));
    assert!(error.contains("no luck"), "{error}");
    if containerd.runtime == Runtime::Ampoule {
        assert!(error.contains("startContainer[0] (/bin/sh)"), "{error}");
        let error = failure(containerd, json!({ "createContainer": [fails] }));
        assert!(error.contains("hooks.createContainer: "), "{error}");
    }
}

/// Debian's runc ignores these.
fn newer_fields(containerd: &Containerd) {
    let command = ["sh", "-c", "uname -m; cut -d. -f1 /proc/uptime | wc -c; nice"];
    containerd.create("alpine", "n", &command, |spec| {
        spec["process"]["scheduler"] = json!({ "policy": "SCHED_OTHER", "nice": 5 });
        spec["linux"]["personality"] = json!({ "domain": "LINUX32" });
        spec["linux"]["timeOffsets"] = json!({ "boottime": { "secs": 5_000_000 } });
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
    });
    let out = containerd.task(&["start"], "n", &[]).output().ended_with(0);
    assert_eq!(out.text(), "i686\n8\n5");
    containerd.ctr(["containers", "rm", &containerd.id("n")]).output().ended_with(0);
    containerd.create("alpine", "n", &command, |spec| spec["process"]["novel"] = json!(1));
    let out = containerd.task(&["start"], "n", &[]).output().ended_with(1);
    assert!(out.error().contains("process.novel: "), "{}", out.error());
    containerd.ctr(["containers", "rm", &containerd.id("n")]).output().ended_with(0);
}
