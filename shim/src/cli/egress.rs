//! `--egress`: the destinations that a sandbox may reach.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use super::values::ValueError;

/// Of one list.
pub const MAX_DESTINATIONS: usize = 64;
const NONE: &str = "none";
const ALL_PORTS: &str = "*";
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// `none`, or destinations with commas between them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Egress(pub Vec<Destination>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    pub host: Host,
    /// All of them if there is none.
    pub port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// In lower case, without a dot at its end.
    Name(String),
    Address(IpAddr),
}

impl FromStr for Egress {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == NONE {
            return Ok(Self(Vec::new()));
        }
        Self::of(text.split(','))
    }
}

impl Egress {
    fn of<'a>(destinations: impl Iterator<Item = &'a str>) -> Result<Self, ValueError> {
        let destinations = destinations.map(str::parse).collect::<Result<Vec<_>, _>>()?;
        if destinations.len() > MAX_DESTINATIONS {
            return Err(ValueError::EgressMany);
        }
        Ok(Self(destinations))
    }
}

/// As the configuration has it.
impl TryFrom<Vec<String>> for Egress {
    type Error = ValueError;

    fn try_from(destinations: Vec<String>) -> Result<Self, ValueError> {
        Self::of(destinations.iter().map(String::as_str))
    }
}

impl From<Egress> for Vec<String> {
    fn from(egress: Egress) -> Self {
        egress.0.iter().map(ToString::to_string).collect()
    }
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str(NONE);
        }
        let all: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&all.join(","))
    }
}

impl FromStr for Destination {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (host, port) = text.rsplit_once(':').ok_or(ValueError::Egress)?;
        let port = match port {
            ALL_PORTS => None,
            // `parse` would take a sign.
            port if port.bytes().all(|byte| byte.is_ascii_digit()) => match port.parse() {
                Ok(port @ 1..) => Some(port),
                _ => return Err(ValueError::Egress),
            },
            _ => return Err(ValueError::Egress),
        };
        Ok(Self { host: host.parse()?, port })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:")?,
            Host::Address(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Host::Address(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
        }
        match self.port {
            Some(port) => write!(f, "{port}"),
            None => f.write_str(ALL_PORTS),
        }
    }
}

impl FromStr for Host {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let in_brackets = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        let address = match in_brackets {
            Some(six) => Some(IpAddr::V6(six.parse().map_err(|_| ValueError::Egress)?)),
            None => text.parse().ok().map(IpAddr::V4),
        };
        match address.map(|address| address.to_canonical()) {
            Some(address) if is_elsewhere(address) => Ok(Self::Address(address)),
            Some(_) => Err(ValueError::EgressNear),
            None => {
                let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
                if is_name(&name) { Ok(Self::Name(name)) } else { Err(ValueError::Egress) }
            }
        }
    }
}

/// Whether it is one that a socket of the host leads away from the host by, or to an address of an interface of its.
pub fn is_elsewhere(address: IpAddr) -> bool {
    let own = match address {
        IpAddr::V4(address) => address.octets()[0] == 0 || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unspecified(),
    };
    !own && !address.is_loopback() && !address.is_multicast()
}

/// Letters, digits, dashes and underscores; what ends in a number is meant to be an address.
fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let mut labels = text.split('.');
    let sound = |label: &str| (1..=MAX_LABEL).contains(&label.len()) && label.bytes().all(plain);
    let number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    text.len() <= MAX_NAME
        && labels.clone().all(sound)
        && labels.next_back().is_some_and(|last| !number(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_names_or_addresses_with_ports() {
        let destination = |host, port| Destination { host, port };
        let name = |name: &str| Host::Name(name.into());
        let address = |text: &str| Host::Address(text.parse().unwrap());
        for (text, expected) in [
            ("example.org:443", destination(name("example.org"), Some(443))),
            ("Example.ORG.:*", destination(name("example.org"), None)),
            ("registry:5000", destination(name("registry"), Some(5000))),
            ("192.0.2.7:65535", destination(address("192.0.2.7"), Some(65535))),
            ("169.254.169.254:80", destination(address("169.254.169.254"), Some(80))),
            ("[2001:DB8::1]:53", destination(address("2001:db8::1"), Some(53))),
            ("[::ffff:192.0.2.7]:1", destination(address("192.0.2.7"), Some(1))),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        let list = "example.org:443,192.0.2.7:*,[2001:db8::1]:53";
        assert_eq!(list.parse::<Egress>().unwrap().to_string(), list);
        assert_eq!("none".parse::<Egress>(), Ok(Egress(Vec::new())));
        assert_eq!(Egress(Vec::new()).to_string(), "none");
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let long = format!("{}:1", "a".repeat(64));
        let longer = format!("{}a:1", "a.".repeat(127));
        for text in [
            "",
            ",",
            "a",
            "a:",
            ":1",
            "a:0",
            "a:65536",
            "a:+1",
            "a:1,",
            "a:1, b:2",
            "a:1,none",
            "a b:1",
            "*.example.org:1",
            "a..b:1",
            ".a:1",
            "2001:db8::1:53",
            "[2001:db8::1]",
            "[192.0.2.7]:1",
            "[a]:1",
            "300.1.2.3:1",
            "10.0.0:1",
            "10:1",
            "http://a:1",
            "a:http",
            &long,
            &longer,
        ] {
            assert_eq!(text.parse::<Egress>(), Err(ValueError::Egress), "{text}");
        }
        for near in [
            "127.0.0.1:1",
            "127.9.9.9:1",
            "0.0.0.0:1",
            "0.1.2.3:1",
            "255.255.255.255:1",
            "224.0.0.1:1",
            "[::1]:1",
            "[::]:1",
            "[ff02::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            assert_eq!(near.parse::<Egress>(), Err(ValueError::EgressNear), "{near}");
        }
        let many = vec!["a:1"; 65].join(",");
        assert_eq!(many.parse::<Egress>(), Err(ValueError::EgressMany));
        assert!(many[4..].parse::<Egress>().is_ok());
    }
}
