//! The variables that the options give.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// A file that an option names.
#[derive(Debug, thiserror::Error)]
#[error("{option} {}", path.display())]
pub struct FileError {
    pub option: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

impl FileError {
    /// Of one option's file.
    pub fn of(option: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + Copy {
        move |source| Self { option, path: path.into(), source }
    }
}

/// `NAME=value` each, of options.
pub fn given(options: &[String]) -> Vec<String> {
    options.iter().filter_map(|text| variable(text)).collect()
}

/// `NAME=value` each, of files with one in a line.
pub fn from_files(files: &[PathBuf]) -> Result<Vec<String>, FileError> {
    let mut all = Vec::new();
    for path in files {
        read(path, &mut all).map_err(FileError::of("--env-file", path))?;
    }
    Ok(all)
}

/// The names, of options and files, whose values are those they have here.
pub fn inherited(options: &[String], files: &[PathBuf]) -> Result<Vec<String>, FileError> {
    let mut all = options.to_vec();
    for path in files {
        let lines = lines(path).map_err(FileError::of("--env-file", path))?;
        all.extend(lines);
    }
    all.retain(|text| !text.contains('='));
    Ok(all)
}

fn read(path: &Path, all: &mut Vec<String>) -> io::Result<()> {
    all.extend(lines(path)?.iter().filter_map(|line| variable(line)));
    Ok(())
}

/// The lines of a file that name variables.
fn lines(path: &Path) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(path)?;
    let mut all = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split('=').next().unwrap_or_default();
        if name.is_empty() || name.contains(char::is_whitespace) {
            let text = format!("line {}: {name:?} cannot be the name of a variable", n + 1);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        all.push(line.to_string());
    }
    Ok(all)
}

/// `NAME=value` as it is; `NAME` with the value it has here, nothing if it has none.
fn variable(text: &str) -> Option<String> {
    if text.contains('=') {
        return Some(text.to_string());
    }
    env::var(text).ok().map(|value| format!("{text}={value}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain_text;

    #[test]
    fn a_variable_without_a_value_is_taken_from_here() {
        assert_eq!(variable("A=b=c").as_deref(), Some("A=b=c"));
        assert_eq!(variable("A=").as_deref(), Some("A="));
        assert_eq!(variable("CARGO_PKG_NAME").as_deref(), Some("CARGO_PKG_NAME=ampoule-shim"));
        assert_eq!(variable("NO_SUCH_VARIABLE_HERE"), None);
    }

    #[test]
    fn files_are_read_and_named_when_they_are_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = folder.path().join("env");
            fs::write(&path, text).unwrap();
            path
        };
        let path = file("# all\n\nA=1\n  B=two words\nCARGO_PKG_NAME\nNO_SUCH_VARIABLE_HERE\n");
        let all = from_files(&[path]).unwrap();
        assert_eq!(all, ["A=1", "B=two words", "CARGO_PKG_NAME=ampoule-shim"]);
        for bad in ["A B=1", "=x", "\nA\tB"] {
            let path = file(bad);
            let error = chain_text(&from_files(&[path]).unwrap_err());
            assert!(error.contains("env") && error.contains("line"), "{error}");
        }
        let error = chain_text(&from_files(&["/no/such".into()]).unwrap_err());
        assert!(error.starts_with("--env-file /no/such: No such file"), "{error}");
    }
}
