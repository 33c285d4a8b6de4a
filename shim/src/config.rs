//! `config.toml`: what the administrator and the user say once for all runs. Read only by what needs it.
//!
//! ```toml
//! [registries."docker.io"]
//! mirrors = ["mirror.example.org", "cache.lan:5000"]   # asked first, in this order
//!
//! [registries."cache.lan:5000"]
//! http = true                                          # plain HTTP; the default for localhost only
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// More than this is no configuration.
const MAX_SIZE: u64 = 1 << 20;

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// By `HOST` or `HOST:PORT`, as image names have it.
    pub registries: BTreeMap<String, Registry>,
}

/// What is to be known of one registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Hosts that have its images too.
    pub mirrors: Vec<String>,
    pub http: Option<bool>,
}

/// Where the images of a registry can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub host: String,
    /// Without TLS.
    pub http: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration {path} cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("the configuration {path} is wrong in line {line}: {message}")]
    Parse { path: PathBuf, line: usize, message: String },
}

impl Config {
    /// Reads those of `paths` that are there; a registry of a later file replaces that of an earlier one.
    pub fn load(paths: &[PathBuf]) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        for path in paths {
            match read(path) {
                Ok(text) => config.registries.extend(parse(path, &text)?.registries),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(ConfigError::Read { path: path.clone(), source }),
            }
        }
        Ok(config)
    }

    /// Where to ask for images of `domain` before it is asked itself.
    pub fn mirrors(&self, domain: &str) -> Vec<Endpoint> {
        let mirrors = self.registries.get(domain).map_or(&[][..], |registry| &registry.mirrors);
        mirrors.iter().map(|host| self.endpoint(host)).collect()
    }

    pub fn endpoint(&self, host: &str) -> Endpoint {
        Endpoint { host: host.into(), http: self.is_http(host) }
    }

    fn is_http(&self, host: &str) -> bool {
        let said = self.registries.get(host).and_then(|registry| registry.http);
        said.unwrap_or_else(|| is_local(host))
    }
}

/// As docker: what does not leave this machine needs no TLS.
fn is_local(host: &str) -> bool {
    let host = host.split(':').next().unwrap_or_default();
    host == "localhost" || host.parse().is_ok_and(|ip: std::net::Ipv4Addr| ip.is_loopback())
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_SIZE).read_to_string(&mut text)?;
    Ok(text)
}

fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let at = error.span().map_or(0, |span| span.start);
        let line = 1 + text.bytes().take(at).filter(|&byte| byte == b'\n').count();
        let message = error.message().replace('\n', "; ");
        ConfigError::Parse { path: path.into(), line, message }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, ConfigError> {
        parse(Path::new("/c"), text)
    }

    fn endpoint(host: &str, http: bool) -> Endpoint {
        Endpoint { host: host.into(), http }
    }

    #[test]
    fn mirrors_come_first_and_plain_http_is_said_or_local() {
        let text = "[registries.'docker.io']\nmirrors = ['m.lan:5000', 'localhost:1']\n\
                    [registries.'m.lan:5000']\nhttp = true\n[registries.'127.0.0.1:2']\nhttp = false\n";
        let config = parsed(text).unwrap();
        let mirrors = [endpoint("m.lan:5000", true), endpoint("localhost:1", true)];
        assert_eq!(config.mirrors("docker.io"), mirrors);
        for (host, http) in [
            ("docker.io", false),
            ("ghcr.io", false),
            ("127.0.0.1:2", false),
            ("127.0.0.1:3", true),
            ("localhost", true),
            ("localhost.example.org", false),
        ] {
            assert_eq!(config.endpoint(host), endpoint(host, http));
        }
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, line, part) in [
            ("\n[registry]\n", 2, "registry"),
            ("[registries.'a']\nmirrors = []\nhtpp = true\n", 3, "htpp"),
            ("[registries.'a']\nhttp = 'yes'\n", 2, "boolean"),
            ("[", 1, ""),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.starts_with("the configuration /c is wrong"), "{error}");
            assert!(error.contains(&format!("line {line}:")) && error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_later_file_wins_and_a_missing_one_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let one = file("one", "[registries.a]\nhttp = true\n[registries.b]\nhttp = true\n");
        let two = file("two", "[registries.b]\nhttp = false\n");
        let config = Config::load(&[one, two, "/no/such/file".into()]).unwrap();
        assert_eq!((config.is_http("a"), config.is_http("b")), (true, false));
        assert!(Config::load(&[folder.path().into()]).is_err());
    }
}
