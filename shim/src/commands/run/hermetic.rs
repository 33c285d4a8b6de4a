//! `ampoule run --hermetic`: what goes into a run is its command line and its image. The sandbox gives most of that to
//! every run: it has no network, no file of the host, and what it writes is thrown away. This refuses the rest.

use crate::{
    cli::{NetworkChoice, RunArgs},
    commands::env,
};

use super::RunError;

/// Host name where none is given: a sandbox's name is another one each time.
pub const HOSTNAME: &str = "ampoule";

/// An option that takes something from outside.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotHermetic {
    #[error("--hermetic: --privileged opens devices that tell the host's time and random numbers")]
    Privileged,
    #[error("--hermetic: --volume {0} would bring files of this host")]
    Volume(String),
    #[error("--hermetic: --device {0} would bring a disk of this host")]
    Device(String),
    #[error("--hermetic: --network {0} would bring what is not of this run")]
    Network(NetworkChoice),
    #[error("--hermetic: variable {0} would come from the environment here: write {0}=VALUE")]
    Variable(String),
}

/// Refuses what contradicts `--hermetic`, if that is given.
pub fn check(args: &RunArgs) -> Result<(), RunError> {
    if !args.hermetic {
        return Ok(());
    }
    if args.container.privileged {
        return Err(NotHermetic::Privileged.into());
    }
    if let Some(source) = args.container.volume.iter().find_map(|volume| volume.source.as_ref()) {
        return Err(NotHermetic::Volume(source.display().to_string()).into());
    }
    if let Some(device) = args.container.device.first() {
        return Err(NotHermetic::Device(device.source.display().to_string()).into());
    }
    // Nor is the configuration's looked at.
    let network = args.network.choice();
    if network != NetworkChoice::None {
        return Err(NotHermetic::Network(network).into());
    }
    let inherited = env::inherited(&args.env, &args.container.env_file)?;
    match inherited.into_iter().next() {
        Some(name) => Err(NotHermetic::Variable(name).into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn checked(options: &[&str]) -> Result<(), String> {
        let words = [&["ampoule", "run"], options, &["alpine"]].concat();
        let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        check(&args).map_err(|error| error.to_string())
    }

    #[test]
    fn what_takes_from_outside_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("env");
        fs::write(&file, "A=1\n# no\nFROM_HERE\n").unwrap();
        let file = file.to_str().unwrap();
        for (options, word) in [
            (&["--privileged"][..], "--privileged"),
            (&["-e", "A=1", "-e", "HOME"], "HOME=VALUE"),
            (&["--env-file", file], "FROM_HERE=VALUE"),
            (&["-v", "/srv:/srv:ro"], "--volume /srv"),
            (&["--device", "/dev/sdb:r"], "--device /dev/sdb"),
            (&["--network", "user"], "--network user"),
        ] {
            assert_eq!(checked(options), Ok(()));
            let error = checked(&[&["--hermetic"], options].concat()).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let harmless = ["--hermetic", "-i", "-e", "A=", "--cap-add", "ALL", "--read-only"];
        assert_eq!(checked(&harmless), Ok(()));
    }
}
