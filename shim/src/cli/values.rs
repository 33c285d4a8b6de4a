//! Values of options.

use std::{fmt, str::FromStr};

use ampoule_vmm_api::config::MAX_VCPUS;
use serde::{Deserialize, Serialize};

/// An amount of bytes: a number with an optional suffix b, k, m, g or t, powers of 1024. As JSON or TOML it is such
/// text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Memory(pub u64);

/// A number of CPUs, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus(pub u32);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    #[error("must be a number of bytes, with k, m or g for KiB, MiB or GiB, as in 512m")]
    Memory,
    #[error("must be more than 0 and at most {MAX_VCPUS}, as in 0.5 or 2")]
    Cpus,
    #[error("must be a capability of Linux, as NET_ADMIN, or ALL")]
    Capability,
    #[error(
        "must be seccomp=FILE, seccomp=unconfined, no-new-privileges or systempaths=unconfined"
    )]
    SecurityOption,
    #[error(
        "must be a limit of getrlimit(2) with the soft one not above the hard one, as in nofile=1024:4096"
    )]
    Ulimit,
    #[error("must be NAME=VALUE, as in net.core.somaxconn=1024")]
    Sysctl,
    #[error("must be an absolute path, with options after a colon, as in /tmp:size=64m")]
    Tmpfs,
    #[error("must be 1 to 64 letters, digits, dots and dashes")]
    Hostname,
}

impl FromStr for Memory {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let lower = text.to_ascii_lowercase();
        let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &lower[digits.len()..] {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(ValueError::Memory),
        };
        let number: u64 = digits.parse().map_err(|_| ValueError::Memory)?;
        match number.checked_mul(1 << shift) {
            Some(bytes) if bytes > 0 => Ok(Self(bytes)),
            _ => Err(ValueError::Memory),
        }
    }
}

impl TryFrom<String> for Memory {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        text.parse()
    }
}

impl From<Memory> for String {
    fn from(memory: Memory) -> Self {
        let (number, suffix) = match memory.0 {
            n if n % (1 << 30) == 0 => (n >> 30, "g"),
            n if n % (1 << 20) == 0 => (n >> 20, "m"),
            n => (n, ""),
        };
        format!("{number}{suffix}")
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n % (1 << 30) == 0 => write!(f, "{} GiB", n >> 30),
            n if n % (1 << 20) == 0 => write!(f, "{} MiB", n >> 20),
            n => write!(f, "{n} bytes"),
        }
    }
}

impl FromStr for Cpus {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let number: f64 = text.parse().map_err(|_| ValueError::Cpus)?;
        // A quota is at least 1 ms in 100 (cgroup v2, cpu.max).
        if !(0.01..=f64::from(MAX_VCPUS)).contains(&number) {
            return Err(ValueError::Cpus);
        }
        Ok(Self((number * 1000.0).round() as u32))
    }
}

impl Cpus {
    /// vCPUs: rounded up.
    pub fn vcpus(self) -> u8 {
        self.0.div_ceil(1000).try_into().unwrap_or(MAX_VCPUS)
    }

    /// Thousandths of a CPU, if that is less than the vCPUs.
    pub fn quota(self) -> Option<u32> {
        (!self.0.is_multiple_of(1000)).then_some(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory() {
        for (text, bytes) in [
            ("1", Some(1)),
            ("64m", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("2G", Some(2 << 30)),
            ("512b", Some(512)),
            ("0", None),
            ("", None),
            ("m", None),
            ("-1m", None),
            ("1.5g", None),
            ("lots", None),
            ("99999999999t", None),
        ] {
            assert_eq!(text.parse::<Memory>().ok().map(|m| m.0), bytes, "{text}");
        }
        assert_eq!(Memory(64 << 20).to_string(), "64 MiB");
    }

    #[test]
    fn numbers_of_cpus() {
        for (text, expected) in [
            ("1", Some((1, None))),
            ("0.5", Some((1, Some(500)))),
            ("2.25", Some((3, Some(2250)))),
            ("16", Some((16, None))),
            ("17", None),
            ("0", None),
            ("-1", None),
            ("NaN", None),
            ("x", None),
        ] {
            let cpus = text.parse::<Cpus>().ok();
            assert_eq!(cpus.map(|c| (c.vcpus(), c.quota())), expected, "{text}");
        }
    }
}
