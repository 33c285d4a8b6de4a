//! Errors, to standard error and to the file of `--log`, from which callers take what they show. In the formats of
//! runc's: lines of logfmt or JSON with `level`, `msg` and `time`.

use std::{error::Error, fs::OpenOptions, io::Write, path::PathBuf};

use serde_json::json;

use super::cli::LogFormat;
use crate::{
    error::Report,
    text::{complain, one_line},
    timestamp::Timestamp,
};

/// Longest message that a caller is shown.
const MAX_TEXT: usize = 4000;

#[derive(Debug)]
pub struct Log {
    /// Absolute: who writes to it last has left the working directory.
    path: Option<PathBuf>,
    format: LogFormat,
}

impl Log {
    pub fn new(path: Option<PathBuf>, format: LogFormat) -> Self {
        let path = path.map(|path| std::path::absolute(&path).unwrap_or(path));
        Self { path, format }
    }

    /// Says why a verb failed.
    pub fn failed(&self, verb: &str, error: &(dyn Error + 'static), code: u8) {
        let report = Report::new(verb, error, code);
        complain(&report.to_string());
        self.write(&message(&report));
    }

    /// Says which fields of a specification nobody sees to, if there are any.
    pub fn ignored(&self, fields: &[String]) {
        if !fields.is_empty() {
            self.append(
                "warning",
                &format!("ignored, since strict = false: {}", fields.join(", ")),
            );
        }
    }

    /// Appends an error to the file, if there is one. Nobody can be told that it cannot be written.
    pub fn write(&self, text: &str) {
        self.append("error", text);
    }

    fn append(&self, level: &str, text: &str) {
        let Some(path) = &self.path else { return };
        let line = self.line(level, text, Timestamp::now());
        let file = OpenOptions::new().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }

    fn line(&self, level: &str, text: &str, time: Timestamp) -> String {
        match self.format {
            LogFormat::Json => {
                format!("{}\n", json!({ "level": level, "msg": text, "time": time.to_string() }))
            }
            LogFormat::Text => format!("time=\"{time}\" level={level} msg={text:?}\n"),
        }
    }
}

/// All of it on one line: what a dead guest said last, and the way out.
fn message(report: &Report) -> String {
    let text = report.to_string().replace("ampoule: ", "");
    one_line(&text.lines().map(str::trim).collect::<Vec<_>>().join("; "), MAX_TEXT)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::UNIX_EPOCH};

    use super::*;
    use crate::oci::OciError;

    #[test]
    fn lines_are_those_of_runc() {
        let log = |format| Log::new(None, format).line("error", "a \"b\"", Timestamp(UNIX_EPOCH));
        let json: serde_json::Value = serde_json::from_str(&log(LogFormat::Json)).unwrap();
        assert_eq!((&json["level"], &json["msg"]), (&json!("error"), &json!("a \"b\"")));
        assert_eq!(json["time"], "1970-01-01T00:00:00.000000000Z");
        let text = "time=\"1970-01-01T00:00:00.000000000Z\" level=error msg=\"a \\\"b\\\"\"\n";
        assert_eq!(log(LogFormat::Text), text);
    }

    #[test]
    fn errors_are_appended_with_their_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = Log::new(Some(path.clone()), LogFormat::Json);
        for id in ["one", "two"] {
            log.failed("state", &OciError::NotFound(id.into()), 1);
        }
        let text = fs::read_to_string(path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("container two: container does not exist"), "{text}");
    }
}
