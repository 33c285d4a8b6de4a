//! OCI resources as cgroup v2 files: one pure function. Conversions as runc does them, so that a limit
//! means the same here.

use crate::{
    oci::{Cpu, Memory, Resources},
    plan::{StepError, refuse},
};

const SWAP: &str = "memory.swap.max";
const HUGE_PAGES: &str = "hugetlb.";
/// cpu.max's period unless one is given, in microseconds.
const PERIOD: u64 = 100_000;

/// What to write into which file.
#[derive(Debug, PartialEq, Eq)]
pub struct Limit {
    pub file: String,
    pub value: String,
}

fn limit(file: impl Into<String>, value: impl ToString) -> Limit {
    Limit { file: file.into(), value: value.to_string() }
}

/// Whether a kernel that lacks the file has nothing of what it limits.
pub fn may_be_missing(limit: &Limit) -> bool {
    limit.file == SWAP || limit.file.starts_with(HUGE_PAGES)
}

/// In the order they are to be written.
pub fn of(resources: &Resources) -> Result<Vec<Limit>, StepError> {
    let mut limits = Vec::new();
    cpu(&resources.cpu, &mut limits);
    memory(&resources.memory, &mut limits)?;
    if let Some(pids) = resources.pids.limit {
        limits.push(limit("pids.max", or_max(Some(pids).filter(|n| *n > 0).unwrap_or(-1))));
    }
    for huge in &resources.hugepage_limits {
        check_name(&huge.page_size)?;
        limits.push(limit(format!("{HUGE_PAGES}{}.max", huge.page_size), huge.limit));
    }
    for (file, value) in &resources.unified {
        check_name(file)?;
        limits.push(limit(file, value));
    }
    Ok(limits)
}

fn cpu(cpu: &Cpu, limits: &mut Vec<Limit>) {
    if let Some(idle) = cpu.idle {
        limits.push(limit("cpu.idle", idle));
    }
    // An idle group has no weight.
    if let Some(shares) = cpu.shares.filter(|s| *s > 0 && cpu.idle != Some(1)) {
        limits.push(limit("cpu.weight", weight(shares)));
    }
    if cpu.quota.is_some() || cpu.period.is_some() {
        let quota = cpu.quota.filter(|q| *q > 0).map_or("max".to_owned(), |q| q.to_string());
        let period = cpu.period.filter(|p| *p > 0).unwrap_or(PERIOD);
        limits.push(limit("cpu.max", format!("{quota} {period}")));
    }
    if let Some(burst) = cpu.burst {
        limits.push(limit("cpu.max.burst", burst));
    }
    for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if !list.is_empty() {
            limits.push(limit(file, list));
        }
    }
}

/// cgroup v1 shares (2-262144, default 1024) to a v2 weight (1-10000, default 100): the curve through
/// the ends and both defaults that Kubernetes and runc 1.3 use.
fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let l = (shares as f64).log2();
            10f64.powf((l * l + 125.0 * l) / 612.0 - 7.0 / 34.0).ceil() as u64
        }
    }
}

fn memory(memory: &Memory, limits: &mut Vec<Limit>) -> Result<(), StepError> {
    let set = |n: Option<i64>| n.filter(|n| *n != 0);
    if let Some(swap) = swap(set(memory.limit), set(memory.swap))? {
        limits.push(limit(SWAP, or_max(swap)));
    }
    if let Some(max) = set(memory.limit) {
        limits.push(limit("memory.max", or_max(max)));
    }
    if let Some(low) = set(memory.reservation) {
        limits.push(limit("memory.low", or_max(low)));
    }
    Ok(())
}

/// OCI counts memory and swap together, the kernel swap alone.
fn swap(memory: Option<i64>, both: Option<i64>) -> Result<Option<i64>, StepError> {
    let refused = |cause| Err(refuse("spec", "linux.resources.memory.swap", cause));
    match (memory, both) {
        (Some(m), None) if m < 0 => Ok(Some(-1)),
        (_, None) => Ok(None),
        (_, Some(b)) if b < 0 => Ok(Some(-1)),
        (Some(m), Some(b)) if m < 0 => Ok(Some(b)),
        (Some(m), Some(b)) if b >= m => Ok(Some(b - m)),
        (Some(_), Some(_)) => refused("less than the memory limit it includes"),
        (None, Some(_)) => refused("a swap limit without a memory limit"),
    }
}

fn or_max(n: i64) -> String {
    if n < 0 { "max".to_owned() } else { n.to_string() }
}

/// A name of the spec that becomes a file name.
fn check_name(name: &str) -> Result<(), StepError> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(refuse("spec", "linux.resources", format_args!("{name:?} is no file name")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn limits(resources: serde_json::Value) -> Result<Vec<String>, String> {
        let resources: Resources = serde_json::from_value(resources).unwrap();
        of(&resources)
            .map(|l| l.iter().map(|l| format!("{}={}", l.file, l.value)).collect())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn resources_become_files() {
        let table = [
            (json!({}), vec![]),
            (json!({"memory": {"limit": 1000}}), vec!["memory.max=1000"]),
            (
                json!({"memory": {"limit": 1000, "swap": 3000, "reservation": 500}}),
                vec!["memory.swap.max=2000", "memory.max=1000", "memory.low=500"],
            ),
            (json!({"memory": {"limit": 7, "swap": 7}}), vec!["memory.swap.max=0", "memory.max=7"]),
            (json!({"memory": {"limit": 0, "swap": 0}}), vec![]),
            (json!({"memory": {"limit": -1}}), vec!["memory.swap.max=max", "memory.max=max"]),
            (
                json!({"memory": {"limit": 9, "swap": -1}}),
                vec!["memory.swap.max=max", "memory.max=9"],
            ),
            (json!({"pids": {"limit": 32}}), vec!["pids.max=32"]),
            (json!({"pids": {"limit": 0}}), vec!["pids.max=max"]),
            (json!({"pids": {"limit": -1}}), vec!["pids.max=max"]),
            (json!({"cpu": {"shares": 1024}}), vec!["cpu.weight=100"]),
            (json!({"cpu": {"shares": 0}}), vec![]),
            (json!({"cpu": {"shares": 512, "idle": 1}}), vec!["cpu.idle=1"]),
            (json!({"cpu": {"quota": 50000, "period": 100000}}), vec!["cpu.max=50000 100000"]),
            (json!({"cpu": {"quota": 50000}}), vec!["cpu.max=50000 100000"]),
            (json!({"cpu": {"quota": -1}}), vec!["cpu.max=max 100000"]),
            (json!({"cpu": {"period": 1000}}), vec!["cpu.max=max 1000"]),
            (json!({"cpu": {"quota": 5, "burst": 9}}), vec!["cpu.max=5 100000", "cpu.max.burst=9"]),
            (
                json!({"cpu": {"cpus": "0-1", "mems": "0"}}),
                vec!["cpuset.cpus=0-1", "cpuset.mems=0"],
            ),
            (
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4096}]}),
                vec!["hugetlb.2MB.max=4096"],
            ),
            (json!({"unified": {"memory.high": "5"}}), vec!["memory.high=5"]),
        ];
        for (resources, files) in table {
            assert_eq!(limits(resources.clone()).unwrap(), files, "{resources}");
        }
    }

    #[test]
    fn shares_map_to_weights_at_the_ends_and_the_default() {
        for (shares, expected) in
            [(2, 1), (3, 2), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)]
        {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        assert!((2..262_145).map(weight).is_sorted());
    }

    #[test]
    fn nonsense_is_refused() {
        for resources in [
            json!({"memory": {"limit": 10, "swap": 9}}),
            json!({"memory": {"swap": 9}}),
            json!({"unified": {"../x": "1"}}),
            json!({"unified": {"a/b": "1"}}),
            json!({"hugepageLimits": [{"pageSize": "../../2MB", "limit": 1}]}),
        ] {
            assert!(
                limits(resources.clone()).unwrap_err().contains("linux.resources"),
                "{resources}"
            );
        }
    }
}
