//! `containerd-shim-ampoule-v2` as containerd calls it.

use std::process::ExitCode;

/// The program.
pub fn main() -> ExitCode {
    ExitCode::FAILURE
}
