//! From a bundle to a container in a VM of its own or in another container's, parked before its command: the same parts
//! of which containerd's tasks are made.

use std::{mem, path::Path, time::Duration};

use oci_spec::runtime::{Process, Spec};

use super::{
    Host, OciError, Result,
    block_io::BlockIo,
    cgroup,
    containers::Found,
    network,
    pod::{self, Joins},
};
use crate::{
    config::Config,
    device::{self, Device},
    hooks::Hooks,
    id::Id,
    image::Store,
    network::Room,
    rootfs::{self, Prepared, RootFsError},
    run_spec::hostname,
    sandbox::{
        ContainerConfig, Created, FIRST_DISK, Fixed, HostUpper, RootFs, Sandbox, SandboxConfig,
        SandboxError, Stdio, spare_disks, vm_memory_mib,
    },
    spec::{Counterparts, Terms, guest_spec, has_own_users},
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
    /// Whose VM it is in.
    pub joins: Option<Joins>,
    /// To be set on the cgroup of this process.
    pub block_io: Option<BlockIo>,
    pub config: Config,
    binds: Binds,
}

/// Decides on all that the bundle's specification asks for.
pub fn plan(id: &str, mut bundle: Bundle, host: &Host) -> Result<Plan> {
    let id: Id = id.parse().map_err(|source| OciError::Id { id: id.into(), source })?;
    let config = settings(&host.paths, &Default::default(), &bundle.spec)?;
    let joins = Joins::find(&bundle.spec, &host.containers)?;
    // Whoever joins a VM is in the cgroup of another container.
    let cgroup = joins.is_none() && cgroup::named(&bundle.spec, host.systemd_cgroup).is_some();
    let ignored = bundle.decide(Terms { strict: config.strict, cgroup });
    host.log.ignored(&ignored.map_err(SandboxError::from)?);
    let block_io = BlockIo::take(&mut bundle.spec)?;
    let hooks = Hooks::take(&mut bundle.spec, &id, &bundle.path).map_err(SandboxError::from)?;
    let network = bundle.network();
    if joins.is_none() {
        bundle.forget_paths();
    }
    let binds = binds(&bundle.spec)?;
    check(&bundle.spec, &binds, joins.is_some())?;
    Ok(Plan { id, bundle, network, hooks, joins, block_io, config, binds })
}

/// Refuses what the guest's specification cannot have now, instead of after the VM's boot.
fn check(spec: &Spec, binds: &Binds, joins: bool) -> Result<()> {
    let own = binds.own.iter().cloned().collect();
    let shares = binds.shares.iter().map(|share| (share.mount, 0)).collect();
    let devices = device::wanted(spec)?;
    let disks =
        devices.into_iter().flat_map(|device| device.entries).map(|entry| (entry, 0)).collect();
    let namespaces_of = joins.then_some(1);
    let counterparts =
        Counterparts { binds: own, shares, disks, namespaces_of, ..Default::default() };
    let checked = guest_spec(spec, &counterparts);
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
    plan.hooks.create(std::process::id()).await?;
    let paths = &host.paths;
    let mut prepared = plan.prepare(host)?;
    let upper = prepared.upper.take();
    let Plan { id, bundle, config, binds, .. } = &*plan;
    let sandbox = &config.sandbox;
    let size = Size::of(&bundle.spec, sandbox);
    let (disks, rootfs) = prepared.from_slot(FIRST_DISK);
    let name = bundle.spec.hostname().as_deref().filter(|name| !name.is_empty());
    let grows = pod::is_first(&bundle.spec);
    let fsd = (grows || !binds.shares.is_empty() || upper.is_some()).then(|| paths.fsd.clone());
    let room = |nets| spare_disks(disks.len(), nets, fsd.is_some());
    // Who makes a pod makes its network first.
    let devices = if grows { 0 } else { room(0) };
    let of_container = has_own_users(&bundle.spec);
    let network = network::join(Room { devices, vcpus: size.vcpus, late: false, of_container });
    let network = network.await?;
    let nets = network.as_ref().map_or(0, |network| network.nets.len());
    let spare_disks = if grows { room(nets) } else { 0 };
    let (sandbox, _events) = Sandbox::create(SandboxConfig {
        name: id.clone(),
        hostname: hostname(name.unwrap_or(id.as_str())).into(),
        vcpus: size.vcpus,
        memory_mib: vm_memory_mib(size.memory),
        vmm: paths.vmm.clone(),
        kernel: sandbox.kernel.as_ref().unwrap_or(&paths.kernel).clone(),
        guest_image: sandbox.guest_image.as_ref().unwrap_or(&paths.guest).clone(),
        disks,
        spare_disks,
        network,
        cmdline: String::new(),
        boot_timeout: Duration::from_secs(sandbox.boot_timeout.into()),
        seeded: false,
        oom_score_adj: bundle.oom_score_adj(),
        fsd,
    })
    .await?;
    let created = sandbox.create_container(plan.container(rootfs, upper, None)).await?;
    sandbox.attach_network(&plan.id).await?;
    Ok(Parked { sandbox, created })
}

impl Plan {
    /// Its root file system and its devices. Blocks.
    pub fn prepare(&self, host: &Host) -> Result<Prepared> {
        let store = Store::open(&host.paths.store).map_err(RootFsError::Convert)?;
        let store = store.with_snapshots(self.config.store.snapshots.0);
        let scratch = self.bundle.scratch(self.config.sandbox.scratch_size.0);
        let prepared = rootfs::prepare(&store, &[], &self.bundle.root(), scratch)?;
        Ok(prepared.with_devices(Device::all(&self.bundle.spec)?)?)
    }

    /// With what was opened for it, once; it joins the namespaces of another container if it names some by path.
    pub fn container(
        &mut self,
        rootfs: RootFs,
        upper: Option<HostUpper>,
        joins: Option<Id>,
    ) -> ContainerConfig {
        let binds = mem::take(&mut self.binds);
        ContainerConfig {
            id: self.id.clone(),
            spec: self.bundle.spec.clone(),
            rootfs,
            upper,
            stdio: Stdio { stdin: true, stdout: true, stderr: !self.bundle.terminal() },
            files: Vec::new(),
            binds: binds.own,
            shares: binds.shares,
            joins,
            init: false,
            fixed: Fixed::default(),
        }
    }
}
