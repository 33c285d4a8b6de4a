//! `--network` and `--publish`: what a sandbox is connected to.

use std::{fmt, net::Ipv4Addr, path::PathBuf, str::FromStr};

use clap::Args;
use serde::{Serialize, Serializer};

use super::{egress::Egress, values::ValueError};

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    /// none: loopback only; user: what this user reaches, by passt(1); netns:PATH: the interfaces of a network namespace
    /// [default: the configuration's sandbox.network, else none]
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<NetworkChoice>,
    /// Let a port of this host lead to one of the container; takes --network user
    #[arg(short, long, value_name = "[ADDRESS:]PORT:PORT[/udp]")]
    pub publish: Vec<Publish>,
    /// Let nothing leave but for these destinations, or none at all; takes --network user, and root; see below
    /// [default: the configuration's sandbox.egress, else no such list]
    #[arg(long, value_name = "HOST:PORT,...|none")]
    pub egress: Option<Egress>,
}

impl NetworkArgs {
    pub fn choice(&self) -> NetworkChoice {
        self.network.clone().unwrap_or_default()
    }
}

/// What a sandbox is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetworkChoice {
    #[default]
    None,
    User,
    Namespace(PathBuf),
}

impl FromStr for NetworkChoice {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "user" => Ok(Self::User),
            Some(("netns", path)) if !path.is_empty() => Ok(Self::Namespace(path.into())),
            _ => Err(ValueError::Network),
        }
    }
}

impl fmt::Display for NetworkChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::User => f.write_str("user"),
            Self::Namespace(path) => write!(f, "netns:{}", path.display()),
        }
    }
}

/// A port of this host that leads to one of the container, with docker's notation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// All addresses of the host if there is none.
    pub address: Option<Ipv4Addr>,
    pub host: u16,
    pub container: u16,
    pub udp: bool,
}

impl FromStr for Publish {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let udp = match protocol {
            "tcp" => false,
            "udp" => true,
            _ => return Err(ValueError::Publish),
        };
        let parts: Vec<&str> = ports.split(':').collect();
        let (address, host, container) = match parts[..] {
            [host, container] => (None, host, container),
            [address, host, container] => (Some(address), host, container),
            _ => return Err(ValueError::Publish),
        };
        let address = address.map(str::parse).transpose().map_err(|_| ValueError::Publish)?;
        Ok(Self { address, host: port(host)?, container: port(container)?, udp })
    }
}

fn port(text: &str) -> Result<u16, ValueError> {
    match text.parse() {
        Ok(1..) => text.parse().map_err(|_| ValueError::Publish),
        _ => Err(ValueError::Publish),
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address}:")?;
        }
        let protocol = if self.udp { "udp" } else { "tcp" };
        write!(f, "{}:{}/{protocol}", self.host, self.container)
    }
}

impl Serialize for Publish {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        let local = Some(Ipv4Addr::LOCALHOST);
        for (text, address, host, container, udp) in [
            ("8080:80", None, 8080, 80, false),
            ("8080:80/tcp", None, 8080, 80, false),
            ("53:5353/udp", None, 53, 5353, true),
            ("127.0.0.1:8080:80", local, 8080, 80, false),
        ] {
            assert_eq!(text.parse(), Ok(Publish { address, host, container, udp }), "{text}");
        }
        for text in ["", "80", "0:80", "80:0", "80:65536", "a:80", "80:80/sctp", "h:1:2", "1:2:3:4"]
        {
            assert_eq!(text.parse::<Publish>(), Err(ValueError::Publish), "{text}");
        }
    }

    #[test]
    fn networks_are_named_as_they_are_given() {
        for text in ["none", "user", "netns:/run/netns/a:b"] {
            assert_eq!(text.parse::<NetworkChoice>().unwrap().to_string(), text);
        }
        for text in ["", "host", "bridge", "netns", "netns:", "user:x"] {
            assert_eq!(text.parse::<NetworkChoice>(), Err(ValueError::Network), "{text}");
        }
    }
}
