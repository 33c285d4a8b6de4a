//! Words of the end-to-end tests: they run the staged `ampoule` as a user would.
//!
//! - [`ampoule`]: one command line, run to its end within a bound, with what it printed and left behind
//! - [`assert_nothing_left`]: what a sandbox leaves on its host
//! - [`detached`]: a sandbox in the background, removed at the end of the test
//! - [`Footprint`]: what the host holds, to be the same before and after
//! - [`percentiles`], [`Memory`]: of the measurements of `make bench`
//! - [`sandbox`]: a sandbox with several containers, through the library
//! - [`containerd`]: a containerd of a test's own, and what it leaves behind
//! - [`cri`]: pods as a kubelet runs them
//! - [`oci`]: a container from a bundle, by an OCI runtime's command line
//! - [`engine`]: a Podman or a Docker of a test's own
//! - [`host_address`]: by which guests reach the host
//! - [`screen`]: a terminal with its user
//! - [`Disk`]: a block device of the host
//! - [`skip`]: a test that cannot run here says why, and is counted
//! - [`scaled`]: how much of something there is, every day and on demand

mod address;
mod command;
pub mod containerd;
pub mod cri;
mod disk;
pub mod engine;
mod footprint;
mod memory;
pub mod oci;
pub mod percentiles;
mod runtime;
pub mod sandbox;
mod scaled;
pub mod screen;
mod skip;
mod traces;

pub use address::{host_address, no_passt};
pub use command::{
    Ampoule, Detached, Outcome, Running, ampoule, detached, detached_with, program, run,
};
pub use disk::Disk;
pub use footprint::Footprint;
pub use memory::Memory;
pub use runtime::Runtime;
pub use scaled::scaled;
pub use skip::skip;
pub use traces::{assert_nothing_left, file_server_of, processes_of};

use std::{env, path::PathBuf};

/// The folder laid out as an installation, made by `make build`.
pub fn stage() -> PathBuf {
    env::var_os("AMPOULE_STAGE").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ampoule")),
        PathBuf::from,
    )
}

/// `AMPOULE_ROOT` of the tests: holds the image store with `alpine`, `debian` and `mini`.
pub fn root() -> PathBuf {
    env::var_os("AMPOULE_TEST_ROOT").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/test-results/root")),
        PathBuf::from,
    )
}
