//! What a shim and the guest agent say to each other: `proto/agent.proto`, generated into [`agent`] (the
//! messages) and [`agent_ttrpc`] (client and service).

#[allow(clippy::all, clippy::unwrap_used, clippy::expect_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::{agent, agent_ttrpc};

/// Host vsock port that the agent dials when it is ready.
pub const AGENT_PORT: u32 = 1024;

/// Where the agent puts the nth file of a request for a container.
pub fn file_path(container: &str, n: usize) -> String {
    format!("{}/{n}", files_of(container))
}

/// The folder of those files.
pub fn files_of(container: &str) -> String {
    format!("/run/ampoule-files/{container}")
}
