//! Options of `ampoule run` that shape the container, with docker's names and meanings.

use std::{path::PathBuf, str::FromStr};

use clap::Args;
use oci_spec::runtime::{Capability, PosixRlimitType};

use super::{DeviceOption, Memory, Volume, values::ValueError};

#[derive(Debug, Args)]
#[command(next_help_heading = "Container")]
pub struct ContainerArgs {
    /// Put a PID 1 before the command, which reaps processes and passes signals on
    #[arg(long)]
    pub init: bool,
    /// Read variables from a file: NAME=VALUE in a line, or NAME alone for its value here
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Host name [default: the sandbox's name]
    #[arg(long, value_name = "NAME", value_parser = hostname)]
    pub hostname: Option<String>,
    /// Run this instead of the image's entrypoint and command; empty for neither
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Give a capability, as NET_ADMIN, or ALL
    #[arg(long, value_name = "CAP")]
    pub cap_add: Vec<CapabilityName>,
    /// Take a capability away, or ALL
    #[arg(long, value_name = "CAP")]
    pub cap_drop: Vec<CapabilityName>,
    /// All capabilities, no seccomp filter, every device of the guest, /proc and /sys writable; inside the VM still
    #[arg(long)]
    pub privileged: bool,
    /// seccomp=FILE, seccomp=unconfined, no-new-privileges or systempaths=unconfined
    #[arg(long, value_name = "OPTION")]
    pub security_opt: Vec<SecurityOption>,
    /// Set a resource limit, as nofile=1024:4096; -1 is unlimited
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub ulimit: Vec<Ulimit>,
    /// Set a sysctl of the sandbox's own kernel, as net.core.somaxconn=1024
    #[arg(long, value_name = "NAME=VALUE")]
    pub sysctl: Vec<Sysctl>,
    /// Mount a tmpfs, as /run or /tmp:size=64m,mode=1777
    #[arg(long, value_name = "DIR[:OPTIONS]")]
    pub tmpfs: Vec<Tmpfs>,
    /// Share a directory or a file of this host with the container, ro for reading only; or DIR alone: a directory of the
    /// sandbox's own scratch disk, not in the overlay that the rest of the root is, as the image's own volumes are
    #[arg(short, long, value_name = "[SOURCE:]DIR[:ro]")]
    pub volume: Vec<Volume>,
    /// Give the container a disk of this host, as /dev/sdb:/dev/xvda; r for reading only
    #[arg(long, value_name = "DISK[:PATH][:rwm]")]
    pub device: Vec<DeviceOption>,
    /// Size of /dev/shm
    #[arg(long, value_name = "SIZE", default_value = "64m")]
    pub shm_size: Memory,
}

/// A capability with or without `CAP_`, in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityName {
    All,
    One(Capability),
}

impl FromStr for CapabilityName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let name = text.to_ascii_uppercase();
        let name = name.strip_prefix("CAP_").unwrap_or(&name);
        if name == "ALL" {
            return Ok(Self::All);
        }
        name.parse().map(Self::One).map_err(|_| ValueError::Capability)
    }
}

/// One of docker's security options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecurityOption {
    SeccompUnconfined,
    SeccompFile(PathBuf),
    NoNewPrivileges(bool),
    /// No masked and no read-only paths.
    SystemPathsUnconfined,
}

impl FromStr for SecurityOption {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (name, value) = match text.split_once(['=', ':']) {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        match (name, value) {
            ("seccomp", Some("unconfined")) => Ok(Self::SeccompUnconfined),
            ("seccomp", Some(file)) if !file.is_empty() => Ok(Self::SeccompFile(file.into())),
            ("no-new-privileges", None | Some("true")) => Ok(Self::NoNewPrivileges(true)),
            ("no-new-privileges", Some("false")) => Ok(Self::NoNewPrivileges(false)),
            ("systempaths", Some("unconfined")) => Ok(Self::SystemPathsUnconfined),
            _ => Err(ValueError::SecurityOption),
        }
    }
}

/// A resource limit (getrlimit(2)); `u64::MAX` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ulimit {
    pub kind: PosixRlimitType,
    pub soft: u64,
    pub hard: u64,
}

impl FromStr for Ulimit {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (name, limits) = text.split_once('=').ok_or(ValueError::Ulimit)?;
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let number = |text| match text {
            "-1" | "unlimited" => Ok(u64::MAX),
            number => number.parse().map_err(|_| ValueError::Ulimit),
        };
        let kind = format!("RLIMIT_{}", name.to_ascii_uppercase());
        let kind = kind.parse().map_err(|_| ValueError::Ulimit)?;
        let limit = Self { kind, soft: number(soft)?, hard: number(hard)? };
        if limit.soft <= limit.hard { Ok(limit) } else { Err(ValueError::Ulimit) }
    }
}

/// A sysctl of the guest's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    pub name: String,
    pub value: String,
}

impl FromStr for Sysctl {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => {
                Ok(Self { name: name.into(), value: value.into() })
            }
            _ => Err(ValueError::Sysctl),
        }
    }
}

/// A tmpfs in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tmpfs {
    pub destination: String,
    pub options: Vec<String>,
}

impl FromStr for Tmpfs {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (destination, options) = text.split_once(':').unwrap_or((text, ""));
        if !destination.starts_with('/') {
            return Err(ValueError::Tmpfs);
        }
        let options = options.split(',').filter(|o| !o.is_empty()).map(String::from).collect();
        Ok(Self { destination: destination.into(), options })
    }
}

/// A name the kernel takes, in the characters of RFC 1123.
fn hostname(text: &str) -> Result<String, ValueError> {
    let fits = (1..=crate::run_spec::MAX_HOSTNAME).contains(&text.len());
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    if fits && plain { Ok(text.into()) } else { Err(ValueError::Hostname) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_as_docker_reads_them() {
        for text in ["NET_ADMIN", "net_admin", "CAP_NET_ADMIN", "cap_net_admin"] {
            assert_eq!(text.parse(), Ok(CapabilityName::One(Capability::NetAdmin)), "{text}");
        }
        assert_eq!("all".parse(), Ok(CapabilityName::All));
        for text in ["", "NET", "CAP_", "CAP_CAP_CHOWN"] {
            assert_eq!(text.parse::<CapabilityName>(), Err(ValueError::Capability), "{text}");
        }
    }

    #[test]
    fn security_options() {
        use SecurityOption::*;
        for (text, option) in [
            ("seccomp=unconfined", Some(SeccompUnconfined)),
            ("seccomp:unconfined", Some(SeccompUnconfined)),
            ("seccomp=/x/p.json", Some(SeccompFile("/x/p.json".into()))),
            ("no-new-privileges", Some(NoNewPrivileges(true))),
            ("no-new-privileges:false", Some(NoNewPrivileges(false))),
            ("systempaths=unconfined", Some(SystemPathsUnconfined)),
            ("seccomp=", None),
            ("apparmor=docker-default", None),
            ("", None),
        ] {
            assert_eq!(text.parse().ok(), option, "{text}");
        }
    }

    #[test]
    fn limits_sysctls_and_mounts() {
        let limit = |soft, hard| Ulimit { kind: PosixRlimitType::RlimitNofile, soft, hard };
        for (text, expected) in [
            ("nofile=5", Some(limit(5, 5))),
            ("nofile=5:-1", Some(limit(5, u64::MAX))),
            ("NOFILE=5:9", Some(limit(5, 9))),
            ("nofile=9:5", None),
            ("nofile", None),
            ("nofiles=1", None),
            ("nofile=x", None),
        ] {
            assert_eq!(text.parse().ok(), expected, "{text}");
        }
        let sysctl = "a.b=c=d".parse::<Sysctl>().unwrap();
        assert_eq!((&*sysctl.name, &*sysctl.value), ("a.b", "c=d"));
        assert!("=x".parse::<Sysctl>().is_err() && "x".parse::<Sysctl>().is_err());
        let tmpfs = "/run:size=1m,exec".parse::<Tmpfs>().unwrap();
        assert_eq!((&*tmpfs.destination, tmpfs.options.len()), ("/run", 2));
        assert!("run".parse::<Tmpfs>().is_err());
        assert!(hostname("web-1.local").is_ok());
        for bad in ["", "a b", "a\n", &"x".repeat(65)] {
            assert!(hostname(bad).is_err(), "{bad:?}");
        }
    }
}
