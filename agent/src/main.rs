//! `ampoule-agent`: PID 1 of the guest. In reading order:
//!
//! - [`boot`][]: from the first instruction to the end of the VM
//! - [`ports`][]: stage marks and power-off, [`network`]: loopback and the interfaces of the pod
//! - [`host`][]: the connection to the host, [`service`]: what it may ask for
//! - [`clock`][]: the guest's clock, where the host sets it; [`pace`][]: how long things may take
//! - [`registry`][]: things by id, [`error`]: what can go wrong with them
//! - [`container`][]: the life of a container, [`process`]: of a process
//! - [`console`][]: a shell in the guest itself, [`view`]: the files of a container, for the host
//! - [`rootfs`], [`files`], [`cgroup`], [`stats`]: what a container is made of and what it uses
//! - [`write_out`][]: what a container has written, for the host
//! - [`share`][]: directories and files of the host, [`follow`]: what the host changes in them
//! - [`random`][]: random numbers of a container that was given a seed
//! - [`stdio`][]: pumps between processes and the host
//! - [`reaper`][]: exits
//! - [`oci`][]: the specification, as far as it is enforced
//! - [`plan`], [`spawn`]: how a runner is told what to do, and started
//! - [`init`][]: the runner: everything between clone and exec
//! - [`mount`][]: mounts as descriptors

mod boot;
mod cgroup;
mod clock;
mod console;
mod container;
mod dial;
mod error;
mod files;
mod follow;
mod host;
mod init;
mod mount;
mod network;
mod oci;
mod pace;
mod plan;
mod ports;
mod process;
mod random;
mod reaper;
mod registry;
mod rootfs;
mod service;
mod share;
mod spawn;
mod stats;
mod stdio;
mod view;
mod write_out;

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    if env::args_os().nth(1).is_some_and(|a| a == plan::RUNNER) {
        init::run()
    }
    if std::process::id() == 1 {
        boot::run()
    }
    eprintln!("ampoule-agent {}: runs as PID 1 of a guest", env!("CARGO_PKG_VERSION"));
    ExitCode::from(2)
}
