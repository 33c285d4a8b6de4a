//! An error of the process that runs a sandbox, told to a command that asked it for something.

use std::{error::Error, fmt};

use serde::{Deserialize, Serialize};

use super::{
    causes, exit_code,
    facts::{self, Facts, Phase},
};
use crate::{commands::FAILURE, text::one_line};

/// A message holds these at their longest.
const MAX_CAUSES: usize = 8;
const MAX_TEXT: usize = 400;

/// What the command needs for its [`super::Report`]; but for the guest's console, for which a message has no room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub phase: Phase,
    pub object: Option<String>,
    /// The outermost first.
    pub causes: Vec<String>,
    pub hint: Option<String>,
    /// The exit code for it.
    pub code: u8,
}

impl Failure {
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        let Facts { phase, object, hint } = facts::of(error);
        let short = |text: String| one_line(&text, MAX_TEXT);
        Self {
            phase,
            object: object.map(short),
            causes: causes(error).into_iter().take(MAX_CAUSES).map(short).collect(),
            hint,
            code: exit_code(error),
        }
    }

    /// Something that the sandbox as it is cannot do.
    pub fn refused(why: &str) -> Self {
        let causes = vec![why.into()];
        Self { phase: Phase::Sandbox, object: None, causes, hint: None, code: FAILURE }
    }

    pub(super) fn facts(&self) -> Facts {
        Facts { phase: self.phase, object: self.object.clone(), hint: self.hint.clone() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.causes.join(": "))
    }
}
