//! `ampoule` as an OCI runtime: runc's command line, for Podman, Docker and whatever else calls one.
//!
//! - [`cli`]: runc's verbs and flags, and how they are told from those for local sandboxes
//! - [`containers`]: what is on disk of each container
//! - [`create`]: from a bundle to a container in a VM, parked before its workload
//! - [`keeper`]: the process that stands for a container, [`exec`]: and for a further process in it
//! - [`place`], [`pod`]: the VM of its own that a container has, or shares with those whose namespaces it joins
//! - [`cgroup`], [`block_io`], [`systemd`], [`console`], [`pid_file`]: what it has of its caller
//! - [`namespaces`], [`network`], [`view`]: what is found by who looks at that process instead of the container
//! - [`verbs`], [`events`]: the short-lived others, clients of the keeper's socket
//! - [`error`], [`log`]: what is printed when something is wrong, in the words callers look for
//!
//! `create` leaves one process behind: the container's keeper. It runs the sandbox as the process of an `ampoule run
//! -d` does, and it is what the pid file names: its parent, which conmon or containerd's shim become, sees the
//! container's exit code as its own, signals to it reach the container, and its death is the VM's. An exec has
//! a process of its own likewise, which is a client of the keeper's.

mod block_io;
mod cgroup;
pub mod cli;
mod console;
mod containers;
mod create;
mod error;
mod events;
mod exec;
mod keeper;
mod log;
mod namespaces;
mod network;
mod pid_file;
mod place;
mod pod;
mod systemd;
mod verbs;
mod view;

use std::{ffi::OsString, path::PathBuf, sync::Arc};

use clap::Parser;

use crate::{
    commands::features::features,
    paths::{Environment, Paths},
    registry::Registry,
};
use cli::{Command, OciCli, Owner};
use containers::Containers;
pub use error::OciError;
use log::Log;

/// Exit code of our own failures, as runc's; but for `exec`, whose other codes are the command's.
const FAILURE: u8 = 1;
const EXEC_FAILURE: u8 = 255;

type Result<T> = std::result::Result<T, OciError>;

/// Where everything of one command line is.
struct Host {
    paths: Paths,
    containers: Containers,
    log: Log,
    /// Cgroups are systemd's to make.
    systemd_cgroup: bool,
}

/// Whether a command line, the program's name first, is one for an OCI runtime.
pub fn is_meant(words: &[OsString]) -> bool {
    let words: Vec<_> = words.iter().skip(1).map(|word| word.to_string_lossy()).collect();
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    cli::is_meant(&words, owner)
}

fn owner(name: &str) -> Owner {
    let paths = Paths::new(&Environment::current());
    if Registry::new(&paths.state).find(name).is_ok() {
        return Owner::Local;
    }
    match Containers::new(&root(&paths)).find(name) {
        Ok(_) => Owner::Oci,
        Err(_) => Owner::Nobody,
    }
}

/// Where containers are unless `--root` says it.
fn root(paths: &Paths) -> PathBuf {
    paths.state.join("oci")
}

/// Does what the command line says; returns the exit code. Errors have been printed and logged.
pub fn main(words: &[OsString]) -> u8 {
    let cli = match OciCli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            let _ = error.print();
            return 0;
        }
        Err(error) => {
            let _ = error.print();
            return FAILURE;
        }
    };
    let paths = Paths::new(&Environment::current());
    let root = cli.global.root.unwrap_or_else(|| root(&paths));
    let log = Log::new(cli.global.log, cli.global.log_format);
    let systemd_cgroup = cli.global.systemd_cgroup;
    let host = Arc::new(Host { containers: Containers::new(&root), paths, log, systemd_cgroup });
    let (verb, failure) = (cli.command.name(), cli.command.failure());
    let done = match cli.command {
        Command::Create(args) => keeper::create(&args, &host),
        Command::Run(args) => keeper::run(&args, &host),
        Command::Start(args) => verbs::start(&args.id, &host),
        Command::State(args) => verbs::state(&args.id, &host),
        Command::Kill(args) => verbs::kill(&args, &host),
        Command::Delete(args) => verbs::delete(&args, &host),
        Command::Exec(args) => exec::exec(&args, &host),
        Command::Ps(args) => verbs::ps(&args, &host),
        Command::List(args) => verbs::list(&args, &host),
        Command::Pause(args) => verbs::pause(&args.id, true, &host),
        Command::Resume(args) => verbs::pause(&args.id, false, &host),
        Command::Update(args) => verbs::update(&args, &host),
        Command::Events(args) => events::events(&args, &host),
        Command::Spec(args) => verbs::spec(&args),
        Command::Features(args) => Ok(features(&args)),
    };
    done.unwrap_or_else(|error| {
        host.log.failed(verb, &error, failure);
        failure
    })
}
