//! The command line.

mod container;
mod device;
mod egress;
mod network;
mod values;
mod verbs;
mod volume;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{id::Id, pace::BOOT_TIMEOUT, paths::Paths, signal_name::Signal, timings::Format};
pub use container::{CapabilityName, ContainerArgs, SecurityOption, Sysctl, Tmpfs, Ulimit};
pub use device::DeviceOption;
pub use egress::{Destination, Egress, Host, MAX_DESTINATIONS, is_elsewhere};
pub use network::{NetworkArgs, NetworkChoice, Publish};
pub use values::{ClockStart, Cpus, Memory, Seed};
pub use verbs::*;
pub use volume::Volume;

const ABOUT: &str = "Runs every container in a virtual machine of its own";

const FILES: &str = "\
Errors are on stderr: `ampoule: COMMAND: PHASE: what failed, on which object: why`, the last lines of the guest's console if
its VM died, and a hint where a way out is known. With --json each is one line there:
  {\"error\": {\"command\", \"phase\", \"object\", \"message\", \"causes\", \"hint\", \"console\", \"exit_code\"}}

Files and environment:
  PREFIX/bin/ampoule-vmm                AMPOULE_VMM     the VM process
  PREFIX/share/ampoule/vmlinux          AMPOULE_KERNEL  the guest kernel (or --kernel)
  PREFIX/share/ampoule/guest.erofs      AMPOULE_GUEST   the guest image (or --guest-image)
  /var/lib/ampoule, or for ordinary users ~/.local/share/ampoule
                                        AMPOULE_ROOT    the image store
  /run/ampoule, or for ordinary users $XDG_RUNTIME_DIR/ampoule or /tmp/ampoule-UID
                                                        records, logs and sockets of sandboxes
  /etc/ampoule/config.toml, ~/.config/ampoule/config.toml
                                        configuration, with *.toml in config.d beside it (see `ampoule config`)
  ~/.docker/config.json                 REGISTRY_AUTH_FILE, or DOCKER_CONFIG for its folder: credentials
  AMPOULE_LOG                           what is logged to stderr: error, warn, info, debug [default: error]

PREFIX is the folder above the one `ampoule` lies in.";

/// Everything.
#[derive(Debug, Parser)]
#[command(name = "ampoule", version, about = ABOUT, after_help = FILES, max_term_width = 100, args_override_self = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Guest kernel, an ELF64 vmlinux [default: PREFIX/share/ampoule/vmlinux]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Guest")]
    pub kernel: Option<PathBuf>,
    /// Guest image with the agent [default: PREFIX/share/ampoule/guest.erofs]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Guest")]
    pub guest_image: Option<PathBuf>,
    /// For programs: errors are one line of JSON on stderr; so is, on stdout, what ps, stats, images and check find
    #[arg(long, global = true)]
    pub json: bool,
}

impl Global {
    /// What the flags say wins over the environment.
    pub fn over(&self, mut paths: Paths) -> Paths {
        if let Some(kernel) = &self.kernel {
            paths.kernel.clone_from(kernel);
        }
        if let Some(guest) = &self.guest_image {
            paths.guest.clone_from(guest);
        }
        paths
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new container in its own VM
    #[command(after_help = RUN_HELP)]
    Run(Box<RunArgs>),
    /// List sandboxes
    #[command(after_help = PS_HELP)]
    Ps(PsArgs),
    /// Run a further command in a running container
    #[command(after_help = EXEC_HELP)]
    Exec(ExecArgs),
    /// Run a shell in the guest of a sandbox, outside of its container, to look for what is wrong
    #[command(after_help = CONSOLE_HELP)]
    Console(ConsoleArgs),
    /// Print what a detached container has written
    Logs(LogsArgs),
    /// Connect to the streams of a detached container
    #[command(after_help = ATTACH_HELP)]
    Attach(AttachArgs),
    /// Copy a file or a folder into a running container, or out of it
    #[command(after_help = CP_HELP)]
    Cp(CpArgs),
    /// Ask containers to end by their stop signal, and kill those that do not in time
    Stop(StopArgs),
    /// Send a signal to containers
    Kill(KillArgs),
    /// Wait until sandboxes have ended and print their exit codes
    Wait(NamesArgs),
    /// Forget ended sandboxes
    Rm(RmArgs),
    /// Print all that is known of sandboxes, as JSON
    Inspect(NamesArgs),
    /// Print what sandboxes use, in the guest and on the host
    #[command(after_help = STATS_HELP)]
    Stats(StatsArgs),
    /// Pull, import, inspect and remove images
    Image(ImageArgs),
    /// List the images in the store
    Images(ImagesArgs),
    /// Print the configuration and where each setting comes from
    #[command(after_help = CONFIG_HELP)]
    Config(ConfigArgs),
    /// Make containerd know the runtime, and print the RuntimeClass for Kubernetes
    #[command(after_help = INSTALL_HELP)]
    Install(InstallArgs),
    /// Tell whether this host can run sandboxes, and why not
    #[command(after_help = CHECK_HELP)]
    Check(CheckArgs),
    /// Print what of the OCI runtime specification is enforced
    #[command(after_help = FEATURES_HELP)]
    Features(FeaturesArgs),
    /// Print the versions of ampoule and its parts
    Version,
    /// Print a script that completes ampoule's command line in a shell
    #[command(after_help = COMPLETION_HELP)]
    Completion(CompletionArgs),
}

const RUN_HELP: &str = "\
IMAGE is a name as docker has them, NAME[:TAG|@DIGEST]; what is not in the image store is pulled. Or it is
  oci:DIR[:TAG]        an OCI layout
  dir:PATH             a folder that holds a root file system
  tar:FILE             a tar of a root file system
  docker-archive:FILE  what `docker save` writes

Examples:
  ampoule run alpine -- uname -r
  ampoule run -it alpine
  echo hello | ampoule run -i alpine -- tr a-z A-Z
  ampoule run --memory 1g --cpus 2 -e LANG=C -w /tmp dir:/srv/rootfs -- make
  ampoule run -v ./project:/src -w /src gcc -- make
  ampoule run --network user -p 127.0.0.1:8080:80 nginx
  ampoule run --network user --egress pypi.org:443,files.pythonhosted.org:443 python -- pip download six
  ampoule run -d --name clock alpine -- sh -c 'while date; do sleep 1; done'

What --volume shares is this host's own: both see what the other writes, at once. SOURCE is a directory or a file that is
there; no link in it leads out of it. Users and groups are by number, those of this host if root runs ampoule; else all
files belong to who runs it, as root in the container. Devices, sockets, FIFOs, / and file systems as /proc are refused.

Without --network a sandbox has loopback only, unless sandbox.network in config.toml is `user`. With --network user it reaches
what this user reaches, and nobody reaches it but by -p: passt(1) speaks for it, of Debian's package passt. It is 10.0.2.15
and fd00:a00:200::f, as far as this host has default routes of IPv4 and IPv6; DNS is this host's, and this host's own loopback
is not reached. With --network netns:PATH it gets the interfaces, addresses and routes of a network namespace, which takes root.
/etc/resolv.conf is the container's then, unless a --volume is there.

With --egress nothing leaves but by TCP and UDP to the destinations of the list: names, IPv4 addresses, or IPv6 addresses in
brackets, each with a port or *, 64 at most; with `none` nothing leaves at all. Without it sandbox.egress in config.toml is the
list, if it is there. The host's kernel holds passt to it (BPF on a cgroup of its own), so that nothing a guest does changes
it; a ping does not leave either. A name stands for the addresses that this host finds for it, 64 at most, the latest: whoever
answers there is reached, under whatever name. Other names are answered NXDOMAIN. What a listed server passes on is for that
to say. Ports that -p publishes, TCP only, answer whoever connects. It takes root, cgroup v2 and BPF; where those are missing
the run is refused.

What a container writes to its files is thrown away when it ends. With -d its record, exit code and log stay until
`ampoule rm`, unless --rm is given; in the foreground nothing stays, since its output and its exit code have gone to
whoever ran it.

The exit code is the command's, 128 + N if signal N killed it, and
  125  ampoule itself failed: bad options, unknown image, no KVM, the guest did not boot
  126  the command cannot be executed
  127  the command was not found
  124, 152, 153  a cap was met: --timeout, --cpu-time, --output-limit
  137  also: the memory limit killed it, or the VM died; stderr says which

Repeatable runs:
  --hermetic  sets: no network; the image read-only, what is written goes to a layer that is thrown away; no file and
              no variable of this host; the host name `ampoule` unless --hostname is given. It refuses what would break
              that: --privileged, --volume of this host, --network, variables without a value (-e NAME, or such a line of
              --env-file), and, while it runs, `ampoule exec`, `cp` and `console`. Standard input is the container's if
              -i says so. Caps, --clock and --seed are not set by it: give those you want.
  --clock     is RFC 3339, as 2026-11-21T05:51:40Z, or seconds since 1970. It sets CLOCK_REALTIME. Clocks that count
              from boot and the processor's counter are as they are, and some time stamps in /proc and /sys are real.
  --seed      decides what getrandom(2), /dev/random and /dev/urandom give. Each thread has a sequence of its own, by
              its id in the container: runs are equal as long as they start processes and threads in the same order.
              Addresses are not randomized, and the processor's own random numbers (RDRAND) are hidden. Not decided by
              it, since the guest's kernel draws them: the 16 bytes a program gets at its start (AT_RANDOM, from which
              Go orders its maps), /proc/sys/kernel/random, port numbers, and everything that depends on time or on
              scheduling. The seed is no secret, and what was drawn from it is none either.

SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGALRM, SIGUSR1 and SIGUSR2 are passed on to the command. If it ignores three
SIGINT or SIGTERM, the third ends the sandbox.";

/// `ampoule run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Go to the background once the command runs, and print the sandbox's name
    #[arg(short, long, conflicts_with = "timings")]
    pub detach: bool,
    /// Forget the sandbox when it ends; without -d that is always so
    #[arg(long)]
    pub rm: bool,
    /// Label of the sandbox, for `ampoule ps --label` and `inspect`
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
    /// Signal by which `ampoule stop` asks the command to end [default: the image's, else TERM]
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<Signal>,
    /// Seconds `ampoule stop` then leaves it before it is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stop_timeout: u32,
    /// When to ask the registry for an image that is given by name
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pub pull: Pull,
    /// Connect stdin to the command [default: it reads an empty file]
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal; stdin must be one if -i is given
    #[arg(short, long)]
    pub tty: bool,
    /// Set a variable; NAME alone takes its value from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Folder the command starts in [default: the image's, else /]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User to run as, by name or number [default: the image's, else root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Name and host name of the sandbox; only one of a name runs at a time [default: random]
    #[arg(long)]
    pub name: Option<Id>,
    /// Memory the container may use, in bytes or with k, m, g; the VM has some more for its kernel
    #[arg(short, long, value_name = "SIZE", default_value = "512m", value_parser = values::container_memory)]
    pub memory: Memory,
    /// CPUs; the VM has this many, rounded up, and the container a quota if it is not whole
    #[arg(long, value_name = "N", default_value = "1")]
    pub cpus: Cpus,
    /// Most processes and threads at a time; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub pids_limit: u32,
    /// Make the root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Room for what the container writes to its root file system
    #[arg(long, value_name = "SIZE", default_value = "8g")]
    pub scratch_size: Memory,
    /// Longest time in seconds the VM may take to boot; all later limits of its guest grow with it
    #[arg(long, value_name = "SECONDS", default_value_t = BOOT_TIMEOUT, value_parser = clap::value_parser!(u16).range(1..))]
    pub boot_timeout: u16,
    /// End the run after this time; exit code 124
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: Option<u32>,
    /// End the run when its processes have used so much CPU time; exit code 152
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpu_time: Option<u32>,
    /// End the run when it has written so much to stdout and stderr together; exit code 153
    #[arg(long, value_name = "SIZE", conflicts_with = "detach")]
    pub output_limit: Option<Memory>,
    /// Take nothing from outside of the command line and the image, and leave nothing behind; see below
    #[arg(long)]
    pub hermetic: bool,
    /// What the guest's clock shows when the command starts; it then goes on as usual
    #[arg(long, value_name = "TIME")]
    pub clock: Option<ClockStart>,
    /// Make the container's random numbers the same for the same seed: a number, or hexadecimal after 0x; see below
    #[arg(long, value_name = "SEED", conflicts_with = "privileged")]
    pub seed: Option<Seed>,
    /// Write to a file, as JSON, what the run was: digests of all parts, devices, limits, how it ended
    #[arg(long, value_name = "FILE")]
    pub receipt: Option<PathBuf>,
    /// Print when what happened, from start to first output, to stderr at the end
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub timings: Option<Format>,
    /// Image, and the command to run instead of the image's own
    #[arg(value_names = ["IMAGE", "[--] COMMAND"], required = true, trailing_var_arg = true, allow_hyphen_values = false)]
    pub words: Vec<String>,
    #[command(flatten)]
    pub container: ContainerArgs,
    #[command(flatten)]
    pub network: NetworkArgs,
}

/// When a registry is asked for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// If the store does not have it
    Missing,
    /// Each time; layers that are here are not fetched again
    Always,
    Never,
}

impl RunArgs {
    pub fn image(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }

    /// The words after the image, without the `--` that may come first.
    pub fn command(&self) -> &[String] {
        match self.words.get(1..) {
            Some([first, rest @ ..]) if first == "--" => rest,
            Some(all) => all,
            None => &[],
        }
    }
}

/// `ampoule image`
#[derive(Debug, Args)]
pub struct ImageArgs {
    #[command(subcommand)]
    pub command: ImageCommand,
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Fetch an image from its registry
    #[command(after_help = PULL_HELP)]
    Pull(PullArgs),
    /// Put an image into the store from a file, under one or more names
    #[command(after_help = IMPORT_HELP)]
    Import(ImportArgs),
    /// Print all that is known of images, as JSON
    Inspect(ImageNamesArgs),
    /// Forget names; what no name needs goes a day later, or with `prune`
    Rm(ImageNamesArgs),
    /// Remove what no name needs: downloads, unnamed root file systems, those made of containerd's snapshots
    #[command(after_help = PRUNE_HELP)]
    Prune(PruneArgs),
}

const PULL_HELP: &str = "\
IMAGE is NAME[:TAG] or NAME@sha256:DIGEST, completed as docker does: `alpine` is docker.io/library/alpine:latest.
A pull that was cut or killed goes on where it was.

Credentials are docker's: `docker login` writes them, credential helpers are asked. Mirrors, and registries
without TLS, are named in config.toml:
  [registries.\"docker.io\"]
  mirrors = [\"cache.lan:5000\"]
  [registries.\"cache.lan:5000\"]
  http = true
Registries on localhost are spoken to in plain HTTP unless `http = false` says otherwise.

Examples:
  ampoule image pull alpine:3.23
  ampoule image pull ghcr.io/owner/image@sha256:0123...";

/// `ampoule image pull`
#[derive(Debug, Args)]
pub struct PullArgs {
    #[arg(value_name = "IMAGE")]
    pub name: String,
}

const IMPORT_HELP: &str = "\
SOURCE is an OCI layout (oci:DIR[:TAG] or a folder with one), a folder that holds a root file system (dir:PATH),
a tar file of one (tar:FILE), `-` for such a tar on standard input, or what `docker save` writes
(docker-archive:FILE). A name without a tag gets `latest`.

Examples:
  ampoule image import oci:./alpine:3.23 alpine:3.23 alpine:latest
  ampoule image import rootfs.tar.gz mine
  docker export container | ampoule image import - mine";

/// `ampoule image import`
#[derive(Debug, Args)]
pub struct ImportArgs {
    pub source: String,
    /// Names to give it
    pub names: Vec<String>,
}

/// Some names of images.
#[derive(Debug, Args)]
pub struct ImageNamesArgs {
    #[arg(value_name = "IMAGE", required = true)]
    pub names: Vec<String>,
}

const PRUNE_HELP: &str = "\
With --keep-size, named images go as well, those used the longest time ago first, until the store is no
larger than that. Running sandboxes are not disturbed.";

/// `ampoule image prune`
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Most the store may hold afterwards, in bytes or with k, m, g
    #[arg(long, value_name = "SIZE")]
    pub keep_size: Option<Memory>,
}

/// `ampoule images`
#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// Print names only
    #[arg(short, long)]
    pub quiet: bool,
}

const CONFIG_HELP: &str = "\
Each layer replaces single settings of those before it: what is built in, /etc/ampoule/config.toml,
/etc/ampoule/config.d/*.toml, the same two in ~/.config/ampoule; for sandboxes of containerd then the runtime
options ConfigPath and ConfigBody, and annotations `io.ampoule.SETTING` of the pod, as far as `annotations` lists
them. A key that is not known is an error. sandbox.network, none or user, and sandbox.egress, a list of
HOST:PORT of which an empty one lets nothing leave, are the defaults of `ampoule run`; --hermetic asks for neither.

Examples:
  ampoule config                        # which files are read, and what is not built in
  ampoule config --effective            # every setting and where its value comes from";

/// `ampoule config`
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Print the built-in settings too
    #[arg(long)]
    pub effective: bool,
}

const INSTALL_HELP: &str = "\
The handler `ampoule` is added to the configuration of containerd's CRI plugin, in format 2 (containerd 1.6, 1.7) or
3 (2.x); nothing else in the file changes. `ctr` and Docker need none: they take
`--runtime io.containerd.ampoule.v2` once containerd-shim-ampoule-v2 is in containerd's PATH.

Examples:
  ampoule install --containerd | kubectl apply -f -
  ampoule install --containerd --undo";

/// `ampoule install`
#[derive(Debug, Args)]
pub struct InstallArgs {
    /// Edit containerd's configuration
    #[arg(long, required = true)]
    pub containerd: bool,
    /// The file
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    pub config: PathBuf,
    /// Take the handler out again
    #[arg(long)]
    pub undo: bool,
}

const CHECK_HELP: &str = "\
Exit code 0 if everything is there, 1 if not. `ampoule check --kvm -q && ...` is for scripts.";

/// `ampoule check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Check /dev/kvm only: that it is there, may be used, and runs guest kernels at full speed
    #[arg(long)]
    pub kvm: bool,
}

const FEATURES_HELP: &str = "\
The JSON is that of the specification's features.md, as `runc features` prints it.

Examples:
  ampoule features | jq .linux.namespaces
  ampoule features --table              # each field, who enforces it, or why it is refused";

/// `ampoule features`
#[derive(Debug, Args)]
pub struct FeaturesArgs {
    /// Print a page about each field, Markdown, instead of the JSON
    #[arg(long)]
    pub table: bool,
}

#[cfg(test)]
mod tests;
