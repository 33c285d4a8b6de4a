//! The variables that the options give.

use std::{env, fs, io, path::PathBuf};

use super::RunError;

/// `NAME=value` each: those of the files first, so that `--env` wins over them.
pub fn variables(files: &[PathBuf], given: &[String]) -> Result<Vec<String>, RunError> {
    let mut all = Vec::new();
    for path in files {
        let failed = |source| RunError::File { path: path.clone(), source };
        let text = fs::read_to_string(path).map_err(failed)?;
        for (n, line) in text.lines().enumerate() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let name = line.split('=').next().unwrap_or_default();
            if name.is_empty() || name.contains(char::is_whitespace) {
                let text = format!("line {}: {name:?} cannot be the name of a variable", n + 1);
                return Err(failed(io::Error::new(io::ErrorKind::InvalidData, text)));
            }
            all.extend(variable(line));
        }
    }
    all.extend(given.iter().filter_map(|text| variable(text)));
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
    use crate::error::report;

    #[test]
    fn a_variable_without_a_value_is_taken_from_here() {
        assert_eq!(variable("A=b=c").as_deref(), Some("A=b=c"));
        assert_eq!(variable("A=").as_deref(), Some("A="));
        assert_eq!(variable("CARGO_PKG_NAME").as_deref(), Some("CARGO_PKG_NAME=ampoule-shim"));
        assert_eq!(variable("NO_SUCH_VARIABLE_HERE"), None);
    }

    #[test]
    fn files_come_first_and_are_named_when_they_are_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = folder.path().join("env");
            fs::write(&path, text).unwrap();
            path
        };
        let path = file("# all\n\nA=1\n  B=two words\nCARGO_PKG_NAME\nNO_SUCH_VARIABLE_HERE\n");
        let all = variables(&[path], &["A=2".into()]).unwrap();
        assert_eq!(all, ["A=1", "B=two words", "CARGO_PKG_NAME=ampoule-shim", "A=2"]);
        for bad in ["A B=1", "=x", "\nA\tB"] {
            let path = file(bad);
            let error = report("run", &variables(&[path], &[]).unwrap_err());
            assert!(error.contains("env") && error.contains("line"), "{error}");
        }
        let error = report("run", &variables(&["/no/such".into()], &[]).unwrap_err());
        assert!(error.contains("/no/such"), "{error}");
    }
}
