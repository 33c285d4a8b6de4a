//! The process that `start` leaves behind, one for each sandbox: it serves containerd's Task services on the
//! socket it inherits, until containerd has called Shutdown and no task is left.
//!
//! It outlives containerd: connections and the reader of its log may go and come back. Its end is always the end
//! of its VM, whose control socket closes with it.

mod clients;
mod door;
mod fifo;

use std::{
    env, io,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::TryStreamExt;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tracing_subscriber::EnvFilter;
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    bootstrap::{
        args::Args,
        socket::{self, SocketName},
    },
    id::Id,
    paths::{Environment, Paths},
    publisher::Publisher,
    task::{self, Tasks, TasksConfig},
};
use clients::Clients;
use fifo::Fifo;

/// For the answer to Shutdown, and others that are on their way, to arrive. A client of ttrpc's Go library may lose an
/// answer behind which the connection was closed, so that it is the client who closes.
const FAREWELL: Duration = Duration::from_secs(2);
/// For events that containerd has not taken yet.
const LAST_EVENTS: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("standard input is no listening socket: containerd starts this; see -help")]
    NotStarted(#[source] io::Error),
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    #[error("serve")]
    Serve(#[source] ttrpc::Error),
}

/// Serves to the end.
pub fn run(args: &Args, id: Id) -> Result<(), DaemonError> {
    let listener = socket::inherited().map_err(DaemonError::NotStarted)?;
    let bundle = env::current_dir().map_err(|e| DaemonError::Host("the bundle is gone", e))?;
    detach().map_err(|e| DaemonError::Host("leave containerd's session", e))?;
    begin_log(&bundle, args);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| DaemonError::Host("start the event loop", e))?;
    let served = runtime.block_on(serve(args, id, bundle, listener));
    if let Err(error) = &served {
        tracing::error!(error = crate::error::chain_text(error), "the shim failed");
    }
    // Nothing that still blocks a thread keeps the process.
    runtime.shutdown_background();
    served
}

/// Signals for containerd's process group and terminal are not for us, and its folders may be removed.
fn detach() -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn begin_log(bundle: &Path, args: &Args) {
    let default = if args.debug { "info,ampoule_shim=debug" } else { "warn,ampoule_shim=info" };
    let filter = EnvFilter::try_from_env("AMPOULE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let fifo = Arc::new(Fifo::open(&bundle.join("log"), &args.id));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(fifo);
    // It cannot be there already. What cannot be written is lost: there is no standard error to say so.
    let _ = log.log_internal_errors(false).try_init();
    // A panic ends the process; without this nobody would know why.
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
}

async fn serve(
    args: &Args,
    id: Id,
    bundle: PathBuf,
    listener: UnixListener,
) -> Result<(), DaemonError> {
    let host = |what| move |e| DaemonError::Host(what, e);
    let name = SocketName::of(&listener).map_err(host("the socket has no name"))?;
    listener.set_nonblocking(true).map_err(host("listen"))?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(host("listen"))?;
    let events = env::var("TTRPC_ADDRESS").ok().filter(|address| !address.is_empty());
    let publisher = Publisher::new(events, args.namespace.clone());
    let config = TasksConfig {
        id,
        namespace: args.namespace.clone(),
        bundle,
        paths: Paths::new(&Environment::current()),
        debug: args.debug,
    };
    let tasks = Tasks::new(config, publisher.clone());
    let (door, connections) = door::open(listener);
    let clients = Clients::default();
    let count = clients.clone();
    let calls = tasks.streaming.clone().sort(connections).map_ok(move |call| count.come(call));
    let mut server = Server::new()
        .add_listener(Listener::new(calls))
        .register_service(task::services(tasks.clone()));
    let mut signals = Signals::listen().map_err(host("listen for signals"))?;
    server.start().await.map_err(DaemonError::Serve)?;
    let is_asked = tokio::select! {
        () = tasks.wait_for_shutdown() => true,
        signal = signals.next() => {
            tracing::warn!("{signal}: the sandbox ends");
            false
        }
    };
    // First of all: a container of the same name that is started now gets a daemon of its own.
    name.remove();
    drop(door);
    publisher.flush(LAST_EVENTS).await;
    let farewell = async {
        if is_asked {
            clients.gone().await;
        }
        server.disconnect().await;
    };
    let _ = timeout(FAREWELL, farewell).await;
    Ok(())
}

/// Those by which a host that shuts down asks us to end. containerd sends none.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        Ok(Self { terminate, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
