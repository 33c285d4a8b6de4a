//! Why a registry did not give what was asked for.

use std::io;
use std::path::PathBuf;

use oci_client::errors::{OciDistributionError, OciErrorCode};

use crate::text::one_line;

/// As much of a registry's own words as fits a message.
const WORDS: usize = 200;

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("the registry {host} cannot be reached")]
    Unreachable { host: String, source: io::Error },
    #[error("the registry {host} has no {repository} or keeps it from you ({reason})")]
    Denied { host: String, repository: String, reason: String },
    #[error("the registry {host} has no such image: {what} is unknown to it")]
    Unknown { host: String, what: String },
    #[error("the registry {host} answered {what} with {answer}")]
    Answer { host: String, what: String, answer: String, transient: bool },
    #[error("the registry {host} has not answered for {what} in {seconds} s")]
    Slow { host: String, what: String, seconds: u64 },
    #[error("the registry {host} answers {what} without end: more than {limit} MiB were not read")]
    Long { host: String, what: String, limit: u64 },
    #[error("the connection to {host} was cut")]
    Cut { host: String, source: io::Error },
    #[error("{object} was cut off by {host} at byte {at} of {size}")]
    Short { host: String, object: String, at: u64, size: u64 },
    #[error("the request to {host} failed")]
    Request { host: String, source: OciDistributionError },
    #[error("no connection to {host} can be made secure")]
    Client { host: String, source: OciDistributionError },
    #[error("the credentials for registries in {path} cannot be read")]
    Credentials { path: PathBuf, source: io::Error },
    #[error("the credentials for {host} in {path} cannot be used: {reason}")]
    Credential { host: String, path: PathBuf, reason: String },
}

impl RegistryError {
    /// The way out.
    pub fn hint(&self) -> Option<String> {
        let elsewhere = "`ampoule images` lists what is here, `ampoule image import SOURCE NAME` needs no \
                         registry; for mirrors and plain HTTP see `ampoule image pull --help`";
        Some(match self {
            Self::Unreachable { .. } | Self::Slow { .. } => elsewhere.into(),
            Self::Client { .. } => "is the package ca-certificates installed?".into(),
            Self::Denied { host, .. } => format!("check the name, or `docker login {host}`"),
            Self::Unknown { .. } => "check the name and the tag".into(),
            Self::Cut { .. } | Self::Short { .. } | Self::Request { .. } => {
                "pull again: it goes on where it was".into()
            }
            Self::Answer { transient: true, .. } => "try again later".into(),
            Self::Credentials { .. } | Self::Credential { .. } => {
                "`docker login` writes them anew; REGISTRY_AUTH_FILE and DOCKER_CONFIG name other files".into()
            }
            Self::Answer { .. } | Self::Long { .. } => return None,
        })
    }

    /// Whether the same request may well succeed in a moment.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Slow { .. } | Self::Cut { .. } | Self::Short { .. } | Self::Request { .. } => {
                true
            }
            Self::Answer { transient, .. } => *transient,
            _ => false,
        }
    }
}

/// What was asked of whom, for messages.
pub struct Request {
    pub host: String,
    pub repository: String,
    pub what: String,
}

impl Request {
    pub fn failed(self, error: OciDistributionError) -> RegistryError {
        use OciDistributionError as E;
        let Self { host, repository, what } = self;
        match error {
            E::RequestError(e) if e.is_connect() => {
                RegistryError::Unreachable { host, source: innermost(&e) }
            }
            E::UnauthorizedError { .. } => {
                RegistryError::Denied { host, repository, reason: "not authorized".into() }
            }
            E::AuthenticationFailure(reason) => {
                RegistryError::Denied { host, repository, reason: one_line(&reason, WORDS) }
            }
            E::ServerError { code: 404, .. } => RegistryError::Unknown { host, what },
            E::ServerError { code, message, .. } => {
                let answer = one_line(&format!("HTTP status {code} {message}"), WORDS);
                let transient = code >= 500 || code == 429 || code == 408;
                RegistryError::Answer { host, what, answer, transient }
            }
            E::RegistryError { envelope, .. } => {
                let is = |codes: &[OciErrorCode]| {
                    envelope.errors.iter().any(|error| codes.contains(&error.code))
                };
                use OciErrorCode as C;
                let answer = one_line(&envelope.to_string(), WORDS);
                if is(&[C::Unauthorized, C::Denied]) {
                    RegistryError::Denied { host, repository, reason: answer }
                } else if is(&[C::ManifestUnknown, C::NameUnknown, C::BlobUnknown, C::NotFound]) {
                    RegistryError::Unknown { host, what }
                } else {
                    let transient = is(&[C::Toomanyrequests]);
                    RegistryError::Answer { host, what, answer, transient }
                }
            }
            E::DigestError(error) => {
                let answer = format!("what has another digest: {error}");
                RegistryError::Answer { host, what, answer, transient: false }
            }
            source @ (E::RequestError(_) | E::IoError(_)) => {
                RegistryError::Request { host, source }
            }
            other => {
                let answer = one_line(&other.to_string(), WORDS);
                RegistryError::Answer { host, what, answer, transient: false }
            }
        }
    }
}

/// What the system said; the layers of the HTTP library around it say nothing a user could use.
fn innermost(error: &(dyn std::error::Error + 'static)) -> io::Error {
    let last = std::iter::successors(Some(error), |e| e.source()).last().unwrap_or(error);
    match last.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(one_line(&last.to_string(), WORDS)),
    }
}
