//! `linux.resources.blockIO`, met by the host in the cgroup that a container's VM is in: there its disks and shares are
//! read and written, and the devices are the host's. Files and conversions are runc's with cgroup v2.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::Path,
};

use oci_spec::runtime::{LinuxBlockIo, LinuxResources, LinuxThrottleDevice, Spec};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::{OciError, Result, cgroup};
use crate::spec::fields::NO_CGROUP;

const FIELD: &str = "linux.resources.blockIO";
const BFQ: &str = "io.bfq.weight";
const WEIGHT: &str = "io.weight";
const MAX: &str = "io.max";

/// What is asked for, not empty.
#[derive(Debug, PartialEq, Eq)]
pub struct BlockIo(Vec<Limit>);

#[derive(Debug, PartialEq, Eq)]
struct Limit {
    /// With its device, if it has one.
    field: String,
    device: Option<String>,
    set: Set,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    /// 10 to 1000.
    Weight(u16),
    /// A key of io.max.
    Rate(&'static str, u64),
}

impl BlockIo {
    /// Out of a specification: the guest is not asked for it.
    pub fn take(spec: &mut Spec) -> Result<Option<Self>> {
        let Some(linux) = spec.linux_mut() else { return Ok(None) };
        let Some(resources) = linux.resources_mut() else { return Ok(None) };
        Self::take_of(resources)
    }

    /// Out of the JSON of resources that a container is to have from now on.
    pub fn take_json(resources: &[u8]) -> Result<(Option<Self>, Vec<u8>)> {
        let wrong = |source| OciError::Json { path: "resources".into(), source };
        let mut json: Value = serde_json::from_slice(resources).map_err(wrong)?;
        let asked = json.as_object_mut().and_then(|members| members.remove("blockIO"));
        let Some(asked) = asked else { return Ok((None, resources.into())) };
        let mut asked: LinuxResources =
            serde_json::from_value(json!({ "blockIO": asked })).map_err(wrong)?;
        Ok((Self::take_of(&mut asked)?, serde_json::to_vec(&json).map_err(wrong)?))
    }

    fn take_of(resources: &mut LinuxResources) -> Result<Option<Self>> {
        let Some(asked) = resources.block_io().clone() else { return Ok(None) };
        resources.set_block_io(None);
        let limits = limits(&asked)?;
        Ok((!limits.is_empty()).then_some(Self(limits)))
    }

    /// Sets them on a cgroup.
    ///
    /// # Errors
    /// `Refused`, of the first one that nothing of the host's enforces.
    pub fn set(&self, folder: Option<&Path>) -> Result<()> {
        let Some(folder) = folder else {
            return Err(OciError::refused(FIELD, format!("here {NO_CGROUP}")));
        };
        let controlled = cgroup::controls_disks(folder);
        let has_bfq = folder.join(BFQ).exists();
        self.0.iter().try_for_each(|limit| {
            let (file, value) = limit.line(has_bfq);
            let path = folder.join(file);
            let why = match controlled {
                true => write(&path, &value).map_err(|error| why(file, &error)),
                false => Err("the io and memory controllers cannot be had there".into()),
            };
            why.map_err(|why| {
                let at = folder.display();
                OciError::refused(&limit.field, format!("cgroup {at}: {why}; leave it out"))
            })
        })
    }
}

/// To a file that is there.
fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

impl Limit {
    /// A cgroup's file, and what is written to it.
    fn line(&self, has_bfq: bool) -> (&'static str, String) {
        let device = self.device.as_deref().map(|device| format!("{device} ")).unwrap_or_default();
        match self.set {
            Set::Weight(weight) if has_bfq => (BFQ, format!("{device}{weight}")),
            Set::Weight(weight) => (WEIGHT, format!("{device}{}", converted(weight))),
            Set::Rate(key, rate) => (MAX, format!("{device}{key}={rate}")),
        }
    }
}

/// OCI's range of weights, 10 to 1000, is 1 to 10000 in io.weight.
fn converted(weight: u16) -> u64 {
    1 + u64::from(weight).saturating_sub(10) * 9999 / 990
}

/// In the order they are to be written.
fn limits(asked: &LinuxBlockIo) -> Result<Vec<Limit>> {
    let mut limits = Vec::new();
    let mut weigh = |name: &str, device: Option<String>, weight: Option<u16>| {
        let field = field(name, device.as_deref());
        match weight.unwrap_or(0) {
            0 => {}
            weight @ 10..=1000 => {
                limits.push(Limit { field, device, set: Set::Weight(weight) });
            }
            other => {
                let why = format!("{other} is not from 10 to 1000, nor 0 for none");
                return Err(OciError::refused(field, why));
            }
        }
        Ok(())
    };
    weigh("weight", None, asked.weight())?;
    for device in asked.weight_device().iter().flatten() {
        let named = Some(format!("{}:{}", device.major(), device.minor()));
        if device.leaf_weight().is_some_and(|weight| weight != 0) {
            let why = "its leafWeight is not in cgroup v2; leave it out";
            return Err(OciError::refused(field("weightDevice", named.as_deref()), why));
        }
        weigh("weightDevice", named, device.weight())?;
    }
    let rates: [(&str, &'static str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("throttleReadBpsDevice", "rbps", asked.throttle_read_bps_device()),
        ("throttleWriteBpsDevice", "wbps", asked.throttle_write_bps_device()),
        ("throttleReadIOPSDevice", "riops", asked.throttle_read_iops_device()),
        ("throttleWriteIOPSDevice", "wiops", asked.throttle_write_iops_device()),
    ];
    for (name, key, devices) in rates {
        limits.extend(devices.iter().flatten().map(|throttled| {
            let device = format!("{}:{}", throttled.major(), throttled.minor());
            let set = Set::Rate(key, throttled.rate());
            Limit { field: field(name, Some(&device)), device: Some(device), set }
        }));
    }
    Ok(limits)
}

fn field(name: &str, device: Option<&str>) -> String {
    match device {
        Some(device) => format!("{FIELD}.{name} ({device})"),
        None => format!("{FIELD}.{name}"),
    }
}

/// What those in a cgroup have read and written, as `runc events` has it.
pub fn used(folder: &Path) -> Value {
    let text = fs::read_to_string(folder.join("io.stat")).unwrap_or_default();
    let entries = |read: &str, write: &str| {
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        let entries = lines.flat_map(|(device, counts)| {
            [(read, "Read"), (write, "Write")].into_iter().filter_map(move |(key, op)| {
                let (major, minor) = device.split_once(':')?;
                let value = counts.split(' ').find_map(|count| {
                    count.strip_prefix(key)?.strip_prefix('=')?.parse::<u64>().ok()
                })?;
                let number = |n: &str| n.parse::<u32>().ok();
                Some(json!({ "major": number(major)?, "minor": number(minor)?, "op": op, "value": value }))
            })
        });
        entries.collect::<Value>()
    };
    json!({
        "ioServiceBytesRecursive": entries("rbytes", "wbytes"),
        "ioServicedRecursive": entries("rios", "wios"),
    })
}

fn why(file: &str, error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => format!("this host's kernel has no {file}"),
        Some(Errno::NODEV | Errno::NXIO) => "the host has no such disk, as a whole".into(),
        Some(Errno::OPNOTSUPP) => {
            format!("{file} is not in force on that disk (bfq is not its scheduler)")
        }
        _ => format!("{file}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines for these resources, with bfq and without.
    fn lines(asked: Value) -> Result<[Vec<String>; 2]> {
        let asked = serde_json::to_vec(&json!({ "blockIO": asked, "pids": {} })).unwrap();
        let (found, rest) = BlockIo::take_json(&asked)?;
        assert_eq!(rest, br#"{"pids":{}}"#);
        let limits = found.map(|found| found.0).unwrap_or_default();
        Ok([true, false].map(|has_bfq| {
            let lines = limits.iter().map(|limit| limit.line(has_bfq));
            lines.map(|(file, value)| format!("{file}={value}")).collect()
        }))
    }

    #[test]
    fn limits_become_lines_of_files_as_runcs_do() {
        let disk = |of: &str, value: u64| json!([{ "major": 8, "minor": 16, of: value }]);
        for (asked, bfq, other) in [
            (json!({}), vec![], vec![]),
            (json!({ "weight": 0, "throttleReadBpsDevice": [] }), vec![], vec![]),
            (json!({ "weight": 10 }), vec!["io.bfq.weight=10"], vec!["io.weight=1"]),
            (json!({ "weight": 1000 }), vec!["io.bfq.weight=1000"], vec!["io.weight=10000"]),
            (
                json!({ "weight": 500, "weightDevice": disk("weight", 100) }),
                vec!["io.bfq.weight=500", "io.bfq.weight=8:16 100"],
                vec!["io.weight=4950", "io.weight=8:16 910"],
            ),
        ] {
            assert_eq!(lines(asked.clone()).unwrap(), [bfq, other], "{asked}");
        }
        let asked = json!({
            "throttleReadBpsDevice": disk("rate", 1), "throttleWriteBpsDevice": disk("rate", 2),
            "throttleReadIOPSDevice": disk("rate", 3), "throttleWriteIOPSDevice": disk("rate", 4),
        });
        let all =
            ["rbps=1", "wbps=2", "riops=3", "wiops=4"].map(|max| format!("io.max=8:16 {max}"));
        assert_eq!(lines(asked).unwrap()[0], all);
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        let named = |weight: Value| json!([{ "major": 8, "minor": 0, "leafWeight": weight }]);
        for (asked, field) in [
            (json!({ "weight": 9 }), "linux.resources.blockIO.weight: 9 "),
            (json!({ "weight": 1001 }), "linux.resources.blockIO.weight: 1001 "),
            (
                json!({ "weightDevice": named(json!(10)) }),
                "linux.resources.blockIO.weightDevice (8:0): its leafWeight",
            ),
        ] {
            let refused = lines(asked).unwrap_err().to_string();
            assert!(refused.starts_with(field), "{refused}");
        }
        assert!(lines(json!({ "weightDevice": named(json!(0)) })).is_ok());
    }

    #[test]
    fn what_was_read_and_written_is_told_by_disk() {
        let folder = tempfile::tempdir().unwrap();
        let nothing = json!({ "ioServiceBytesRecursive": [], "ioServicedRecursive": [] });
        assert_eq!(used(folder.path()), nothing);
        let stat = "8:0 rbytes=5 wbytes=6 rios=1 wios=2 dbytes=0 dios=0\n7:1 \nx rbytes=1\n";
        fs::write(folder.path().join("io.stat"), stat).unwrap();
        let entry = |op, value| json!({ "major": 8, "minor": 0, "op": op, "value": value });
        let told = json!({
            "ioServiceBytesRecursive": [entry("Read", 5), entry("Write", 6)],
            "ioServicedRecursive": [entry("Read", 1), entry("Write", 2)],
        });
        assert_eq!(used(folder.path()), told);
    }

    #[test]
    fn a_cgroup_without_the_controllers_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (asked, _) = BlockIo::take_json(br#"{ "blockIO": { "weight": 10 } }"#).unwrap();
        let refused = asked.as_ref().unwrap().set(Some(folder.path())).unwrap_err().to_string();
        assert!(refused.contains("controllers cannot be had there"), "{refused}");
        fs::write(folder.path().join("cgroup.controllers"), "cpu io memory\n").unwrap();
        let refused = asked.as_ref().unwrap().set(Some(folder.path())).unwrap_err().to_string();
        assert!(refused.contains("this host's kernel has no io.weight"), "{refused}");
        fs::write(folder.path().join(BFQ), "").unwrap();
        asked.unwrap().set(Some(folder.path())).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join(BFQ)).unwrap(), "10");
    }
}
