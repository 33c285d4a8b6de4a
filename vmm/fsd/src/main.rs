//! `ampoule-fsd`: serves the shares of one sandbox, told by the control socket that is its standard input.

use std::{
    os::fd::{FromRawFd, OwnedFd},
    process::ExitCode,
};

use ampoule_vmm_api::Channel;

fn main() -> ExitCode {
    // SAFETY: whoever starts this program gives it the control socket as descriptor 0, and nothing else in it
    // uses that.
    let control = unsafe { OwnedFd::from_raw_fd(0) };
    match ampoule_fsd::run::run(&Channel::from_fd(control)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = format!("ampoule-fsd: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                text.push_str(&format!(": {error}"));
                cause = error.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}
