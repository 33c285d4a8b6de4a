//! What this runtime is: for containerd (from 2.0 on), and for people.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;

const NAME: &str = "io.containerd.ampoule.v2";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A `RuntimeInfo`.
pub fn info() -> protobuf::Result<Vec<u8>> {
    let version = RuntimeVersion { version: VERSION.into(), ..Default::default() };
    let info =
        RuntimeInfo { name: NAME.into(), version: Some(version).into(), ..Default::default() };
    info.write_to_bytes()
}

pub fn version() -> String {
    format!("containerd-shim-ampoule-v2 {VERSION}\n")
}
