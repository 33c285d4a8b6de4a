//! What CRI's pause container is to a pod: a process that sleeps, and holds the namespaces that the pod's
//! containers join. It runs from the guest's own image, so that nobody has to bring one.

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use super::{Result, plan::Plan};
use crate::{
    cli::{CapabilityName, Sysctl},
    run_spec::{RunOptions, RunSpecError, run_spec},
    sandbox::{
        ContainerConfig, Fixed, GUEST_IMAGE, Lower, ProcessId, RootFs, SandboxError, Stdio, Upper,
    },
    task::{error::TaskError, pod::Pod},
};

/// As long as `sleep` can: 68 years.
const COMMAND: [&str; 2] = ["sleep", "2147483647"];
/// Enough for the agent's PID 1 and the command.
const MEMORY: u64 = 32 << 20;

/// Starts it as the first container of the pod, whom it belongs to: containerd never hears of it.
pub async fn start(pod: &Pod, plan: &Plan) -> Result<()> {
    let container = container(plan).map_err(|e| TaskError::Invalid(e.to_string()))?;
    let process = ProcessId::init(container.id.clone());
    let started = async {
        pod.sandbox.create_container(container).await?;
        if plan.users.is_some() {
            pod.sandbox.attach_network(&process.container).await?;
        }
        pod.sandbox.start(&process).await
    };
    started.await.map_err(|error: SandboxError| error.into())
}

fn container(plan: &Plan) -> std::result::Result<ContainerConfig, RunSpecError> {
    let sysctls = plan.sysctls.iter();
    let mut spec = run_spec(
        &Default::default(),
        &RunOptions {
            command: COMMAND.map(String::from).into(),
            hostname: plan.pod.hostname.clone(),
            memory: MEMORY,
            read_only: true,
            cap_drop: vec![CapabilityName::All],
            no_new_privileges: true,
            sysctls: sysctls
                .map(|(name, value)| Sysctl { name: name.clone(), value: value.clone() })
                .collect(),
            ..Default::default()
        },
    )?;
    if let (Some(users), Some(linux)) = (&plan.users, spec.linux_mut()) {
        let namespaces = linux.namespaces_mut().get_or_insert_default();
        let mut own = LinuxNamespace::default();
        own.set_typ(LinuxNamespaceType::User);
        namespaces.push(own);
        linux.set_uid_mappings(Some(users.uids.clone()));
        linux.set_gid_mappings(Some(users.gids.clone()));
    }
    let image =
        Lower { slot: GUEST_IMAGE, kind: "erofs".into(), devices: Vec::new(), mapped: false };
    Ok(ContainerConfig {
        id: plan.pod.first.clone(),
        spec,
        rootfs: RootFs {
            lowers: vec![image],
            upper: Upper::None,
            devices: Vec::new(),
            owners: None,
        },
        upper: None,
        stdio: Stdio::default(),
        files: Vec::new(),
        binds: Vec::new(),
        shares: Vec::new(),
        joins: None,
        // It reaps what containers that share its processes leave behind.
        init: true,
        fixed: Fixed::default(),
    })
}
