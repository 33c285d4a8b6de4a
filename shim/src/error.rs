//! Errors as a user meets them. All have one shape: the command, the phase it was in, what failed and on which
//! object, why, what a dead guest said last, and the way out where one is known.
//!
//! ```text
//! ampoule: run: boot: guest kernel /x/vmlinux: No such file or directory (os error 2)
//!   guest console | ...
//!   hint: --kernel, or sandbox.kernel in config.toml, names another; `make kernel` builds it
//! ```
//!
//! With `--json` the same is one line, `{"error":{...}}`, with the fields of [`Report`].
//!
//! - [`facts`]: what an error is about, beyond its words
//! - [`failure`]: one that happened in another process of ours
//! - [`usage`]: command lines that are no command

mod facts;
mod failure;
pub mod usage;

use std::{error::Error, fmt, iter, sync::Arc};

use serde::Serialize;

use crate::{
    commands::FAILURE,
    control::ControlError,
    sandbox::StartFailure,
    text::{complain, is_json},
    vm::Death,
};
use facts::Facts;
pub use facts::{Phase, refusal};
pub use failure::Failure;

/// An error in parts. The names of the fields are those of the JSON, and stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// As on the command line: "run", "image pull".
    pub command: String,
    pub phase: Phase,
    /// The path, the name, the digest, the option that it is about.
    pub object: Option<String>,
    /// The causes, joined by colons.
    pub message: String,
    /// The outermost first.
    pub causes: Vec<String>,
    /// What to do.
    pub hint: Option<String>,
    /// The last lines of a dead guest's console.
    pub console: Vec<String>,
    /// Of the program.
    pub exit_code: u8,
}

/// Prints an error to stderr, in the shape the command line asks for.
pub fn tell(command: &str, error: &(dyn Error + 'static), exit_code: u8) {
    Report::new(command, error, exit_code).print();
}

impl Report {
    pub fn new(command: &str, error: &(dyn Error + 'static), exit_code: u8) -> Self {
        let Facts { phase, object, hint } = facts::of(error);
        Self {
            command: command.into(),
            phase,
            object,
            message: chain_text(error),
            causes: causes(error),
            hint,
            console: find::<Death>(error).map(|death| death.console.clone()).unwrap_or_default(),
            exit_code,
        }
    }

    pub fn print(&self) {
        complain(&if is_json() { self.json() } else { self.to_string() });
    }

    fn json(&self) -> String {
        format!("{}\n", serde_json::json!({ "error": self }))
    }

    /// What goes before the message: a phase that the command or the message names by itself is not said twice.
    fn place(&self) -> String {
        let phase = self.phase.word();
        let named = |command: &str| command.split(' ').any(|word| word.starts_with(phase));
        match &*self.command {
            "" => phase.into(),
            command if named(command) || self.message.starts_with(phase) => command.into(),
            command => format!("{command}: {phase}"),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ampoule: {}: {}", self.place(), self.message)?;
        self.console.iter().try_for_each(|line| writeln!(f, "  guest console | {line}"))?;
        self.hint.iter().try_for_each(|hint| writeln!(f, "  hint: {hint}"))
    }
}

/// The chain's texts, joined by colons.
pub fn chain_text(error: &(dyn Error + 'static)) -> String {
    causes(error).join(": ")
}

/// The chain's texts.
fn causes(error: &(dyn Error + 'static)) -> Vec<String> {
    let links = chain(error).flat_map(|link| match link.downcast_ref::<ControlError>() {
        Some(ControlError::Failed(failure)) => failure.causes.clone(),
        _ => vec![link.to_string()],
    });
    let mut texts: Vec<String> = links.collect();
    // A link that is transparent, or repeats its cause, says nothing new.
    texts.dedup_by(|cause, link| link.ends_with(&**cause));
    texts.retain(|text| !text.is_empty());
    texts
}

/// The exit code for a failure of ours, as docker's: a command that does not exist is 127, one that cannot be
/// executed 126, all else 125.
pub fn exit_code(error: &(dyn Error + 'static)) -> u8 {
    match find::<StartFailure>(error) {
        Some(StartFailure::NotFound(_)) => 127,
        Some(StartFailure::NotExecutable(_)) => 126,
        None => FAILURE,
    }
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |&e| e.source())
}

fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    chain(error).find_map(|link| {
        link.downcast_ref::<T>().or_else(|| link.downcast_ref::<Arc<T>>().map(Arc::as_ref))
    })
}

#[cfg(test)]
mod tests;
