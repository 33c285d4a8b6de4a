//! What a list of mounts means: layers, top first, and where writes go. Pure.
//!
//! The last mount is the root file system; those before it are there to be referred to by it, as
//! `{{ mount 0 }}` (containerd's `docs/mounts.md`). Options that change nothing for a guest (`noatime`, `loop`,
//! `index=off`) are passed over; what would make another file system of it is refused.

use std::path::PathBuf;

use super::{Mount, RootFsError, overlay, template};
use crate::{image::Dialect, sandbox::IdMaps};

/// A root file system.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Top first. With none, it is the disk of [`Writes::Kept`].
    pub layers: Vec<Layer>,
    pub writes: Writes,
    /// How its directories are marked.
    pub dialect: Dialect,
    /// If its files are to have other owners than on the disk.
    pub owners: Option<IdMaps>,
    /// Those of the top layer are whom they are to be: it is an overlay's upper directory.
    pub owned: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// A directory that nobody changes any more.
    Committed(PathBuf),
    /// A directory that may have been changed since the last start.
    Changing(PathBuf),
    /// A file system of its own, in a file or on a device; an EROFS may have more devices.
    Image { kind: Kind, path: PathBuf, devices: Vec<PathBuf> },
}

impl Layer {
    pub fn committed(&self) -> Option<PathBuf> {
        match self {
            Self::Committed(path) => Some(path.clone()),
            _ => None,
        }
    }
}

/// File systems that the guest's kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Erofs,
    Ext4,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Ext4 => "ext4",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Writes {
    /// Read-only.
    Nowhere,
    /// To a disk or memory of ours.
    Above,
    /// To a disk of ours, for which there is room in this directory: it goes when the upper directory beside it goes.
    Beside(PathBuf),
    /// To this ext4 image or device.
    Kept(PathBuf),
}

/// # Errors
/// For what a guest cannot mount, or what is no root file system.
pub fn plan(mounts: &[Mount]) -> Result<Plan, RootFsError> {
    let Some((last, earlier)) = mounts.split_last() else {
        return Err(refuse("mounts", "there are none"));
    };
    check(last)?;
    if let Some(mapped) = earlier.iter().find(|mount| owners(mount) != Ok(None)) {
        return Err(refuse(&mapped.source, "uidmap, gidmap: only the whole can be mapped"));
    }
    let owners = owners(last).map_err(|reason| refuse(&last.source, reason))?;
    let (layers, writes) = match file_system(last)? {
        "overlay" => return Ok(Plan { owners, ..overlay::plan(&last.options, earlier)? }),
        "bind" => match template::mount(&last.source)? {
            // The whole of an earlier one, read-only where either is.
            Some(index) => {
                let source = template::find(earlier, index)?;
                let writes = if is_read_only(last) { Writes::Nowhere } else { writes(source) };
                (vec![layer(source)?], writes)
            }
            None => (vec![layer(last)?], writes(last)),
        },
        "ext4" if !is_read_only(last) => (Vec::new(), Writes::Kept(last.source.clone().into())),
        _ => (vec![layer(last)?], writes(last)),
    };
    Ok(Plan { layers, writes, dialect: Dialect::Trusted, owners, owned: false })
}

/// The maps of the options `uidmap` and `gidmap`: `ON-DISK:SHOWN:COUNT`, several with commas between them.
fn owners(mount: &Mount) -> Result<Option<IdMaps>, String> {
    let map = |name: &str| -> Result<Option<String>, String> {
        let value = |option: &str| Some(option.strip_prefix(name)?.strip_prefix('=')?.to_owned());
        let Some(value) = mount.options.iter().find_map(|option| value(option)) else {
            return Ok(None);
        };
        let line = |words: &str| {
            let numbers: Option<Vec<u32>> =
                words.split(':').map(|word| word.parse().ok()).collect();
            match numbers.as_deref() {
                Some([disk, shown, count]) => Ok(format!("{disk} {shown} {count}\n")),
                _ => Err(format!("option {name}={value}: no three numbers with colons between")),
            }
        };
        value.split(',').map(line).collect::<Result<_, _>>().map(Some)
    };
    match (map("uidmap")?, map("gidmap")?) {
        (Some(uids), Some(gids)) => Ok(Some(IdMaps { uids, gids })),
        (None, None) => Ok(None),
        _ => Err("options uidmap and gidmap go together".into()),
    }
}

/// What a mount adds to a stack.
pub fn layer(mount: &Mount) -> Result<Layer, RootFsError> {
    check(mount)?;
    let path = PathBuf::from(&mount.source);
    let image = |kind| {
        let devices = mount.options.iter().filter_map(|o| o.strip_prefix("device="));
        let devices = devices.map(PathBuf::from).collect();
        Layer::Image { kind, path: path.clone(), devices }
    };
    match file_system(mount)? {
        "bind" if is_read_only(mount) => Ok(Layer::Committed(path)),
        "bind" => Ok(Layer::Changing(path)),
        "erofs" => Ok(image(Kind::Erofs)),
        "ext4" if is_read_only(mount) => Ok(image(Kind::Ext4)),
        "ext4" => Err(refuse(&mount.source, "an ext4 that is written to cannot be below others")),
        other => Err(refuse(
            &mount.source,
            format!(
                "the guest has no file system `{other}`: use a snapshotter of overlay, bind, ext4 or erofs mounts"
            ),
        )),
    }
}

fn writes(mount: &Mount) -> Writes {
    if is_read_only(mount) { Writes::Nowhere } else { Writes::Above }
}

pub fn is_read_only(mount: &Mount) -> bool {
    // As mount(8): the last one counts.
    let last = mount.options.iter().rev().find(|o| *o == "ro" || *o == "rw");
    last.is_some_and(|option| option == "ro")
}

/// A mount's type without what was to be done before: filling in words is done here, and directories for an
/// overlay are made in the guest.
pub fn file_system(mount: &Mount) -> Result<&str, RootFsError> {
    let (before, kind) = mount.kind.rsplit_once('/').unwrap_or(("", &mount.kind));
    if let Some(step) = before.split('/').find(|step| !["", "format", "mkdir"].contains(step)) {
        let reason =
            format!("the step `{step}` of its type `{}` is containerd's to do", mount.kind);
        return Err(refuse(&mount.source, reason));
    }
    let binds = mount.options.iter().any(|o| o == "bind" || o == "rbind");
    Ok(if binds && ["", "none"].contains(&kind) { "bind" } else { kind })
}

fn check(mount: &Mount) -> Result<(), RootFsError> {
    if !["", "/"].contains(&mount.target.as_str()) {
        let reason = format!("it is to lie at {} in the root file system", mount.target);
        return Err(refuse(&mount.source, reason));
    }
    for option in &mount.options {
        let name = option.split('=').next().unwrap_or_default();
        let reason = match name {
            "offset" | "sizelimit" => "only whole files and devices become disks",
            "X-containerd.dmverity" => {
                "the guest does not verify it: set the snapshotter's dmverity_mode to off, or have \
                 containerd mount it"
            }
            _ => continue,
        };
        return Err(refuse(&mount.source, format!("option {name}: {reason}")));
    }
    Ok(())
}

pub fn refuse(object: &str, reason: impl Into<String>) -> RootFsError {
    RootFsError::Refused { object: object.into(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|&o| o.to_owned()).collect();
        Mount { kind: kind.into(), source: source.into(), target: String::new(), options }
    }

    fn erofs(path: &str) -> Mount {
        mount("erofs", path, &["ro", "loop"])
    }

    fn committed(path: &str) -> Layer {
        Layer::Committed(path.into())
    }

    fn changing(path: &str) -> Layer {
        Layer::Changing(path.into())
    }

    fn image(kind: Kind, path: &str) -> Layer {
        Layer::Image { kind, path: path.into(), devices: Vec::new() }
    }

    fn kept(path: &str) -> Writes {
        Writes::Kept(path.into())
    }

    #[test]
    fn what_the_snapshotters_of_containerd_give() {
        use Writes::{Above, Beside, Nowhere};
        let active =
            ["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"];
        let block = [
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
        ];
        let device = |path: &str| format!("device={path}");
        let merged =
            mount("erofs", "/s/2/m", &["ro", "loop", &device("/s/1/l"), &device("/s/2/l")]);
        let devices = vec![PathBuf::from("/s/1/l"), PathBuf::from("/s/2/l")];
        let merged_layer = Layer::Image { kind: Kind::Erofs, path: "/s/2/m".into(), devices };
        let upper = ["workdir=/s/3/work", "upperdir=/s/3/fs"];
        let (two, one) = (image(Kind::Erofs, "/s/2/l"), image(Kind::Erofs, "/s/1/l"));
        for (what, mounts, layers, writes) in [
            (
                "overlayfs, active",
                vec![mount("overlay", "overlay", &active)],
                vec![changing("/s/3/fs"), committed("/s/2/fs"), committed("/s/1/fs")],
                Beside("/s/3".into()),
            ),
            (
                "overlayfs, a view",
                vec![mount("overlay", "overlay", &["lowerdir=/s/2/fs:/s/1/fs"])],
                vec![committed("/s/2/fs"), committed("/s/1/fs")],
                Nowhere,
            ),
            (
                "overlayfs, a view of one layer",
                vec![mount("bind", "/s/1/fs", &["ro", "rbind"])],
                vec![committed("/s/1/fs")],
                Nowhere,
            ),
            (
                "somebody's own overlay",
                vec![mount(
                    "overlay",
                    "overlay",
                    &["lowerdir=/1", "upperdir=/mine/fs", "workdir=/w/work"],
                )],
                vec![changing("/mine/fs"), committed("/1")],
                Above,
            ),
            (
                "native",
                vec![mount("bind", "/s/4", &["rbind", "rw"])],
                vec![changing("/s/4")],
                Above,
            ),
            ("blockfile", vec![mount("ext4", "/b/1", &["loop", "rw"])], vec![], kept("/b/1")),
            (
                "blockfile, a view",
                vec![mount("ext4", "/b/1", &["loop", "ro"])],
                vec![image(Kind::Ext4, "/b/1")],
                Nowhere,
            ),
            (
                "devmapper",
                vec![mount("ext4", "/dev/mapper/p-snap-1", &[])],
                vec![],
                kept("/dev/mapper/p-snap-1"),
            ),
            ("erofs, a view of one layer", vec![erofs("/s/1/l")], vec![one.clone()], Nowhere),
            (
                "erofs",
                vec![
                    erofs("/s/2/l"),
                    erofs("/s/1/l"),
                    mount(
                        "format/mkdir/overlay",
                        "overlay",
                        &[&upper[..], &["lowerdir={{ overlay 0 1 }}"]].concat(),
                    ),
                ],
                vec![changing("/s/3/fs"), two.clone(), one.clone()],
                Beside("/s/3".into()),
            ),
            (
                "erofs, one layer",
                vec![
                    erofs("/s/1/l"),
                    mount(
                        "format/mkdir/overlay",
                        "overlay",
                        &[&upper[..], &["lowerdir={{ mount 0 }}"]].concat(),
                    ),
                ],
                vec![changing("/s/3/fs"), one.clone()],
                Beside("/s/3".into()),
            ),
            (
                "erofs with a writable image",
                vec![
                    mount("ext4", "/s/3/rwlayer.img", &["rw", "loop"]),
                    erofs("/s/2/l"),
                    erofs("/s/1/l"),
                    mount("format/mkdir/overlay", "overlay", &block),
                ],
                vec![two, one],
                kept("/s/3/rwlayer.img"),
            ),
            (
                "erofs with merged metadata, a view",
                vec![merged, mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"])],
                vec![merged_layer],
                Nowhere,
            ),
        ] {
            let plan = plan(&mounts).unwrap();
            assert_eq!((plan.layers, plan.writes), (layers, writes), "{what}");
        }
        let userxattr =
            plan(&[mount("overlay", "overlay", &["userxattr", "lowerdir=/a"])]).unwrap();
        assert_eq!(userxattr.dialect, Dialect::User);
    }

    #[test]
    fn what_a_guest_cannot_have_is_refused_and_says_why() {
        let overlay = |option: &str| mount("format/overlay", "overlay", &[option]);
        for (mounts, part) in [
            (vec![], "there are none"),
            (vec![mount("xfs", "/dev/mapper/a", &["nouuid"])], "`xfs`"),
            (vec![mount("fuse.nydus-overlayfs", "overlay", &[])], "`fuse.nydus-overlayfs`"),
            (vec![mount("mkfs/ext4", "/a", &["rw"])], "`mkfs`"),
            (vec![mount("bind", "/a", &["rw", "uidmap=0:1:2"])], "go together"),
            (vec![mount("bind", "/a", &["uidmap=0:1:2", "gidmap=0:1"])], "gidmap=0:1: no three"),
            (
                vec![mount("erofs", "/a", &MAPPED), overlay("lowerdir={{ mount 0 }}")],
                "only the whole",
            ),
            (vec![mount("ext4", "/a", &["loop", "offset=4096"])], "offset"),
            (
                vec![mount("erofs", "/a", &["ro", "X-containerd.dmverity=/a.dmverity"])],
                "dmverity_mode",
            ),
            (vec![Mount { target: "/data".into(), ..mount("bind", "/a", &[]) }], "/data"),
            (vec![mount("overlay", "overlay", &["upperdir=/a"])], "no lowerdir"),
            (vec![mount("overlay", "overlay", &["lowerdir=/a::/b"])], "data-only"),
            (vec![overlay("lowerdir={{ mount 0 }}")], "no mount 0"),
            (vec![erofs("/a"), overlay("lowerdir={{ overlay 0 1 }}")], "no mount 1"),
            (vec![erofs("/a"), overlay("lowerdir={{ source 0 }}")], "source 0"),
            (vec![mount("ext4", "/a", &["rw"]), overlay("lowerdir={{ mount 0 }}")], "below others"),
            (
                vec![
                    erofs("/a"),
                    mount("format/overlay", "o", &["lowerdir=/b", "upperdir={{ mount 0 }}/upper"]),
                ],
                "only to /upper of a writable ext4",
            ),
        ] {
            let error = plan(&mounts).unwrap_err().to_string();
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    /// As containerd's overlay snapshotter has them for a pod with users of its own.
    const MAPPED: [&str; 2] = ["uidmap=0:100000:65536", "gidmap=0:200000:65536,65536:1:2"];

    #[test]
    fn owners_are_mapped_but_for_those_of_what_is_written() {
        let upper = ["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/1/fs"];
        for (mounts, owned) in [
            (vec![mount("overlay", "overlay", &[&MAPPED[..], &upper].concat())], true),
            (
                vec![mount("overlay", "overlay", &[&MAPPED[..], &["lowerdir=/a:/b"]].concat())],
                false,
            ),
            (vec![mount("bind", "/s/1/fs", &[&MAPPED[..], &["ro", "rbind"]].concat())], false),
        ] {
            let plan = plan(&mounts).unwrap();
            let maps = plan.owners.unwrap();
            let lines = (&*maps.uids, &*maps.gids);
            assert_eq!(lines, ("0 100000 65536\n", "0 200000 65536\n65536 1 2\n"));
            assert_eq!(plan.owned, owned, "{mounts:?}");
        }
    }

    #[test]
    fn the_last_of_ro_and_rw_counts() {
        for (options, read_only) in
            [(&[][..], false), (&["ro"], true), (&["ro", "rw"], false), (&["rw", "ro"], true)]
        {
            assert_eq!(is_read_only(&mount("ext4", "/a", options)), read_only);
        }
    }
}
