//! The phase `Creating`: from nothing to an agent that has answered.

use std::{os::fd::OwnedFd, time::Duration};

use ampoule_agent_api::{
    AGENT_PORT,
    agent::{ConfigureNetworkRequest, HelloResponse},
};
use ampoule_vmm_api::{Event, config::MAX_DISKS, guest::MAX_MARKS};

use super::{
    BootRecord, SandboxConfig, SandboxError,
    shares::{Shares, Start},
    wire::answers,
};
use crate::{
    agent::{Agent, AgentError},
    check, clock,
    network::{Joined, Net, Network},
    pace::Pace,
    text::one_line,
    vm::{Cause, Death, Report, Vm, VmSetup},
};

/// Hardware boots in hundredths of this.
const SUSPICIOUS: Duration = Duration::from_secs(1);

/// Device faults that are logged: a guest makes as many as it likes.
const MAX_FAULTS: u32 = 16;

/// A VM is hardly larger than what its containers may use. By its usual rule the kernel would refuse a single
/// allocation of more than that, which a host with memory to spare grants; here it is for the containers' limits
/// to say what is too much, when it is used.
const OVERCOMMIT: &str = "sysctl.vm.overcommit_memory=1";

/// Without the vDSO, the C library's random numbers all come by a system call, which the agent can answer.
const SEEDED: &str = "vdso=0";

/// A VM whose agent is ready.
pub(super) struct Booted {
    pub vm: Vm,
    pub agent: Agent,
    pub record: BootRecord,
    /// Slots that [`super::Sandbox::attach_disk`] may use.
    pub spare_slots: Vec<u8>,
    pub network: Option<Joined>,
    /// What the guest was told of it, if it has it itself; else it is for a container.
    pub told: Option<ConfigureNetworkRequest>,
    pub shares: Shares,
}

/// Boots. The hello is sent at once and waits in the stream until the agent is there: its answer is readiness.
pub(super) async fn boot(mut config: SandboxConfig) -> Result<Booted, SandboxError> {
    let first_spare = 1 + config.disks.len();
    let last = (first_spare + usize::from(config.spare_disks)).min(MAX_DISKS);
    let spare_slots = (first_spare..last).filter_map(|slot| slot.try_into().ok()).collect();
    let (hostname, limit) = (config.hostname.clone(), config.boot_timeout);
    let pace = Pace::of(limit);
    let (kernel, guest_image) = (config.kernel.clone(), config.guest_image.clone());
    let start = config.fsd.clone().map(|exe| {
        let name = config.name.to_string();
        Start::new(exe, name, config.oom_score_adj, pace)
    });
    let (start, share) = start.transpose().map_err(SandboxError::Boot)?.unzip();
    let shares = Shares::new(start);
    let of_guest = config.network.as_ref().is_some_and(|n| n.connects() && !n.of_container);
    let (request, nets, network) = match config.network.take() {
        Some(Network { request, nets, joined, resolver, of_container: _ }) => {
            (of_guest.then_some((request, resolver)), nets, Some(joined))
        }
        None => (None, Vec::new(), None),
    };
    let told = request.as_ref().map(|(request, _)| request.clone());
    let (mut vm, agent_stream) =
        Vm::boot(setup(config, nets, share)).map_err(SandboxError::Boot)?;
    let agent = Agent::new(agent_stream, pace);
    let record = hello(&mut vm, &agent, &hostname, limit).await;
    let record = record.map_err(|source| SandboxError::Died {
        kernel,
        guest_image,
        source: source.into(),
    })?;
    if let Some((mut request, resolver)) = request {
        request.resolver_port = answers(&vm, resolver).map_err(SandboxError::Vm)?;
        agent.configure_network(&request).await?;
    }
    Ok(Booted { vm, agent, record, spare_slots, network, told, shares })
}

async fn hello(
    vm: &mut Vm,
    agent: &Agent,
    hostname: &str,
    limit: Duration,
) -> Result<BootRecord, Death> {
    let mut record = BootRecord::default();
    let hello = agent.hello(hostname, limit);
    tokio::pin!(hello);
    let suspicion = kvm_is_emulated();
    tokio::pin!(suspicion);
    let (mut answered, mut suspected) = (false, false);
    loop {
        tokio::select! {
            biased;
            answer = &mut hello, if !answered => {
                answered = true;
                match answer {
                    Ok(answer) => return Ok(record.greeted(&answer)),
                    Err(error) => give_up(vm, error, limit),
                }
            }
            why = &mut suspicion, if !suspected => {
                suspected = true;
                if let Some(why) = why {
                    vm.kill(Cause::Emulated(why));
                }
            }
            // Last, because a hostile VMM may report without end.
            report = vm.next() => match report {
                Report::Event(event) => record.note(&event),
                Report::Died(death) => return Err(*death),
            },
        }
    }
}

/// A boot that takes its time is reason to look at the host's KVM. One that emulates guest kernels takes many
/// seconds to fail by itself; asking before every boot would make every boot slower.
async fn kvm_is_emulated() -> Option<String> {
    tokio::time::sleep(SUSPICIOUS).await;
    tokio::task::spawn_blocking(check::emulation).await.ok().flatten()
}

/// The agent failed its hello. A broken connection is most likely the VM's death, whose reason comes next.
fn give_up(vm: &mut Vm, error: AgentError, limit: Duration) {
    match error {
        AgentError::Timeout { .. } => vm.kill(Cause::GivenUp(format!(
            "the guest's agent was not ready within {} s; a slow host needs a longer sandbox.boot_timeout",
            limit.as_secs_f32()
        ))),
        other => vm.doom(Cause::GivenUp(other.to_string())),
    }
}

fn setup(config: SandboxConfig, nets: Vec<Net>, share: Option<OwnedFd>) -> VmSetup {
    let seeded = if config.seeded { SEEDED } else { "" };
    VmSetup {
        vmm: config.vmm,
        name: config.name.to_string(),
        kernel: config.kernel,
        guest_image: config.guest_image,
        disks: config.disks,
        spare_disks: config.spare_disks,
        nets,
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        cmdline: format!("{OVERCOMMIT} {seeded} {}", config.cmdline),
        hide_random: config.seeded,
        agent_port: AGENT_PORT,
        oom_score_adj: config.oom_score_adj,
        share,
    }
}

impl BootRecord {
    fn greeted(self, answer: &HelloResponse) -> Self {
        Self {
            hello_ns: clock::now_ns(),
            agent_version: one_line(&answer.agent_version, 100),
            kernel_release: one_line(&answer.kernel_release, 100),
            ..self
        }
    }

    /// Takes what an event says about the boot.
    pub(super) fn note(&mut self, event: &Event) {
        match event {
            Event::Started(stamps) => self.stamps = *stamps,
            Event::Stage { mark, at_ns } if self.marks.len() < MAX_MARKS as usize => {
                self.marks.push((*mark, *at_ns));
            }
            Event::DeviceFault { device, error } if self.device_faults < MAX_FAULTS => {
                self.device_faults += 1;
                let (device, error) = (one_line(device, 100), one_line(error, 500));
                tracing::warn!(device, error, "the guest broke a device");
            }
            _ => {}
        }
    }
}
