//! The one place that waits for children. PID 1 also inherits every orphan of the guest; theirs are
//! reaped and forgotten.
//!
//! Owns the map of awaited processes. Spawning and [`Reaper::expect`] happen with no await in between,
//! on the one thread of the runtime, so that no exit is reaped before somebody asks for it.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// Exit code, or 128 + signal.
pub type Status = u32;

#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<HashMap<Pid, oneshot::Sender<Status>>>>);

impl Reaper {
    /// Starts reaping. Within a runtime, before the first child.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child())?;
        let own = reaper.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                own.reap();
            }
        });
        Ok(reaper)
    }

    /// The exit of a child that was just spawned.
    pub fn expect(&self, pid: Pid) -> oneshot::Receiver<Status> {
        let (sender, receiver) = oneshot::channel();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, sender);
        receiver
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let awaited = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
            if let Some(sender) = awaited {
                let _ = sender.send(exit_code(status));
            }
        }
    }
}

fn exit_code(status: WaitStatus) -> Status {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code as Status,
        (None, Some(signal)) => 128 + signal as Status,
        (None, None) => 255,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    // The reaper waits.
    #[allow(clippy::zombie_processes)]
    #[tokio::test]
    async fn exits_reach_whoever_expects_them() {
        let reaper = Reaper::start().unwrap();
        let cases = [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)];
        let mut exits = Vec::new();
        for (script, status) in cases {
            let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let pid = Pid::from_raw(child.id() as i32).unwrap();
            exits.push((reaper.expect(pid), status));
        }
        for (exit, status) in exits {
            assert_eq!(exit.await.unwrap(), status);
        }
    }
}
