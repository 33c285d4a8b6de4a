//! Which devices a container has: the guest's, always.
//!
//! A caller that names a device of the host gets the guest's of the same number where every Linux has the same one
//! there, and is refused else. One that lets the container use all devices, as `docker run --privileged` does, lists
//! besides whatever nodes the host has: that stands for all devices of the guest, and what the guest has none of is left
//! out.

use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use super::{Result, unsupported};

/// Character devices that every Linux has under the same numbers (Documentation/admin-guide/devices.txt).
const COMMON: [(i64, i64); 10] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (1, 11),   // kmsg
    (5, 0),    // tty
    (10, 200), // net/tun
    (10, 229), // fuse
    (10, 237), // loop-control
];
/// The agent makes these as they must be.
const OWN: [&str; 2] = ["/dev/console", "/dev/ptmx"];
/// What a container with all devices has besides every container's: path, major, minor, mode.
const FURTHER: [(&str, i64, i64, u32); 4] = [
    ("/dev/kmsg", 1, 11, 0o644),
    ("/dev/net/tun", 10, 200, 0o666),
    ("/dev/fuse", 10, 229, 0o666),
    ("/dev/loop-control", 10, 237, 0o660),
];
/// And the first loop devices: mount(8) and losetup(8) do not make the nodes they need.
const LOOPS: i64 = 8;
const LOOP_MAJOR: i64 = 7;

/// Turns the devices of a caller's `linux` into the guest's.
pub(super) fn replace(linux: &mut Value) -> Result<()> {
    let all = allows_all(&linux["resources"]["devices"]);
    let listed = match linux.get_mut("devices").map(Value::take) {
        Some(Value::Array(listed)) => listed,
        _ => Vec::new(),
    };
    let mut devices = Vec::new();
    for (i, device) in listed.into_iter().enumerate().filter(|(_, device)| !is_own(device)) {
        if is_common(&device) {
            devices.push(device);
        } else if !all {
            let field = format!("linux.devices[{i}] ({})", path(&device).escape_default());
            return Err(unsupported(
                field,
                "devices of the host cannot be passed in: a VM has its own; of a disk, share a directory of its file system",
            ));
        }
    }
    if all {
        let further = further(linux).into_iter();
        let missing = |further: &Value| devices.iter().all(|device| path(device) != path(further));
        let missing: Vec<_> = further.filter(missing).collect();
        devices.extend(missing);
    }
    if !devices.is_empty() {
        linux["devices"] = devices.into();
    } else if let Value::Object(members) = linux {
        members.remove("devices");
    }
    Ok(())
}

/// Devices that a spec lists among all of the host's and the guest has none of, by their paths.
pub fn left_out(spec: &Spec) -> Result<Vec<String>> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_ref());
    if !allows_all(&serde_json::to_value(rules)?) {
        return Ok(Vec::new());
    }
    let linux = serde_json::to_value(spec.linux())?;
    let further = further(&linux);
    let there = |device: &&Value| {
        is_own(device) || is_common(device) || further.iter().any(|one| path(one) == path(device))
    };
    let listed = linux["devices"].as_array().into_iter().flatten();
    Ok(listed.filter(|device| !there(device)).map(|device| path(device).into()).collect())
}

/// Whether the last word on devices in general is that all may be used.
fn allows_all(rules: &Value) -> bool {
    let any = |number: &Value| number.as_i64().is_none_or(|number| number < 0);
    let general = |rule: &&Value| {
        matches!(rule["type"].as_str(), None | Some("" | "a"))
            && any(&rule["major"])
            && any(&rule["minor"])
    };
    rules.as_array().into_iter().flatten().rfind(general).is_some_and(|rule| {
        let access = rule["access"].as_str().unwrap_or_default();
        rule["allow"] == true && (access.is_empty() || "rwm".chars().all(|c| access.contains(c)))
    })
}

fn further(linux: &Value) -> Vec<Value> {
    let node = |path: &str, kind, major, minor, mode: u32| {
        json!({
            "path": path, "type": kind, "major": major, "minor": minor, "fileMode": mode, "uid": 0, "gid": 0,
        })
    };
    let nodes =
        FURTHER.iter().map(|&(path, major, minor, mode)| node(path, "c", major, minor, mode));
    let namespaces = linux["namespaces"].as_array();
    // There the agent binds what the guest has, which is no loop device yet; and nobody could mount one.
    let has_users = namespaces.into_iter().flatten().any(|namespace| namespace["type"] == "user");
    let loops = if has_users { 0..0 } else { 0..LOOPS };
    let loops = loops.map(|n| node(&format!("/dev/loop{n}"), "b", LOOP_MAJOR, n, 0o660));
    nodes.chain(loops).collect()
}

fn is_common(device: &Value) -> bool {
    let number = (device["major"].as_i64().unwrap_or(0), device["minor"].as_i64().unwrap_or(0));
    match device["type"].as_str().unwrap_or_default() {
        "c" | "u" => COMMON.contains(&number),
        kind => kind == "p",
    }
}

fn is_own(device: &Value) -> bool {
    OWN.contains(&path(device))
}

fn path(device: &Value) -> &str {
    device["path"].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::SpecError;

    fn device(path: &str, kind: &str, major: i64, minor: i64) -> Value {
        json!({ "path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o600 })
    }

    /// As engines list a host's.
    fn hosts() -> Value {
        json!([
            device("/dev/console", "c", 136, 3),
            device("/dev/fuse", "c", 10, 229),
            device("/dev/kmsg", "c", 136, 4),
            device("/dev/kvm", "c", 10, 232),
            device("/dev/loop0", "b", 7, 0),
            device("/dev/null", "c", 1, 3),
            device("/dev/sda", "b", 8, 0),
        ])
    }

    fn linux(rules: Value, devices: Value) -> Value {
        json!({ "resources": { "devices": rules }, "devices": devices })
    }

    fn paths(linux: &Value) -> Vec<&str> {
        linux["devices"].as_array().into_iter().flatten().map(path).collect()
    }

    #[test]
    fn all_devices_are_those_of_the_guest() {
        let mut all = linux(json!([{ "allow": true, "access": "rwm" }]), hosts());
        replace(&mut all).unwrap();
        let loops = (0..8).map(|n| format!("/dev/loop{n}"));
        let mut expected: Vec<String> =
            ["/dev/fuse", "/dev/null", "/dev/kmsg", "/dev/net/tun", "/dev/loop-control"]
                .map(String::from)
                .into();
        expected.extend(loops);
        assert_eq!(paths(&all), expected);
        // As the caller has it; and the guest's own, whatever the host's of that name is.
        assert_eq!(all["devices"][0]["fileMode"], 0o600);
        assert_eq!(
            (&all["devices"][2]["major"], &all["devices"][2]["minor"]),
            (&json!(1), &json!(11))
        );
        // No caller needs to list any.
        let mut none = linux(json!([{ "allow": true, "type": "a" }]), Value::Null);
        replace(&mut none).unwrap();
        assert_eq!(paths(&none).len(), 12);
        none["namespaces"] = json!([{ "type": "user" }]);
        none["devices"] = Value::Null;
        replace(&mut none).unwrap();
        assert_eq!(paths(&none).len(), 4);
    }

    #[test]
    fn all_devices_is_said_by_the_last_word_on_devices_in_general() {
        let (allow, deny) = (json!({ "allow": true, "access": "rwm" }), json!({ "allow": false }));
        let one = json!({ "allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm" });
        let any = json!({ "allow": true, "type": "a", "major": -1, "minor": -1, "access": "mwr" });
        for (rules, all) in [
            (json!([]), false),
            (json!([allow]), true),
            (json!([any]), true),
            (json!([deny, allow]), true),
            (json!([allow, deny]), false),
            (json!([allow, one]), true),
            (json!([deny, one]), false),
            (json!([{ "allow": true, "access": "rw" }]), false),
            (json!([{ "allow": true, "type": "c", "access": "rwm" }]), false),
            (json!([{ "allow": true, "major": 8, "access": "rwm" }]), false),
        ] {
            assert_eq!(allows_all(&rules), all, "{rules}");
            let disk = json!([device("/dev/null", "c", 1, 3), device("/dev/sda", "b", 8, 0)]);
            match replace(&mut linux(rules.clone(), disk)) {
                Ok(()) => assert!(all, "{rules}"),
                Err(SpecError::Unsupported { field, .. }) => {
                    assert_eq!((field.as_str(), all), ("linux.devices[1] (/dev/sda)", false));
                }
                Err(other) => panic!("{rules}: {other}"),
            }
        }
    }

    #[test]
    fn what_the_guest_has_none_of_is_named() {
        let spec = |rules: Value| -> Spec {
            serde_json::from_value(json!({ "ociVersion": "1.0.2", "linux": linux(rules, hosts()) }))
                .unwrap()
        };
        let all = spec(json!([{ "allow": true, "access": "rwm" }]));
        assert_eq!(left_out(&all).unwrap(), ["/dev/kvm", "/dev/sda"]);
        assert!(left_out(&spec(json!([]))).unwrap().is_empty());
    }
}
