//! What a process costs its host in memory.

use std::{fs, ops::Add, path::Path};

/// No mapping besides a guest's memory is as large.
const GUEST: u64 = 32 << 10;

/// Memory in KiB, without a guest's: of a process alone (USS), its share of all (PSS), changed by it, all it has (RSS).
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    pub uss: u64,
    pub pss: u64,
    pub dirty: u64,
    pub rss: u64,
}

impl Memory {
    /// Of the process whose folder in `/proc` this is.
    pub fn of(process: &Path) -> Self {
        let smaps = fs::read_to_string(process.join("smaps")).expect("smaps of a process");
        let mut sum = Self::default();
        let mut counts = true;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (Some(key), Some(Ok(kib))) = (words.next(), words.next().map(str::parse::<u64>))
            else {
                continue;
            };
            match key {
                "Size:" => counts = kib < GUEST,
                "Rss:" if counts => sum.rss += kib,
                "Pss:" if counts => sum.pss += kib,
                "Private_Clean:" if counts => sum.uss += kib,
                "Private_Dirty:" if counts => {
                    (sum.uss, sum.dirty) = (sum.uss + kib, sum.dirty + kib);
                }
                _ => {}
            }
        }
        sum
    }
}

impl Add for Memory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            uss: self.uss + other.uss,
            pss: self.pss + other.pss,
            dirty: self.dirty + other.dirty,
            rss: self.rss + other.rss,
        }
    }
}
