//! A directory that is a root file system already: Docker's `merged`, `ctr run --rootfs`.
//!
//! If an overlay is mounted on it, its layers are known from `/proc/self/mountinfo` (proc_pid_mountinfo(5)), and with
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
use crate::image::Dialect;

pub fn plan(root: &Path) -> Result<Plan, RootFsError> {
    let failed = |source| RootFsError::Open { path: root.into(), source };
    let root = fs::canonicalize(root).map_err(failed)?;
    let failed = |source: io::Error| RootFsError::Open { path: root.clone(), source };
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(failed)?;
    let layers = options(&mounts, &root).and_then(|options| overlay::plan(&options, &[]).ok());
    let found = layers.and_then(|plan| with_base(plan, &root));
    Ok(found.unwrap_or_else(|| Plan {
        layers: vec![Layer::Changing(root.clone())],
        writes: Writes::Above,
        dialect: Dialect::Trusted,
    }))
}

/// The options of the overlay mounted on `root`, if there is one and it is on top.
fn options(mountinfo: &str, root: &Path) -> Option<Vec<String>> {
    let mut found = None;
    for line in mountinfo.lines() {
        let (mount, system) = line.split_once(" - ")?;
        if mount.split(' ').nth(4).map(unescape).as_deref() == root.to_str() {
            found = Some(system);
        }
    }
    let mut fields = found?.split(' ');
    let (kind, _source, options) = (fields.next()?, fields.next()?, fields.next()?);
    (kind == "overlay").then(|| options.split(',').map(unescape).collect())
}

/// What the kernel writes as backslash and three octal digits.
fn unescape(text: &str) -> String {
    let mut plain = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if byte == b'\\' => {
                plain.push(escaped);
                rest = &after[3..];
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
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
    Some(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
90 22 0:50 / /var/lib/docker/overlay2/abc/merged rw,relatime shared:2 - overlay overlay rw,lowerdir=/v/l/A:/v/l/B\\134:C\\040D,upperdir=/v/abc/diff,workdir=/v/abc/work
91 22 0:51 / /mnt/a\\040b rw - tmpfs tmpfs rw,size=10k
92 22 0:52 / /mnt/two rw - overlay overlay rw,lowerdir=/x:/y
93 22 0:53 / /mnt/two rw - tmpfs tmpfs rw
";

    #[test]
    fn an_overlay_is_found_by_its_directory() {
        let found = |root: &str| options(MOUNTINFO, Path::new(root));
        let overlay = found("/var/lib/docker/overlay2/abc/merged").unwrap();
        let plan = overlay::plan(&overlay, &[]).unwrap();
        let layers = [
            Layer::Changing("/v/abc/diff".into()),
            Layer::Committed("/v/l/A".into()),
            Layer::Committed("/v/l/B:C D".into()),
        ];
        assert_eq!((&plan.layers[..], &plan.writes), (&layers[..], &Writes::Above));
        for other in ["/", "/mnt/a b", "/mnt/two", "/nowhere"] {
            assert_eq!(found(other), None, "{other}");
        }
        assert_eq!(unescape("a\\040b\\0\\999\\"), "a b\\0\\999\\");
    }

    #[test]
    fn relative_layers_are_dockers() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        for path in ["l/A", "x/merged", "x/diff"] {
            fs::create_dir_all(home.join(path)).unwrap();
        }
        let plan = |lower: &str| {
            let options = [format!("lowerdir={lower}"), "upperdir=x/diff".into()];
            with_base(overlay::plan(&options, &[]).unwrap(), &home.join("x/merged"))
        };
        let layers = vec![Layer::Changing(home.join("x/diff")), Layer::Committed(home.join("l/A"))];
        assert_eq!(plan("l/A").unwrap().layers, layers);
        assert_eq!(plan("l/A:l/B"), None, "a layer that is not there");
        assert_eq!(plan("../etc"), None, "a way out");
    }
}
