//! What is known of a sandbox on disk: `state.json`, written whole by whoever runs it, read by everybody.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::{error::chain_text, sandbox::Exit, signal_name::Signal, timestamp::Timestamp};

const FILE: &str = "state.json";
/// Longest record that is read, in bytes: its command line and labels come from a command line.
const MAX_LEN: u64 = 4 << 20;

/// A sandbox as `ampoule inspect` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub image: String,
    /// `sha256:…` of the image.
    pub digest: String,
    /// The arguments of the container's first process.
    pub command: Vec<String>,
    pub created: Timestamp,
    /// When the workload was let run.
    pub started: Option<Timestamp>,
    /// How it ended.
    pub ended: Option<Ended>,
    /// The process that runs the sandbox: its `ampoule run`, which with `-d` has gone to the background.
    pub pid: u32,
    pub detached: bool,
    /// Whether the sandbox is forgotten when it ends.
    pub remove: bool,
    pub terminal: bool,
    pub interactive: bool,
    /// Limit of the container in bytes.
    pub memory: u64,
    pub vcpus: u8,
    #[serde(default)]
    pub boot_timeout: u16,
    /// As `--network` has it, and `--publish`.
    #[serde(default)]
    pub network: String,
    #[serde(default)]
    pub ports: Vec<String>,
    /// As `--egress` has it, if it was given.
    #[serde(default)]
    pub egress: Option<String>,
    pub stop_signal: Signal,
    /// Seconds `ampoule stop` leaves the workload.
    pub stop_timeout: u32,
    pub labels: BTreeMap<String, String>,
}

/// The end of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Exit code, or 128 + signal.
    pub code: u8,
    pub at: Timestamp,
    /// The kernel killed something of the container for its memory limit.
    pub oom: bool,
    /// Why, if its VM ended it.
    pub reason: Option<String>,
    /// The last lines of the guest's console then.
    #[serde(default)]
    pub console: Vec<String>,
}

impl Record {
    /// Reads the record of a sandbox's folder.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let path = folder.join(FILE);
        if fs::metadata(&path)?.len() > MAX_LEN {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Replaces it: a reader meets the one before or this one.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let new = folder.join("state.json.new");
        fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        fs::rename(new, folder.join(FILE))
    }
}

impl From<Exit> for Ended {
    fn from(exit: Exit) -> Self {
        let death = exit.death.as_deref().filter(|death| !death.is_orderly());
        Self {
            code: exit.status,
            at: Timestamp(exit.at),
            oom: exit.oom_kills > 0,
            reason: death.map(|death| chain_text(death)),
            console: death.map(|death| death.console.clone()).unwrap_or_default(),
        }
    }
}
