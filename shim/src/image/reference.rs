//! What a user may write where an image is wanted. A pure parser; nothing is looked up.
//!
//! - `oci:DIR[:TAG]`: an OCI layout in a directory
//! - `dir:PATH`: a directory that is a root file system
//! - `tar:FILE`: a root file system in a tar, plain or compressed with gzip or zstd
//! - `docker-archive:FILE`: what `docker save` writes, of one image
//! - anything else is a name, completed as docker does: `alpine` is `docker.io/library/alpine:latest`
//!
//! A name is one and the same thing for the store and for a registry: an image imported as `alpine` and one
//! pulled from docker.io take each other's place, and the store is asked first.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::digest::{Digest, ParseDigestError};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    Name(Name),
    Oci { layout: PathBuf, tag: Option<String> },
    Directory(PathBuf),
    Tar(PathBuf),
    DockerArchive(PathBuf),
}

/// A full image name: the registry's domain, the repository on it, and a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name {
    domain: String,
    repository: String,
    version: Version,
}

/// What a name says after its repository.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    Tag(String),
    /// The content itself; a tag beside it says nothing more and is dropped.
    Digest(Digest),
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    #[error("the image reference is empty")]
    Empty,
    #[error("`{0}` names no path after its prefix")]
    NoPath(String),
    #[error(
        "`{0}` is not an image name, which is lower-case letters, digits, and single `.`, `_`, `-` or `/` \
         between them"
    )]
    BadName(String),
    #[error(
        "`{tag}` in `{reference}` is not a tag: up to 128 of letters, digits, `_`, `.` and `-`"
    )]
    BadTag { reference: String, tag: String },
    #[error("`{0}` is longer than {MAX_NAME} characters with its domain and tag")]
    LongName(String),
    #[error("`{reference}` does not end as NAME@DIGEST does")]
    BadDigest { reference: String, source: ParseDigestError },
}

impl ReferenceError {
    /// The reference.
    pub fn object(&self) -> Option<String> {
        match self {
            Self::Empty => None,
            Self::NoPath(text)
            | Self::BadName(text)
            | Self::LongName(text)
            | Self::BadTag { reference: text, .. }
            | Self::BadDigest { reference: text, .. } => Some(text.clone()),
        }
    }
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
        } else if let Some(rest) = text.strip_prefix("docker-archive:") {
            path(rest).map(Self::DockerArchive)
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
            Self::DockerArchive(path) => write!(f, "docker-archive:{}", path.display()),
        }
    }
}

impl Name {
    /// The registry's: a host, with a port if one was given.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Without the domain, as `library/alpine`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub fn version(&self) -> &Version {
        &self.version
    }

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
        let (text_without, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (text, None),
        };
        let (repository, tag) = match text_without.rsplit_once(':') {
            // A colon before a slash belongs to the domain's port.
            Some((repository, tag)) if !tag.contains('/') => (repository, tag),
            _ => (text_without, TAG),
        };
        let (domain, repository) = complete(repository);
        if !is_domain(&domain) || !repository.split('/').all(is_path_part) {
            return Err(ReferenceError::BadName(text.into()));
        }
        if !is_tag(tag) {
            return Err(ReferenceError::BadTag { reference: text.into(), tag: tag.into() });
        }
        let bad = |source| ReferenceError::BadDigest { reference: text.into(), source };
        let version = match digest {
            Some(digest) => Version::Digest(digest.parse().map_err(bad)?),
            None => Version::Tag(tag.into()),
        };
        let name = Self { domain, repository, version };
        if name.to_string().len() > MAX_NAME {
            return Err(ReferenceError::LongName(text.into()));
        }
        Ok(name)
    }
}

/// Adds the default domain, and `library/` to a name of one part on it.
fn complete(repository: &str) -> (String, String) {
    let (domain, path) = match repository.split_once('/') {
        Some((domain, path)) if domain.contains(['.', ':']) || domain == "localhost" => {
            (domain, path)
        }
        _ => (DOMAIN, repository),
    };
    let domain = if domain == "index.docker.io" { DOMAIN } else { domain };
    let library = if domain == DOMAIN && !path.contains('/') { "library/" } else { "" };
    (domain.into(), format!("{library}{path}"))
}

/// Whether a text is HOST or HOST:PORT.
pub fn is_domain(domain: &str) -> bool {
    let (host, port) = domain.split_once(':').unwrap_or((domain, "0"));
    host.split('.').all(is_host_part)
        && !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit())
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
        write!(f, "{}/{}", self.domain, self.repository)?;
        match &self.version {
            Version::Tag(tag) => write!(f, ":{tag}"),
            Version::Digest(digest) => write!(f, "@{digest}"),
        }
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
