//! Which devices a container has: the guest's, and disks of the host that were asked for by themselves.
//!
//! A caller that names a character device of the host gets the guest's of the same number where every Linux has the same
//! one there, and is refused else; a block device becomes a disk of the VM, and the guest's number of that takes the place
//! of the host's. One that lets the container use all devices, as `docker run --privileged` does, lists besides whatever
//! nodes the host has: that stands for all devices of the guest, and what the guest has none of is left out.

use std::collections::{BTreeMap, BTreeSet};

use ampoule_agent_api::DISK_MAJOR;
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

/// Major and minor number.
pub type Number = (i64, i64);

/// A block device of the host that a container is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub number: Number,
    /// Where it is listed in `linux.devices`.
    pub entries: Vec<usize>,
    /// The container may write to it.
    pub writable: bool,
    /// Of the first entry, for messages.
    pub field: String,
}

/// The block devices that a spec asks for by themselves: each that it lists or, where a container may use all devices and
/// those of the host are listed anyway, each that it lists twice, or at a path at which the host has another one or none.
/// `host` says which that is.
pub fn block_devices(spec: &Spec, host: impl Fn(&str) -> Option<Number>) -> Result<Vec<Wanted>> {
    let linux = serde_json::to_value(spec.linux())?;
    let listed: Vec<&Value> = linux["devices"].as_array().into_iter().flatten().collect();
    let rules = &linux["resources"]["devices"];
    let all = allows_all(rules);
    let twice = |device: &Value| {
        let same = |other: &&&Value| path(other) == path(device) && number(other) == number(device);
        listed.iter().filter(same).count() > 1
    };
    let mut wanted: BTreeMap<Number, Wanted> = BTreeMap::new();
    for (i, device) in listed.iter().enumerate().filter(|(_, device)| device["type"] == "b") {
        let number = number(device);
        if all && host(path(device)) == Some(number) && !twice(device) {
            continue;
        }
        let new = || Wanted {
            number,
            entries: Vec::new(),
            writable: access(rules, number).contains('w'),
            field: field(i, device),
        };
        wanted.entry(number).or_insert_with(new).entries.push(i);
    }
    if let Some(wanted) = wanted.values().next()
        && has_users(&linux)
    {
        let why = "a container with users of its own cannot have a disk: leave out the device, or the namespace (user)";
        return Err(unsupported(&wanted.field, why));
    }
    Ok(wanted.into_values().collect())
}

/// Turns the devices of a caller's `linux` into the guest's. `disks` are those of the VM that take the place of entries, by
/// their slots.
pub(super) fn replace(linux: &mut Value, disks: &BTreeMap<usize, u8>) -> Result<()> {
    let all = allows_all(&linux["resources"]["devices"]);
    let listed = match linux.get_mut("devices").map(Value::take) {
        Some(Value::Array(listed)) => listed,
        _ => Vec::new(),
    };
    let (mut devices, mut passed_on) = (Vec::new(), BTreeSet::new());
    for (i, mut device) in listed.into_iter().enumerate().filter(|(_, device)| !is_own(device)) {
        if let Some(slot) = disks.get(&i) {
            if passed_on.insert(*slot) {
                pass_on(&mut linux["resources"]["devices"], number(&device), *slot);
            }
            (device["major"], device["minor"]) = (DISK_MAJOR.into(), (*slot).into());
            if devices.iter().all(|other| path(other) != path(&device)) {
                devices.push(device);
            }
        } else if is_common(&device) {
            devices.push(device);
        } else if !all {
            return Err(unsupported(
                field(i, &device),
                "character devices of the host cannot be passed in: a VM has its own; leave it out",
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

/// What a container may do with a device of the host it may do with the disk in its place, and not with the guest's device
/// of the same number.
fn pass_on(rules: &mut Value, number: Number, slot: u8) {
    let access = access(rules, number);
    let Value::Array(rules) = rules else { return };
    let names = |rule: &Value| {
        rule["type"] == "b"
            && (rule["major"].as_i64(), rule["minor"].as_i64()) == (Some(number.0), Some(number.1))
    };
    rules.retain(|rule| !names(rule));
    if !access.is_empty() {
        rules.push(json!({
            "allow": true, "type": "b", "major": DISK_MAJOR, "minor": slot, "access": access,
        }));
    }
}

/// Devices that a spec lists among all of the host's and the guest has none of, by their paths; but for those of `disks`.
pub fn left_out(spec: &Spec, disks: &BTreeMap<usize, u8>) -> Result<Vec<String>> {
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
    let listed = linux["devices"].as_array().into_iter().flatten().enumerate();
    let listed = listed.filter(|(i, device)| !there(device) && !disks.contains_key(i));
    Ok(listed.map(|(_, device)| path(device).into()).collect())
}

/// What the rules, of which later ones count more, allow with a block device: of "rwm".
fn access(rules: &Value, (major, minor): Number) -> String {
    let fits = |wanted: &Value, number: i64| wanted.as_i64().is_none_or(|n| n < 0 || n == number);
    let mut granted = String::new();
    for rule in rules.as_array().into_iter().flatten() {
        let kind = matches!(rule["type"].as_str(), None | Some("" | "a" | "b"));
        if !kind || !fits(&rule["major"], major) || !fits(&rule["minor"], minor) {
            continue;
        }
        let named = rule["access"].as_str().filter(|access| !access.is_empty()).unwrap_or("rwm");
        granted.retain(|letter| !named.contains(letter));
        if rule["allow"] == true {
            granted.push_str(named);
        }
    }
    granted
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
    // There the agent binds what the guest has, which is no loop device yet; and nobody could mount one.
    let loops = if has_users(linux) { 0..0 } else { 0..LOOPS };
    let loops = loops.map(|n| node(&format!("/dev/loop{n}"), "b", LOOP_MAJOR, n, 0o660));
    nodes.chain(loops).collect()
}

fn has_users(linux: &Value) -> bool {
    let namespaces = linux["namespaces"].as_array();
    namespaces.into_iter().flatten().any(|namespace| namespace["type"] == "user")
}

fn is_common(device: &Value) -> bool {
    match device["type"].as_str().unwrap_or_default() {
        "c" | "u" => COMMON.contains(&number(device)),
        kind => kind == "p",
    }
}

fn is_own(device: &Value) -> bool {
    OWN.contains(&path(device))
}

fn number(device: &Value) -> Number {
    (device["major"].as_i64().unwrap_or(0), device["minor"].as_i64().unwrap_or(0))
}

fn field(i: usize, device: &Value) -> String {
    format!("linux.devices[{i}] ({})", path(device).escape_default())
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
        replace(&mut all, &BTreeMap::new()).unwrap();
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
        replace(&mut none, &BTreeMap::new()).unwrap();
        assert_eq!(paths(&none).len(), 12);
        none["namespaces"] = json!([{ "type": "user" }]);
        none["devices"] = Value::Null;
        replace(&mut none, &BTreeMap::new()).unwrap();
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
            let kvm = json!([device("/dev/null", "c", 1, 3), device("/dev/kvm", "c", 10, 232)]);
            match replace(&mut linux(rules.clone(), kvm), &BTreeMap::new()) {
                Ok(()) => assert!(all, "{rules}"),
                Err(SpecError::Unsupported { field, .. }) => {
                    assert_eq!((field.as_str(), all), ("linux.devices[1] (/dev/kvm)", false));
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
        let none = BTreeMap::new();
        assert_eq!(left_out(&all, &none).unwrap(), ["/dev/kvm", "/dev/sda"]);
        assert_eq!(left_out(&all, &BTreeMap::from([(6, 3)])).unwrap(), ["/dev/kvm"]);
        assert!(left_out(&spec(json!([])), &none).unwrap().is_empty());
    }

    fn spec(rules: &Value, devices: &Value) -> Spec {
        let linux = linux(rules.clone(), devices.clone());
        serde_json::from_value(json!({ "ociVersion": "1.0.2", "linux": linux })).unwrap()
    }

    #[test]
    fn a_disk_is_given_to_who_asks_for_it_by_itself() {
        let all = json!([{ "allow": true, "access": "rwm" }]);
        let allow = |access: &str| {
            json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": 8, "minor": 0, "access": access },
            ])
        };
        let sda = device("/dev/sda", "b", 8, 0);
        let moved = device("/dev/xvda", "b", 8, 0);
        for (rules, devices, entries, writable) in [
            (&allow("rwm"), json!([sda]), &[0][..], true),
            (&allow("r"), json!([device("/dev/null", "c", 1, 3), sda]), &[1], false),
            (&allow("rw"), json!([sda, moved]), &[0, 1], true),
            (&json!([]), json!([sda]), &[0], false),
            (&all, json!([sda]), &[], true),
            (&all, json!([sda, moved]), &[1], true),
            (&all, json!([sda, sda]), &[0, 1], true),
        ] {
            let host = |path: &str| (path == "/dev/sda").then_some((8, 0));
            let found = block_devices(&spec(rules, &devices), host).unwrap();
            let expected = Wanted {
                number: (8, 0),
                entries: entries.into(),
                writable,
                field: field(
                    entries.first().copied().unwrap_or(0),
                    found.first().map_or(&sda, |f| &devices[f.entries[0]]),
                ),
            };
            let expected = if entries.is_empty() { vec![] } else { vec![expected] };
            assert_eq!(found, expected, "{rules} {devices}");
        }
        let mut users = linux(allow("rw"), json!([sda]));
        users["namespaces"] = json!([{ "type": "user" }]);
        let users = serde_json::from_value(json!({ "ociVersion": "1.0.2", "linux": users }));
        let refused = block_devices(&users.unwrap(), |_| None).unwrap_err().to_string();
        assert!(refused.starts_with("linux.devices[0] (/dev/sda): "), "{refused}");
    }

    #[test]
    fn a_disk_has_the_guests_number_and_what_the_host_allows() {
        let rules = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "major": 8, "access": "r" },
            { "allow": true, "type": "b", "major": 8, "minor": 0, "access": "wm" },
        ]);
        let mut given =
            linux(rules, json!([device("/dev/sda", "b", 8, 0), device("/dev/x", "b", 8, 0)]));
        replace(&mut given, &BTreeMap::from([(0, 3), (1, 3)])).unwrap();
        assert_eq!(paths(&given), ["/dev/sda", "/dev/x"]);
        for device in given["devices"].as_array().unwrap() {
            assert_eq!((&device["major"], &device["minor"]), (&json!(DISK_MAJOR), &json!(3)));
        }
        let rules = given["resources"]["devices"].as_array().unwrap();
        let last = json!({
            "allow": true, "type": "b", "major": DISK_MAJOR, "minor": 3, "access": "rwm",
        });
        assert_eq!((rules.len(), rules.last()), (3, Some(&last)));
    }
}
