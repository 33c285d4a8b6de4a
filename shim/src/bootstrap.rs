//! `containerd-shim-ampoule-v2` as containerd calls it: a short-lived program that answers and ends.
//!
//! - [`args`]: the command line
//! - [`request`]: what `start` reads, and how it answers each containerd
//! - [`group`], [`socket`]: whose sandbox a container belongs to, and where its daemon listens
//! - [`start`], [`delete`], [`info`]: what is done
//!
//! Without an action it is the [`crate::daemon`], as which `start` executes it. It prints what containerd asked
//! for on standard output and nothing else; an error is one line on standard error, which containerd shows.

pub mod args;
pub mod delete;
pub mod group;
pub mod info;
pub mod request;
pub mod socket;
pub mod start;

use std::{
    env,
    error::Error,
    ffi::OsString,
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt,
    path::Path,
    process::ExitCode,
};

use crate::{daemon, error::chain_text, id::Id, text::complain};
use args::{Action, Args, HELP};

const NAME: &str = "containerd-shim-ampoule-v2";
/// How the name of every runtime of containerd begins.
const RUNTIME: &[u8] = b"containerd-shim-";
/// containerd sends less.
const MAX_INPUT: u64 = 10 << 20;

/// Whether a command line, the program's name first, is containerd's.
pub fn is_meant(words: &[OsString]) -> bool {
    let name = words.first().and_then(|word| Path::new(word).file_name());
    name.is_some_and(|name| name.as_bytes().starts_with(RUNTIME))
}

/// The program.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{NAME}: {}\n", chain_text(&*error)));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    // Whatever is no UTF-8 is no name or path of containerd's.
    let args = Args::parse(env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()))?;
    let output = match args.action {
        Action::Help => HELP.into(),
        Action::Version => info::version().into(),
        Action::Info => info::info()?,
        Action::Start => {
            check(&args)?;
            start::start(&args, &input()?)?
        }
        Action::Delete => {
            check(&args)?;
            delete::delete(&args)?
        }
        Action::Serve => {
            let id = check(&args)?;
            return Ok(daemon::run(&args, id)?);
        }
    };
    io::stdout().write_all(&output)?;
    Ok(())
}

fn check(args: &Args) -> Result<Id, Box<dyn Error>> {
    if args.namespace.is_empty() {
        return Err("flag -namespace: must not be empty; see -help".into());
    }
    Ok(args.id.parse().map_err(|e| format!("flag -id: {e}"))?)
}

fn input() -> io::Result<Vec<u8>> {
    let mut input = Vec::new();
    io::stdin().lock().take(MAX_INPUT).read_to_end(&mut input)?;
    Ok(input)
}
