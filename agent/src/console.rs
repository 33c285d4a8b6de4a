//! The console: a shell in the guest itself, for whoever has to see what is wrong there.
//!
//! It is made only when the host asks over the agent's one connection; nothing in a container can. It runs in the
//! agent's namespaces and cgroup with all of its rights.

use rustix::thread::CapabilitySet;

use crate::oci::{Capabilities, ConsoleSize, Process};

const SHELL: [&str; 2] = ["/bin/sh", "-l"];
const ENVIRONMENT: [&str; 2] = ["PATH=/sbin:/usr/sbin:/bin:/usr/bin", "TERM=xterm"];

/// The shell as a process object; with a terminal if there is a size for it.
pub fn shell(size: Option<ConsoleSize>) -> Process {
    let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    let all = CapabilitySet::all();
    let all: Vec<String> = all.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
    let capabilities = Capabilities {
        bounding: all.clone(),
        effective: all.clone(),
        permitted: all,
        ..Default::default()
    };
    Process {
        terminal: size.is_some(),
        console_size: size,
        args: strings(&SHELL),
        env: strings(&ENVIRONMENT),
        cwd: "/".to_owned(),
        capabilities,
        ..Default::default()
    }
}
