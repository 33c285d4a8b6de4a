//! The `ampoule` program, which is also `containerd-shim-ampoule-v2` when it is called by that name.

use std::{env, ffi::OsString, process::ExitCode};

use ampoule_shim::{
    bootstrap, cli::Cli, commands::dispatch, error::usage, oci, text::speak_json, timings::Timings,
};
use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let timings = Timings::begin();
    let words: Vec<OsString> = env::args_os().collect();
    if bootstrap::is_meant(&words) {
        return bootstrap::main();
    }
    if oci::is_meant(&words) {
        return oci::main(&words).into();
    }
    // What the verifier of certificates logs, our own errors say.
    let default = "error,rustls_platform_verifier=off";
    let filter = EnvFilter::try_from_env("AMPOULE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // What cannot be written is lost: to say so on the same full disk would be a panic.
    log.log_internal_errors(false).init();
    match Cli::try_parse() {
        Ok(cli) => {
            if cli.global.json {
                speak_json();
            }
            dispatch(cli, timings).into()
        }
        Err(error) => usage::answer(&error).into(),
    }
}
