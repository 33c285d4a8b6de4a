//! Create: from a bundle to a container in a VM, parked before its workload.

use std::{path::Path, sync::Arc, time::Duration};

use containerd_shim_protos::{api::CreateTaskRequest, protobuf::well_known_types::any::Any};

use super::{
    Result, Tasks,
    anchor::HostNetwork,
    binds::{self, Binds},
    bundle::Bundle,
    container::{Container, Place},
    error::TaskError,
    pod::PodPlan,
    process::{Process, Status},
    sandbox::PodFiles,
    settings::settings,
    size::Size,
    stdio::{Opened, Owner, Wanted},
};
use crate::{
    bootstrap::start::INIT_PID,
    config::{Config, SandboxSettings},
    device::Device,
    hooks::Hooks,
    id::Id,
    image::Store,
    pace::Pace,
    paths::Paths,
    rootfs::{self, Mount, Prepared, RootFsError},
    sandbox::{ContainerConfig, FIRST_DISK, Fixed, HostUpper, ProcessId, SandboxError},
    spec::{Terms, has_own_users},
};

/// What a container is made from, read and converted.
struct Parts {
    bundle: Bundle,
    config: Config,
    prepared: Prepared,
    binds: Binds,
    hooks: Hooks,
    /// Fields of the spec.
    ignored: Vec<String>,
}

impl Tasks {
    /// Returns the task's pid. Whoever drops the future, or meets an error, leaves nothing.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32> {
        if !request.checkpoint.is_empty() {
            // Not "unimplemented", on which containerd tries an older version of the API.
            return Err(TaskError::Invalid("a checkpoint cannot be restored yet".into()));
        }
        self.sandbox.admits_containers()?;
        let id: Id = request.id.parse()?;
        let bundle = Bundle::read(Path::new(&request.bundle))?;
        let wanted = Wanted {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: bundle.terminal(),
        };
        let init = Process::init(ProcessId::init(id.clone()), wanted);
        let mut container = Container::new(id, bundle.path.clone(), request.rootfs, init);
        container.stands_for_pod = bundle.stands_for_pod();
        let container = Arc::new(container);
        self.table.reserve(container.clone())?;
        let mut creation = Creation { tasks: self.clone(), container: Some(container.clone()) };
        match self.build(&container, bundle, request.options.unwrap_or_default()).await {
            Ok(()) => {
                creation.container = None;
                Ok(container.pid())
            }
            Err(error) => {
                creation.container = None;
                self.give_up(&container).await;
                Err(error)
            }
        }
    }

    async fn build(
        self: &Arc<Self>,
        container: &Arc<Container>,
        bundle: Bundle,
        options: Any,
    ) -> Result<()> {
        let owner = Owner { id: container.id.as_str(), namespace: &self.config.namespace };
        let paths = self.config.paths.clone();
        let config = settings(&paths, &options, &bundle.spec)?;
        let pace = Pace::of(Duration::from_secs(config.sandbox.boot_timeout.into()));
        let wanted = &container.init.wanted;
        let opened = Opened::open(wanted, owner, &self.streaming, pace).await?;
        let mounts = container.mounts.iter().map(mount).collect();
        let (id, files) = (container.id.clone(), self.sandbox.files());
        let parts =
            tokio::task::spawn_blocking(move || parts(&id, bundle, config, mounts, &paths, &files))
                .await;
        let parts =
            parts.map_err(|e| TaskError::Host("prepare the root file system", e.into()))??;
        container.log_ignored(&parts.ignored);
        let (spec, binds, upper, joins) = self.place(container, parts).await?;
        let place = container.place.get().ok_or_else(|| container.init.refuse("created"))?;
        if let Some(hooks) = container.hooks.get().filter(|_| place.attached) {
            hooks.create(container.pid()).await?;
        }
        let created = place
            .pod
            .sandbox
            .create_container(ContainerConfig {
                id: container.id.clone(),
                spec,
                rootfs: place.rootfs.clone(),
                upper,
                stdio: opened.streams(),
                files: Vec::new(),
                binds: binds.own,
                shares: binds.shares,
                joins,
                init: false,
                fixed: Fixed::default(),
            })
            .await?;
        container.init.connected(opened.connect(created.streams));
        // Its event is on its way then.
        container.init.until(|status| *status != Status::Creating).await;
        let path = container.bundle.join(INIT_PID);
        let written = std::fs::write(&path, container.pid().to_string());
        written.map_err(|source| TaskError::File { path, source })
    }

    /// Finds a container its VM. Returns what is left to make it from, and whose namespaces it joins.
    async fn place(
        self: &Arc<Self>,
        container: &Arc<Container>,
        parts: Parts,
    ) -> Result<(oci_spec::runtime::Spec, Binds, Option<HostUpper>, Option<Id>)> {
        let Parts { mut bundle, config, mut prepared, binds, hooks, .. } = parts;
        let upper = prepared.upper.take();
        let strict = config.strict;
        let hooks = container.hooks.get_or_init(|| hooks);
        let mut slot = self.pod.lock().await;
        let (pod, rootfs, joins) = match slot.clone() {
            Some(pod) => {
                drop(slot);
                let rootfs = prepared.attach(&pod.sandbox).await?;
                let first = pod.first.clone();
                (pod, rootfs, Some(first))
            }
            None => {
                self.sandbox.leaves_the_vm_to_containers()?;
                let (disks, rootfs) = prepared.from_slot(FIRST_DISK);
                let shares = !binds.shares.is_empty() || upper.is_some();
                let network = bundle.network();
                bundle.forget_paths();
                let plan = plan(&container.id, &bundle, network, config.sandbox, shares);
                let pod = self.boot(plan, disks, Some(hooks)).await?;
                *slot = Some(pod.clone());
                (pod, rootfs, None)
            }
        };
        let attached = joins.is_some();
        // Nobody else places this container.
        let _ = container.place.set(Place { pod, rootfs, attached, strict });
        Ok((bundle.spec, binds, upper, joins))
    }

    /// Undoes a creation, however far it came.
    async fn give_up(self: &Arc<Self>, container: &Arc<Container>) {
        if container.init.status() == Status::Created {
            let _ = self.end(container).await;
        }
        let _ = self.delete_from_sandbox(container).await;
        container.has_gone().await;
        self.table.remove(&container.id);
        self.clone().retire().await;
    }
}

/// Until it is disarmed, a dropped creation is given up.
struct Creation {
    tasks: Arc<Tasks>,
    container: Option<Arc<Container>>,
}

impl Drop for Creation {
    fn drop(&mut self) {
        if let Some(container) = self.container.take() {
            let tasks = self.tasks.clone();
            tokio::spawn(async move { tasks.give_up(&container).await });
        }
    }
}

/// Reads and converts what may take its time.
fn parts(
    id: &Id,
    mut bundle: Bundle,
    config: Config,
    mounts: Vec<Mount>,
    paths: &Paths,
    of_pod: &PodFiles,
) -> Result<Parts> {
    let ignored = bundle
        .decide(Terms { strict: config.strict, cgroup: false })
        .map_err(SandboxError::from)?;
    let hooks = Hooks::take(&mut bundle.spec, id, &bundle.path).map_err(SandboxError::from)?;
    let store = Store::open(&paths.store).map_err(RootFsError::Convert)?;
    let store = store.with_snapshots(config.store.snapshots.0);
    let scratch = bundle.scratch(config.sandbox.scratch_size.0);
    let devices = Device::all(&bundle.spec)?;
    let prepared = rootfs::prepare(&store, &mounts, &bundle.root(), scratch)?;
    let prepared = prepared.with_devices(devices)?;
    of_pod.bind_into(&mut bundle.spec);
    let binds = binds::binds(&bundle.spec)?;
    Ok(Parts { bundle, config, prepared, binds, hooks, ignored })
}

/// The pod whose first container this is.
fn plan(
    first: &Id,
    bundle: &Bundle,
    network: HostNetwork,
    settings: SandboxSettings,
    shares: bool,
) -> PodPlan {
    let name = bundle.spec.hostname().as_deref().filter(|name| !name.is_empty());
    PodPlan {
        first: first.clone(),
        hostname: name.unwrap_or(first.as_str()).into(),
        network,
        size: Size::of(&bundle.spec, &settings),
        settings,
        grows: bundle.is_grouped(),
        shares,
        oom_score_adj: bundle.oom_score_adj(),
        own_users: has_own_users(&bundle.spec),
    }
}

fn mount(mount: &containerd_shim_protos::api::Mount) -> Mount {
    Mount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}
