//! `delete`: nothing of one container is left when it returns, and nothing of another is touched.
//!
//! containerd calls it when its connection to the daemon is gone: after every ordinary deletion, when all is
//! done already and the daemon may serve others of its pod; after a daemon's death; and when a daemon did not
//! answer. Then containerd knows nothing of the container any more and removes its bundle, so what still runs
//! of it is ended here. A daemon that does not answer us either is killed, and its VM with it, if it was
//! started for this container; where it was another's, that one's `delete` does it.

use std::{
    env, fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse, KillRequest, ShutdownRequest, StateRequest, WaitRequest},
    sandbox_api::ShutdownSandboxRequest,
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
};
use protobuf::Message;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    mount::{UnmountFlags, unmount},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{Code, r#async::transport::Socket, context::Context};

use super::{
    args::Args,
    group::group,
    socket,
    start::{ADDRESS, BOOTSTRAP, INIT_PID, PID},
};
use crate::text::complain;

/// 128 + SIGKILL: how a container ends whose end nobody saw.
const KILLED: u32 = 137;
/// For the daemon to end the container. containerd gives us 5 s for everything.
const DAEMON: Duration = Duration::from_secs(3);
/// For a killed daemon to be gone.
const GONE: Duration = Duration::from_secs(1);
/// Mounts on top of each other, of which there is one.
const MAX_MOUNTS: u8 = 16;

#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    #[error("the bundle is gone")]
    Bundle(#[source] io::Error),
    #[error("ask the daemon")]
    Runtime(#[source] io::Error),
    #[error("reply")]
    Reply(#[from] protobuf::Error),
}

/// Returns what is to be printed: the end of the container, as far as it is known.
pub fn delete(args: &Args) -> Result<Vec<u8>, DeleteError> {
    let bundle = match &args.bundle {
        Some(bundle) => bundle.clone(),
        None => env::current_dir().map_err(DeleteError::Bundle)?,
    };
    let path = address(&bundle);
    let path = path.as_deref().and_then(|address| address.strip_prefix("unix://")).map(Path::new);
    // Without a specification there is nothing it could be the first of.
    let first = group(&bundle, &args.id).is_ok_and(|group| group == args.id);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(DeleteError::Runtime)?;
    let ended = match path {
        None => None,
        Some(path) => {
            match runtime.block_on(async { timeout(DAEMON, end(path, &args.id, first)).await }) {
                Ok(ended) => ended,
                Err(_) => {
                    let killed = first && kill_daemon(&bundle, args);
                    let what = if killed { "and was killed" } else { "and is another container's" };
                    complain(&format!("the daemon at {} did not answer, {what}\n", path.display()));
                    None
                }
            }
        }
    };
    clear(&bundle, path);
    let ended = ended.unwrap_or_else(|| DeleteResponse {
        pid: init_pid(&bundle),
        exit_status: KILLED,
        exited_at: Some(SystemTime::now().into()).into(),
        ..Default::default()
    });
    Ok(ended.write_to_bytes()?)
}

/// The daemon's, as we or containerd wrote it down.
fn address(bundle: &Path) -> Option<String> {
    fs::read_to_string(bundle.join(ADDRESS)).ok().or_else(|| {
        let json = fs::read(bundle.join(BOOTSTRAP)).ok()?;
        let json: serde_json::Value = serde_json::from_slice(&json).ok()?;
        Some(json["address"].as_str()?.to_owned())
    })
}

/// The pid that containerd was told. 0: there was no task.
fn init_pid(bundle: &Path) -> u32 {
    let pid = fs::read_to_string(bundle.join(INIT_PID)).ok();
    pid.and_then(|pid| pid.trim().parse().ok()).unwrap_or_default()
}

/// Has the daemon end the container, if there is a daemon and it knows of it.
async fn end(path: &Path, id: &str, first: bool) -> Option<DeleteResponse> {
    let stream = UnixStream::connect(path).await.ok()?;
    let client = Client::new(Socket::from(stream));
    let (daemon, sandboxes) = (TaskClient::new(client.clone()), SandboxClient::new(client));
    // Who calls this keeps the time.
    let ctx = Context::default;
    let id = || id.to_string();
    let state = StateRequest { id: id(), ..Default::default() };
    let known = match daemon.state(ctx(), &state).await {
        Ok(_) => true,
        Err(ttrpc::Error::RpcStatus(status)) => status.code() != Code::NOT_FOUND,
        // It ends just now, and with it everything.
        Err(_) => return None,
    };
    let mut ended = None;
    if known {
        let kill = KillRequest { id: id(), signal: 9, all: true, ..Default::default() };
        // What has ended, or never began, cannot be killed.
        if daemon.kill(ctx(), &kill).await.is_ok() {
            let wait = WaitRequest { id: id(), ..Default::default() };
            let _ = daemon.wait(ctx(), &wait).await;
        }
        ended = daemon.delete(ctx(), &DeleteRequest { id: id(), ..Default::default() }).await.ok();
    }
    if first {
        // One that was made without a container has nobody else to end it.
        let request = ShutdownSandboxRequest { sandbox_id: id(), ..Default::default() };
        let _ = sandboxes.shutdown_sandbox(ctx(), &request).await;
    }
    if known || first {
        // It stays if it has other tasks.
        let _ = daemon.shutdown(ctx(), &ShutdownRequest { id: id(), ..Default::default() }).await;
    }
    ended
}

/// Whether it was, and is gone.
fn kill_daemon(bundle: &Path, args: &Args) -> bool {
    let pid = fs::read_to_string(bundle.join(PID)).ok().and_then(|pid| pid.trim().parse().ok());
    let Some(pid) = pid.and_then(Pid::from_raw) else { return false };
    let Ok(daemon) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    // Looked at when it can no longer become another process.
    is_daemon(pid, args)
        && pidfd_send_signal(&daemon, Signal::KILL).is_ok()
        && is_gone(&daemon).unwrap_or(false)
}

/// Whether `start` gave this process its command line.
fn is_daemon(pid: Pid, args: &Args) -> bool {
    let words = fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).unwrap_or_default();
    let words: Vec<&[u8]> = words.split(|byte| *byte == 0).skip(1).collect();
    let expected = ["-namespace", &args.namespace, "-id", &args.id].map(str::as_bytes);
    words.starts_with(&expected)
}

fn is_gone(daemon: &OwnedFd) -> io::Result<bool> {
    let limit = Timespec::try_from(GONE).map_err(io::Error::other)?;
    let mut events = [PollFd::new(daemon, PollFlags::IN)];
    Ok(poll(&mut events, Some(&limit))? == 1)
}

/// What is left in the file system. What cannot be removed is said, and containerd tries itself.
fn clear(bundle: &Path, socket: Option<&Path>) {
    if let Err(error) = unmount_all(&bundle.join("rootfs")) {
        complain(&format!("unmount {}: {error}\n", bundle.join("rootfs").display()));
    }
    if let Some(path) = socket
        && let Err(error) = socket::remove_dead(path)
    {
        complain(&format!("remove {}: {error}\n", path.display()));
    }
}

/// Takes all that is mounted at `path`, and below that, out of sight at once; what still uses it keeps it.
fn unmount_all(path: &PathBuf) -> io::Result<()> {
    for _ in 0..MAX_MOUNTS {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Nothing is mounted; there is no such folder; who may not unmount has not mounted.
            Err(Errno::INVAL | Errno::NOENT | Errno::PERM) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}
