//! What containerd sends to `start` on standard input, and in which dialect it wants the answer.
//!
//! | containerd | standard input | answer |
//! |---|---|---|
//! | 1.6, 1.7, 2.0 to 2.2 | the runtime's options as an `Any`, or nothing | the address, without a line end |
//! | 2.3 and later | `BootstrapParams` | `BootstrapResult` |
//!
//! Options parse as `BootstrapParams` too: the type's name as the id, the value as the namespace. So only the
//! right id and namespace make it those. JSON, which 1.7 and later take as well, would be an address for 1.6.

use std::path::PathBuf;

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel},
    shim::oci::Options,
};
use protobuf::{Enum, Message, well_known_types::any::Any};

use super::args::Args;
use crate::task::OPTIONS;

/// Version of the Task API from containerd 2 on: with it, members of a pod reach the pod's daemon without
/// another `start`.
const VERSION: i32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Plain,
    Bootstrap,
}

impl Dialect {
    /// All that `start` prints.
    pub fn reply(self, address: &str) -> protobuf::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(address.into()),
            Self::Bootstrap => BootstrapResult {
                version: VERSION,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..Default::default()
            }
            .write_to_bytes(),
        }
    }
}

/// A `start`, whichever way it was said.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub dialect: Dialect,
    /// containerd's gRPC socket.
    pub address: String,
    /// Where containerd takes events, if it says so here.
    pub ttrpc_address: Option<String>,
    pub socket_dir: Option<PathBuf>,
    pub debug: bool,
    /// The daemon is to run in this cgroup.
    pub cgroup: Option<String>,
    /// Of this runtime: where its configuration is.
    pub options: Option<Any>,
}

impl Request {
    pub fn new(args: &Args, input: &[u8]) -> Self {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params) if params.instance_id == args.id && params.namespace == args.namespace => {
                Self::bootstrap(args, params)
            }
            _ => {
                let options = Any::parse_from_bytes(input).ok();
                Self {
                    dialect: Dialect::Plain,
                    address: args.address.clone(),
                    ttrpc_address: None,
                    socket_dir: None,
                    debug: args.debug,
                    cgroup: options.as_ref().and_then(cgroup),
                    options: options.filter(is_ours),
                }
            }
        }
    }

    fn bootstrap(args: &Args, params: BootstrapParams) -> Self {
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let options: Vec<Any> =
            params.extensions.into_iter().filter_map(|e| e.value.into_option()).collect();
        let debug = params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value();
        Self {
            dialect: Dialect::Bootstrap,
            cgroup: options.iter().find_map(cgroup),
            options: options.into_iter().find(is_ours),
            address: given(params.containerd_grpc_address).unwrap_or_else(|| args.address.clone()),
            ttrpc_address: given(params.containerd_ttrpc_address),
            socket_dir: params.socket_dir.and_then(given).map(PathBuf::from),
            debug: args.debug || debug,
        }
    }
}

fn is_ours(options: &Any) -> bool {
    options.type_url.ends_with(OPTIONS)
}

/// The cgroup for shims, of options that are those of containerd's own shim.
fn cgroup(options: &Any) -> Option<String> {
    let name = options.type_url.rsplit('/').next()?;
    let options = (name == "containerd.runc.v1.Options").then_some(&options.value)?;
    let options = Options::parse_from_bytes(options).ok()?;
    Some(options.shim_cgroup).filter(|cgroup| !cgroup.is_empty())
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;

    use super::*;

    fn args() -> Args {
        Args {
            namespace: "default".into(),
            id: "c1".into(),
            address: "/run/c.sock".into(),
            ..Default::default()
        }
    }

    fn options(type_url: &str) -> Any {
        let options = Options { shim_cgroup: "/shims".into(), ..Default::default() };
        Any {
            type_url: type_url.into(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_grpc_address: "/run/other.sock".into(),
            containerd_ttrpc_address: "/run/other.sock.ttrpc".into(),
            log_level: LogLevel::LOG_LEVEL_DEBUG.into(),
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        }
    }

    fn request(input: &impl Message) -> Request {
        Request::new(&args(), &input.write_to_bytes().unwrap())
    }

    #[test]
    fn options_of_older_containerds_are_answered_plainly() {
        let plain = Request {
            dialect: Dialect::Plain,
            address: "/run/c.sock".into(),
            ttrpc_address: None,
            socket_dir: None,
            debug: false,
            cgroup: None,
            options: None,
        };
        assert_eq!(Request::new(&args(), b""), plain);
        assert_eq!(Request::new(&args(), b"\xff\xff"), plain);
        let ours = options("runtimeoptions.v1.Options");
        let configured = Request { options: Some(ours.clone()), ..plain.clone() };
        assert_eq!(request(&ours), configured);
        let joined = Request { cgroup: Some("/shims".into()), ..plain };
        for name in
            ["containerd.runc.v1.Options", "types.googleapis.com/containerd.runc.v1.Options"]
        {
            assert_eq!(request(&options(name)), joined);
        }
    }

    #[test]
    fn bootstrap_parameters_are_those_of_this_container() {
        let mut full = params();
        let value = Some(options("containerd.runc.v1.Options")).into();
        full.extensions.push(Extension { value, ..Default::default() });
        let ours = options("types.googleapis.com/runtimeoptions.v1.Options");
        let value = Some(ours.clone()).into();
        full.extensions.push(Extension { value, ..Default::default() });
        let expected = Request {
            dialect: Dialect::Bootstrap,
            address: "/run/other.sock".into(),
            ttrpc_address: Some("/run/other.sock.ttrpc".into()),
            socket_dir: Some("/run/s".into()),
            debug: true,
            cgroup: Some("/shims".into()),
            options: Some(ours),
        };
        assert_eq!(request(&full), expected);
        let other = BootstrapParams { instance_id: "c2".into(), ..params() };
        assert_eq!(request(&other).dialect, Dialect::Plain);
        let other = BootstrapParams { namespace: "moby".into(), ..params() };
        assert_eq!(request(&other).dialect, Dialect::Plain);
    }

    #[test]
    fn a_reply_is_an_address_or_a_message() {
        let address = "unix:///run/s/1";
        assert_eq!(Dialect::Plain.reply(address).unwrap(), address.as_bytes());
        let reply = Dialect::Bootstrap.reply(address).unwrap();
        let result = BootstrapResult::parse_from_bytes(&reply).unwrap();
        assert_eq!((result.version, &*result.address, &*result.protocol), (3, address, "ttrpc"));
        // Or 2.3 would take the plain one for a message.
        assert!(BootstrapResult::parse_from_bytes(address.as_bytes()).is_err());
    }
}
