//! A workload while it runs: its streams, its terminal, the user's signals, and its exact end.

use std::time::Duration;

use tokio::sync::oneshot;

use super::caps::{Cap, Caps};
use crate::{
    sandbox::{Exit, ProcessId, Sandbox, SandboxError},
    signals::{Signals, Wish},
    terminal,
    text::remark,
};

/// SIGINTs and SIGTERMs after which a workload that ignores them is ended, as docker does. The text says 3.
const ENOUGH: u32 = 3;
/// How long what a dead VM left in the streams may take to be written out.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What is needed to see a process through.
pub(super) struct Supervised<'a> {
    pub sandbox: &'a Sandbox,
    pub process: &'a ProcessId,
    pub signals: &'a mut Signals,
    pub caps: &'a Caps,
}

impl Supervised<'_> {
    /// Sees a started process to its end, which may be a cap. Returns when everything it wrote has been written out.
    pub async fn run(
        mut self,
        outputs: Vec<oneshot::Receiver<()>>,
    ) -> Result<(Exit, Option<Cap>), SandboxError> {
        let (mut exit, met) = self.attend().await?;
        self.drained(outputs, exit.death.is_some()).await;
        let met = met.or_else(|| self.caps.output_met());
        if let Some(cap) = met {
            exit.status = cap.exit_code();
        }
        Ok((exit, met))
    }

    /// Passes the user's wishes on until the process has ended; a cap that is met ends it.
    async fn attend(&mut self) -> Result<(Exit, Option<Cap>), SandboxError> {
        let mut asked_to_end = 0;
        let mut met = None;
        let cap = self.caps.met(self.sandbox, &self.process.container);
        tokio::pin!(cap);
        let end = self.sandbox.wait(self.process);
        tokio::pin!(end);
        loop {
            tokio::select! {
                exit = &mut end => return Ok((exit?, met)),
                cap = &mut cap, if met.is_none() => {
                    met = Some(cap);
                    self.sandbox.shutdown().await;
                }
                wish = self.signals.next() => {
                    asked_to_end += u32::from(wish.asks_to_end());
                    if asked_to_end == ENOUGH {
                        remark("run: got 3 SIGTERM/SIGINTs, ending the sandbox");
                        self.sandbox.shutdown().await;
                    } else {
                        self.pass_on(wish);
                    }
                }
            }
        }
    }

    /// Passes a wish on without waiting: an agent that hangs must not keep the user from insisting. One that
    /// fails does so because the process or its VM has just ended, which the wait sees.
    fn pass_on(&self, wish: Wish) {
        let (sandbox, process) = (self.sandbox.clone(), self.process.clone());
        tokio::spawn(async move {
            match wish {
                Wish::Forward(signal) => {
                    let _ = sandbox.signal(&process, signal.unsigned_abs(), false).await;
                }
                Wish::Resize => {
                    if let Some((width, height)) = terminal::size() {
                        let _ = sandbox.resize(&process, width, height).await;
                    }
                }
            }
        });
    }

    /// Waits until both outputs have met the end of their streams. A slow reader of ours may take its time
    /// while the VM lives; the user may cut it short.
    async fn drained(&mut self, outputs: Vec<oneshot::Receiver<()>>, dead: bool) {
        let all = async {
            for output in outputs {
                let _ = output.await;
            }
        };
        let too_late = async {
            if !dead {
                self.sandbox.ended().await;
            }
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            () = all => {}
            () = too_late => {}
            _ = self.signals.end() => {}
        }
    }
}
