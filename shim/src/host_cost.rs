//! What a process has used on this host (proc(5)).

use std::{
    fs,
    ops::{Add, AddAssign},
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCost {
    /// Memory that belongs to it alone, in bytes: its own, and that of a guest.
    pub memory: u64,
    /// CPU time in its programs and in the kernel, in microseconds. A guest's is the former.
    pub user_us: u64,
    pub system_us: u64,
}

impl HostCost {
    /// Nothing of a process that is not there.
    pub fn of(pid: u32) -> Self {
        let read =
            |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let (user_us, system_us) = cpu_us(&read("stat")).unwrap_or_default();
        Self { memory: memory(&read("status")), user_us, system_us }
    }

    pub fn cpu_us(&self) -> u64 {
        self.user_us + self.system_us
    }
}

impl Add for HostCost {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl AddAssign for HostCost {
    fn add_assign(&mut self, other: Self) {
        self.memory += other.memory;
        self.user_us += other.user_us;
        self.system_us += other.system_us;
    }
}

fn memory(status: &str) -> u64 {
    let kilobytes = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    (kilobytes("RssAnon:") + kilobytes("RssShmem:")) << 10
}

/// From the 14th and 15th field.
fn cpu_us(stat: &str) -> Option<(u64, u64)> {
    // The second field, a name in parentheses, may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    let us = |ticks: u64| ticks * 1_000_000 / rustix::param::clock_ticks_per_second();
    Some((us(next()?), us(next()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        let status =
            "Name:\tx\nVmRSS:\t 9000 kB\nRssAnon:\t     8 kB\nRssFile:\t 7 kB\nRssShmem:\t 4 kB\n";
        assert_eq!(memory(status), 12 << 10);
        let stat = "7 (a) (b c) S 1 7 7 0 -1 4194560 1 0 0 0 200 100 0 0 20 0 1 0";
        let tick = 1_000_000 / rustix::param::clock_ticks_per_second();
        assert_eq!(cpu_us(stat), Some((200 * tick, 100 * tick)));
        assert_eq!(HostCost::of(u32::MAX), HostCost::default());
        assert!(HostCost::of(std::process::id()).memory > 0);
    }
}
