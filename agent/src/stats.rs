//! What a container uses, from the cgroup v2 files of the same names.

use std::{collections::HashMap, io};

use ampoule_agent_api::agent::StatsResponse;

use crate::cgroup::Cgroup;

/// Reads everything at one go; what the kernel does not count is 0 or absent.
pub fn read(cgroup: &Cgroup) -> io::Result<StatsResponse> {
    // The one file that is always there says whether the cgroup is.
    cgroup.read("cgroup.events")?;
    let one = |file| number(&cgroup.read(file).unwrap_or_default());
    let many = |file| numbers(&cgroup.read(file).unwrap_or_default());
    Ok(StatsResponse {
        memory_current: one("memory.current"),
        memory_max: one("memory.max"),
        memory_peak: one("memory.peak"),
        memory_stat: many("memory.stat"),
        memory_events: many("memory.events"),
        cpu_stat: many("cpu.stat"),
        pids_current: one("pids.current"),
        pids_max: one("pids.max"),
        ..Default::default()
    })
}

/// A file of one number; "max" is all there is.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        n => n.parse().unwrap_or(0),
    }
}

/// A flat keyed file: lines of "key number".
fn numbers(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, n)| Some((key.to_owned(), n.trim().parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read() {
        assert_eq!(number("4096\n"), 4096);
        assert_eq!(number("max\n"), u64::MAX);
        assert_eq!(number(""), 0);
        let stat = numbers("anon 12\nfile 34\nnot a number\n");
        assert_eq!(stat.len(), 2);
        assert_eq!(stat["file"], 34);
    }
}
