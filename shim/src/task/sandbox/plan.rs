//! What a sandbox is made from: the bundle's `config.json` if there is one, the request, CRI's view of the pod in
//! its options, and the runtime's options that `start` left in the bundle.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    sandbox_api::CreateSandboxRequest,
};

use super::{
    Result,
    files::PodFiles,
    pod_config::{PodConfig, Users},
};
use crate::{
    bootstrap::start::OPTIONS as SAVED_OPTIONS,
    id::Id,
    paths::Paths,
    task::{
        anchor::HostNetwork,
        bundle::{Bundle, BundleError},
        error::TaskError,
        pod::PodPlan,
        settings::{OPTIONS, settings},
        size::{CRI_MEMORY, CRI_PERIOD, CRI_QUOTA, Size},
    },
};

#[derive(Clone, Debug)]
pub struct Plan {
    pub pod: PodPlan,
    /// Of the pod's namespaces.
    pub sysctls: HashMap<String, String>,
    pub users: Option<Users>,
    /// None, if it is not CRI's.
    pub files: PodFiles,
}

impl Plan {
    /// Reads files, so it blocks.
    pub fn new(id: Id, request: CreateSandboxRequest, paths: &Paths) -> Result<Self> {
        if !request.rootfs.is_empty() {
            let why = "rootfs: a sandbox has the guest image for its own; containers bring theirs";
            return Err(TaskError::Invalid(why.into()));
        }
        let path = Path::new(&request.bundle_path);
        let written = read_bundle(path)?;
        let options = request.options.unwrap_or_default();
        let config =
            PodConfig::parse(&options).map_err(|e| TaskError::Invalid(format!("options: {e}")))?;
        let bundle = bundle(written, config.as_ref(), request.annotations)?;
        // CRI's are the pod's, and others may be missing: those of the runtime came with `start`.
        let ours = options.type_url.ends_with(OPTIONS);
        let options = if ours { options } else { runtime_options(path)? };
        let settings = settings(paths, &options, &bundle.spec)?.sandbox;
        let of_cri = config.is_some();
        let config = config.unwrap_or_default();
        let said = [Some(config.hostname), bundle.spec.hostname().clone()];
        let hostname = said.into_iter().flatten().find(|name| !name.is_empty());
        let hostname = hostname.unwrap_or_else(|| id.to_string());
        let files = match of_cri {
            true => PodFiles::write(path, &hostname, config.dns.as_ref())
                .map_err(|source| TaskError::File { path: path.into(), source })?,
            false => PodFiles::default(),
        };
        let network = match request.netns_path.as_str() {
            "" => bundle.network(),
            path => HostNetwork::Path(path.into()),
        };
        let mut sysctls = config.sysctls;
        let linux = bundle.spec.linux().as_ref();
        sysctls.extend(linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default());
        Ok(Self {
            pod: PodPlan {
                hostname,
                first: id,
                network,
                size: Size::of(&bundle.spec, &settings),
                settings,
                grows: true,
                shares: false,
                oom_score_adj: bundle.oom_score_adj(),
                own_users: config.users.is_some(),
            },
            sysctls,
            users: config.users,
            files,
        })
    }
}

/// containerd makes bundles of sandboxes without a specification too.
fn read_bundle(path: &Path) -> Result<Bundle> {
    match Bundle::read(path) {
        Err(BundleError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Bundle::without_config(path))
        }
        read => Ok(read?),
    }
}

/// All that is said of the pod, in the places where a container's bundle has it.
fn bundle(
    mut bundle: Bundle,
    config: Option<&PodConfig>,
    annotations: HashMap<String, String>,
) -> Result<Bundle> {
    let mut all = bundle.spec.annotations().clone().unwrap_or_default();
    if let Some(config) = config {
        all.extend(config.annotations.clone());
        // The pod's author does not decide these, but the kubelet.
        let numbers = [config.memory, config.cpu_quota, config.cpu_period];
        let names = [CRI_MEMORY, CRI_QUOTA, CRI_PERIOD].map(String::from);
        all.extend(names.into_iter().zip(numbers.map(|number| number.to_string())));
    }
    all.extend(annotations);
    bundle.spec.set_annotations(Some(all));
    Ok(bundle)
}

fn runtime_options(bundle: &Path) -> Result<Any> {
    let path: PathBuf = bundle.join(SAVED_OPTIONS);
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Any::default()),
        read => read.map_err(|source| TaskError::File { path: path.clone(), source })?,
    };
    let parsed = Any::parse_from_bytes(&bytes);
    parsed.map_err(|e| TaskError::File { path, source: io::Error::other(e) })
}
