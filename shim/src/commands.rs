//! The verbs of the command line: each a small file that calls the library.

pub mod check;
pub mod completion;
pub mod config;
pub mod cp;
pub mod end;
mod env;
pub mod exec;
pub mod features;
pub mod image;
pub mod inspect;
pub mod install;
pub mod logs;
pub mod ps;
pub mod run;
pub mod stats;
mod verb;
pub mod version;

pub use run::RunError;
pub use verb::VerbError;

use crate::{
    cli::{Cli, Command, ImageCommand},
    error::tell,
    paths::{Environment, Paths},
    timings::Timings,
};

/// Exit code of our own failures, as docker's.
pub const FAILURE: u8 = 125;

/// Does what the command line says; returns the exit code. Errors have been printed.
pub fn dispatch(cli: Cli, timings: Timings) -> u8 {
    let paths = cli.global.over(Paths::new(&Environment::current()));
    match cli.command {
        Command::Run(mut args) => run::run(&mut args, &paths, timings),
        Command::Ps(args) => ps::ps(&args, &paths),
        Command::Exec(args) => exec::exec(&args, &paths),
        Command::Console(args) => exec::console(&args, &paths),
        Command::Logs(args) => logs::logs(&args, &paths),
        Command::Attach(args) => exec::attach_to(&args, &paths),
        Command::Cp(args) => cp::cp(&args, &paths),
        Command::Stop(args) => end::stop(&args, &paths),
        Command::Kill(args) => end::kill(&args, &paths),
        Command::Wait(args) => end::wait(&args, &paths),
        Command::Rm(args) => end::rm(&args, &paths),
        Command::Inspect(args) => inspect::inspect(&args, &paths),
        Command::Stats(args) => stats::stats(&args, &paths),
        Command::Image(args) => match args.command {
            ImageCommand::Pull(args) => done("image pull", image::pull(&args, &paths)),
            ImageCommand::Import(args) => done("image import", image::import(&args, &paths)),
            ImageCommand::Inspect(args) => done("image inspect", image::inspect(&args, &paths)),
            ImageCommand::Rm(args) => done("image rm", image::remove(&args, &paths)),
            ImageCommand::Prune(args) => done("image prune", image::prune(&args, &paths)),
        },
        Command::Images(args) => done("images", image::list(&args, &paths)),
        Command::Config(args) => done("config", config::config(&args, &paths)),
        Command::Install(args) => done("install", install::install(&args)),
        Command::Check(args) => check::check(&args, &paths),
        Command::Completion(args) => completion::completion(&args),
        Command::Features(args) => features::features(&args),
        Command::Version => version::version(&paths),
    }
}

fn done(command: &str, result: Result<(), impl std::error::Error + 'static>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            tell(command, &error, FAILURE);
            FAILURE
        }
    }
}
