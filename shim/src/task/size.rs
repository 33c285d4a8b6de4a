//! How large a VM is: decided once, from what its first container's spec says.
//!
//! A pod's sandbox container carries the sum of its containers as annotations (CRI); of a container of its own
//! its limits count. What nobody says is in the configuration.

use std::collections::HashMap;

use ampoule_vmm_api::config::MAX_VCPUS;
use oci_spec::runtime::Spec;

use crate::config::SandboxSettings;

/// Annotations of containerd's CRI plugin on a pod's sandbox container. 0: no limit.
pub const CRI_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
pub const CRI_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
pub const CRI_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// Microseconds, unless given.
const PERIOD: u64 = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub vcpus: u8,
    /// What containers may use; the guest's own share comes on top.
    pub memory: u64,
}

impl Size {
    pub fn of(spec: &Spec, settings: &SandboxSettings) -> Self {
        let none = HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&none);
        let said =
            |key: &str| annotations.get(key).and_then(|n| n.parse::<u64>().ok()).filter(|n| *n > 0);
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let limit = resources.and_then(|r| r.memory().as_ref()).and_then(|m| m.limit());
        let cpu = resources.and_then(|r| r.cpu().as_ref());
        let positive = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0);
        let quota = said(CRI_QUOTA).or_else(|| cpu?.quota().and_then(positive));
        let period = said(CRI_PERIOD).or_else(|| cpu?.period()).filter(|n| *n > 0);
        Self {
            vcpus: quota.map_or(settings.vcpus, |quota| vcpus(quota, period.unwrap_or(PERIOD))),
            memory: said(CRI_MEMORY).or(limit.and_then(positive)).unwrap_or(settings.memory.0),
        }
    }
}

fn vcpus(quota: u64, period: u64) -> u8 {
    u8::try_from(quota.div_ceil(period)).unwrap_or(MAX_VCPUS).clamp(1, MAX_VCPUS)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn size(annotations: Value, resources: Value) -> (u8, u64) {
        let spec = json!({
            "ociVersion": "1.1.0",
            "annotations": annotations,
            "linux": { "resources": resources },
        });
        let size = Size::of(&serde_json::from_value(spec).unwrap(), &SandboxSettings::default());
        (size.vcpus, size.memory >> 20)
    }

    #[test]
    fn a_pods_annotations_come_before_limits_and_those_before_the_default() {
        let limits = json!({
            "memory": { "limit": 256 << 20 },
            "cpu": { "quota": 150_000, "period": 100_000 },
        });
        let pod = json!({
            CRI_MEMORY: (1_u64 << 30).to_string(), CRI_QUOTA: "400000", CRI_PERIOD: "100000",
        });
        let none = json!({ CRI_MEMORY: "0", CRI_QUOTA: "0", CRI_PERIOD: "100000" });
        for (annotations, resources, expected) in [
            (json!({}), json!({}), (1, 512)),
            (json!({}), limits.clone(), (2, 256)),
            (pod, limits.clone(), (4, 1024)),
            (none, limits, (2, 256)),
            (json!({}), json!({ "memory": { "limit": -1 }, "cpu": { "quota": -1 } }), (1, 512)),
            (json!({ CRI_QUOTA: "-1", CRI_MEMORY: "lots" }), json!({}), (1, 512)),
            (json!({}), json!({ "cpu": { "quota": 1 } }), (1, 512)),
            (json!({}), json!({ "cpu": { "quota": i64::MAX, "period": 1 } }), (MAX_VCPUS, 512)),
        ] {
            assert_eq!(size(annotations.clone(), resources), expected, "{annotations}");
        }
    }
}
