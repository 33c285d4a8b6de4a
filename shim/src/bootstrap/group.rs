//! Which sandbox a container belongs to, from its bundle's annotations.

use std::{collections::HashMap, fs::File, io, io::Read, path::Path, path::PathBuf};

use serde::Deserialize;

/// Annotations that name the group, the first one found counts: that of containerd's own shim (`ctr`, nerdctl),
/// of containerd's CRI plugin, of CRI-O.
pub const GROUP: [&str; 3] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];

/// More than this is no container's specification.
const MAX_SIZE: u64 = 16 << 20;
/// Read at once.
const USUAL_SIZE: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
#[error("the container's specification {} cannot be read", path.display())]
pub struct GroupError {
    path: PathBuf,
    source: io::Error,
}

/// All that is needed of `config.json`.
#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

/// The group of the container in `bundle`: containers of the same group share a sandbox. A container without
/// one is alone in a group of its own name, as is a bundle without a specification: so containerd makes a
/// sandbox before its first container.
pub fn group(bundle: &Path, id: &str) -> Result<String, GroupError> {
    let path = bundle.join("config.json");
    let failed = |source| GroupError { path: path.clone(), source };
    let mut text = Vec::with_capacity(USUAL_SIZE);
    match File::open(&path) {
        Ok(file) => file.take(MAX_SIZE).read_to_end(&mut text).map_err(failed)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(id.into()),
        Err(e) => return Err(failed(e)),
    };
    let spec: Spec = serde_json::from_slice(&text).map_err(|e| failed(e.into()))?;
    let annotations = spec.annotations.unwrap_or_default();
    let group = GROUP.iter().find_map(|key| annotations.get(*key)).filter(|key| !key.is_empty());
    Ok(group.map_or(id, String::as_str).into())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn of(text: Option<&str>) -> Result<String, GroupError> {
        let bundle = tempfile::tempdir().unwrap();
        if let Some(text) = text {
            fs::write(bundle.path().join("config.json"), text).unwrap();
        }
        group(bundle.path(), "c1")
    }

    #[test]
    fn annotations_name_the_group() {
        for (annotations, group) in [
            (r#"{"io.containerd.runc.v2.group": "g"}"#, "g"),
            (r#"{"io.kubernetes.cri.sandbox-id": "pod"}"#, "pod"),
            (r#"{"io.kubernetes.cri-o.SandboxID": "pod", "x": "y"}"#, "pod"),
            (r#"{"io.kubernetes.cri.sandbox-id": "p", "io.containerd.runc.v2.group": "g"}"#, "g"),
            (r#"{"io.kubernetes.cri.sandbox-id": ""}"#, "c1"),
            (r#"{"io.kubernetes.cri.container-type": "sandbox"}"#, "c1"),
            ("{}", "c1"),
            ("null", "c1"),
        ] {
            let text = format!(r#"{{"ociVersion": "1.1.0", "annotations": {annotations}}}"#);
            assert_eq!(of(Some(&text)).unwrap(), group, "{annotations}");
        }
        assert_eq!(of(Some(r#"{"ociVersion": "1.1.0"}"#)).unwrap(), "c1");
        assert_eq!(of(None).unwrap(), "c1");
    }

    #[test]
    fn a_broken_specification_is_named() {
        for text in ["", "{", r#"{"annotations": {"a": 1}}"#] {
            let error = of(Some(text)).unwrap_err();
            assert!(error.to_string().contains("config.json"), "{error}");
        }
    }
}
