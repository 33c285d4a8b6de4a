//! The runtimes that tests compare.

use std::path::PathBuf;

use crate::stage;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    Runc,
    Ampoule,
}

impl Runtime {
    /// As runtime handlers and shims are called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Ampoule => "ampoule",
        }
    }

    /// With runc's command line.
    pub fn program(self) -> PathBuf {
        match self {
            Self::Runc => "/usr/sbin/runc".into(),
            Self::Ampoule => stage().join("bin/ampoule"),
        }
    }
}
