//! Values of options.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ampoule_vmm_api::config::MAX_VCPUS;
use serde::{Deserialize, Serialize};

use crate::timestamp::Timestamp;

/// An amount of bytes: a number with an optional suffix b, k, m, g or t, powers of 1024. As JSON or TOML it is such
/// text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Memory(pub u64);

/// In bytes, docker's.
const LEAST_MEMORY: u64 = 6 << 20;

/// A number of CPUs, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus(pub u32);

/// What a guest's clock is to show when its container starts. A kernel's clock cannot show a time at which it would
/// have booted before 1970, nor one after 2232.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ClockStart(pub Timestamp);

/// A number of up to 256 bits, big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub [u8; 32]);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    #[error("must be a number of bytes, with k, m or g for KiB, MiB or GiB, as in 512m")]
    Memory,
    #[error("must be 6m or more: a container does not start in less")]
    LittleMemory,
    #[error("must be more than 0 and at most {MAX_VCPUS}, as in 0.5 or 2")]
    Cpus,
    #[error(
        "must be a time as 2026-11-21T05:51:40Z, or seconds since 1970; from 1970-01-02 up to 2199"
    )]
    Clock,
    #[error("must be a number, as 42, or up to 64 hexadecimal digits after 0x")]
    Seed,
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
    #[error(
        "must be SOURCE:DIR[:ro] with an absolute DIR, as in ./src:/src or /etc/hosts:/etc/hosts:ro, or such a DIR alone"
    )]
    Volume,
    #[error("volumes cannot have names yet: write ./NAME for a folder here, or an absolute path")]
    NamedVolume,
    #[error("the only options of a volume are ro and rw")]
    VolumeOption,
    #[error(
        "must be a disk's absolute path, then the container's or the access (of r, w and m) or both, as in /dev/sdb:/dev/xvda:r"
    )]
    Device,
    #[error("must be none, user, or netns:PATH, as in netns:/run/netns/lab")]
    Network,
    #[error(
        "must be PORT:PORT, this host's and the container's, with an IPv4 address of this host before them or /udp \
         after them, as in 127.0.0.1:8080:80"
    )]
    Publish,
    #[error(
        "must be none, or HOST:PORT with commas between, where HOST is a name, an IPv4 address or an IPv6 address in \
         brackets, and PORT a number or * for all: as in example.org:443,192.0.2.7:*,[2001:db8::1]:53"
    )]
    Egress,
    #[error("may have 64 destinations at most")]
    EgressMany,
    #[error(
        "cannot have the host's own loopback, 0.0.0.0, broadcast or multicast: a sandbox never reaches them"
    )]
    EgressNear,
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

/// The memory of a container: as docker, no less than it takes to start one.
pub fn container_memory(text: &str) -> Result<Memory, ValueError> {
    match text.parse()? {
        Memory(..LEAST_MEMORY) => Err(ValueError::LittleMemory),
        memory => Ok(memory),
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

impl FromStr for ClockStart {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const EARLIEST: Duration = Duration::from_secs(86_400);
        const LATEST: Duration = Duration::from_secs(7_258_118_400);
        let time = match text.parse() {
            Ok(seconds) => UNIX_EPOCH.checked_add(Duration::from_secs(seconds)),
            Err(_) => text.parse().ok().map(|Timestamp(time)| time),
        };
        let possible = |time: &SystemTime| {
            time.duration_since(UNIX_EPOCH).is_ok_and(|t| (EARLIEST..LATEST).contains(&t))
        };
        time.filter(possible).map(|time| Self(Timestamp(time))).ok_or(ValueError::Clock)
    }
}

impl FromStr for Seed {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let mut bytes = [0; 32];
        let Some(digits) = text.strip_prefix("0x") else {
            let number: u64 = text.parse().map_err(|_| ValueError::Seed)?;
            bytes[24..].copy_from_slice(&number.to_be_bytes());
            return Ok(Self(bytes));
        };
        if !(1..=64).contains(&digits.len()) {
            return Err(ValueError::Seed);
        }
        let padded = format!("{digits:0>64}");
        for (byte, pair) in bytes.iter_mut().zip(padded.as_bytes().chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16).ok_or(ValueError::Seed);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(Self(bytes))
    }
}

/// `0x` and all its digits, without zeros before them.
impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        match digits.trim_start_matches('0') {
            "" => f.write_str("0x0"),
            digits => write!(f, "0x{digits}"),
        }
    }
}

impl Serialize for Seed {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
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
    fn starts_of_clocks() {
        for (text, seconds) in [
            ("86400", Some(86_400)),
            ("1980-01-01T00:00:00Z", Some(315_532_800)),
            ("1980-01-01T01:00:00+01:00", Some(315_532_800)),
            ("0", None),
            ("7258118400", None),
            ("18446744073709551615", None),
            ("-1", None),
            ("yesterday", None),
            ("1980-01-01", None),
        ] {
            let time = seconds.map(|s| ClockStart(Timestamp(UNIX_EPOCH + Duration::from_secs(s))));
            assert_eq!(text.parse().ok(), time, "{text}");
        }
    }

    #[test]
    fn seeds_are_numbers() {
        for (text, same) in [
            ("7", Some("0x7")),
            ("0x07", Some("0x7")),
            ("0", Some("0x0")),
            ("18446744073709551615", Some("0xffffffffffffffff")),
            ("0xABC", Some("0xabc")),
            (&format!("0x{}", "f".repeat(64)), Some(&*format!("0x{}", "f".repeat(64)))),
            ("18446744073709551616", None),
            (&format!("0x{}", "0".repeat(65)), None),
            ("0x", None),
            ("0x+1", None),
            ("0xä", None),
            ("abc", None),
            ("-1", None),
            ("", None),
        ] {
            let seed = text.parse::<Seed>().ok().map(|seed| seed.to_string());
            assert_eq!(seed.as_deref(), same, "{text}");
        }
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
