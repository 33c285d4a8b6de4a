//! The sandbox of a shim's containers: a VM, and its process on the host.

use std::{fmt, fs::File, sync::Arc, time::Duration};

use tokio::sync::Mutex;

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
    network::{Late, Loopback, Net, Network, NetworkError, Spares, spare},
    run_spec::hostname,
    sandbox::{Sandbox, SandboxConfig, spare_disks, vm_memory_mib},
    vm::Disk,
};

/// Each costs every boot without a network a little.
const SPARE_NETS: u8 = 2;

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
        let mut network = look(&anchor, Network::join).await?;
        if let Some(network) = &mut network {
            network.of_first = !plan.grows && plan.own_users;
        }
        let loopback = match network.is_some() && plan.grows {
            true => loopback(&anchor).await,
            false => None,
        };
        let paths = &self.config.paths;
        let fsd = (plan.grows || plan.shares).then(|| paths.fsd.clone());
        let room = |nets| spare_disks(disks.len(), nets, fsd.is_some());
        let (spare_nets, late) = match (&network, plan.grows) {
            (Some(_), _) => (Vec::new(), None),
            // Who makes a pod makes its network first.
            (None, true) => (Vec::new(), Some(Spares::default())),
            (None, false) => {
                let (nets, spares) = spares(&anchor, room(0)).await;
                (nets, Some(spares))
            }
        };
        let nets = network.as_ref().map_or(0, |network| network.nets.len());
        // A slot costs every boot a little.
        let spare_disks = if plan.grows { room(nets) } else { 0 };
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
            spare_nets,
            cmdline: String::new(),
            boot_timeout: Duration::from_secs(settings.boot_timeout.into()),
            seeded: false,
            oom_score_adj: plan.oom_score_adj,
            fsd,
        })
        .await?;
        let pod = Arc::new(Pod { late: late.into(), ..Pod::new(sandbox, anchor, first) });
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
                    _ = loopback.serve(&pod.sandbox) => {}
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

/// Network devices for what comes after the boot, if there is room.
async fn spares(anchor: &Anchor, room: u8) -> (Vec<Net>, Spares) {
    look(anchor, move |namespace| spare(namespace, room.min(SPARE_NETS))).await.unwrap_or_else(
        |error| {
            let error = chain_text(&error);
            tracing::warn!(error, "interfaces that come after the VM's boot will be refused");
            Default::default()
        },
    )
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
    /// For what its network namespace gets after the boot; `None` if the guest has a network.
    late: Mutex<Option<Spares>>,
}

impl Pod {
    /// One without a network.
    pub fn new(sandbox: Sandbox, anchor: Anchor, first: Id) -> Self {
        Self { sandbox, anchor, first, late: Mutex::default() }
    }

    /// Gives a container, before it is started, what its network namespace has got since the boot, or refuses that: it would
    /// be left out silently.
    pub async fn attach_late_network(&self, container: &Id) -> Result<()> {
        let mut late = self.late.lock().await;
        let Some(spares) = late.clone() else { return Ok(()) };
        if let Some(network) = look(&self.anchor, move |n| Late::join(n, &spares)).await? {
            self.sandbox.attach_network(container, network).await?;
            *late = None;
        }
        Ok(())
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
