//! `ampoule run --network`: from the choice to a network, and the container's `/etc/resolv.conf` with it.

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    path::PathBuf,
};

use oci_spec::runtime::{MountBuilder, Spec};

use super::RunError;
use crate::{
    cli::{NetworkArgs, NetworkChoice, Publish},
    config::{Config, DefaultNetwork, SandboxSettings},
    network::{self, Network, NetworkError, Room},
    pace::Pace,
    paths::Paths,
    sandbox::HostFile,
};

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// What a mount of the copy is known by, which no path of a volume is.
const SOURCE: &str = "resolv.conf of the network";

/// Why a sandbox does not get its network.
#[derive(Debug, thiserror::Error)]
pub enum RunNetworkError {
    #[error("--publish takes --network user: ports lead nowhere without it")]
    Publish,
    #[error("--egress takes --network user: what leaves by {network} is for that to say")]
    Egress { network: NetworkChoice },
    #[error(
        "--publish {port}: answers by UDP would leave to whoever asked, who is not among the destinations of --egress"
    )]
    PublishUdp { port: Publish },
    #[error("network namespace {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("network namespace {}: no interface but loopback is up there", path.display())]
    Empty { path: PathBuf },
    #[error("--network {choice}")]
    Join { choice: NetworkChoice, source: NetworkError },
}

impl RunNetworkError {
    /// What it is about.
    pub fn object(&self) -> String {
        match self {
            Self::Publish | Self::PublishUdp { .. } => "--publish".into(),
            Self::Egress { .. } => "--egress".into(),
            Self::Open { path, .. } | Self::Empty { path } => path.display().to_string(),
            Self::Join { choice, .. } => format!("--network {choice}"),
        }
    }

    /// The way out.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Publish => Some("add --network user"),
            Self::Egress { network: NetworkChoice::None } => {
                Some("add --network user, or leave out --egress: nothing leaves without a network")
            }
            Self::Egress { .. } => Some("filters on the host's end of a veth hold for the guest"),
            Self::PublishUdp { .. } => Some("publish a TCP port, or leave out --egress"),
            Self::Open { .. } => Some("`ip netns list` lists those of /run/netns"),
            Self::Empty { .. } => Some("bring one up there first, or use --network none"),
            Self::Join { choice, source } => match (choice, source) {
                (_, NetworkError::Egress(_, e)) if is_denied(e) => {
                    Some("that takes root; without it --network none lets nothing leave")
                }
                (_, NetworkError::Egress(..)) => Some(
                    "it takes root, Linux 5.10 with BPF, and cgroup v2 mounted for writing; --network none lets nothing leave",
                ),
                (_, NetworkError::NoPasst) => Some("install Debian's package `passt`"),
                (NetworkChoice::Namespace(_), NetworkError::Host(_, e)) if is_denied(e) => {
                    Some("that takes root; --network user does not")
                }
                (NetworkChoice::User, NetworkError::Host(_, e)) if is_denied(e) => Some(
                    "ordinary users need /dev/net/tun, which udev opens to all, and user namespaces of their own",
                ),
                _ => None,
            },
        }
    }
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// Adds what the configuration says, as far as the command line does not.
pub fn complete(args: &mut NetworkArgs, paths: &Paths) -> Result<(), RunError> {
    let settled = |choice: &NetworkChoice| *choice != NetworkChoice::User || args.egress.is_some();
    if args.network.as_ref().is_some_and(settled) {
        return Ok(());
    }
    let SandboxSettings { network, egress, .. } = Config::load(&paths.config)?.sandbox;
    let choice = args.network.get_or_insert(match network {
        DefaultNetwork::None => NetworkChoice::None,
        DefaultNetwork::User => NetworkChoice::User,
    });
    if *choice == NetworkChoice::User && args.egress.is_none() {
        args.egress = egress;
    }
    Ok(())
}

/// Refuses what makes no sense, before anything is done.
pub fn check(args: &NetworkArgs) -> Result<(), RunError> {
    let is_user = args.choice() == NetworkChoice::User;
    let udp = args.publish.iter().find(|port| port.udp);
    match (&args.egress, udp) {
        _ if !is_user && !args.publish.is_empty() => Err(RunNetworkError::Publish.into()),
        (Some(_), _) if !is_user => Err(RunNetworkError::Egress { network: args.choice() }.into()),
        (Some(_), Some(port)) => Err(RunNetworkError::PublishUdp { port: port.clone() }.into()),
        _ => Ok(()),
    }
}

/// Makes or joins it; the latter with spare devices as far as there is room for so many.
pub async fn connect(
    args: &NetworkArgs,
    devices: u8,
    vcpus: u8,
    pace: Pace,
) -> Result<Option<Network>, RunError> {
    let choice = args.choice();
    let NetworkArgs { publish: ports, egress, .. } = args.clone();
    let connecting = tokio::task::spawn_blocking(move || {
        let failed = |source| RunNetworkError::Join { choice: choice.clone(), source };
        match &choice {
            NetworkChoice::None => Ok(None),
            NetworkChoice::User => {
                Network::user(&ports, egress.as_ref(), pace).map(Some).map_err(failed)
            }
            NetworkChoice::Namespace(path) => {
                let path = path.clone();
                let open = |source| RunNetworkError::Open { path: path.clone(), source };
                let namespace = File::open(&path).map_err(open)?;
                let room = Room { devices, vcpus, ..Room::default() };
                let joined = Network::join(&namespace, room).map_err(failed)?;
                let joined = joined.connects().then_some(joined);
                joined.map(Some).ok_or(RunNetworkError::Empty { path })
            }
        }
    });
    let connected = connecting.await;
    Ok(connected.map_err(|e| RunError::Host("look at the network", e.into()))??)
}

/// Gives the container a `/etc/resolv.conf` that fits its network, unless it has a volume there.
pub fn resolv_conf(args: &NetworkArgs, spec: &mut Spec) -> Vec<HostFile> {
    let host = fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    let content = match args.choice() {
        NetworkChoice::None => return Vec::new(),
        NetworkChoice::User if args.egress.is_some() => {
            format!("nameserver {}\n", network::LISTED_DNS)
        }
        NetworkChoice::User => with_servers(&host, &network::dns_servers(&host)),
        NetworkChoice::Namespace(_) => host,
    };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    if mounts.iter().any(|mount| mount.destination().as_os_str() == RESOLV_CONF) {
        return Vec::new();
    }
    let mount = MountBuilder::default()
        .destination(RESOLV_CONF)
        .source(SOURCE)
        .typ("bind")
        .options(vec!["bind".into(), "rprivate".into()])
        .build();
    mounts.extend(mount);
    spec.set_mounts(Some(mounts));
    vec![HostFile { source: SOURCE.into(), content: content.into(), mode: 0o644 }]
}

/// The host's search list and options, with the servers that stand for the host's.
fn with_servers(host: &str, servers: &[IpAddr]) -> String {
    let kept = host.lines().filter(|line| line.starts_with(['s', 'o'])).map(String::from);
    let servers = servers.iter().map(|server| format!("nameserver {server}"));
    kept.chain(servers).map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::Environment;

    #[test]
    fn the_configuration_says_what_the_command_line_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        let mut paths = Paths::new(&Environment::current());
        paths.config = vec![file.clone()];
        let list = |text: &str| Some(text.parse().unwrap());
        let completed = |network: Option<NetworkChoice>, egress| {
            let mut args = NetworkArgs { network, publish: Vec::new(), egress };
            complete(&mut args, &paths).unwrap();
            (args.choice(), args.egress)
        };
        let (none, user) = (NetworkChoice::None, NetworkChoice::User);
        assert_eq!(completed(None, None), (none.clone(), None));
        fs::write(&file, "[sandbox]\nnetwork = 'user'\negress = ['a:1', 'b:*']\n").unwrap();
        assert_eq!(completed(None, None), (user.clone(), list("a:1,b:*")));
        assert_eq!(completed(Some(user.clone()), None), (user.clone(), list("a:1,b:*")));
        assert_eq!(completed(None, list("c:3")), (user.clone(), list("c:3")));
        assert_eq!(completed(Some(none.clone()), None), (none.clone(), None));
        fs::write(&file, "[sandbox]\nnetwork = 'none'\negress = []\n").unwrap();
        assert_eq!(completed(None, None), (none, None));
        assert_eq!(completed(Some(user.clone()), None), (user, list("none")));
    }

    #[test]
    fn names_are_looked_up_at_the_gateways_server() {
        let host = "# x\nnameserver 127.0.0.53\nsearch lan\noptions edns0\nsortlist x\n";
        let guests = "search lan\noptions edns0\nsortlist x\nnameserver 10.0.2.3\n";
        assert_eq!(with_servers(host, &[[10, 0, 2, 3].into()]), guests);
    }
}
