//! `ampoule run --receipt FILE`: what a run was made of and how it ended, for whoever has to prove or repeat it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use serde::Serialize;
use serde_json::Value;

use super::{FileError, vm_memory_mib};
use crate::{
    cli::{ClockStart, NetworkChoice, Publish, RunArgs, Seed},
    image::{Digest, Image},
    paths::Paths,
    registry::Ended,
    spec::needs_scratch,
    timestamp::Timestamp,
};

/// The file, open since before the run, and what is known before it.
pub struct Receipt {
    path: PathBuf,
    file: File,
    facts: Facts,
}

/// What a VM has, and a serial console.
const DEVICES: [&str; 5] = [
    "virtio-vsock",
    "virtio-rng",
    "virtio-blk: guest image, read-only",
    "virtio-blk: root file system, read-only",
    "virtio-blk: scratch",
];
const NET: &str = "virtio-net";
const DISK: &str = "virtio-blk: disk of this host";
const SHARES: &str = "virtio-fs: files of this host";

/// Digests are those of OCI: `sha256:` and 64 hexadecimal digits.
#[derive(Debug, Serialize)]
struct Facts {
    ampoule: &'static str,
    began: Timestamp,
    kernel: Part,
    guest_image: Part,
    /// Its system call filters are part of it.
    vmm: Part,
    /// If files of this host are shared.
    file_server: Option<Part>,
    /// As it was given, and the digest of what that was.
    image: Named,
    /// The container's OCI spec, and the seccomp profile in it.
    spec: Digest,
    seccomp: Option<Digest>,
    devices: Vec<&'static str>,
    limits: Limits,
    /// As they were given.
    network: String,
    ports: Vec<Publish>,
    egress: Option<String>,
    hermetic: bool,
    /// What the guest's clock showed at the start, and the seed of its random numbers; null is neither.
    clock: Option<ClockStart>,
    seed: Option<Seed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<Ended>,
}

#[derive(Debug, Serialize)]
struct Part {
    path: PathBuf,
    digest: Digest,
}

#[derive(Debug, Serialize)]
struct Named {
    reference: String,
    digest: String,
}

/// Bytes, MiB, counts, seconds; null is none.
#[derive(Debug, Serialize)]
struct Limits {
    memory: u64,
    vm_memory_mib: u32,
    vcpus: u8,
    milli_cpus: Option<u32>,
    pids: u32,
    scratch: Option<u64>,
    timeout: Option<u32>,
    cpu_time: Option<u32>,
    output: Option<u64>,
}

impl Limits {
    fn new(args: &RunArgs) -> Self {
        Self {
            memory: args.memory.0,
            vm_memory_mib: vm_memory_mib(args.memory.0),
            vcpus: args.cpus.vcpus(),
            milli_cpus: args.cpus.quota(),
            pids: args.pids_limit,
            scratch: (!args.read_only).then_some(args.scratch_size.0),
            timeout: args.timeout,
            cpu_time: args.cpu_time,
            output: args.output_limit.map(|limit| limit.0),
        }
    }
}

impl Receipt {
    /// Opens the file and looks at every part, before any of them is used.
    pub fn begin(
        path: &Path,
        args: &RunArgs,
        paths: &Paths,
        image: &Image,
        spec: &Spec,
    ) -> Result<Self, FileError> {
        let file = File::create(path).map_err(FileError::of("--receipt", path))?;
        let disks = &DEVICES[..if needs_scratch(spec) { 5 } else { 4 }];
        let spec = canonical(spec).map_err(FileError::of("--receipt", path))?;
        let seccomp = spec.pointer("/linux/seccomp");
        let shares = args.container.volume.iter().any(|volume| volume.source.is_some());
        let network = args.network.choice();
        let connected = network != NetworkChoice::None;
        let disk = !args.container.device.is_empty();
        let further = [(disk, DISK), (shares, SHARES), (connected, NET)];
        let further = further.into_iter().filter_map(|(there, name)| there.then_some(name));
        let facts = Facts {
            ampoule: env!("CARGO_PKG_VERSION"),
            began: Timestamp::now(),
            kernel: part("--kernel", &paths.kernel)?,
            guest_image: part("--guest-image", &paths.guest)?,
            vmm: part("AMPOULE_VMM", &paths.vmm)?,
            image: Named { reference: image.reference.clone(), digest: image.digest.clone() },
            spec: digest(&spec),
            seccomp: seccomp.map(digest),
            file_server: shares.then(|| part("AMPOULE_FSD", &paths.fsd)).transpose()?,
            devices: disks.iter().copied().chain(further).collect(),
            limits: Limits::new(args),
            network: network.to_string(),
            ports: args.network.publish.clone(),
            egress: args.network.egress.as_ref().map(ToString::to_string),
            hermetic: args.hermetic,
            clock: args.clock,
            seed: args.seed,
            ended: None,
        };
        Ok(Self { path: path.into(), file, facts })
    }

    pub fn finish(mut self, ended: Ended) -> Result<(), FileError> {
        self.facts.ended = Some(ended);
        let mut write = || -> io::Result<()> {
            let mut text = serde_json::to_vec_pretty(&self.facts)?;
            text.push(b'\n');
            self.file.write_all(&text)
        };
        write().map_err(FileError::of("--receipt", &self.path))
    }
}

/// The spec as one value: sets in it are in order, and so are an object's keys.
fn canonical(spec: &Spec) -> io::Result<Value> {
    let mut spec = serde_json::to_value(spec)?;
    let sets = spec.pointer_mut("/process/capabilities").and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()).filter_map(Value::as_array_mut) {
        set.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
    }
    Ok(spec)
}

fn digest(value: &Value) -> Digest {
    Digest::of(value.to_string().as_bytes())
}

fn part(option: &'static str, path: &Path) -> Result<Part, FileError> {
    let bytes = fs::read(path).map_err(FileError::of(option, path))?;
    Ok(Part { path: path.into(), digest: Digest::of(&bytes) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_spec::{RunOptions, run_spec};

    #[test]
    fn the_same_spec_has_the_same_digest() {
        let options = || RunOptions { command: vec!["sh".into()], ..Default::default() };
        let spec = || canonical(&run_spec(&Default::default(), &options()).unwrap()).unwrap();
        let first = digest(&spec());
        for _ in 0..10 {
            assert_eq!(digest(&spec()), first);
        }
        let other = RunOptions { read_only: true, ..options() };
        let other = canonical(&run_spec(&Default::default(), &other).unwrap()).unwrap();
        assert_ne!(digest(&other), first);
    }
}
