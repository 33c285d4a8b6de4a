//! `ampoule stats`: what a container uses in its guest, and what its VM costs this host.

use std::{fs, time::Duration};

use serde_json::{Value, json};

use super::{
    ps::table,
    verb::{self, Result, VerbError, connect},
};
use crate::{
    cli::StatsArgs,
    clock,
    control::{ControlError, Request, Response, Stats},
    host_cost::HostCost,
    paths::Paths,
    registry::{Found, Registry},
    text::{is_json, print},
};

/// Over which CPU time is counted.
const INTERVAL: Duration = Duration::from_secs(1);

/// A sandbox at one instant.
struct Sample {
    at_ns: u64,
    guest: Stats,
    host: HostCost,
}

pub fn stats(args: &StatsArgs, paths: &Paths) -> u8 {
    verb::run("stats", async {
        let registry = Registry::new(&paths.state);
        loop {
            let found = chosen(args, &registry)?;
            let before = samples(&found).await?;
            tokio::time::sleep(INTERVAL).await;
            let after = samples(&found).await?;
            let rows = found.iter().zip(before.iter().zip(&after));
            let rows = rows.filter_map(|(found, (before, after))| {
                Some((found, before.as_ref()?, after.as_ref()?))
            });
            print(&if is_json() { as_json(rows) } else { as_table(rows) });
            if !args.watch {
                return Ok(0);
            }
        }
    })
}

fn chosen(args: &StatsArgs, registry: &Registry) -> Result<Vec<Found>> {
    if args.names.is_empty() {
        return Ok(registry.list()?.into_iter().filter(Found::is_alive).collect());
    }
    args.names.iter().map(|name| Ok(registry.find(name)?)).collect()
}

/// One each; none of a sandbox that has just ended.
async fn samples(all: &[Found]) -> Result<Vec<Option<Sample>>> {
    let mut samples = Vec::new();
    for found in all {
        samples.push(match sample(found).await {
            Err(VerbError::Control(_, ControlError::Gone) | VerbError::Not(..)) => None,
            other => Some(other?),
        });
    }
    Ok(samples)
}

async fn sample(found: &Found) -> Result<Sample> {
    let failed = |e| VerbError::Control(found.name.clone(), e);
    let answer = connect(found)?.call(&Request::Stats).await.map_err(failed)?;
    let (Response::Stats(guest), _) = answer else { return Err(failed(ControlError::Unexpected)) };
    let host = children(found.record.pid).into_iter().map(HostCost::of);
    let host = host.fold(HostCost::default(), |sum, cost| sum + cost);
    Ok(Sample { at_ns: clock::now_ns(), guest, host })
}

/// Of the process that runs the sandbox: the VM's, and its file server if it has one.
fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.flat_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
    });
    children.collect()
}

/// CPU time between two samples in percent of one CPU.
fn percent(from: u64, to: u64, before: &Sample, after: &Sample) -> f64 {
    let passed_us = after.at_ns.saturating_sub(before.at_ns).max(1) as f64 / 1e3;
    to.saturating_sub(from) as f64 / passed_us * 100.0
}

fn as_table<'a>(rows: impl Iterator<Item = (&'a Found, &'a Sample, &'a Sample)>) -> String {
    let names = ["NAME", "GUEST CPU", "GUEST MEMORY", "PROCESSES", "HOST CPU", "HOST MEMORY"];
    let mut lines = vec![names.map(String::from)];
    lines.extend(rows.map(|(found, before, after)| {
        let (guest, host) = (&after.guest, &after.host);
        [
            found.name.to_string(),
            format!("{:.1} %", percent(before.guest.cpu_us, guest.cpu_us, before, after)),
            format!("{} / {}", mebibytes(guest.memory), mebibytes(guest.memory_limit)),
            guest.processes.to_string(),
            format!("{:.1} %", percent(before.host.cpu_us(), host.cpu_us(), before, after)),
            mebibytes(host.memory),
        ]
    }));
    table(&lines)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn as_json<'a>(rows: impl Iterator<Item = (&'a Found, &'a Sample, &'a Sample)>) -> String {
    let rows = rows.map(|(found, before, after)| {
        let (guest, host) = (&after.guest, &after.host);
        json!({
            "name": found.name.as_str(),
            "guest": {
                "cpu_percent": percent(before.guest.cpu_us, guest.cpu_us, before, after),
                "cpu_us": guest.cpu_us,
                "memory": guest.memory,
                "memory_peak": guest.memory_peak,
                "memory_limit": guest.memory_limit,
                "processes": guest.processes,
            },
            "host": {
                "cpu_percent": percent(before.host.cpu_us(), host.cpu_us(), before, after),
                "cpu_us": host.cpu_us(),
                "memory": host.memory,
            },
        })
    });
    format!("{}\n", Value::from_iter(rows))
}
