//! A directory that is a root file system already: Docker's `merged`, `ctr run --rootfs`.
//!
//! If an overlay is mounted on it, its layers are known from [`crate::mountinfo`], and with
//! them what is converted already. Layers that this process cannot find (an overlay of another mount namespace) make
//! it any other directory, of which all is read.

use std::{
    fs, io,
    path::{Component, Path},
};

use super::{
    RootFsError, overlay,
    plan::{Layer, Plan, Writes},
};
use crate::{image::Dialect, mountinfo::mounted_on};

pub fn plan(root: &Path) -> Result<Plan, RootFsError> {
    let failed = |source| RootFsError::Open { path: root.into(), source };
    let root = fs::canonicalize(root).map_err(failed)?;
    let failed = |source: io::Error| RootFsError::Open { path: root.clone(), source };
    let mounted = mounted_on(&root).map_err(failed)?.filter(|mounted| mounted.kind == "overlay");
    let layers = mounted.and_then(|mounted| overlay::plan(&mounted.options, &[]).ok());
    let found = layers.and_then(|plan| with_base(plan, &root));
    Ok(found.unwrap_or_else(|| Plan {
        layers: vec![Layer::Changing(root.clone())],
        writes: Writes::Above,
        dialect: Dialect::Trusted,
        owners: None,
        owned: false,
    }))
}

/// Docker mounts with paths relative to its own folder when they are many: `HOME/ID/merged` of `HOME/l/SHORT`.
fn with_base(mut plan: Plan, root: &Path) -> Option<Plan> {
    let home = root.parent()?.parent()?;
    for layer in &mut plan.layers {
        if let Layer::Committed(path) | Layer::Changing(path) = layer {
            if path.components().any(|part| part == Component::ParentDir) {
                return None;
            }
            *path = home.join(&*path);
            if !path.is_dir() {
                return None;
            }
        }
    }
    if let Writes::Beside(folder) = &mut plan.writes {
        *folder = home.join(&*folder);
    }
    Some(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_layers_are_dockers() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        for path in ["l/A", "x/merged", "x/diff"] {
            fs::create_dir_all(home.join(path)).unwrap();
        }
        let plan = |lower: &str| {
            let upper = ["upperdir=x/diff", "workdir=x/work"].map(str::to_owned);
            let options = [&[format!("lowerdir={lower}")][..], &upper].concat();
            with_base(overlay::plan(&options, &[]).unwrap(), &home.join("x/merged"))
        };
        let layers = vec![Layer::Changing(home.join("x/diff")), Layer::Committed(home.join("l/A"))];
        let found = plan("l/A").unwrap();
        assert_eq!((found.layers, found.writes), (layers, Writes::Beside(home.join("x"))));
        assert_eq!(plan("l/A:l/B"), None, "a layer that is not there");
        assert_eq!(plan("../etc"), None, "a way out");
    }
}
