//! What this runtime is: for containerd (from 2.0 on), and for people.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, well_known_types::any::Any};
use serde_json::json;

use crate::rootfs::ALLOWED_MOUNTS;

const NAME: &str = "io.containerd.ampoule.v2";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Where containerd finds which mounts it is to leave as they are.
const MOUNTS: &str = "containerd.io/runtime-allow-mounts";
/// The OCI runtime specification's `features`, as JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// A `RuntimeInfo`.
pub fn info() -> protobuf::Result<Vec<u8>> {
    let version = RuntimeVersion { version: VERSION.into(), ..Default::default() };
    // Whatever is missing there is not supported. Mapped mounts are; but by them containerd takes it that pods may have
    // users of their own, which those with a network may not.
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.1.0",
        "linux": { "mountExtensions": { "idmap": { "enabled": false } } },
    });
    let features =
        Any { type_url: FEATURES.into(), value: features.to_string().into(), ..Default::default() };
    let info = RuntimeInfo {
        name: NAME.into(),
        version: Some(version).into(),
        features: Some(features).into(),
        annotations: [(MOUNTS.into(), ALLOWED_MOUNTS.into())].into(),
        ..Default::default()
    };
    info.write_to_bytes()
}

pub fn version() -> String {
    format!("containerd-shim-ampoule-v2 {VERSION}\n")
}
