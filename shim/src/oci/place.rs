//! Where a container runs, for the process that stands for it: in a VM that is this process's own, or in that of another
//! container, whose keeper then does what is to be done.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::sleep};

use super::{
    Host, OciError, Result,
    create::{self, Parked, Plan},
    pod::{self, Joins},
    verbs::connect,
};
use crate::{
    commands::exec::{self, NEVER_ENOUGH},
    control::{Connection, Container, ControlError, Member, Request, Server},
    registry::Ended,
    sandbox::{Exit, ProcessId, Sandbox, Streams},
    signals::{Signals, Wish},
    terminal,
    timestamp::Timestamp,
    vm::Death,
};

/// How long what a dead VM left in the streams may take to be written out.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Of a container that went with another one's VM.
const KILLED: u8 = 128 + 9;

pub enum Place {
    Own { container: Arc<Container>, server: Server },
    Shared(Connection),
}

/// How a container ended.
pub struct End {
    pub ended: Ended,
    /// Its VM's, if it ended by that and the VM was this process's.
    pub death: Option<Arc<Death>>,
}

impl Place {
    /// Makes a container, parked before its command, which is then served in its folder. Dropping the future leaves
    /// nothing.
    pub async fn make(plan: &mut Plan, host: &Arc<Host>, folder: &Path) -> Result<(Self, Streams)> {
        match plan.joins.clone() {
            Some(joins) => Self::join(plan, joins, folder).await,
            None => Self::boot(plan, host, folder).await,
        }
    }

    async fn boot(plan: &mut Plan, host: &Arc<Host>, folder: &Path) -> Result<(Self, Streams)> {
        let Parked { sandbox, created } = create::create(plan, host).await?;
        let container = Arc::new(pod::container(plan, sandbox, host)?);
        let server = Server::start(folder, container.clone())
            .map_err(|e| OciError::Host("open the control socket", e))?;
        Ok((Self::Own { container, server }, created.streams))
    }

    async fn join(plan: &mut Plan, joins: Joins, folder: &Path) -> Result<(Self, Streams)> {
        plan.hooks.create(std::process::id()).await?;
        let connection = connect(&joins.sandbox)?;
        let streams = connection.join(Member {
            id: plan.id.to_string(),
            bundle: plan.bundle.path.clone(),
            folder: folder.into(),
            joins: joins.container.id.to_string(),
        });
        let failed = |e| OciError::Control(joins.sandbox.id.to_string(), e);
        let streams = streams.await.map_err(failed)?;
        Ok((Self::Shared(connection), streams))
    }

    /// Lets the command run.
    pub async fn start(&self, plan: &Plan) -> Result<()> {
        match self {
            Self::Own { container, .. } => Ok(container.start().await?),
            Self::Shared(connection) => connection
                .ask(&Request::Start)
                .await
                .map_err(|error| OciError::asked(plan.id.as_str(), error)),
        }
    }

    /// Passes signals on until the container has ended.
    pub async fn attend(&self, plan: &Plan, signals: &mut Signals) -> Result<End> {
        match self {
            Self::Own { container, .. } => {
                let process = ProcessId::init(plan.id.clone());
                let exit = attend(&container.sandbox, &process, signals).await?;
                container.ended();
                Ok(End { death: exit.death.clone(), ended: exit.into() })
            }
            Self::Shared(connection) => {
                let ended = match exec::attend(connection, signals, NEVER_ENOUGH).await {
                    Err(ControlError::Gone) => gone(),
                    ended => ended.map_err(|e| OciError::Control(plan.id.to_string(), e))?,
                };
                Ok(End { ended, death: None })
            }
        }
    }

    /// Waits until all output has been written out. A slow reader may take its time while the VM lives; where that is
    /// another container's, until we are told to end.
    pub async fn drained(
        &self,
        outputs: Vec<oneshot::Receiver<()>>,
        end: &End,
        signals: &mut Signals,
    ) {
        let Self::Own { container, .. } = self else {
            return exec::drained(outputs, signals).await;
        };
        let all = async {
            for output in outputs {
                let _ = output.await;
            }
        };
        let too_late = async {
            if end.death.is_none() {
                container.sandbox.ended().await;
            }
            sleep(LAST_WORDS).await;
        };
        tokio::select! {
            () = all => {}
            () = too_late => {}
        }
    }

    /// Ends the VM, if it is this process's.
    pub async fn shut_down(&self) {
        if let Self::Own { container, .. } = self {
            container.sandbox.end().await;
        }
    }

    /// Tells everyone who waits how it ended.
    pub async fn finish(self, ended: Ended) {
        if let Self::Own { server, .. } = self {
            server.finish(ended).await;
        }
    }
}

/// With a VM everything in it ends.
fn gone() -> Ended {
    let reason = Some("the VM that it shared has ended".into());
    Ended { code: KILLED, at: Timestamp::now(), oom: false, reason, console: Vec::new() }
}

/// Passes signals on until the process has ended.
async fn attend(sandbox: &Sandbox, process: &ProcessId, signals: &mut Signals) -> Result<Exit> {
    let end = sandbox.wait(process);
    tokio::pin!(end);
    loop {
        tokio::select! {
            exit = &mut end => return Ok(exit?),
            wish = signals.next() => {
                let (sandbox, process) = (sandbox.clone(), process.clone());
                // One that fails does so because the process or its VM has just ended, which the wait sees.
                tokio::spawn(async move {
                    match wish {
                        Wish::Forward(signal) => {
                            let _ = sandbox.signal(&process, signal.unsigned_abs(), false).await;
                        }
                        Wish::Resize => if let Some((width, height)) = terminal::size() {
                            let _ = sandbox.resize(&process, width, height).await;
                        }
                    }
                });
            }
        }
    }
}
