//! Identity tokens, which some `docker login`s and credential helpers leave in a password's place: refresh tokens of OAuth
//! 2.0, for which the registry's authorization server gives one of access (Docker Registry v2 authentication using OAuth2).

use std::collections::HashMap;

use oci_client::{errors::OciDistributionError as Error, secrets::RegistryAuth};
use reqwest::{Client, header::WWW_AUTHENTICATE, redirect::Policy};
use serde::Deserialize;

use super::{AGENT, CONNECT, SILENCE};

#[derive(Deserialize)]
struct Answer {
    access_token: String,
}

/// The right to pull from a repository; `scheme` is how the registry is spoken to. A registry that asks for none gets none.
pub async fn access(
    scheme: &str,
    host: &str,
    repository: &str,
    token: &str,
) -> Result<RegistryAuth, Error> {
    // Whoever answers with another address gets no token there.
    let client = Client::builder().user_agent(AGENT).redirect(Policy::none());
    let client = client.connect_timeout(CONNECT).read_timeout(SILENCE).build()?;
    let greeting = client.get(format!("{scheme}://{host}/v2/")).send().await?;
    let Some(challenge) = greeting.headers().get(WWW_AUTHENTICATE) else {
        return Ok(RegistryAuth::Anonymous);
    };
    let asked = challenge.to_str().ok().and_then(bearer);
    let asked =
        asked.ok_or_else(|| refused("it does not ask for a token it could be exchanged for"))?;
    let realm = asked.get("realm").map(String::as_str).unwrap_or_default();
    if !realm.starts_with(&format!("{scheme}://")) && !realm.starts_with("https://") {
        return Err(refused("it wants the identity token to be sent in the clear"));
    }
    let scope = format!("repository:{repository}:pull");
    let form = [
        ("grant_type", "refresh_token"),
        ("client_id", "ampoule"),
        ("service", asked.get("service").map(String::as_str).unwrap_or_default()),
        ("scope", &scope),
        ("refresh_token", token),
    ];
    let answer = client.post(realm).form(&form).send().await?;
    let (status, text) = (answer.status(), answer.text().await?);
    if !status.is_success() {
        return Err(Error::AuthenticationFailure(text));
    }
    let answer: Answer = serde_json::from_str(&text)
        .map_err(|error| Error::RegistryTokenDecodeError(error.to_string()))?;
    Ok(RegistryAuth::Bearer(answer.access_token))
}

/// What a `Bearer` challenge (RFC 6750) says.
fn bearer(challenge: &str) -> Option<HashMap<String, String>> {
    let challenges = http_auth::parse_challenges(challenge).ok()?;
    let bearer = challenges.into_iter().find(|c| c.scheme.eq_ignore_ascii_case("bearer"))?;
    let value = |(name, value): &(&str, http_auth::ParamValue<'_>)| {
        (name.to_ascii_lowercase(), value.to_unescaped())
    };
    Some(bearer.params.iter().map(value).collect())
}

fn refused(why: &str) -> Error {
    Error::AuthenticationFailure(why.into())
}
