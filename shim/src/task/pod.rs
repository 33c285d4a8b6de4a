//! The sandbox of a shim's containers: a VM, and its process on the host.

use std::{fmt, sync::Arc, time::Duration};

use ampoule_vmm_api::config::MAX_DISKS;

use super::{
    Result, Tasks,
    anchor::{Anchor, HostNetwork},
    size::Size,
};
use crate::{
    config::SandboxSettings,
    id::Id,
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
    /// Containers may come later, with disks and shares of their own.
    pub grows: bool,
    /// The first container has shares.
    pub shares: bool,
    pub oom_score_adj: i32,
}

impl Tasks {
    /// Boots a VM, and from then on passes on what it tells. Dropping the future leaves nothing.
    pub(super) async fn boot(
        self: &Arc<Self>,
        plan: PodPlan,
        disks: Vec<Disk>,
    ) -> Result<Arc<Pod>> {
        let PodPlan { first, size, settings, .. } = plan;
        let anchor = Anchor::new(&plan.network)?;
        let paths = &self.config.paths;
        // A slot costs every boot a little.
        let free = MAX_DISKS.saturating_sub(usize::from(FIRST_DISK) + disks.len());
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
            cmdline: String::new(),
            boot_timeout: Duration::from_secs(settings.boot_timeout.into()),
            seeded: false,
            oom_score_adj: plan.oom_score_adj,
            fsd: (plan.grows || plan.shares).then(|| paths.fsd.clone()),
        })
        .await?;
        let pod = Arc::new(Pod::new(sandbox, anchor, first));
        tokio::spawn(self.clone().follow(events));
        tokio::spawn({
            let pod = pod.clone();
            async move { pod.guard().await }
        });
        Ok(pod)
    }
}

/// It is ended by [`Sandbox::shutdown`]; who only drops it leaves that to the others who have it.
pub struct Pod {
    pub sandbox: Sandbox,
    anchor: Anchor,
    /// The container whose namespaces are the pod's.
    pub first: Id,
}

impl Pod {
    pub fn new(sandbox: Sandbox, anchor: Anchor, first: Id) -> Self {
        Self { sandbox, anchor, first }
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
