//! `events`: what a container uses, in runc's JSON: one line, or one after the other until it has ended.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    Host, OciError, Result,
    block_io::used,
    cli::EventsArgs,
    containers::Found,
    verbs::{Status, connect, status, wait_for},
};
use crate::{
    control::{ControlError, Request, Response, Stats},
    text::print,
};

pub fn events(args: &EventsArgs, host: &Host) -> Result<u8> {
    let found = host.containers.find(&args.id)?;
    let interval = interval(&args.interval)?;
    wait_for(async {
        let running = |status| matches!(status, Status::Running | Status::Paused);
        if !running(status(&found).await?) {
            return Err(OciError::NotRunning(args.id.clone()));
        }
        loop {
            let stats = stats(&found).await;
            if stats.is_err() && !running(status(&found).await?) {
                return Ok(0);
            }
            print(&format!("{}\n", described(&found, &stats?)));
            if args.stats {
                return Ok(0);
            }
            sleep(interval).await;
        }
    })
}

async fn stats(found: &Found) -> Result<Stats> {
    let failed = |e| OciError::Control(found.id.to_string(), e);
    match connect(found)?.call(&Request::Stats).await.map_err(failed)? {
        (Response::Stats(stats), _) => Ok(stats),
        _ => Err(failed(ControlError::Unexpected)),
    }
}

/// runc's `types.Event`, as far as a guest's cgroup tells; of disks that of its VM on the host.
fn described(found: &Found, stats: &Stats) -> Value {
    let record = &found.record;
    let cgroup = record.cgroup.as_deref().filter(|_| record.sandbox.is_none());
    json!({
        "type": "stats",
        "id": found.id.as_str(),
        "data": {
            "cpu": { "usage": { "total": stats.cpu_us.saturating_mul(1000) } },
            "memory": {
                "usage": {
                    "usage": stats.memory,
                    "max": stats.memory_peak,
                    "limit": stats.memory_limit,
                },
            },
            "pids": { "current": stats.processes },
            "blkio": cgroup.map_or_else(|| json!({}), used),
        },
    })
}

/// Of the durations that Go's callers write, those of whole seconds, milliseconds and minutes.
fn interval(text: &str) -> Result<Duration> {
    let wrong =
        || OciError::refused("--interval", format!("{text:?} is not a time as 500ms, 5s or 1m"));
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..at].parse().map_err(|_| wrong())?;
    let length = match &text[at..] {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        _ => return Err(wrong()),
    };
    if length.is_zero() { Err(wrong()) } else { Ok(length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_go() {
        for (text, length) in [("5s", 5000), ("500ms", 500), ("1m", 60_000)] {
            assert_eq!(interval(text).unwrap(), Duration::from_millis(length));
        }
        for text in ["", "5", "s", "0s", "-1s", "1h2m", "5 s"] {
            assert!(interval(text).is_err(), "{text}");
        }
    }
}
