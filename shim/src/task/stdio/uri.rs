//! What containerd may say where a stream goes: a path, `fifo://`, `file://`, `binary://`, `binary-v2://` or
//! `ttrpc+unix://`.

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use super::StdioError;

#[derive(Debug, PartialEq, Eq)]
pub enum Target {
    Nowhere,
    /// A FIFO, or a file that is there.
    Path(PathBuf),
    /// A file that is made where there is none.
    File(PathBuf),
    Logger(Command),
    /// By its id, of those that containerd opens at our socket.
    Stream(String),
}

/// A logger and its arguments.
#[derive(Debug, PartialEq, Eq)]
pub struct Command {
    pub path: PathBuf,
    pub arguments: Vec<OsString>,
    /// It says that it is ready; one that only closes the descriptor has failed (`binary-v2`).
    pub speaks: bool,
}

pub fn parse(stream: &'static str, text: &str) -> Result<Target, StdioError> {
    if text.is_empty() {
        return Ok(Target::Nowhere);
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Ok(Target::Path(absolute(stream, text, text.into())?));
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    // The address is our own: containerd has it of `start`.
    if scheme == "ttrpc+unix" {
        let id = query.split('&').find_map(|pair| pair.strip_prefix("streaming_id="));
        let id = id.filter(|id| !id.is_empty());
        let id = id.ok_or_else(|| refused(stream, text, "it has no streaming_id"))?;
        return Ok(Target::Stream(decode(id, true).to_string_lossy().into_owned()));
    }
    let path = absolute(stream, text, decode(path, false).into())?;
    match scheme {
        "fifo" => Ok(Target::Path(path)),
        "file" => Ok(Target::File(path)),
        "binary" | "binary-v2" => {
            let speaks = scheme == "binary-v2";
            Ok(Target::Logger(Command { path, arguments: arguments(query), speaks }))
        }
        _ => Err(refused(
            stream,
            text,
            "the scheme must be fifo, file, binary, binary-v2 or ttrpc+unix",
        )),
    }
}

pub fn refused(stream: &'static str, uri: &str, why: &'static str) -> StdioError {
    StdioError::Uri { stream, uri: uri.chars().take(200).collect(), why }
}

fn absolute(stream: &'static str, text: &str, path: PathBuf) -> Result<PathBuf, StdioError> {
    if path.is_absolute() { Ok(path) } else { Err(refused(stream, text, "not an absolute path")) }
}

/// As containerd: each key, and its value unless that is empty.
fn arguments(query: &str) -> Vec<OsString> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .flat_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            [Some(decode(key, true)), Some(decode(value, true)).filter(|value| !value.is_empty())]
        })
        .flatten()
        .collect()
}

/// `%41` is `A`; in a query `+` is a space. A `%` without two hexadecimal digits stands for itself.
fn decode(text: &str, query: bool) -> OsString {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match (byte, digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                at += 2;
            }
            (b'+', ..) if query => decoded.push(b' '),
            _ => decoded.push(byte),
        }
        at += 1;
    }
    OsString::from_vec(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_schemes_are_told_apart() {
        let program = |speaks: bool, path: &str, arguments: &[&str]| {
            let arguments = arguments.iter().map(OsString::from).collect();
            Target::Logger(Command { path: path.into(), arguments, speaks })
        };
        let logger = |path: &str, arguments: &[&str]| program(false, path, arguments);
        for (text, target) in [
            ("", Target::Nowhere),
            ("/run/x/1-stdout", Target::Path("/run/x/1-stdout".into())),
            ("/a b%41", Target::Path("/a b%41".into())),
            ("fifo:///run/x", Target::Path("/run/x".into())),
            ("file:///var/log/a%20b", Target::File("/var/log/a b".into())),
            ("binary:///bin/log", logger("/bin/log", &[])),
            ("binary-v2:///bin/log?a=1", program(true, "/bin/log", &["a", "1"])),
            ("ttrpc+unix:///run/s/1?streaming_id=c-stdout", Target::Stream("c-stdout".into())),
            (
                "binary:///bin/log?a=1&b&c=x%2Fy+z&=%zz",
                logger("/bin/log", &["a", "1", "b", "c", "x/y z", "", "%zz"]),
            ),
        ] {
            assert_eq!(parse("stdout", text).unwrap(), target, "{text}");
        }
        for text in [
            "a/b",
            "file://a/b",
            "npipe:///x",
            "://",
            "binary://log",
            "ttrpc+unix:///run/s/1",
            "ttrpc+unix:///run/s/1?streaming_id=",
            "grpc+unix:///run/s/1?streaming_id=c-stdin",
        ] {
            let error = parse("stdout", text).unwrap_err().to_string();
            assert!(error.starts_with("stdout "), "{error}");
        }
    }
}
