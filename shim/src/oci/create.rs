//! From a bundle to a container in a VM of its own, parked before its command: the same parts of which containerd's
//! tasks are made.

use std::{mem, path::Path, time::Duration};

use oci_spec::runtime::{Process, Spec};

use super::{Host, OciError, Result, containers::Found, network};
use crate::{
    config::Config,
    hooks::Hooks,
    id::Id,
    image::Store,
    rootfs::{self, RootFsError},
    run_spec::hostname,
    sandbox::{
        ContainerConfig, Created, FIRST_DISK, Fixed, Sandbox, SandboxConfig, SandboxError, Stdio,
        vm_memory_mib,
    },
    spec::{Counterparts, guest_spec},
    task::{Binds, Bundle, HostNetwork, Size, binds, settings},
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

/// What a container is to be, decided before anything is made for it.
pub struct Plan {
    pub id: Id,
    pub bundle: Bundle,
    /// The namespace on the host; the guest's own one is another.
    pub network: HostNetwork,
    pub hooks: Hooks,
    config: Config,
    binds: Binds,
}

/// Decides on all that the bundle's specification asks for.
pub fn plan(id: &str, mut bundle: Bundle, host: &Host) -> Result<Plan> {
    let id: Id = id.parse().map_err(|source| OciError::Id { id: id.into(), source })?;
    let config = settings(&host.paths, &Default::default(), &bundle.spec)?;
    let ignored = bundle.decide(config.strict).map_err(SandboxError::from)?;
    host.log.ignored(&ignored);
    let hooks = Hooks::take(&mut bundle.spec, &id, &bundle.path).map_err(SandboxError::from)?;
    let network = bundle.network();
    bundle.forget_network_path();
    let binds = binds(&bundle.spec)?;
    check(&bundle.spec, &binds)?;
    Ok(Plan { id, bundle, network, hooks, config, binds })
}

/// Refuses what the guest's specification cannot have now, instead of after the VM's boot.
fn check(spec: &Spec, binds: &Binds) -> Result<()> {
    let copies = binds.files.iter().map(|file| (file.source.clone(), String::new()));
    let own = copies.chain(binds.own.clone()).collect();
    let shares = binds.shares.iter().map(|share| (share.mount, 0)).collect();
    let checked = guest_spec(spec, &Counterparts { binds: own, shares, ..Default::default() });
    checked.map(drop).map_err(|e| SandboxError::from(e).into())
}

/// The hooks of a container that is there, as its bundle has them now.
pub fn hooks(found: &Found) -> Result<Hooks> {
    let mut bundle = read_bundle(&found.record.bundle)?;
    Ok(Hooks::take(&mut bundle.spec, &found.id, &bundle.path).map_err(SandboxError::from)?)
}

/// Runs the hooks that prepare the namespaces of this process, boots the VM and prepares the container in it. Dropping
/// the future leaves nothing.
pub async fn create(plan: &mut Plan, host: &Host) -> Result<Parked> {
    let Plan { id, bundle, hooks, config, binds, .. } = plan;
    hooks.create(std::process::id()).await?;
    binds.read_again()?;
    let network = network::join().await?;
    let paths = &host.paths;
    let sandbox = &config.sandbox;
    let store = Store::open(&paths.store).map_err(RootFsError::Convert)?;
    let store = store.with_snapshots(config.store.snapshots.0);
    let scratch = (!bundle.is_read_only()).then_some(sandbox.scratch_size.0);
    let prepared = rootfs::prepare(&store, &[], &bundle.root(), scratch)?;
    let size = Size::of(&bundle.spec, sandbox);
    let (disks, rootfs) = prepared.from_slot(FIRST_DISK);
    let shares = mem::take(&mut binds.shares);
    let name = bundle.spec.hostname().as_deref().filter(|name| !name.is_empty());
    let (sandbox, _events) = Sandbox::create(SandboxConfig {
        name: id.clone(),
        hostname: hostname(name.unwrap_or(id.as_str())).into(),
        vcpus: size.vcpus,
        memory_mib: vm_memory_mib(size.memory),
        vmm: paths.vmm.clone(),
        kernel: sandbox.kernel.as_ref().unwrap_or(&paths.kernel).clone(),
        guest_image: sandbox.guest_image.as_ref().unwrap_or(&paths.guest).clone(),
        disks,
        spare_disks: 0,
        network,
        spare_nets: Vec::new(),
        cmdline: String::new(),
        boot_timeout: Duration::from_secs(sandbox.boot_timeout.into()),
        seeded: false,
        oom_score_adj: bundle.oom_score_adj(),
        fsd: (!shares.is_empty()).then(|| paths.fsd.clone()),
    })
    .await?;
    let stdio = Stdio { stdin: true, stdout: true, stderr: !bundle.terminal() };
    let created = sandbox
        .create_container(ContainerConfig {
            id: id.clone(),
            spec: bundle.spec.clone(),
            rootfs,
            stdio,
            files: mem::take(&mut binds.files),
            binds: mem::take(&mut binds.own),
            shares,
            joins: None,
            init: false,
            fixed: Fixed::default(),
        })
        .await?;
    Ok(Parked { sandbox, created })
}
