//! The user's credentials for a registry, from docker's `config.json`: `auths`, `credHelpers` and
//! `credsStore` (the programs `docker-credential-NAME`).

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use docker_credential::{
    CredentialRetrievalError as Failure, DockerCredential, get_credential_from_reader,
};
use oci_client::secrets::RegistryAuth;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::RegistryError;
use crate::text::one_line;

/// How docker's own file and its credential helpers call docker.io.
const HUB: &str = "https://index.docker.io/v1/";
/// A helper may ask the user to unlock a key ring.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a user shows a registry.
pub enum Credentials {
    Known(RegistryAuth),
    /// To be exchanged.
    IdentityToken(String),
}

const ANONYMOUS: Credentials = Credentials::Known(RegistryAuth::Anonymous);

/// The credentials for `host` in `file`; anonymous if there are none.
pub async fn of(host: &str, file: Option<&Path>) -> Result<Credentials, RegistryError> {
    let Some(path) = file else { return Ok(ANONYMOUS) };
    let reader = match File::open(path) {
        Ok(reader) => reader,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(ANONYMOUS),
        Err(source) => return Err(RegistryError::Credentials { path: path.into(), source }),
    };
    let server = if host == "docker.io" { HUB } else { host }.to_string();
    let found = spawn_blocking(move || get_credential_from_reader(reader, &server));
    let unusable = |reason: &str| RegistryError::Credential {
        host: host.into(),
        path: path.into(),
        reason: one_line(reason, 300),
    };
    match timeout(PATIENCE, found).await {
        Err(_) => Err(unusable("the credential helper does not answer")),
        Ok(Err(_)) => Err(unusable("the credential helper could not be run")),
        Ok(Ok(Ok(DockerCredential::UsernamePassword(name, password)))) => {
            Ok(Credentials::Known(RegistryAuth::Basic(name, password)))
        }
        Ok(Ok(Ok(DockerCredential::IdentityToken(token)))) => Ok(Credentials::IdentityToken(token)),
        Ok(Ok(Err(Failure::NoCredentialConfigured))) => Ok(ANONYMOUS),
        // What every helper says of a host it does not know.
        Ok(Ok(Err(Failure::HelperFailure { stdout, .. }))) if stdout.contains("not found") => {
            Ok(ANONYMOUS)
        }
        Ok(Ok(Err(failure))) => Err(unusable(&failure.to_string())),
    }
}
