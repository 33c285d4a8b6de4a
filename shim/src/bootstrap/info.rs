//! What this runtime is: for containerd (from 2.0 on), and for people.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, well_known_types::any::Any};

use crate::{features::features, rootfs::ALLOWED_MOUNTS};

const NAME: &str = "io.containerd.ampoule.v2";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Where containerd finds which mounts it is to leave as they are.
const MOUNTS: &str = "containerd.io/runtime-allow-mounts";
/// The OCI runtime specification's `features`, as JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// A `RuntimeInfo`.
pub fn info() -> protobuf::Result<Vec<u8>> {
    let version = RuntimeVersion { version: VERSION.into(), ..Default::default() };
    let value = features().to_string().into();
    let features = Any { type_url: FEATURES.into(), value, ..Default::default() };
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
