//! The options of an overlay mount (kernel documentation, `filesystems/overlayfs.rst`).

use std::path::{Path, PathBuf};

use super::{
    Mount, RootFsError,
    plan::{Layer, Plan, Writes, file_system, is_read_only, layer, refuse},
    template,
};
use crate::image::Dialect;

/// The overlay that `options` describe, which may refer to `earlier` mounts.
pub fn plan(options: &[String], earlier: &[Mount]) -> Result<Plan, RootFsError> {
    let (mut lowers, mut upper, mut writes) = (Vec::new(), None, Writes::Nowhere);
    let (mut work, mut dialect) = (None, Dialect::Trusted);
    for option in options {
        match option.split_once('=') {
            Some(("lowerdir", value)) => {
                for word in paths(value)? {
                    lowers.extend(lower(&word, earlier)?);
                }
            }
            Some(("lowerdir+", path)) => lowers.push(Layer::Committed(path.into())),
            Some(("datadir+", _)) => return Err(data_only()),
            Some(("upperdir", value)) => match template::below(value)? {
                None => (upper, writes) = (Some(PathBuf::from(value)), Writes::Above),
                Some((index, path)) => writes = Writes::Kept(kept(index, path, earlier)?),
            },
            Some(("workdir", value)) => work = Some(Path::new(value)),
            None if option == "userxattr" => dialect = Dialect::User,
            _ => {}
        }
    }
    if lowers.is_empty() {
        return Err(refuse("overlay", "it has no lowerdir"));
    }
    if let Some(folder) = own_folder(upper.as_deref(), work) {
        writes = Writes::Beside(folder.into());
    }
    let owned = upper.is_some();
    let layers = upper.map(Layer::Changing).into_iter().chain(lowers).collect();
    Ok(Plan { layers, writes, dialect, owners: None, owned })
}

/// The directory that snapshotters make for each container, in which its upper directory and the kernel's work directory
/// are. They remove it as a whole.
fn own_folder<'a>(upper: Option<&'a Path>, work: Option<&Path>) -> Option<&'a Path> {
    let folder = upper?.parent()?;
    (work?.parent() == Some(folder) && folder != Path::new("") && folder != Path::new("/"))
        .then_some(folder)
}

/// What one word of `lowerdir` stands for.
fn lower(word: &str, earlier: &[Mount]) -> Result<Vec<Layer>, RootFsError> {
    match template::mounts(word)? {
        None => Ok(vec![Layer::Committed(word.into())]),
        Some(indices) => {
            let layers = indices.into_iter().map(|index| layer(template::find(earlier, index)?));
            layers.collect()
        }
    }
}

/// The ext4 image whose directory `upper` takes the writes.
fn kept(index: usize, path: &str, earlier: &[Mount]) -> Result<PathBuf, RootFsError> {
    let disk = template::find(earlier, index)?;
    match file_system(disk)? {
        "ext4" if !is_read_only(disk) && path == "/upper" => Ok(disk.source.clone().into()),
        kind => {
            let reason = format!(
                "writes cannot go to {path} of a mount of type {kind}: only to /upper of a writable ext4"
            );
            Err(refuse(&disk.source, reason))
        }
    }
}

/// The paths of a list with colons between them; a backslash makes what follows it a part of a path.
fn paths(list: &str) -> Result<Vec<String>, RootFsError> {
    let mut paths = vec![String::new()];
    let mut characters = list.chars();
    while let Some(character) = characters.next() {
        match (character, paths.last_mut()) {
            (':', _) => paths.push(String::new()),
            (other, Some(path)) => match other {
                '\\' => path.extend(characters.next()),
                other => path.push(other),
            },
            (_, None) => {}
        }
    }
    if paths.iter().any(String::is_empty) {
        return Err(if list.contains("::") {
            data_only()
        } else {
            refuse("overlay", "an empty lowerdir")
        });
    }
    Ok(paths)
}

fn data_only() -> RootFsError {
    refuse("overlay", "data-only lower layers cannot be read on their own")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_paths() {
        for (list, expected) in [
            ("/a", vec!["/a"]),
            ("/a:/b c:/d,e", vec!["/a", "/b c", "/d,e"]),
            (r"/a\:b:/c\\d", vec!["/a:b", r"/c\d"]),
            ("{{ overlay 1 2 }}:/x", vec!["{{ overlay 1 2 }}", "/x"]),
        ] {
            assert_eq!(paths(list).unwrap(), expected);
        }
        for list in ["", ":", "/a:", "/a::/b"] {
            assert!(paths(list).is_err(), "{list}");
        }
    }
}
