//! The options of the verbs for sandboxes that are there already.

use clap::Args;
use clap_complete::Shell;

use crate::signal_name::Signal;

pub(super) const PS_HELP: &str = "\
STATUS is one of
  booting   its VM is being started
  up        its command runs
  exited    it ended, in the background: its record and log stay until `ampoule rm`
  dead      the process that ran it was killed; `ampoule rm`, or the next `run` of the name, clears it away";

/// `ampoule ps`
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Ended ones too
    #[arg(short, long)]
    pub all: bool,
    /// Print names only
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print again whenever a second has passed
    #[arg(long)]
    pub watch: bool,
    /// Only those with this label
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
}

pub(super) const EXEC_HELP: &str = "\
Environment, user and working directory are the container's, but for what is given here.

The exit code is the command's, 128 + N if signal N killed it, and 125, 126 and 127 as with `ampoule run`.";

/// `ampoule exec`
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Connect stdin to the command [default: it reads an empty file]
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal; stdin must be one if -i is given
    #[arg(short, long)]
    pub tty: bool,
    /// Do not wait for the command; what it writes is thrown away
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub detach: bool,
    /// Set a variable; NAME alone takes its value from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Folder the command starts in
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User to run as, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Sandbox, by its name or the beginning of it
    pub name: String,
    /// Command and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    pub command: Vec<String>,
}

pub(super) const CONSOLE_HELP: &str = "\
The shell is the guest's BusyBox, as root beside the agent: it sees the container from outside, below /run/ampoule and in
/proc, and can do anything to it and to the guest. The guest's own files are read-only. The console ends with the
container. It has a terminal if standard input is one.

Consoles are off. In /etc/ampoule/config.toml or ~/.config/ampoule/config.toml this turns them on, also for sandboxes
that run already:
  console = true

Examples:
  ampoule console web
  echo 'dmesg | tail; ps' | ampoule console web";

/// `ampoule console`
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Sandbox, by its name or the beginning of it
    pub name: String,
}

/// `ampoule logs`
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the container has ended
    #[arg(short, long)]
    pub follow: bool,
    /// Print the time before each line
    #[arg(short, long)]
    pub timestamps: bool,
    /// Print the last N lines only of what is there
    #[arg(short = 'n', long, value_name = "N")]
    pub tail: Option<usize>,
    /// Sandbox, by its name or the beginning of it
    pub name: String,
}

pub(super) const ATTACH_HELP: &str = "\
What the container wrote before is in `ampoule logs`. Its exit code is that of this command. Signals are passed on to
the container. Ctrl-P Ctrl-Q leaves a container with a terminal running.";

/// `ampoule attach`
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Leave stdin alone
    #[arg(long)]
    pub no_stdin: bool,
    /// Sandbox, by its name or the beginning of it
    pub name: String,
}

pub(super) const CP_HELP: &str = "\
One of the two is NAME:PATH, in a sandbox, the other a path here. As with cp(1), what is copied goes into a folder that is
there, and else gets the target's name. A folder is not merged into one of the same name here. The image needs a `tar`.

Examples:
  ampoule cp ./config.json web:/etc/app/
  ampoule cp web:/var/log ./web-log";

/// `ampoule cp`
#[derive(Debug, Args)]
pub struct CpArgs {
    #[arg(value_name = "SOURCE")]
    pub source: String,
    #[arg(value_name = "TARGET")]
    pub target: String,
}

/// `ampoule stop`
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds a container gets before it is killed [default: what its `run` said, else 10]
    #[arg(short, long, value_name = "SECONDS")]
    pub timeout: Option<u32>,
    /// Sandboxes, by their names or the beginnings of them
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// `ampoule kill`
#[derive(Debug, Args)]
pub struct KillArgs {
    /// Signal, by name or number
    #[arg(short, long, default_value_t = Signal::KILL)]
    pub signal: Signal,
    /// Sandboxes, by their names or the beginnings of them
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// `ampoule rm`
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Kill those that run
    #[arg(short, long)]
    pub force: bool,
    /// Sandboxes, by their names or the beginnings of them
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// `ampoule wait`, `ampoule inspect`
#[derive(Debug, Args)]
pub struct NamesArgs {
    /// Sandboxes, by their names or the beginnings of them
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

pub(super) const STATS_HELP: &str = "\
CPU is a percentage of one CPU over the last second. GUEST is what the container's cgroup in the guest counts, HOST what
the VM's process on this host has used: memory that belongs to it alone.";

/// `ampoule stats`
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Print again and again
    #[arg(long)]
    pub watch: bool,
    /// Sandboxes, by their names or the beginnings of them [default: all that run]
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
}

pub(super) const COMPLETION_HELP: &str = "\
Examples:
  source <(ampoule completion bash)
  ampoule completion zsh > ~/.zfunc/_ampoule
  ampoule completion fish > ~/.config/fish/completions/ampoule.fish";

/// `ampoule completion`
#[derive(Debug, Args)]
pub struct CompletionArgs {
    pub shell: Shell,
}
