//! The sources of the configuration, one over the other, and where each setting came from. From the lowest:
//!
//! 1. what is built in
//! 2. `/etc/ampoule/config.toml`, then the files `*.toml` in `/etc/ampoule/config.d`, by name
//! 3. the same two of the user, in `~/.config/ampoule`
//! 4. containerd's runtime options: the file `ConfigPath`, then the text `ConfigBody`
//! 5. annotations of the pod, `io.ampoule.` and the name of a setting, if the layers below list it in `annotations`
//!
//! A layer replaces single settings; a list is one setting.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use toml::{Table, Value, de::DeTable};

use super::{Config, ConfigError};

/// What an annotation that makes a setting begins with.
pub const ANNOTATION_PREFIX: &str = "io.ampoule.";
/// More than this is no configuration.
const MAX_SIZE: u64 = 1 << 20;
/// So much of a wrong line is shown.
const MAX_LINE: usize = 80;
/// The one that no annotation makes, whatever is listed.
const LIST: &str = "annotations";

type Result<T> = std::result::Result<T, ConfigError>;

/// Settings by their path, as `["sandbox", "memory"]`. Each layer was a valid configuration of its own.
#[derive(Clone, Debug, Default)]
pub struct Layers(BTreeMap<Vec<String>, Setting>);

#[derive(Clone, Debug)]
struct Setting {
    value: Value,
    origin: String,
}

impl Layers {
    /// Those of `paths` that are there, each with the files of the folder beside it.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut layers = Self::default();
        for path in paths {
            layers.file_if_there(path)?;
            for path in drop_ins(&path.with_extension("d"))? {
                layers.file_if_there(&path)?;
            }
        }
        Ok(layers)
    }

    /// A file that must be there.
    pub fn file(&mut self, path: &Path) -> Result<()> {
        let text = read(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        self.text(&path.display().to_string(), &text)
    }

    fn file_if_there(&mut self, path: &Path) -> Result<()> {
        match self.file(path) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(())
            }
            other => other,
        }
    }

    /// `origin` is what the user knows this text by.
    pub fn text(&mut self, origin: &str, text: &str) -> Result<()> {
        let wrong = |error: toml::de::Error| {
            let line = line(text, error.span().map_or(0, |span| span.start));
            let text = text.lines().nth(line - 1).unwrap_or_default();
            let text = crate::text::one_line(text.trim(), MAX_LINE);
            ConfigError::Parse { origin: origin.into(), line, text, message: one_line(&error) }
        };
        toml::from_str::<Config>(text).map_err(wrong)?;
        let values: Table = toml::from_str(text).map_err(wrong)?;
        let spans = DeTable::parse(text).map_err(wrong)?;
        let line =
            |path: &[String]| format!("{origin}:{}", line(text, start(spans.get_ref(), path)));
        self.lay(&[], values, &line);
        Ok(())
    }

    /// Those that begin with [`ANNOTATION_PREFIX`], as far as the list in the layers so far has them. A value is TOML's,
    /// but quotes around text may be left out.
    pub fn annotations<'a>(
        &mut self,
        annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<()> {
        let allowed = self.config().annotations;
        for (name, text) in annotations {
            let Some(setting) = name.strip_prefix(ANNOTATION_PREFIX) else { continue };
            if setting == LIST || !allowed.contains(setting) {
                return Err(ConfigError::Annotation {
                    name: name.clone(),
                    setting: setting.into(),
                });
            }
            let path: Vec<String> = setting.split('.').map(String::from).collect();
            let value = text.parse().unwrap_or_else(|_| Value::String(text.clone()));
            let mut alone = Table::new();
            put(&mut alone, &path, value);
            if let Err(error) = alone.clone().try_into::<Config>() {
                return Err(ConfigError::Value { name: name.clone(), message: one_line(&error) });
            }
            self.lay(&[], alone, &|_| format!("annotation {name}"));
        }
        Ok(())
    }

    /// All layers together.
    pub fn config(&self) -> Config {
        let mut all = Table::new();
        for (path, setting) in &self.0 {
            put(&mut all, path, setting.value.clone());
        }
        // Each layer was valid, and so is what is made of their settings.
        all.try_into().unwrap_or_default()
    }

    /// Every setting, one in a line as TOML, and where it came from.
    pub fn effective(&self) -> String {
        let mut all = Self::default();
        if let Ok(table) = Table::try_from(self.config()) {
            all.lay(&[], table, &|_| "built in".into());
        }
        all.0.extend(self.0.clone());
        all.said()
    }

    /// The same of what the layers say alone.
    pub fn said(&self) -> String {
        let lines = self.0.iter().map(|(path, Setting { value, origin })| {
            let name: Vec<String> = path.iter().map(|part| key(part)).collect();
            (format!("{} = {value}", name.join(".")), origin)
        });
        let lines: Vec<_> = lines.collect();
        let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0);
        lines.iter().fold(String::new(), |mut out, (line, origin)| {
            let _ = writeln!(out, "{line:width$}  # {origin}");
            out
        })
    }

    fn lay(&mut self, above: &[String], table: Table, origin: &dyn Fn(&[String]) -> String) {
        for (name, value) in table {
            let path = [above, &[name]].concat();
            match value {
                Value::Table(table) => self.lay(&path, table, origin),
                value => {
                    let origin = origin(&path);
                    self.0.insert(path, Setting { value, origin });
                }
            }
        }
    }
}

fn put(table: &mut Table, path: &[String], value: Value) {
    match path {
        [] => {}
        [name] => drop(table.insert(name.clone(), value)),
        [name, rest @ ..] => {
            let below = table.entry(name.clone()).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(below) = below {
                put(below, rest, value);
            }
        }
    }
}

/// A name as TOML has it: quoted unless it is plain.
fn key(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !name.is_empty() && name.chars().all(plain) {
        return name.into();
    }
    Value::String(name.into()).to_string()
}

/// Where in the text the value of a setting begins, in bytes.
fn start(table: &DeTable<'_>, path: &[String]) -> usize {
    let Some((name, rest)) = path.split_first() else { return 0 };
    let Some(value) = table.get(name.as_str()) else { return 0 };
    match value.get_ref().as_table() {
        Some(below) if !rest.is_empty() => start(below, rest),
        _ => value.span().start,
    }
}

fn line(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|&byte| byte == b'\n').count()
}

fn one_line(error: &toml::de::Error) -> String {
    error.message().replace('\n', "; ")
}

fn drop_ins(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |source| ConfigError::Read { path: folder.into(), source };
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let paths = entries.map(|entry| Ok(entry?.path()));
    let mut paths = paths.collect::<io::Result<Vec<_>>>().map_err(failed)?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let length = File::open(path)?.take(MAX_SIZE + 1).read_to_string(&mut text)?;
    if length as u64 > MAX_SIZE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
