//! The sandbox of a shim's containers: a VM, and its process on the host.

use std::{fmt, fs::File, sync::Arc, time::Duration};

use ampoule_vmm_api::config::{MAX_DISKS, MAX_DISKS_AND_NETS};

use super::{
    Result, Tasks,
    anchor::{Anchor, HostNetwork},
    error::TaskError,
    size::Size,
};
use crate::{
    config::SandboxSettings,
    hooks::Hooks,
    id::Id,
    network::{Network, NetworkError, refuse_late},
    run_spec::hostname,
    sandbox::{FIRST_DISK, Sandbox, SandboxConfig, vm_memory_mib},
    vm::Disk,
};

/// What a pod is booted from, but for its disks.
#[derive(Clone, Debug)]
pub struct PodPlan {
    /// The container whose namespaces will be the pod's.
    pub first: Id,
    pub hostname: String,
    pub network: HostNetwork,
    pub size: Size,
    pub settings: SandboxSettings,
    /// Containers may come later, with disks of their own.
    pub grows: bool,
    pub oom_score_adj: i32,
}

impl Tasks {
    /// Runs the hooks that prepare the pod's namespaces, boots a VM, and from then on passes on what it tells. Dropping
    /// the future leaves nothing.
    pub(super) async fn boot(
        self: &Arc<Self>,
        plan: PodPlan,
        disks: Vec<Disk>,
        hooks: Option<&Hooks>,
    ) -> Result<Arc<Pod>> {
        let PodPlan { first, size, settings, .. } = plan;
        let anchor = Anchor::new(&plan.network)?;
        if let Some(hooks) = hooks {
            hooks.create(anchor.pid()).await?;
        }
        let network = look(&anchor, Network::join).await?;
        let joined = network.is_some();
        let paths = &self.config.paths;
        let nets = network.as_ref().map_or(0, |network| network.nets.len());
        let most = MAX_DISKS.min(MAX_DISKS_AND_NETS.saturating_sub(nets));
        // A slot costs every boot a little.
        let free = most.saturating_sub(usize::from(FIRST_DISK) + disks.len());
        let spare_disks = if plan.grows { u8::try_from(free).unwrap_or_default() } else { 0 };
        let (sandbox, events) = Sandbox::create(SandboxConfig {
            name: self.config.id.clone(),
            hostname: hostname(&plan.hostname).into(),
            vcpus: size.vcpus,
            memory_mib: vm_memory_mib(size.memory),
            vmm: paths.vmm.clone(),
            kernel: settings.kernel.unwrap_or_else(|| paths.kernel.clone()),
            guest_image: settings.guest_image.unwrap_or_else(|| paths.guest.clone()),
            disks,
            spare_disks,
            network,
            cmdline: String::new(),
            boot_timeout: Duration::from_secs(settings.boot_timeout.into()),
            seeded: false,
            oom_score_adj: plan.oom_score_adj,
        })
        .await?;
        let pod = Arc::new(Pod { joined, ..Pod::new(sandbox, anchor, first) });
        tokio::spawn(self.clone().follow(events));
        tokio::spawn({
            let pod = pod.clone();
            async move { pod.guard().await }
        });
        Ok(pod)
    }
}

/// Does something with the network namespace that the process is in.
async fn look<T: Send + 'static>(
    anchor: &Anchor,
    look: fn(&File) -> std::result::Result<T, NetworkError>,
) -> Result<T> {
    let path = anchor.network();
    let looking = tokio::task::spawn_blocking(move || {
        let namespace = File::open(&path).map_err(|source| TaskError::File { path, source })?;
        Ok(look(&namespace)?)
    });
    looking.await.map_err(|e| TaskError::Host("look at the network", e.into()))?
}

/// It is ended by [`Sandbox::shutdown`]; who only drops it leaves that to the others who have it.
pub struct Pod {
    pub sandbox: Sandbox,
    anchor: Anchor,
    /// The container whose namespaces are the pod's.
    pub first: Id,
    /// The guest has a network.
    joined: bool,
}

impl Pod {
    /// One without a network.
    pub fn new(sandbox: Sandbox, anchor: Anchor, first: Id) -> Self {
        Self { sandbox, anchor, first, joined: false }
    }

    /// A network that comes too late would be left out silently.
    pub async fn refuse_late_network(&self) -> Result<()> {
        match self.joined {
            true => Ok(()),
            false => look(&self.anchor, refuse_late).await,
        }
    }

    pub fn pid(&self) -> u32 {
        self.anchor.pid()
    }

    /// Ends the sandbox when somebody kills its process; returns when it has ended.
    pub async fn guard(&self) {
        tokio::select! {
            () = self.anchor.ended() => drop(self.sandbox.shutdown().await),
            _ = self.sandbox.ended() => {}
        }
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pod of {}", self.first)
    }
}
