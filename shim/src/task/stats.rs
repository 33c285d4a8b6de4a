//! What a container or a sandbox uses, in the cgroup version that this host has: containerd understands no other.
//!
//! A container's numbers are those of its cgroup in the guest, so that a limit and what is used of it are of the
//! same kind; a guest can lie about them to nobody but its owner. A sandbox's are what it costs the host: its VMM,
//! with the guest's memory and CPU time, its file server, and this daemon. They are given for the sandbox itself and for the container
//! that stands for it (CRI's pause container, which uses nothing worth telling): so a pod's sum is true, and no
//! container is charged with its neighbours.

use ampoule_agent_api::agent::StatsResponse;
use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{MessageFull, well_known_types::any::Any},
};
use rustix::fs::statfs;

use super::{Result, container::Container, error::TaskError, pod::Pod};
use crate::host_cost::HostCost;

/// statfs(2).
const CGROUP2_MAGIC: u64 = 0x6367_7270;
const NANOSECONDS: u64 = 1000;

pub async fn of_container(container: &Container) -> Result<Any> {
    let pod = container.pod()?;
    if container.stands_for_pod {
        return of_sandbox(pod);
    }
    metrics(&pod.sandbox.stats(&container.id).await?)
}

pub fn of_sandbox(pod: &Pod) -> Result<Any> {
    let ended = || TaskError::Ended(format!("sandbox of {}", pod.first));
    let vmm = pod.sandbox.vmm().ok_or_else(ended)?;
    let file_server = pod.sandbox.file_server();
    let cost = HostCost::of(vmm) + HostCost::of(std::process::id());
    let cost = cost + file_server.map(HostCost::of).unwrap_or_default();
    metrics(&on_host(cost, 3 + u64::from(file_server.is_some())))
}

/// In the guest's words. Processes are the VMM, we ourselves, the one that is in the pod's network, and the file server
/// if there is one.
fn on_host(cost: HostCost, processes: u64) -> StatsResponse {
    let cpu = [
        ("usage_usec", cost.cpu_us()),
        ("user_usec", cost.user_us),
        ("system_usec", cost.system_us),
    ];
    StatsResponse {
        memory_current: cost.memory,
        memory_max: u64::MAX,
        memory_stat: [("anon".into(), cost.memory)].into(),
        cpu_stat: cpu.map(|(name, used)| (name.into(), used)).into(),
        pids_current: processes,
        pids_max: u64::MAX,
        ..Default::default()
    }
}

fn metrics(stats: &StatsResponse) -> Result<Any> {
    let unified = statfs("/sys/fs/cgroup").is_ok_and(|found| found.f_type as u64 == CGROUP2_MAGIC);
    let metrics = if unified { any(&metrics_v2(stats)) } else { any(&metrics_v1(stats)) };
    metrics.map_err(|e| TaskError::Invalid(e.to_string()))
}

/// With the bare name for its type, as containerd has it.
pub fn any(message: &impl MessageFull) -> protobuf::Result<Any> {
    let type_url = descriptor_name(message);
    Ok(Any { type_url, value: message.write_to_bytes()?, ..Default::default() })
}

fn descriptor_name<M: MessageFull>(_: &M) -> String {
    M::descriptor().full_name().into()
}

fn metrics_v2(stats: &StatsResponse) -> v2::Metrics {
    let cpu = |key: &str| stats.cpu_stat.get(key).copied().unwrap_or_default();
    let memory = |key: &str| stats.memory_stat.get(key).copied().unwrap_or_default();
    let event = |key: &str| stats.memory_events.get(key).copied().unwrap_or_default();
    let mut metrics = v2::Metrics::new();
    *metrics.pids.mut_or_insert_default() = v2::PidsStat {
        current: stats.pids_current,
        // As cgroups' own library: 0 is none.
        limit: if stats.pids_max == u64::MAX { 0 } else { stats.pids_max },
        ..Default::default()
    };
    *metrics.cpu.mut_or_insert_default() = v2::CPUStat {
        usage_usec: cpu("usage_usec"),
        user_usec: cpu("user_usec"),
        system_usec: cpu("system_usec"),
        nr_periods: cpu("nr_periods"),
        nr_throttled: cpu("nr_throttled"),
        throttled_usec: cpu("throttled_usec"),
        ..Default::default()
    };
    *metrics.memory.mut_or_insert_default() = v2::MemoryStat {
        anon: memory("anon"),
        file: memory("file"),
        kernel_stack: memory("kernel_stack"),
        slab: memory("slab"),
        sock: memory("sock"),
        shmem: memory("shmem"),
        file_mapped: memory("file_mapped"),
        file_dirty: memory("file_dirty"),
        file_writeback: memory("file_writeback"),
        anon_thp: memory("anon_thp"),
        inactive_anon: memory("inactive_anon"),
        active_anon: memory("active_anon"),
        inactive_file: memory("inactive_file"),
        active_file: memory("active_file"),
        unevictable: memory("unevictable"),
        slab_reclaimable: memory("slab_reclaimable"),
        slab_unreclaimable: memory("slab_unreclaimable"),
        pgfault: memory("pgfault"),
        pgmajfault: memory("pgmajfault"),
        usage: stats.memory_current,
        usage_limit: stats.memory_max,
        max_usage: stats.memory_peak,
        ..Default::default()
    };
    *metrics.memory_events.mut_or_insert_default() = v2::MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        ..Default::default()
    };
    metrics
}

fn metrics_v1(stats: &StatsResponse) -> v1::Metrics {
    let cpu = |key: &str| stats.cpu_stat.get(key).copied().unwrap_or_default();
    let memory = |key: &str| stats.memory_stat.get(key).copied().unwrap_or_default();
    let mut metrics = v1::Metrics::new();
    *metrics.pids.mut_or_insert_default() = v1::PidsStat {
        current: stats.pids_current,
        limit: if stats.pids_max == u64::MAX { 0 } else { stats.pids_max },
        ..Default::default()
    };
    let mut usage = v1::CPUUsage::new();
    usage.total = cpu("usage_usec").saturating_mul(NANOSECONDS);
    usage.kernel = cpu("system_usec").saturating_mul(NANOSECONDS);
    usage.user = cpu("user_usec").saturating_mul(NANOSECONDS);
    let mut throttling = v1::Throttle::new();
    throttling.periods = cpu("nr_periods");
    throttling.throttled_periods = cpu("nr_throttled");
    throttling.throttled_time = cpu("throttled_usec").saturating_mul(NANOSECONDS);
    *metrics.cpu.mut_or_insert_default() = v1::CPUStat {
        usage: Some(usage).into(),
        throttling: Some(throttling).into(),
        ..Default::default()
    };
    let mut used = v1::MemoryEntry::new();
    used.limit = stats.memory_max;
    used.usage = stats.memory_current;
    used.max = stats.memory_peak;
    let oom_kill = stats.memory_events.get("oom_kill").copied().unwrap_or_default();
    *metrics.memory.mut_or_insert_default() = v1::MemoryStat {
        cache: memory("file"),
        rss: memory("anon"),
        mapped_file: memory("file_mapped"),
        dirty: memory("file_dirty"),
        writeback: memory("file_writeback"),
        pg_fault: memory("pgfault"),
        pg_maj_fault: memory("pgmajfault"),
        inactive_anon: memory("inactive_anon"),
        active_anon: memory("active_anon"),
        inactive_file: memory("inactive_file"),
        active_file: memory("active_file"),
        unevictable: memory("unevictable"),
        hierarchical_memory_limit: stats.memory_max,
        total_cache: memory("file"),
        total_rss: memory("anon"),
        total_mapped_file: memory("file_mapped"),
        total_pg_fault: memory("pgfault"),
        total_pg_maj_fault: memory("pgmajfault"),
        total_inactive_anon: memory("inactive_anon"),
        total_active_anon: memory("active_anon"),
        total_inactive_file: memory("inactive_file"),
        total_active_file: memory("active_file"),
        total_unevictable: memory("unevictable"),
        usage: Some(used).into(),
        ..Default::default()
    };
    *metrics.memory_oom_control.mut_or_insert_default() =
        v1::MemoryOomControl { oom_kill, ..Default::default() };
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> StatsResponse {
        let map = |pairs: &[(&str, u64)]| pairs.iter().map(|(k, n)| ((*k).into(), *n)).collect();
        StatsResponse {
            memory_current: 7 << 20,
            memory_max: u64::MAX,
            memory_stat: map(&[("anon", 1 << 20), ("file", 2 << 20)]),
            memory_events: map(&[("oom_kill", 3)]),
            cpu_stat: map(&[("usage_usec", 5), ("user_usec", u64::MAX)]),
            pids_current: 2,
            pids_max: u64::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn both_versions_have_the_names_containerd_knows() {
        for (metrics, name) in [
            (any(&metrics_v1(&stats())).unwrap(), "io.containerd.cgroups.v1.Metrics"),
            (any(&metrics_v2(&stats())).unwrap(), "io.containerd.cgroups.v2.Metrics"),
        ] {
            assert_eq!(metrics.type_url, name);
        }
    }

    #[test]
    fn a_sandbox_costs_memory_and_time_without_a_limit() {
        let cost = HostCost { memory: 5 << 20, user_us: 7, system_us: 2 };
        let (one, two) = (metrics_v1(&on_host(cost, 3)), metrics_v2(&on_host(cost, 3)));
        assert_eq!((two.memory.usage, two.memory.usage_limit), (5 << 20, u64::MAX));
        assert_eq!((one.memory.usage.usage, one.memory.usage.limit), (5 << 20, u64::MAX));
        assert_eq!((two.cpu.usage_usec, two.cpu.user_usec, two.cpu.system_usec), (9, 7, 2));
        assert_eq!(one.cpu.usage.total, 9000);
    }

    #[test]
    fn the_same_numbers_are_in_both() {
        let (one, two) = (metrics_v1(&stats()), metrics_v2(&stats()));
        assert_eq!(one.memory.usage.usage, two.memory.usage);
        assert_eq!((one.memory.rss, one.memory.cache), (two.memory.anon, two.memory.file));
        assert_eq!(one.cpu.usage.total, two.cpu.usage_usec * 1000);
        assert_eq!((one.pids.current, one.pids.limit), (2, 0));
        assert_eq!((one.memory_oom_control.oom_kill, two.memory_events.oom_kill), (3, 3));
    }
}
