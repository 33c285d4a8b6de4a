//! `linux.resources.blockIO`, the same specs with runc and with ampoule, on a disk of the test's own.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use ampoule_tests::{Runtime, oci::Bundle, program, skip};
use rustix::fs::{major, minor};
use serde_json::{Value, json};
use tempfile::TempDir;

#[test]
fn runc_block_io() {
    block_io("runc_block_io", Runtime::Runc);
}

#[test]
fn ampoule_block_io() {
    block_io("ampoule_block_io", Runtime::Ampoule);
}

const MIB: u64 = 1 << 20;

/// A file system on a loop device, mounted.
struct Disk {
    folder: TempDir,
    device: (u32, u32),
}

impl Disk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        sh(
            folder.path(),
            "mkdir mounted; truncate -s 64M image; mkfs.ext4 -q image; mount -o loop image mounted; \
             for n in a b; do head -c 3M /dev/urandom > mounted/$n; done; umount mounted; mount -o loop image mounted",
        );
        let dev = fs::metadata(folder.path().join("mounted")).unwrap().dev();
        Self { folder, device: (major(dev), minor(dev)) }
    }

    fn limit(&self, name: &str, value: u64) -> Value {
        json!([{ "major": self.device.0, "minor": self.device.1, name: value }])
    }

    fn name(&self) -> String {
        format!("{}:{}", self.device.0, self.device.1)
    }

    /// Whether weights are in force on it; `modprobe` and the scheduler may not be there.
    fn has_bfq(&self) -> bool {
        let queue = format!("/sys/dev/block/{}/queue/scheduler", self.name());
        sh(self.folder.path(), &format!("(modprobe bfq; echo bfq > {queue}) 2>&- || true"));
        fs::read_to_string(queue).is_ok_and(|all| all.contains("[bfq]"))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        sh(self.folder.path(), "umount mounted");
    }
}

fn sh(folder: &Path, line: &str) {
    let mut command = Command::new("sh");
    command.args(["-ec", line]).current_dir(folder);
    program(command).output().ended_with(0);
}

/// How long reading and writing three megabytes take a container, in hundredths of a second.
fn took(c: &Bundle, file: &str) -> [u64; 2] {
    let script = format!(
        "t() {{ cut -d ' ' -f 1 /proc/uptime | tr -d .; }}; t; cat /disk/{file} | wc -c >&2; t; \
         dd if=/dev/zero of=/disk/new-{file} bs=1M count=3 conv=fsync 2>&-; t"
    );
    let out = c.verb(&["exec", &c.id, "sh", "-c", &script]).output().ended_with(0);
    let times: Vec<u64> = out.text().lines().map(|line| line.parse().unwrap()).collect();
    [times[1] - times[0], times[2] - times[1]]
}

fn cgroup(c: &Bundle, file: &str) -> String {
    let path = PathBuf::from(format!("/sys/fs/cgroup/{}/{file}", c.id));
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn block_io(name: &str, runtime: Runtime) {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return skip(name, "there is no cgroup v2");
    }
    let disk = Disk::new();
    let has_bfq = disk.has_bfq();
    let made = Bundle::new(runtime, &["sleep", "1000"], |spec| {
        let source = disk.folder.path().join("mounted");
        let bind = json!({
            "type": "bind", "source": source, "destination": "/disk", "options": ["bind"],
        });
        spec["mounts"].as_array_mut().unwrap().push(bind);
        spec["linux"]["resources"]["blockIO"] = json!({
            "throttleReadBpsDevice": disk.limit("rate", MIB),
            "throttleWriteBpsDevice": disk.limit("rate", MIB),
            "throttleReadIOPSDevice": disk.limit("rate", 1000),
            "throttleWriteIOPSDevice": disk.limit("rate", 1001),
        });
        if has_bfq {
            spec["linux"]["resources"]["blockIO"]["weight"] = json!(500);
            spec["linux"]["resources"]["blockIO"]["weightDevice"] = disk.limit("weight", 700);
        }
    });
    let c = match made {
        Ok(c) => c,
        Err(why) => return skip(name, &why),
    };
    c.sh("$R run --detach --bundle . --pid-file pid $I </dev/null >out 2>&1").ended_with(0);
    let device = disk.name();
    let limits = format!("{device} rbps={MIB} wbps={MIB} riops=1000 wiops=1001\n");
    assert_eq!(cgroup(&c, "io.max"), limits);
    if has_bfq {
        assert_eq!(cgroup(&c, "io.bfq.weight"), format!("default 500\n{device} 700\n"));
    }
    let limited = took(&c, "a");
    assert!(limited.iter().all(|time| *time >= 180), "{limited:?}");
    let event = c.verb(&["events", "--stats", &c.id]).output().ended_with(0).text();
    let event: Value = serde_json::from_str(&event).unwrap();
    let entries = event["data"]["blkio"]["ioServiceBytesRecursive"].as_array().unwrap();
    for op in ["Read", "Write"] {
        // runc leaves a 0 out.
        let is_ours = |e: &&Value| {
            e["minor"].as_u64().unwrap_or(0) == u64::from(disk.device.1) && e["op"] == op
        };
        let bytes = entries.iter().find(is_ours).and_then(|entry| entry["value"].as_u64());
        assert!(bytes.is_some_and(|bytes| bytes >= 3 * MIB), "{op}: {event}");
    }
    if runtime == Runtime::Ampoule {
        // An update of runc's knows weights alone.
        let rates = json!({
            "throttleReadBpsDevice": disk.limit("rate", MIB << 10),
            "throttleWriteBpsDevice": disk.limit("rate", MIB << 10),
        });
        fs::write(c.path("limits"), json!({ "blockIO": rates }).to_string()).unwrap();
        c.verb(&["update", "--resources", "limits", &c.id]).output().ended_with(0);
        let free = took(&c, "b");
        assert!((0..2).all(|n| free[n] < limited[n] / 2), "{free:?} {limited:?}");
    }
    refused(&c, has_bfq);
}

fn refused(c: &Bundle, has_bfq: bool) {
    let base: Value = serde_json::from_str(&c.text("config.json")).unwrap();
    let runs = |asked: Value, change: fn(&mut Value, &Bundle)| {
        let mut spec = base.clone();
        spec["process"]["args"] = json!(["true"]);
        spec["linux"]["resources"]["blockIO"] = asked;
        change(&mut spec, c);
        let other = c.beside(spec);
        other.verb(&["run", "--bundle", ".", &other.id]).output()
    };
    let of = |name: &str, value: u64| json!([{ "major": 250, "minor": 250, name: value }]);
    let out = runs(json!({ "throttleReadBpsDevice": of("rate", MIB) }), |_, _| {}).ended_with(1);
    if c.runtime == Runtime::Ampoule {
        out.says(&["linux.resources.blockIO.throttleReadBpsDevice (250:250)", "no such disk"]);
    }
    if !has_bfq {
        let out = runs(json!({ "weight": 500 }), |_, _| {}).ended_with(1);
        if c.runtime == Runtime::Ampoule {
            out.says(&["linux.resources.blockIO.weight", "no io.weight", "leave it out"]);
        }
    }
    if c.runtime == Runtime::Runc {
        return;
    }
    // What runc does nothing of.
    runs(json!({ "leafWeight": 10 }), |_, _| {})
        .ended_with(1)
        .says(&["linux.resources.blockIO.leafWeight"]);
    runs(json!({ "weightDevice": of("leafWeight", 10) }), |_, _| {})
        .ended_with(1)
        .says(&["leafWeight"]);
    // The cgroup is that of the container whose VM this one would be in.
    let joins = |spec: &mut Value, c: &Bundle| {
        let path = format!("/proc/{}/ns/uts", c.pid("pid").as_raw_nonzero());
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "uts");
        namespaces.push(json!({ "type": "uts", "path": path }));
    };
    runs(json!({ "weight": 500 }), joins).ended_with(1).says(&[
        "linux.resources.blockIO.weight",
        "no cgroup on the host",
        "strict",
    ]);
}
