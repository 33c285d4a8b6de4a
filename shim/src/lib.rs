//! The sandbox on the host. In reading order:
//!
//! - [`cli`], [`commands`]: the `ampoule` command line, one file for each verb
//! - [`run_spec`], [`capabilities`], [`seccomp`]: an image and options become an OCI runtime spec
//! - [`spec`], [`features`]: the OCI spec becomes the guest's; what is enforced of it, told to programs
//! - [`image`]: the image store: names, OCI layouts and folders become one EROFS file each
//! - [`rootfs`]: a root file system as disks; [`mountinfo`]: what is mounted where
//! - [`network`]: a network namespace's interfaces as the guest's
//! - [`share`]: directories and files of the host that a container sees as they are
//! - [`device`]: disks of the host that a container is given
//! - [`sandbox`]: one VM and the containers in it, owned by one task
//! - [`vm`], [`kvm`]: the VMM process and its control socket; `/dev/kvm`
//! - [`agent`]: the guest agent's calls, [`pace`]: how long they and other steps may take
//! - [`stdio`], [`terminal`], [`signals`]: the user's end of a workload
//! - [`registry`], [`control`]: the sandboxes of a user on disk, and the socket of each
//! - [`journal`], [`log`]: what a detached container writes, and who is attached to it
//! - [`event_loop`]: what a command runs in
//! - [`bootstrap`]: `containerd-shim-ampoule-v2` as containerd calls it: `start`, `delete`, `-info`
//! - [`daemon`]: the process that `start` leaves behind, one for each sandbox
//! - [`task`]: containerd's Task services
//! - [`oci`]: the command line of an OCI runtime, as runc's
//! - [`publisher`]: events, to containerd
//! - [`timings`], [`clock`]: the spans of a run
//! - [`host_cost`], [`oom`], `descriptors`: what a VM costs this host, who goes first when that has no memory left, and how many
//!   descriptors a sandbox's process asks for
//! - [`check`]: whether this host can run sandboxes
//! - [`config`]: the file `config.toml`
//! - [`paths`], [`name`], [`id`], [`signal_name`], [`timestamp`]: where things are, and what they are called
//! - [`error`], [`text`]: what is printed when something is wrong

pub mod agent;
pub mod bootstrap;
pub mod budget;
pub mod capabilities;
pub mod check;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod control;
mod cpus;
pub mod daemon;
mod descriptors;
pub mod device;
pub mod error;
pub mod event_loop;
pub mod features;
pub mod hooks;
pub mod host_cost;
pub mod id;
pub mod image;
pub mod journal;
pub mod kvm;
pub mod log;
mod mountinfo;
pub mod name;
pub mod network;
pub mod oci;
pub mod oom;
pub mod pace;
pub mod paths;
pub mod publisher;
pub mod registry;
pub mod rootfs;
pub mod run_spec;
pub mod sandbox;
pub mod seccomp;
pub mod share;
pub mod signal_name;
pub mod signals;
pub mod spec;
pub mod stdio;
pub mod task;
pub mod terminal;
pub mod text;
pub mod timestamp;
pub mod timings;
pub mod vm;
