//! The runtime that containerd knows as `io.containerd.ampoule.v2`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ampoule_shim::bootstrap::main()
}
