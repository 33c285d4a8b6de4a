//! A workload while it runs: its streams, its terminal, the user's signals, and its exact end.

use std::{sync::atomic::Ordering, time::Duration};

use tokio::sync::oneshot;

use super::RunError;
use crate::{
    cli::RunArgs,
    sandbox::{Created, Exit, ProcessId, Sandbox, SandboxError, Streams},
    signals::{Signals, Wish},
    stdio::{self, FirstByte, Output},
    terminal::{self, RawTerminal},
    text::complain,
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
}

impl Supervised<'_> {
    /// Starts the process and sees it to its end. Returns when everything it wrote has been written out, with
    /// the time of its first byte.
    pub async fn run(mut self, args: &RunArgs, created: Created) -> Result<(Exit, u64), RunError> {
        let first = FirstByte::default();
        let terminal = (args.tty && args.interactive).then(RawTerminal::enter).transpose();
        let terminal = terminal.map_err(|e| RunError::Host("make the terminal raw", e))?;
        let outputs = attach(created.streams, &first)?;
        self.sandbox.start(self.process).await?;
        let exit = self.attend().await?;
        self.drained(outputs, exit.death.is_some()).await;
        drop(terminal);
        Ok((exit, first.load(Ordering::Relaxed)))
    }

    /// Passes the user's wishes on until the process has ended.
    async fn attend(&mut self) -> Result<Exit, SandboxError> {
        let mut asked_to_end = 0;
        let end = self.sandbox.wait(self.process);
        tokio::pin!(end);
        loop {
            tokio::select! {
                exit = &mut end => return exit,
                wish = self.signals.next() => {
                    asked_to_end += u32::from(wish.asks_to_end());
                    if asked_to_end == ENOUGH {
                        let text = "ampoule: run: got 3 SIGTERM/SIGINTs, ending the sandbox\n";
                        complain(text);
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

/// Connects a process's streams to ours.
fn attach(streams: Streams, first: &FirstByte) -> Result<Vec<oneshot::Receiver<()>>, RunError> {
    let failed = |e| RunError::Host("attach the standard streams", e);
    if let Some(stdin) = streams.stdin {
        stdio::feed(stdin).map_err(failed)?;
    }
    let outputs = [(streams.stdout, Output::Stdout), (streams.stderr, Output::Stderr)];
    let outputs = outputs.into_iter().filter_map(|(stream, output)| Some((stream?, output)));
    outputs.map(|(s, output)| stdio::drain(s, output, first.clone()).map_err(failed)).collect()
}
