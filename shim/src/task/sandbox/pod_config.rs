//! `runtime.v1.PodSandboxConfig` of CRI, as far as it says what a sandbox is (cri-api, runtime/v1/api.proto).

use std::{collections::HashMap, io};

use containerd_shim_protos::protobuf::{Result, well_known_types::any::Any};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use crate::task::fields::{Field, entry, fields};

/// The type of CreateSandbox's options, where CRI calls it.
const NAME: &str = "runtime.v1.PodSandboxConfig";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodConfig {
    pub hostname: String,
    /// `None` is as on this host.
    pub dns: Option<Dns>,
    pub annotations: HashMap<String, String>,
    pub sysctls: HashMap<String, String>,
    pub users: Option<Users>,
    /// The sum of its containers' limits; 0 is none.
    pub cpu_period: u64,
    pub cpu_quota: u64,
    pub memory: u64,
}

/// UserNamespace: whom the pod's users are. The maps are as the OCI specification has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    pub uids: Vec<LinuxIdMapping>,
    pub gids: Vec<LinuxIdMapping>,
}

impl Users {
    /// NamespaceMode POD, the default.
    const POD: u64 = 0;

    /// `None` for those of the host.
    fn parse(message: &[u8]) -> Result<Option<Self>> {
        let (mut users, mut mode) = (Self::default(), Self::POD);
        for (number, field) in fields(message)? {
            match number {
                1 => mode = field.number(),
                2 => users.uids.push(mapping(&field.bytes())?),
                3 => users.gids.push(mapping(&field.bytes())?),
                _ => {}
            }
        }
        Ok((mode == Self::POD).then_some(users))
    }
}

/// IDMapping
fn mapping(message: &[u8]) -> Result<LinuxIdMapping> {
    // The OCI specification has them in another order.
    let [mut host, mut container, mut size] = [0; 3];
    for (number, field) in fields(message)? {
        let value = u32::try_from(field.number()).unwrap_or(u32::MAX);
        match number {
            1 => host = value,
            2 => container = value,
            3 => size = value,
            _ => {}
        }
    }
    let mapping = LinuxIdMappingBuilder::default().host_id(host).container_id(container).size(size);
    mapping.build().map_err(|e| io::Error::other(e).into())
}

/// DNSConfig: what resolv.conf(5) is to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

impl Dns {
    fn parse(message: &[u8]) -> Result<Self> {
        let mut dns = Self::default();
        for (number, field) in fields(message)? {
            match number {
                1 => dns.servers.push(field.text()),
                2 => dns.searches.push(field.text()),
                3 => dns.options.push(field.text()),
                _ => {}
            }
        }
        Ok(dns)
    }

    pub fn resolv_conf(&self) -> String {
        let line = |name: &str, words: &[String]| match words {
            [] => String::new(),
            words => format!("{name} {}\n", words.join(" ")),
        };
        let servers: String =
            self.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        line("search", &self.searches) + &servers + &line("options", &self.options)
    }
}

impl PodConfig {
    /// `None` for options that are something else.
    pub fn parse(options: &Any) -> Result<Option<Self>> {
        if options.type_url.rsplit('/').next() != Some(NAME) {
            return Ok(None);
        }
        let mut config = Self::default();
        for (number, field) in fields(&options.value)? {
            match number {
                2 => config.hostname = field.text(),
                4 => config.dns = Some(Dns::parse(&field.bytes())?),
                7 => config.annotations.extend([entry(&field.bytes())?]),
                8 => config.linux(&field.bytes())?,
                _ => {}
            }
        }
        Ok(Some(config))
    }

    /// LinuxPodSandboxConfig
    fn linux(&mut self, message: &[u8]) -> Result<()> {
        for (number, field) in fields(message)? {
            match number {
                2 => self.security(&field.bytes())?,
                3 => self.sysctls.extend([entry(&field.bytes())?]),
                5 => self.resources(&field.bytes())?,
                _ => {}
            }
        }
        Ok(())
    }

    /// LinuxSandboxSecurityContext, of which NamespaceOption is read.
    fn security(&mut self, message: &[u8]) -> Result<()> {
        for (_, options) in fields(message)?.into_iter().filter(|(number, _)| *number == 1) {
            let options = fields(&options.bytes())?;
            for (_, users) in options.into_iter().filter(|(number, _)| *number == 5) {
                self.users = Users::parse(&users.bytes())?;
            }
        }
        Ok(())
    }

    /// LinuxContainerResources
    fn resources(&mut self, message: &[u8]) -> Result<()> {
        // -1 is no limit either.
        let positive = |field: &Field| u64::try_from(field.number().cast_signed()).unwrap_or(0);
        for (number, field) in fields(message)? {
            match number {
                1 => self.cpu_period = positive(&field),
                2 => self.cpu_quota = positive(&field),
                4 => self.memory = positive(&field),
                _ => {}
            }
        }
        Ok(())
    }
}
