//! What a user may write where an image is wanted. A pure parser; nothing is looked up.
//!
//! - `oci:DIR[:TAG]`: an OCI layout in a directory
//! - `dir:PATH`: a directory that is a root file system
//! - `tar:FILE`: a root file system in a tar, plain or compressed with gzip or zstd
//! - anything else is a name, completed as docker does: `alpine` is `docker.io/library/alpine:latest`

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    Name(Name),
    Oci { layout: PathBuf, tag: Option<String> },
    Directory(PathBuf),
    Tar(PathBuf),
}

/// A full image name: repository with its domain, and tag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name {
    repository: String,
    tag: String,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    #[error("the image reference is empty")]
    Empty,
    #[error("`{0}` names no path after its prefix")]
    NoPath(String),
    #[error(
        "`{0}` is not an image name: lower-case letters, digits, and single `.`, `_`, `-` or `/` \
         between them; for files write oci:DIR[:TAG], dir:PATH or tar:FILE"
    )]
    BadName(String),
    #[error(
        "`{tag}` in `{reference}` is not a tag: up to 128 of letters, digits, `_`, `.` and `-`"
    )]
    BadTag { reference: String, tag: String },
    #[error("`{0}` is longer than {MAX_NAME} characters with its domain and tag")]
    LongName(String),
    #[error("`{0}` names an image by digest; the store knows names and tags only")]
    ByDigest(String),
}

const DOMAIN: &str = "docker.io";
const TAG: &str = "latest";
/// The limit of the distribution specification's grammar.
const MAX_TAG: usize = 128;
/// A whole name is the name of a file in the store.
const MAX_NAME: usize = 240;

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let path = |path: &str| match path {
            "" => Err(ReferenceError::NoPath(text.into())),
            path => Ok(PathBuf::from(path)),
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (layout, tag) = split_layout(rest);
            Ok(Self::Oci { layout: path(layout)?, tag: tag.map(String::from) })
        } else if let Some(rest) = text.strip_prefix("dir:") {
            path(rest).map(Self::Directory)
        } else if let Some(rest) = text.strip_prefix("tar:") {
            path(rest).map(Self::Tar)
        } else {
            text.parse().map(Self::Name)
        }
    }
}

/// `DIR:TAG` is split at the last colon, if a tag and not a piece of a path follows it.
fn split_layout(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((layout, tag)) if is_tag(tag) => (layout, Some(tag)),
        _ => (text, None),
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Oci { layout, tag: Some(tag) } => write!(f, "oci:{}:{tag}", layout.display()),
            Self::Oci { layout, tag: None } => write!(f, "oci:{}", layout.display()),
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
            Self::Tar(path) => write!(f, "tar:{}", path.display()),
        }
    }
}

impl Name {
    /// The shortest text that means this name.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        ["docker.io/library/", "docker.io/"]
            .into_iter()
            .filter_map(|prefix| full.strip_prefix(prefix))
            .find(|short| short.parse().is_ok_and(|name: Self| name == *self))
            .map_or(full.clone(), String::from)
    }
}

impl FromStr for Name {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if text.contains('@') {
            return Err(ReferenceError::ByDigest(text.into()));
        }
        let (repository, tag) = match text.rsplit_once(':') {
            // A colon before a slash belongs to the domain's port.
            Some((repository, tag)) if !tag.contains('/') => (repository, tag),
            _ => (text, TAG),
        };
        let repository = complete(repository);
        if !is_repository(&repository) {
            return Err(ReferenceError::BadName(text.into()));
        }
        if !is_tag(tag) {
            return Err(ReferenceError::BadTag { reference: text.into(), tag: tag.into() });
        }
        if repository.len() + ":".len() + tag.len() > MAX_NAME {
            return Err(ReferenceError::LongName(text.into()));
        }
        Ok(Self { repository, tag: tag.into() })
    }
}

/// Adds the default domain, and `library/` to a name of one part on it.
fn complete(repository: &str) -> String {
    let (domain, path) = match repository.split_once('/') {
        Some((domain, path)) if domain.contains(['.', ':']) || domain == "localhost" => {
            (domain, path)
        }
        _ => (DOMAIN, repository),
    };
    let domain = if domain == "index.docker.io" { DOMAIN } else { domain };
    let library = if domain == DOMAIN && !path.contains('/') { "library/" } else { "" };
    format!("{domain}/{library}{path}")
}

fn is_repository(repository: &str) -> bool {
    let Some((domain, path)) = repository.split_once('/') else { return false };
    let (host, port) = domain.split_once(':').unwrap_or((domain, "0"));
    host.split('.').all(is_host_part)
        && !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit())
        && path.split('/').all(is_path_part)
}

fn is_host_part(part: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    !part.is_empty() && part.bytes().all(allowed) && !part.starts_with('-') && !part.ends_with('-')
}

/// Letters and digits, parted by one `.`, one or two `_`, or any number of `-`.
fn is_path_part(part: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let edges = part.bytes().next().is_some_and(word) && part.bytes().last().is_some_and(word);
    let between = part.split(|c: char| c.is_ascii() && word(c as u8)).filter(|run| !run.is_empty());
    let separator = |run: &str| matches!(run, "." | "_" | "__") || run.bytes().all(|b| b == b'-');
    edges && between.into_iter().all(separator)
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.repository, self.tag)
    }
}

impl TryFrom<String> for Name {
    type Error = ReferenceError;

    fn try_from(text: String) -> Result<Self, ReferenceError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.to_string()
    }
}

#[cfg(test)]
mod tests;
