//! The sandbox of a shim's containers: a VM, and its process on the host.

use std::{fmt, fs::File, sync::Arc, time::Duration};

use super::{
    Result, Tasks,
    anchor::{Anchor, HostNetwork},
    error::TaskError,
    size::Size,
};
use crate::{
    config::SandboxSettings,
    error::chain_text,
    hooks::Hooks,
    id::Id,
    network::{Loopback, Network, NetworkError, Room},
    run_spec::hostname,
    sandbox::{Sandbox, SandboxConfig, spare_disks, vm_memory_mib},
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
    /// The first container has shares, or leaves what it writes on the host.
    pub shares: bool,
    pub oom_score_adj: i32,
    /// The first container has a user namespace of its own.
    pub own_users: bool,
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
        let paths = &self.config.paths;
        let fsd = (plan.grows || plan.shares).then(|| paths.fsd.clone());
        let room = |nets| spare_disks(disks.len(), nets, fsd.is_some());
        // Who makes a pod makes its network first; containerd 1.7 not where it is to belong to the pod's own users.
        let late = !plan.grows || plan.own_users && plan.network == HostNetwork::New;
        let devices = if late { room(0) } else { 0 };
        let of_container = plan.own_users;
        let room_for_nets = Room { devices, vcpus: size.vcpus, late, of_container };
        let network = look(&anchor, move |n| Network::join(n, room_for_nets)).await?;
        let loopback = match (network.connects() || late) && plan.grows {
            true => loopback(&anchor).await,
            false => None,
        };
        let of_container = network.of_container.then(|| first.clone());
        // A slot costs every boot a little.
        let spare_disks = if plan.grows { room(network.nets.len()) } else { 0 };
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
            network: Some(network),
            cmdline: String::new(),
            boot_timeout: Duration::from_secs(settings.boot_timeout.into()),
            seeded: false,
            oom_score_adj: plan.oom_score_adj,
            fsd,
        })
        .await?;
        let pod = Arc::new(Pod::new(sandbox, anchor, first));
        tokio::spawn(self.clone().follow(events));
        tokio::spawn({
            let pod = pod.clone();
            async move { pod.guard().await }
        });
        if let Some(loopback) = loopback {
            let pod = pod.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = pod.sandbox.ended() => {}
                    _ = loopback.serve(&pod.sandbox, of_container.as_ref()) => {}
                }
            });
        }
        Ok(pod)
    }
}

/// For connections from within the pod's namespace, if this host's kernel can have them passed on.
async fn loopback(anchor: &Anchor) -> Option<Loopback> {
    let opened = look(anchor, Loopback::open).await;
    let lost = |error: &TaskError| {
        let error = chain_text(error);
        tracing::warn!(
            error,
            "who connects to the pod from within its network namespace on the host reaches nobody"
        );
    };
    opened.inspect_err(lost).ok()
}

/// Does something with the network namespace that the process is in.
async fn look<T: Send + 'static>(
    anchor: &Anchor,
    look: impl FnOnce(&File) -> std::result::Result<T, NetworkError> + Send + 'static,
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
