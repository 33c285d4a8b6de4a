//! `ampoule install --containerd`: the runtime handler `ampoule` in containerd's configuration, and out of it again.
//! What else stands in the file stays as it is, comments too.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

use toml_edit::{DocumentMut, Item, Table, TableLike, value};

use crate::{
    cli::InstallArgs,
    config::ANNOTATION_PREFIX,
    text::{complain, print},
};

/// Printed, and applied by the DaemonSet.
const RUNTIME_CLASS: &str = include_str!("../../deploy/runtimeclass.yaml");
/// First line of a file that was made here.
const MADE: &str = "# Made by `ampoule install --containerd`.\n";
const HANDLER: &str = "ampoule";
const RUNTIME_TYPE: &str = "io.containerd.ampoule.v2";

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: not valid TOML", path.display())]
    Parse { path: PathBuf, source: toml_edit::TomlError },
    #[error(
        "{}: it has format version {found}, but the handler can be added to 2 (containerd 1.6, 1.7) and 3 (2.x) only: \
         bring it up to date with `containerd config migrate`",
        path.display()
    )]
    Version { path: PathBuf, found: i64 },
    #[error("{}: {key} is no table", path.display())]
    NoTable { path: PathBuf, key: String },
    #[error(
        "{}: there is no such file, and `containerd --version`, by which a new one would be written, failed", path.display()
    )]
    NoContainerd { path: PathBuf, source: io::Error },
}

type Result<T> = std::result::Result<T, InstallError>;

pub fn install(args: &InstallArgs) -> Result<()> {
    let path = &args.config;
    let before = match fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(InstallError::Io { path: path.clone(), source }),
    };
    let after = if args.undo {
        before.as_deref().map(|text| without_handler(path, text)).transpose()?.flatten()
    } else {
        let text = match &before {
            Some(text) => text.clone(),
            None => format!("{MADE}version = {}\n", version_for(path)?),
        };
        Some(with_handler(path, &text)?)
    };
    if before == after {
        complain(&format!("{}: nothing to do\n", path.display()));
    } else {
        replace(path, after.as_deref())
            .map_err(|e| InstallError::Io { path: path.clone(), source: e })?;
        let done = if args.undo { "handler removed" } else { "handler added" };
        complain(&format!(
            "{}: {done}; restart containerd for it to take effect\n",
            path.display()
        ));
    }
    if !args.undo {
        print(RUNTIME_CLASS);
    }
    Ok(())
}

/// The format that the containerd on this machine writes.
fn version_for(path: &Path) -> Result<i64> {
    let out = Command::new("containerd").arg("--version").output();
    let out = out.map_err(|source| InstallError::NoContainerd { path: path.into(), source })?;
    // "containerd github.com/containerd/containerd/v2 2.1.3 ..."
    let text = String::from_utf8_lossy(&out.stdout);
    let version = text.split_whitespace().nth(2).unwrap_or_default().trim_start_matches('v');
    Ok(if version.starts_with("1.") { 2 } else { 3 })
}

/// The plugin that runs pods, as the format calls it.
fn plugin(path: &Path, document: &DocumentMut) -> Result<&'static str> {
    match document.get("version").and_then(Item::as_integer) {
        Some(2) => Ok("io.containerd.grpc.v1.cri"),
        Some(3) => Ok("io.containerd.cri.v1.runtime"),
        // Without one, it is of the first.
        other => Err(InstallError::Version { path: path.into(), found: other.unwrap_or(1) }),
    }
}

fn parse(path: &Path, text: &str) -> Result<DocumentMut> {
    text.parse().map_err(|source| InstallError::Parse { path: path.into(), source })
}

fn with_handler(path: &Path, text: &str) -> Result<String> {
    let mut document = parse(path, text)?;
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for key in ["plugins", plugin(path, &parse(path, text)?)?, "containerd", "runtimes"] {
        let below = table.entry(key).or_insert_with(|| {
            let mut new = Table::new();
            new.set_implicit(true);
            Item::Table(new)
        });
        let wrong = || InstallError::NoTable { path: path.into(), key: key.into() };
        table = below.as_table_like_mut().ok_or_else(wrong)?;
    }
    let mut handler = Table::new();
    handler.insert("runtime_type", value(RUNTIME_TYPE));
    // The host's devices are no use in a VM, and none of them is the guest's.
    handler.insert("privileged_without_host_devices", value(true));
    let annotations = Item::Value([format!("{ANNOTATION_PREFIX}*")].into_iter().collect());
    handler.insert("pod_annotations", annotations);
    if table
        .get(HANDLER)
        .is_none_or(|there| there.to_string() != Item::Table(handler.clone()).to_string())
    {
        table.insert(HANDLER, Item::Table(handler));
    }
    Ok(document.to_string())
}

/// `None` if nothing is left of a file that was made here.
fn without_handler(path: &Path, text: &str) -> Result<Option<String>> {
    let mut document = parse(path, text)?;
    let plugin = plugin(path, &document)?;
    let runtimes = ["plugins", plugin, "containerd", "runtimes"]
        .iter()
        .try_fold(document.as_table_mut() as &mut dyn TableLike, |table, key| {
            table.get_mut(key)?.as_table_like_mut()
        });
    let Some(runtimes) = runtimes else { return Ok(Some(text.into())) };
    if runtimes.remove(HANDLER).is_none() {
        return Ok(Some(text.into()));
    }
    let rest = document.to_string();
    let made_here = rest.strip_prefix(MADE).is_some_and(|rest| rest.trim().lines().count() <= 1);
    Ok((!made_here).then_some(rest))
}

/// In one step, so that a containerd that starts now reads the one or the other.
fn replace(path: &Path, text: Option<&str>) -> io::Result<()> {
    let Some(text) = text else { return fs::remove_file(path) };
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    let permissions = match fs::metadata(path) {
        Ok(meta) => meta.permissions(),
        Err(_) => std::os::unix::fs::PermissionsExt::from_mode(0o644),
    };
    file.as_file().set_permissions(permissions)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/etc/containerd/config.toml";

    fn added(text: &str) -> Result<String> {
        with_handler(Path::new(PATH), text)
    }

    fn removed(text: &str) -> Result<Option<String>> {
        without_handler(Path::new(PATH), text)
    }

    #[test]
    fn the_handler_comes_and_goes_and_nothing_else_changes() {
        let v2 = "# mine\nversion = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"overlayfs\" # as ever\n\n\
                  [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n";
        let v3 = "version = 3\n[debug]\nlevel = 'info'\n";
        for (text, plugin) in
            [(v2, "io.containerd.grpc.v1.cri"), (v3, "io.containerd.cri.v1.runtime")]
        {
            let with = added(text).unwrap();
            let header = format!("[plugins.\"{plugin}\".containerd.runtimes.ampoule]\n");
            assert!(with.contains(&header), "{with}");
            assert!(with.contains("runtime_type = \"io.containerd.ampoule.v2\"\n"), "{with}");
            assert!(with.contains("pod_annotations = [\"io.ampoule.*\"]\n"), "{with}");
            assert_eq!(added(&with).unwrap(), with, "twice is as once");
            assert_eq!(
                removed(&with).unwrap().as_deref().map(str::trim_end),
                Some(text.trim_end())
            );
            assert_eq!(removed(text).unwrap().as_deref(), Some(text));
        }
    }

    #[test]
    fn an_older_handler_is_brought_up_to_date() {
        let old = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.ampoule]\nruntime_type = 'x'\n";
        let with = added(old).unwrap();
        assert!(with.contains(RUNTIME_TYPE) && !with.contains("'x'"), "{with}");
    }

    #[test]
    fn a_file_that_was_made_here_goes_when_it_is_undone() {
        let made = added(&format!("{MADE}version = 2\n")).unwrap();
        assert_eq!(removed(&made).unwrap(), None);
        let more = format!("{made}\n[debug]\nlevel = 'info'\n");
        assert!(removed(&more).unwrap().unwrap().contains("[debug]"));
    }

    #[test]
    fn what_cannot_be_edited_is_named() {
        for (text, part) in [
            ("[debug]\n", "version 1"),
            ("version = 7\n", "version 7"),
            ("version = \n", "not valid TOML"),
            ("version = 3\nplugins = 1\n", "plugins is no table"),
        ] {
            let error = added(text).unwrap_err().to_string();
            assert!(error.starts_with(PATH) && error.contains(part), "{error}");
        }
    }

    #[test]
    fn files_are_written_whole_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/config.toml");
        replace(&path, Some("version = 3\n")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "version = 3\n");
        replace(&path, None).unwrap();
        assert!(!path.exists());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }
}
