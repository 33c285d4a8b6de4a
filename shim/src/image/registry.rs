//! A repository of a registry (OCI distribution specification 1.1): its manifests and blobs over HTTP.
//!
//! Nothing a registry says is believed here: who asks compares sizes and digests. Waits are bounded, and
//! so is what is read. (`oci-client` takes manifests, tokens and the text of an error into memory whole,
//! however long they are; an answer is given up when it makes this process grow too much.)
//!
//! - [`credentials`]: the user's name and password for a registry, as docker keeps them
//! - [`identity`]: tokens that are kept in their place
//! - [`error`]: what can go wrong, and whether trying again can help

mod credentials;
mod error;
mod identity;

use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol, SizedStream};
use oci_client::errors::{DigestError, OciDistributionError};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use tokio::time::sleep;

use super::digest::Digest;
use super::oci::{INDEXES, MANIFESTS};
use super::reference::{Name, Version};
use crate::config::Endpoint;
use credentials::Credentials;
pub use error::RegistryError;
use error::Request;

const AGENT: &str = concat!("ampoule/", env!("CARGO_PKG_VERSION"));
/// Finding a host and connecting to it.
const CONNECT: Duration = Duration::from_secs(5);
/// A manifest, a token, the head of an answer.
const ANSWER: Duration = Duration::from_secs(30);
/// The longest a blob's stream may stand still.
const SILENCE: Duration = Duration::from_secs(20);

/// Bytes of memory one answer may take. The longest manifest has 4 MiB.
const ROOM: u64 = 64 << 20;
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// One repository of one registry, logged in.
pub struct Repository {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
    host: String,
}

/// The bytes of a blob from `start` on.
pub struct BlobStream {
    pub start: u64,
    stream: SizedStream,
    host: String,
}

impl Repository {
    /// Connects to `endpoint`, where the repository of `name` is wanted.
    pub async fn connect(
        name: &Name,
        endpoint: &Endpoint,
        credentials: Option<&Path>,
    ) -> Result<Self, RegistryError> {
        // The first of a process counts; a second is no error.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let host = endpoint.host.clone();
        let config = ClientConfig {
            protocol: if endpoint.http { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(CONNECT),
            read_timeout: Some(SILENCE),
            user_agent: AGENT,
            ..ClientConfig::default()
        };
        let client = Client::try_from(config)
            .map_err(|source| RegistryError::Client { host: host.clone(), source })?;
        let credentials = credentials::of(&host, credentials).await?;
        let (repository, version) = (name.repository().into(), name.version());
        let reference = match version {
            Version::Tag(tag) => Reference::with_tag(host.clone(), repository, tag.clone()),
            Version::Digest(digest) => {
                Reference::with_digest(host.clone(), repository, digest.to_string())
            }
        };
        let mut this = Self { client, reference, auth: RegistryAuth::Anonymous, host };
        this.auth = match credentials {
            Credentials::Known(auth) => auth,
            Credentials::IdentityToken(token) => {
                let scheme = if endpoint.http { "http" } else { "https" };
                let access = identity::access(scheme, &this.host, name.repository(), &token);
                this.answer("the exchange of the identity token", access).await?
            }
        };
        let login = this.client.auth(&this.reference, &this.auth, RegistryOperation::Pull);
        this.answer("the login", login).await?;
        Ok(this)
    }

    /// The manifest or index that the name stands for, or the one with a digest. Not verified.
    pub async fn manifest(&self, digest: Option<Digest>) -> Result<Vec<u8>, RegistryError> {
        let reference = match digest {
            Some(digest) => self.reference.clone_with_digest(digest.to_string()),
            None => self.reference.clone(),
        };
        let types = [INDEXES, MANIFESTS].concat();
        let what = format!("the manifest of {}", self.object(&reference));
        let answer = self.client.pull_manifest_raw(&reference, &self.auth, &types);
        let (bytes, _) = self.answer(&what, answer).await?;
        Ok(bytes.into())
    }

    /// The content of a blob from byte `from` on, or from the start if the registry cannot do that.
    pub async fn blob(&self, digest: Digest, from: u64) -> Result<BlobStream, RegistryError> {
        let text = digest.to_string();
        let answer = self.client.pull_blob_stream_partial(&self.reference, &*text, from, None);
        let (start, stream) = match self.answer(&text, answer).await? {
            BlobResponse::Full(stream) => (0, stream),
            BlobResponse::Partial(stream) => (from, stream),
        };
        Ok(BlobStream { start, stream, host: self.host.clone() })
    }

    /// The answer to a request for `what`, within [`ANSWER`] and [`ROOM`].
    async fn answer<T>(
        &self,
        what: &str,
        answer: impl Future<Output = Result<T, OciDistributionError>>,
    ) -> Result<T, RegistryError> {
        let (host, what) = (self.host.clone(), what.to_string());
        let repository = self.reference.repository().to_string();
        tokio::select! {
            answer = answer => answer.map_err(|error| Request { host, repository, what }.failed(error)),
            () = sleep(ANSWER) => Err(RegistryError::Slow { host, what, seconds: ANSWER.as_secs() }),
            () = flood() => Err(RegistryError::Long { host, what, limit: ROOM >> 20 }),
        }
    }

    fn object(&self, reference: &Reference) -> String {
        let (repository, tag) = (reference.repository(), reference.tag().unwrap_or_default());
        match reference.digest() {
            Some(digest) => format!("{repository}@{digest}"),
            None => format!("{repository}:{tag}"),
        }
    }
}

/// Ends when this process has grown by [`ROOM`].
async fn flood() {
    let most = resident() + ROOM;
    while resident() <= most {
        sleep(LOOK).await;
    }
}

/// Bytes of memory in use by this process; 0 if the kernel does not tell.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

impl BlobStream {
    /// The next bytes, or `None` at the end.
    pub async fn next(&mut self) -> Result<Option<impl AsRef<[u8]> + use<>>, RegistryError> {
        match self.stream.stream.next().await.transpose() {
            // The library has compared a digest; here that is done by who asked.
            Err(error) if error.get_ref().is_some_and(|error| error.is::<DigestError>()) => {
                Ok(None)
            }
            next => next.map_err(|source| RegistryError::Cut { host: self.host.clone(), source }),
        }
    }
}
