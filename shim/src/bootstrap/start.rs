//! `start`: finds the daemon of the container's group, or leaves one behind, and prints its address.
//!
//! It is on the way of every container, so it does little: read the parameters and the annotations, bind a
//! socket, start the daemon with it, print. containerd may dial at once: the socket is listened at, and the
//! daemon takes the connection when it is up. Nothing is forked but a program that is executed anew.

use std::{
    env,
    ffi::OsString,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{net::UnixListener, process::CommandExt},
    },
    path::{Component, Path, PathBuf},
    process::{Child, Command, Stdio},
};

use protobuf::Message;

use super::{
    args::Args,
    group::{GroupError, group},
    request::Request,
    socket::{self, Claim, SocketError, SocketName},
};

/// What containerd reads when it is started again: versions before 2 the address, people the PID.
pub const ADDRESS: &str = "address";
/// Where containerd itself has it for those whose `start` it does not run: the containers of a sandbox that it made before.
pub const BOOTSTRAP: &str = "bootstrap.json";
pub const PID: &str = "shim.pid";
/// Where a task's pid is, for `delete` when no daemon can be asked.
pub const INIT_PID: &str = "init.pid";
/// What containerd gives as the runtime's options, an `Any`: for sandboxes, whose other calls do not bring them.
pub const OPTIONS: &str = "options";

const CGROUPS: &str = "/sys/fs/cgroup";

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("bundle: {0}")]
    Bundle(&'static str, #[source] io::Error),
    #[error("shim cgroup {path}: the daemon cannot be put into it")]
    Cgroup { path: String, source: io::Error },
    #[error("core scheduling, which containerd asks for: this kernel has none, or forbids it")]
    SchedCore(#[source] io::Error),
    #[error("the daemon cannot be started")]
    Spawn(#[source] io::Error),
    #[error("reply")]
    Reply(#[from] protobuf::Error),
}

/// In the bundle, which is the working directory. Returns what is to be printed.
pub fn start(args: &Args, input: &[u8]) -> Result<Vec<u8>, StartError> {
    let request = Request::new(args, input);
    let bundle = env::current_dir().map_err(|e| StartError::Bundle("is gone", e))?;
    let group = group(&bundle, &args.id)?;
    let directory = request.socket_dir.as_deref().unwrap_or(Path::new(socket::DIRECTORY));
    let path = socket::path(directory, &request.address, &args.namespace, &group)?;
    let address = format!("unix://{}", path.display());
    // Nobody else can have started a daemon for the group's own first container.
    let shared = group != args.id;
    let daemon = match socket::claim(&path, shared)? {
        Claim::Made(listener) => Some(launch(args, &request, listener)?),
        Claim::Served => None,
    };
    let written = write_files(&bundle, &address, daemon.as_ref(), &request).and_then(|()| {
        let reply = request.dialect.reply(&address)?;
        Ok(reply)
    });
    if let (Err(_), Some(mut daemon)) = (&written, daemon) {
        let _ = daemon.kill();
        let _ = fs::remove_file(&path);
    }
    written
}

fn write_files(
    bundle: &Path,
    address: &str,
    daemon: Option<&Child>,
    request: &Request,
) -> Result<(), StartError> {
    let write = |name: &str, content: &[u8]| {
        let written = fs::write(bundle.join(name), content);
        written.map_err(|e| StartError::Bundle("cannot be written to", e))
    };
    if let Some(daemon) = daemon {
        write(PID, daemon.id().to_string().as_bytes())?;
    }
    if let Some(options) = &request.options {
        write(OPTIONS, &options.write_to_bytes()?)?;
    }
    write(ADDRESS, address.as_bytes())
}

fn launch(args: &Args, request: &Request, listener: UnixListener) -> Result<Child, StartError> {
    let name = SocketName::of(&listener);
    let launched = prepare(request).and_then(|()| {
        let mut command = daemon(args, request);
        command.stdin(OwnedFd::from(listener)).spawn().map_err(StartError::Spawn)
    });
    if let (Err(_), Ok(name)) = (&launched, name) {
        name.remove();
    }
    launched
}

/// What the daemon inherits from this process.
fn prepare(request: &Request) -> Result<(), StartError> {
    if let Some(path) = &request.cgroup {
        let failed = |source| StartError::Cgroup { path: path.clone(), source };
        join_cgroup(Path::new(CGROUPS), path).map_err(failed)?;
    }
    if env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        own_cores().map_err(StartError::SchedCore)?;
    }
    // Some hosts forbid it; then the daemon is as precious as containerd.
    let _ = less_precious();
    Ok(())
}

/// This program, executed anew by way of the kernel's link: the same one, should it have been replaced just now.
fn daemon(args: &Args, request: &Request) -> Command {
    let mut command = Command::new("/proc/self/exe");
    let name =
        env::args_os().next().unwrap_or_else(|| OsString::from("containerd-shim-ampoule-v2"));
    command.arg0(name);
    command.args(["-namespace", &args.namespace, "-id", &args.id, "-address", &request.address]);
    if request.debug {
        command.arg("-debug");
    }
    if let Some(address) = &request.ttrpc_address {
        command.env("TTRPC_ADDRESS", address);
    }
    // containerd reads our output until every copy of it is closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// `path` is from the root of the cgroup file system; with version 1, it counts where it is there.
fn join_cgroup(root: &Path, path: &str) -> io::Result<()> {
    let names = Path::new(path).components().filter(|c| !matches!(c, Component::RootDir));
    let path: PathBuf = names.collect();
    if path.components().any(|c| !matches!(c, Component::Normal(_))) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if root.join("cgroup.controllers").exists() {
        return fs::write(root.join(path).join("cgroup.procs"), "0");
    }
    let mut joined = Err(io::ErrorKind::NotFound.into());
    for controller in fs::read_dir(root)? {
        let procs = controller?.path().join(&path).join("cgroup.procs");
        if procs.exists() {
            fs::write(procs, "0")?;
            joined = Ok(());
        }
    }
    joined
}

/// Processes of other groups never share a core with the daemon's at the same time.
fn own_cores() -> io::Result<()> {
    // PIDTYPE_TGID of the kernel: all threads of this process, whose children inherit it.
    const PROCESS: libc::c_ulong = 1;
    let create = libc::c_ulong::from(libc::PR_SCHED_CORE_CREATE.unsigned_abs());
    // SAFETY: takes numbers only, and no pointer for this operation.
    match unsafe { libc::prctl(libc::PR_SCHED_CORE, create, 0 as libc::c_ulong, PROCESS, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// When memory is out, a shim goes before containerd, as which we are at first.
fn less_precious() -> io::Result<()> {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let score: i32 = fs::read_to_string(SCORE)?.trim().parse().map_err(io::Error::other)?;
    fs::write(SCORE, (score + 1).min(1000).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_joined_by_its_path_in_either_version() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let make = |path: &str| {
            fs::create_dir_all(root.join(path)).unwrap();
            fs::write(root.join(path).join("cgroup.procs"), "").unwrap();
        };
        let joined = |path: &str| {
            fs::read_to_string(root.join(path).join("cgroup.procs")).is_ok_and(|text| text == "0")
        };
        make("cpu/shims");
        make("memory/shims");
        make("pids");
        join_cgroup(root, "/shims").unwrap();
        assert!(joined("cpu/shims") && joined("memory/shims") && !joined("pids"));
        assert!(join_cgroup(root, "/none").is_err());
        assert!(join_cgroup(root, "/../shims").is_err());
        fs::write(root.join("cgroup.controllers"), "").unwrap();
        make("a/b");
        join_cgroup(root, "a/b").unwrap();
        assert!(joined("a/b"));
    }
}
