//! Bounds of a run that the host keeps: wall clock, CPU time, output. Whoever meets one is ended, with a reason and an
//! exit code of its own. (Memory and processes are bounded in the guest, by the container's cgroup.)

use std::{fmt, future::pending, sync::Arc, time::Duration};

use tokio::time::sleep;

use crate::{budget::Budget, cli::RunArgs, id::Id, sandbox::Sandbox};

/// The CPU time is not asked for more often.
const LEAST_PAUSE: Duration = Duration::from_millis(50);

/// A cap, which was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cap {
    Wall(Duration),
    Cpu(Duration),
    /// Bytes of both outputs together.
    Output(u64),
}

impl Cap {
    /// 124 as timeout(1), else 128 + the signal that a process gets for the like: SIGXCPU, SIGXFSZ.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Wall(_) => 124,
            Self::Cpu(_) => 152,
            Self::Output(_) => 153,
        }
    }

    /// What sets it.
    pub fn option(self) -> &'static str {
        match self {
            Self::Wall(_) => "--timeout",
            Self::Cpu(_) => "--cpu-time",
            Self::Output(_) => "--output-limit",
        }
    }
}

impl fmt::Display for Cap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wall(time) => write!(f, "ended after {} s", time.as_secs()),
            Self::Cpu(time) => write!(f, "ended after {} s of CPU time", time.as_secs()),
            Self::Output(bytes) => write!(f, "ended after {bytes} bytes of output"),
        }
    }
}

/// The caps of a run.
#[derive(Clone, Debug)]
pub struct Caps {
    wall: Option<Duration>,
    cpu: Option<Duration>,
    vcpus: u32,
    output: Option<(u64, Arc<Budget>)>,
}

impl Caps {
    pub fn new(args: &RunArgs) -> Self {
        let seconds = |n: u32| Duration::from_secs(n.into());
        Self {
            wall: args.timeout.map(seconds),
            cpu: args.cpu_time.map(seconds),
            vcpus: args.cpus.vcpus().into(),
            output: args.output_limit.map(|limit| (limit.0, Arc::new(Budget::new(limit.0)))),
        }
    }

    /// What the outputs may take from.
    pub fn budget(&self) -> Option<&Arc<Budget>> {
        self.output.as_ref().map(|(_, budget)| budget)
    }

    /// The output's cap, if it was met: also by a workload that then ended by itself.
    pub fn output_met(&self) -> Option<Cap> {
        let met = |(limit, budget): &(u64, Arc<Budget>)| {
            budget.is_overdrawn().then_some(Cap::Output(*limit))
        };
        self.output.as_ref().and_then(met)
    }

    /// Resolves when one is met.
    pub async fn met(&self, sandbox: &Sandbox, container: &Id) -> Cap {
        tokio::select! {
            cap = self.wall() => cap,
            cap = self.cpu(sandbox, container) => cap,
            cap = self.output() => cap,
        }
    }

    async fn wall(&self) -> Cap {
        let Some(time) = self.wall else { return pending().await };
        sleep(time).await;
        Cap::Wall(time)
    }

    /// Looks when the rest could be used up at the earliest, with all vCPUs busy.
    async fn cpu(&self, sandbox: &Sandbox, container: &Id) -> Cap {
        let Some(time) = self.cpu else { return pending().await };
        loop {
            // Gone: its end is seen elsewhere.
            let Ok(stats) = sandbox.stats(container).await else { return pending().await };
            let used = stats.cpu_stat.get("usage_usec").copied().unwrap_or(0);
            let rest = time.saturating_sub(Duration::from_micros(used));
            if rest.is_zero() {
                return Cap::Cpu(time);
            }
            sleep((rest / self.vcpus.max(1)).max(LEAST_PAUSE)).await;
        }
    }

    async fn output(&self) -> Cap {
        let Some((limit, budget)) = &self.output else { return pending().await };
        budget.overdrawn().await;
        Cap::Output(*limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cap_has_an_exit_code_and_names_its_option() {
        let time = Duration::from_secs(3);
        for (cap, code, option) in [
            (Cap::Wall(time), 124, "--timeout"),
            (Cap::Cpu(time), 152, "--cpu-time"),
            (Cap::Output(9), 153, "--output-limit"),
        ] {
            assert_eq!(cap.exit_code(), code);
            assert_eq!(cap.option(), option);
        }
    }
}
