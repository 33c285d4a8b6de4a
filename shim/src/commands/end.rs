//! `ampoule stop`, `kill`, `wait` and `rm`: the ends of sandboxes.

use std::time::Duration;

use rustix::process::Signal as HostSignal;
use tokio::time::timeout;

use super::verb::{self, GONE, Result, VerbError, connect, end_of, end_process};
use crate::{
    cli::{KillArgs, NamesArgs, RmArgs, StopArgs},
    control::{ControlError, Request},
    paths::Paths,
    registry::{Found, Registry, RegistryError, Status},
    signal_name::Signal,
    text::print,
};

/// How long what killed processes have written may take to be read by whoever reads it.
const DRAINED: Duration = Duration::from_secs(3);

pub fn stop(args: &StopArgs, paths: &Paths) -> u8 {
    verb::each("stop", &args.names, |name| async move {
        let registry = Registry::new(&paths.state);
        let found = registry.find(&name)?;
        if !found.is_alive() {
            return Ok(());
        }
        let seconds = args.timeout.unwrap_or(found.record.stop_timeout);
        let patience = Duration::from_secs(seconds.into());
        let signal = Request::Signal { signal: found.record.stop_signal.number(), all: false };
        if ends(&registry, &found, &signal, patience).await? {
            return Ok(());
        }
        make_end(&registry, &found).await
    })
}

pub fn kill(args: &KillArgs, paths: &Paths) -> u8 {
    verb::each("kill", &args.names, |name| async move {
        let registry = Registry::new(&paths.state);
        let found = registry.find(&name)?;
        let signal = Request::Signal { signal: args.signal.number(), all: false };
        let connection = connect(&found)?;
        let sent = connection.ask(&signal).await;
        sent.map_err(|e| VerbError::Control(found.name.clone(), e))?;
        // KILL leaves no choice: whoever asks next finds it ended.
        if args.signal == Signal::KILL {
            let _ = timeout(GONE, end_of(&registry, &found)).await;
        }
        Ok(())
    })
}

pub fn wait(args: &NamesArgs, paths: &Paths) -> u8 {
    verb::run("wait", async {
        let registry = Registry::new(&paths.state);
        // All are looked up before any is waited for: one with --rm cannot be found after its end.
        let found = args.names.iter().map(|name| registry.find(name));
        for found in found.collect::<std::result::Result<Vec<Found>, _>>()? {
            print(&format!("{}\n", end_of(&registry, &found).await?.code));
        }
        Ok(0)
    })
}

pub fn rm(args: &RmArgs, paths: &Paths) -> u8 {
    verb::each("rm", &args.names, |name| async move {
        let registry = Registry::new(&paths.state);
        let found = registry.find(&name)?;
        if found.is_alive() && !args.force {
            let (why, hint) = ("it runs", "stop it first, or use -f");
            return Err(VerbError::Refused { name: found.name, why, hint });
        }
        if found.is_alive() {
            make_end(&registry, &found).await?;
        }
        Ok(registry.remove(&found.name)?)
    })
}

/// Ends a sandbox: its processes, else its VM, else the process that runs it.
async fn make_end(registry: &Registry, found: &Found) -> Result<()> {
    if found.status == Status::Created {
        // Its process ends its boot in order.
        return end_process(registry, found, HostSignal::TERM);
    }
    let kill = Request::Signal { signal: Signal::KILL.number(), all: true };
    for (request, patience) in [(kill, DRAINED), (Request::Shutdown, GONE)] {
        if ends(registry, found, &request, patience).await? {
            return Ok(());
        }
    }
    end_process(registry, found, HostSignal::KILL)
}

/// Asks a sandbox for something, and whether it then ends in time.
async fn ends(
    registry: &Registry,
    found: &Found,
    request: &Request,
    patience: Duration,
) -> Result<bool> {
    if found.status == Status::Created {
        return Ok(false);
    }
    let asked = async {
        let connection = connect(found)?;
        let asked = connection.ask(request).await;
        asked.map_err(|e| VerbError::Control(found.name.clone(), e))
    };
    let ended = async {
        let (asked, ended) = tokio::join!(asked, end_of(registry, found));
        match (ended, asked) {
            // How it ended does not matter, nor whether it did before it was asked.
            (Ok(_) | Err(VerbError::Registry(RegistryError::NotFound(_))), _) => Ok(true),
            (Err(_), Err(VerbError::Control(_, ControlError::Gone))) => {
                Ok(!registry.is_held(&found.name)?)
            }
            (Err(error), _) => Err(error),
        }
    };
    timeout(patience, ended).await.unwrap_or(Ok(false))
}
