//! `config.toml`: what the administrator and the user say once for all sandboxes. Read only by what needs it.
//!
//! ```toml
//! annotations = ["sandbox.memory"]                     # settings a pod may make for itself
//! console = true                                       # `ampoule console` may be used; the default is false
//! strict = false                                       # fields of a spec that protect nobody and that nobody sees to
//!                                                      # are logged and ignored; the default is to refuse them
//!
//! [sandbox]                                            # what a sandbox is when containerd does not say
//! memory = "512m"
//! vcpus = 1
//! boot_timeout = 120                                   # seconds, for a slow or loaded host: every other limit of a
//!                                                      # start grows with it, here four times; the default is 30
//! network = "user"                                     # of `ampoule run`: what --network and --egress are that are not
//! egress = ["example.org:443", "192.0.2.7:*"]          # given; the defaults are "none", and no list: nothing is held back
//!
//! [store]
//! snapshots = "20g"                                    # most that containerd's converted snapshots may take
//!
//! [registries."docker.io"]
//! mirrors = ["mirror.example.org", "cache.lan:5000"]   # asked first, in this order
//!
//! [registries."cache.lan:5000"]
//! http = true                                          # plain HTTP; the default for localhost only
//! ```
//!
//! Several sources are laid over each other, setting by setting: see [`Layers`].

mod layers;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
};

use ampoule_vmm_api::config::MAX_VCPUS;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use crate::{
    cli::{Egress, Memory},
    pace::BOOT_TIMEOUT,
};
pub use layers::{ANNOTATION_PREFIX, Layers};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Settings that an annotation of a pod may make, by their names as `sandbox.memory`.
    pub annotations: BTreeSet<String>,
    /// Whether there may be shells in guests themselves.
    pub console: bool,
    /// Whether a spec is refused for fields that nobody sees to even where no protection is lost with them.
    pub strict: bool,
    pub sandbox: SandboxSettings,
    pub store: StoreSettings,
    /// By `HOST` or `HOST:PORT`, as image names have it.
    pub registries: BTreeMap<String, Registry>,
}

/// What a sandbox is that containerd asks for, as far as neither the OCI spec nor the pod says; and, of that of an
/// `ampoule run`, the network, as far as the command line does not.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxSettings {
    /// What its containers may use together; the VM has some more for its kernel.
    pub memory: Memory,
    /// 1 to [`MAX_VCPUS`].
    #[serde(deserialize_with = "vcpus")]
    pub vcpus: u8,
    /// Room for what each container writes to its root file system.
    pub scratch_size: Memory,
    /// Longest time in seconds the VM may take to boot. It says how slow this host may be, or how loaded: so many times
    /// as [`BOOT_TIMEOUT`] is in it (rounded up) all later limits of the sandbox are as long as usual: of the agent's
    /// calls, disks, file server, and loggers.
    pub boot_timeout: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_image: Option<PathBuf>,
    pub network: DefaultNetwork,
    /// With the network `user`, where nothing else leaves then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
}

/// What needs no further word, of what `--network` takes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DefaultNetwork {
    #[default]
    None,
    User,
}

/// What the image store may keep.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreSettings {
    /// Root file systems made of containerd's snapshots: when they take more, those go that no sandbox uses and
    /// that were used the longest time ago.
    pub snapshots: Memory,
}

/// What is to be known of one registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Hosts that have its images too.
    pub mirrors: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
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
    #[error("the configuration {origin} is wrong in line {line}: `{text}`: {message}")]
    Parse { origin: String, line: usize, text: String, message: String },
    #[error(
        "annotation {name}: not allowed: `annotations` in config.toml does not list {setting:?}"
    )]
    Annotation { name: String, setting: String },
    #[error("annotation {name} is wrong: {message}")]
    Value { name: String, message: String },
}

impl Default for Config {
    fn default() -> Self {
        let sizes = ["sandbox.memory", "sandbox.scratch_size", "sandbox.vcpus"];
        Self {
            annotations: sizes.map(String::from).into(),
            console: false,
            strict: true,
            sandbox: SandboxSettings::default(),
            store: StoreSettings::default(),
            registries: BTreeMap::new(),
        }
    }
}

impl Default for SandboxSettings {
    fn default() -> Self {
        Self {
            memory: Memory(512 << 20),
            vcpus: 1,
            scratch_size: Memory(8 << 30),
            boot_timeout: BOOT_TIMEOUT,
            kernel: None,
            guest_image: None,
            network: DefaultNetwork::default(),
            egress: None,
        }
    }
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self { snapshots: Memory(20 << 30) }
    }
}

fn vcpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    let number = u64::deserialize(deserializer)?;
    let vcpus = u8::try_from(number).ok().filter(|n| (1..=MAX_VCPUS).contains(n));
    vcpus.ok_or_else(|| D::Error::custom(format!("must be 1 to {MAX_VCPUS}, not {number}")))
}

impl ConfigError {
    /// The file or the annotation.
    pub fn object(&self) -> String {
        match self {
            Self::Read { path, .. } => path.display().to_string(),
            Self::Parse { origin: name, .. }
            | Self::Annotation { name, .. }
            | Self::Value { name, .. } => name.clone(),
        }
    }
}

impl Config {
    /// What the files say, and those in the folders beside them.
    pub fn load(paths: &[PathBuf]) -> Result<Self, ConfigError> {
        Ok(Layers::read(paths)?.config())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(host: &str, http: bool) -> Endpoint {
        Endpoint { host: host.into(), http }
    }

    #[test]
    fn mirrors_come_first_and_plain_http_is_said_or_local() {
        let text = "[registries.'docker.io']\nmirrors = ['m.lan:5000', 'localhost:1']\n\
                    [registries.'m.lan:5000']\nhttp = true\n[registries.'127.0.0.1:2']\nhttp = false\n";
        let config: Config = toml::from_str(text).unwrap();
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
}
