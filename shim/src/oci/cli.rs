//! runc's command line, as its callers write it.
//!
//! The verbs `run`, `exec`, `kill` and `ps` are those of local sandboxes too. What is meant is told by what only one
//! of the two has ([`is_meant`]): a global flag before the verb, `run --bundle`, `exec --process`, `kill ID SIGNAL`,
//! `ps ID`; or by a name that only a container of ours has.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{cli::FeaturesArgs, signal_name::Signal};

const ABOUT: &str = "ampoule as an OCI runtime: every container in a virtual machine of its own";

const NOTES: &str = "\
The verbs are those of runc, for Podman, Docker and others that drive an OCI runtime. `run`, `exec`, `kill` and `ps` are
understood so after a global flag, and as `run --bundle DIR ID`, `exec --process FILE ID`, `kill ID SIGNAL` and `ps ID`;
else they are those for local sandboxes, which `ampoule --help` lists.";

#[derive(Debug, Parser)]
#[command(name = "ampoule", version, about = ABOUT, after_help = NOTES, max_term_width = 100, args_override_self = true)]
pub struct OciCli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Folder of the containers' state [default: /run/ampoule/oci, or below $XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// File that errors are appended to, besides standard error
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// The path of a cgroup is SLICE:PREFIX:NAME, for systemd to make a scope of
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Accepted; AMPOULE_LOG chooses what is logged
    #[arg(long)]
    pub debug: bool,
    /// Accepted
    #[arg(long, value_name = "WHETHER", hide = true)]
    pub rootless: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a container from a bundle, up to just before its command
    Create(CreateArgs),
    /// Let the command of a created container run
    Start(IdArgs),
    /// Create a container and let its command run
    Run(RunArgs),
    /// Print a container's state
    State(IdArgs),
    /// Send a signal to a container
    Kill(KillArgs),
    /// Forget a container that has ended
    Delete(DeleteArgs),
    /// Run a further process in a container
    Exec(Box<ExecArgs>),
    /// List the processes of a container as its guest numbers them; as JSON, the one on the host that stands for it
    Ps(PsArgs),
    /// List containers
    List(ListArgs),
    /// Freeze a container's processes
    Pause(IdArgs),
    /// Let them go on
    Resume(IdArgs),
    /// Change a container's limits
    Update(UpdateArgs),
    /// Print what a container uses
    Events(EventsArgs),
    /// Write a config.json to begin with
    Spec(SpecArgs),
    /// Print what of the OCI's specification is enforced
    Features(FeaturesArgs),
}

impl Command {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Start(_) => "start",
            Self::Run(_) => "run",
            Self::State(_) => "state",
            Self::Kill(_) => "kill",
            Self::Delete(_) => "delete",
            Self::Exec(_) => "exec",
            Self::Ps(_) => "ps",
            Self::List(_) => "list",
            Self::Pause(_) => "pause",
            Self::Resume(_) => "resume",
            Self::Update(_) => "update",
            Self::Events(_) => "events",
            Self::Spec(_) => "spec",
            Self::Features(_) => "features",
        }
    }

    /// Exit code of a failure of ours.
    pub fn failure(&self) -> u8 {
        if matches!(self, Self::Exec(_)) { super::EXEC_FAILURE } else { super::FAILURE }
    }
}

#[derive(Debug, Args)]
pub struct IdArgs {
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    /// Folder with config.json and the root file system
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Socket that is sent the controlling end of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File for the id of the process that stands for the container
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Refused if not 0: descriptors of the host cannot be passed into a VM
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Accepted: the guest has its own root
    #[arg(long)]
    pub no_pivot: bool,
    /// Accepted: the guest has its own keyrings
    #[arg(long)]
    pub no_new_keyring: bool,
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub create: CreateArgs,
    /// Do not wait for the container's end
    #[arg(short, long)]
    pub detach: bool,
    /// Leave the container's state when it has ended
    #[arg(long)]
    pub keep: bool,
}

#[derive(Debug, Args)]
pub struct KillArgs {
    /// Every process of the container
    #[arg(short, long)]
    pub all: bool,
    #[arg(value_name = "ID")]
    pub id: String,
    #[arg(value_name = "SIGNAL", default_value_t = Signal::TERM)]
    pub signal: Signal,
}

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Kill it if it runs; one that is not there is no error
    #[arg(short, long)]
    pub force: bool,
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// File with the process, as config.json has it
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File for the id of the process that stands for it
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Do not wait for its end
    #[arg(short, long)]
    pub detach: bool,
    #[arg(short, long)]
    pub tty: bool,
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    #[arg(short, long, value_name = "UID[:GID]")]
    pub user: Option<String>,
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    #[arg(value_name = "ID")]
    pub id: String,
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum TableFormat {
    #[default]
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct PsArgs {
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub format: TableFormat,
    #[arg(value_name = "ID")]
    pub id: String,
    /// Accepted, for callers that give options of ps(1)
    #[arg(value_name = "OPTION", trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub options: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub format: TableFormat,
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// File with the resources as linux.resources of config.json has them; `-` is standard input
    #[arg(short, long, value_name = "FILE")]
    pub resources: PathBuf,
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Print once and end
    #[arg(long)]
    pub stats: bool,
    /// Between two lines, as 5s
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub interval: String,
    #[arg(value_name = "ID")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct SpecArgs {
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
}

/// Verbs of an OCI runtime alone.
const OWN: [&str; 10] =
    ["create", "start", "state", "delete", "list", "pause", "resume", "update", "events", "spec"];
const GLOBAL: [&str; 6] =
    ["--root", "--log", "--log-format", "--systemd-cgroup", "--debug", "--rootless"];
/// Flags by which `run` and `exec` are those of an OCI runtime.
const RUN: [&str; 8] = [
    "--bundle",
    "-b",
    "--pid-file",
    "--console-socket",
    "--preserve-fds",
    "--no-pivot",
    "--no-new-keyring",
    "--keep",
];
const EXEC: [&str; 6] =
    ["--process", "-p", "--pid-file", "--console-socket", "--preserve-fds", "--cwd"];
/// Flags that both kinds of `run` and `exec` have; some with a value.
const SHARED: [&str; 4] = ["--detach", "-d", "--tty", "-t"];
const SHARED_WITH_VALUE: [&str; 4] = ["--env", "-e", "--user", "-u"];
/// Global options of the other command line that have a value.
const LOCAL_WITH_VALUE: [&str; 2] = ["--kernel", "--guest-image"];

/// Whose a name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A local sandbox has it.
    Local,
    /// Only a container of the OCI runtime has it.
    Oci,
    Nobody,
}

/// Whether a command line, without the program's name, is one for an OCI runtime; `owner` knows whose a name is.
pub fn is_meant(words: &[&str], owner: impl Fn(&str) -> Owner) -> bool {
    let mut words = words.iter().copied();
    let verb = loop {
        match words.next() {
            None => return false,
            Some(word) if GLOBAL.contains(&flag(word)) => return true,
            Some(word) if LOCAL_WITH_VALUE.contains(&word) => drop(words.next()),
            Some(word) if word.starts_with('-') => {}
            Some(verb) => break verb,
        }
    };
    let rest: Vec<&str> = words.collect();
    match verb {
        "run" => has_own_flag(&rest, &RUN),
        "exec" => {
            let is_ours = |name| owner(name) == Owner::Oci;
            has_own_flag(&rest, &EXEC) || first_word(&rest).is_some_and(is_ours)
        }
        "kill" => match rest[..] {
            ["-a" | "--all", ..] => true,
            [_, "-a" | "--all", ..] => true,
            [id] => owner(id) == Owner::Oci,
            [id, signal] => {
                let is_signal = !id.starts_with('-') && signal.parse::<Signal>().is_ok();
                is_signal && owner(id) != Owner::Local
            }
            _ => false,
        },
        "ps" => match rest[..] {
            ["-f" | "--format", ..] => true,
            [word, ..] => word.starts_with("--format=") || !word.starts_with('-'),
            [] => false,
        },
        verb => OWN.contains(&verb),
    }
}

/// The flag of `--flag=value`.
fn flag(word: &str) -> &str {
    word.split_once('=').map_or(word, |(flag, _)| flag)
}

/// The first word that is no flag, nor the value of one.
fn first_word<'a>(words: &[&'a str]) -> Option<&'a str> {
    let mut words = words.iter().copied();
    while let Some(word) = words.next() {
        match word {
            word if SHARED_WITH_VALUE.contains(&word) => drop(words.next()),
            word if word.starts_with('-') => {}
            word => return Some(word),
        }
    }
    None
}

/// Looks at the flags up to the first other word.
fn has_own_flag(words: &[&str], own: &[&str]) -> bool {
    let mut words = words.iter().copied();
    while let Some(word) = words.next() {
        match flag(word) {
            found if own.contains(&found) => return true,
            found if SHARED.contains(&found) => {}
            found if SHARED_WITH_VALUE.contains(&found) => {
                if found == word {
                    words.next();
                }
            }
            _ => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meant(line: &str) -> bool {
        is_meant(&line.split(' ').collect::<Vec<_>>(), |name| match name {
            "web" => Owner::Local,
            "ours" => Owner::Oci,
            _ => Owner::Nobody,
        })
    }

    #[test]
    fn what_only_an_oci_runtime_is_told_is_told_from_local_commands() {
        for line in [
            "create --bundle /b --pid-file /p c1",
            "--root /r --log /l --log-format json create --bundle /b c1",
            "--systemd-cgroup state c1",
            "--log-format=json run c1",
            "start c1",
            "run --bundle /b c1",
            "run -d --pid-file /p c1",
            "exec --pid-file /p --process /f --detach c1",
            "exec -d -e A=b --tty --console-socket /s c1",
            "exec ours sh",
            "exec -t -e A=b ours sh",
            "kill ours",
            "kill ours 9",
            "kill c1 15",
            "kill c1 SIGTERM",
            "kill --all c1 9",
            "ps c1",
            "ps --format json c1",
        ] {
            assert!(meant(line), "{line}");
        }
    }

    #[test]
    fn local_commands_stay_local() {
        for line in [
            "run alpine",
            "run -d --name x alpine",
            "run alpine ls --bundle",
            "exec -it web sh",
            "exec web cmd --process x",
            "exec -e --process web sh",
            "exec -it none sh",
            "exec web ours",
            "kill web",
            "kill c1",
            "kill ours web",
            "kill web 15",
            "kill web db",
            "kill -s TERM web",
            "ps",
            "ps -a",
            "ps --json",
            "--json ps",
            "--kernel /k run alpine",
            "logs create",
            "",
        ] {
            assert!(!meant(line), "{line}");
        }
    }

    #[test]
    fn the_lines_that_conmon_and_podman_write_are_understood() {
        for line in [
            "ampoule --log-format=json --log /l create --bundle /b --pid-file /p --console-socket /s c1",
            "ampoule exec --pid-file /p --process /f --detach --tty --console-socket /s c1",
            "ampoule kill --all c1 9",
            "ampoule delete --force c1",
            "ampoule update --resources=/f c1",
            "ampoule --root /r features",
            "ampoule --root /r --log /l --log-format json --systemd-cgroup create --bundle /b --no-pivot c1",
        ] {
            if let Err(error) = OciCli::try_parse_from(line.split(' ')) {
                panic!("{line}: {error}");
            }
        }
    }
}
