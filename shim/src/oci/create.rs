//! From a bundle to a container in a VM of its own, parked before its command: the same parts of which containerd's
//! tasks are made.

use std::{path::Path, time::Duration};

use oci_spec::runtime::Process;

use super::{Host, OciError, Result};
use crate::{
    id::Id,
    image::Store,
    rootfs::{self, RootFsError},
    run_spec::hostname,
    sandbox::{
        ContainerConfig, Created, FIRST_DISK, Fixed, Sandbox, SandboxConfig, Stdio, vm_memory_mib,
    },
    task::{Bundle, Size, binds, settings},
};

/// A container that is there.
pub struct Parked {
    pub sandbox: Sandbox,
    pub created: Created,
}

/// Reads a bundle, whose path is absolute from then on.
pub fn read_bundle(path: &Path) -> Result<Bundle> {
    let failed = |source| OciError::File { what: "bundle", path: path.into(), source };
    Ok(Bundle::read(&path.canonicalize().map_err(failed)?)?)
}

/// The process of a bundle's specification.
pub fn process(bundle: &Bundle) -> Result<&Process> {
    let missing = || OciError::refused("config.json", "it has no process");
    bundle.spec.process().as_ref().ok_or_else(missing)
}

/// Boots the VM and prepares the container in it. Dropping the future leaves nothing.
pub async fn create(id: &Id, mut bundle: Bundle, host: &Host) -> Result<Parked> {
    let paths = &host.paths;
    let config = settings(paths, &Default::default(), &bundle.spec)?;
    let sandbox = config.sandbox;
    let store = Store::open(&paths.store).map_err(RootFsError::Convert)?;
    let store = store.with_snapshots(config.store.snapshots.0);
    let scratch = (!bundle.is_read_only()).then_some(sandbox.scratch_size.0);
    let prepared = rootfs::prepare(&store, &[], &bundle.root(), scratch)?;
    let binds = binds(&bundle.spec)?;
    let size = Size::of(&bundle.spec, &sandbox);
    let (disks, rootfs) = prepared.from_slot(FIRST_DISK);
    let name = bundle.spec.hostname().as_deref().filter(|name| !name.is_empty());
    let (sandbox, _events) = Sandbox::create(SandboxConfig {
        name: id.clone(),
        hostname: hostname(name.unwrap_or(id.as_str())).into(),
        vcpus: size.vcpus,
        memory_mib: vm_memory_mib(size.memory),
        vmm: paths.vmm.clone(),
        kernel: sandbox.kernel.unwrap_or_else(|| paths.kernel.clone()),
        guest_image: sandbox.guest_image.unwrap_or_else(|| paths.guest.clone()),
        disks,
        spare_disks: 0,
        cmdline: String::new(),
        boot_timeout: Duration::from_secs(sandbox.boot_timeout.into()),
        seeded: false,
        oom_score_adj: bundle.oom_score_adj(),
    })
    .await?;
    bundle.forget_network_path();
    let stdio = Stdio { stdin: true, stdout: true, stderr: !bundle.terminal() };
    let created = sandbox
        .create_container(ContainerConfig {
            id: id.clone(),
            spec: bundle.spec,
            rootfs,
            stdio,
            files: binds.files,
            binds: binds.own,
            joins: None,
            init: false,
            fixed: Fixed::default(),
        })
        .await?;
    Ok(Parked { sandbox, created })
}
