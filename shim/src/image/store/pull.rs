//! From a name to an image by way of a registry.
//!
//! ```text
//! name ─▶ manifest, through indexes to linux/amd64 ─▶ config ─▶ layers, several at a time ─▶ conversion
//! ```
//!
//! Every step ends in a verified blob of the store, so a pull that is cut short or killed goes on where it
//! was. If the root file system is there already, no layer is asked for.

use std::path::Path;
use std::time::Duration;

use futures_util::{TryStreamExt, stream};
use oci_spec::image::{Descriptor, MediaType};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::Store;
use super::blobs::Partial;
use super::convert::rootfs_of;
use crate::config::Endpoint;
use crate::error::chain_text;
use crate::event_loop::event_loop;
use crate::image::digest::Digest;
use crate::image::oci::{
    self, Blob, INDEXES, Layout, MANIFESTS, MAX_DEPTH, MAX_JSON, Manifest, Next,
};
use crate::image::progress::{LayerBar, Progress};
use crate::image::registry::{RegistryError, Repository};
use crate::image::{Image, ImageError, Name, Registries, Version};

/// Tries to get one thing, and the first pause between them, doubled each time.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(250);
/// What runs on a thread may still hold a lock, and gives it back; a name server's answer is not waited for longer.
const LAST_STEPS: Duration = Duration::from_millis(500);
/// Layers on their way at a time.
const LAYERS: usize = 3;

/// An image on its way here from one place.
struct Pull<'a> {
    store: &'a Store,
    name: &'a Name,
    endpoint: Endpoint,
    credentials: Option<&'a Path>,
    progress: &'a Progress,
}

/// What a document says of itself.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Peek {
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
}

impl Store {
    /// Brings the image of a name here from its registry, or a mirror of it, and gives it this name.
    pub fn pull(&self, name: &Name, registries: &Registries) -> Result<Image, ImageError> {
        let _arrival = self.arrival()?;
        let runtime = event_loop();
        let runtime = runtime.map_err(|source| ImageError::EventLoop { source })?;
        let fetched = runtime.block_on(self.fetch(name, registries));
        runtime.shutdown_timeout(LAST_STEPS);
        let layout = Layout::of_blobs(&self.root);
        let converted = self.convert_layout(&layout, fetched?, &name.familiar())?;
        self.save(name, &converted)?;
        Ok(self.image(name.to_string(), converted))
    }

    /// The image's blobs come into the store, from the first place that has them.
    async fn fetch(&self, name: &Name, registries: &Registries) -> Result<Manifest, ImageError> {
        let progress = Progress::new(self.progress);
        let credentials = registries.credentials.as_deref();
        let pull = async |endpoint: Endpoint| {
            let host = endpoint.host.clone();
            let pull = Pull { store: self, name, endpoint, credentials, progress: &progress };
            pull.all().await.map_err(|error| error.given_by(&host, &name.familiar()))
        };
        for mirror in registries.config.mirrors(name.domain()) {
            match pull(mirror.clone()).await {
                Err(error) if error.is_of_this_host() => return Err(error),
                Err(error) => {
                    let (host, why) = (mirror.host, chain_text(&error));
                    progress.line(&format!("the mirror {host} is passed over: {why}"));
                }
                fetched => return fetched,
            }
        }
        pull(registries.config.endpoint(name.domain())).await
    }
}

impl Pull<'_> {
    async fn all(&self) -> Result<Manifest, ImageError> {
        let image = self.name.familiar();
        let connect = async || {
            self.of(Repository::connect(self.name, &self.endpoint, self.credentials).await)
        };
        let repository = self.retry(connect).await?;
        let layout = Layout::of_blobs(&self.store.root);
        let descriptor = self.manifest(&repository, &layout, &image).await?;
        let manifest = layout.load(&image, &descriptor)?;
        if self.store.claim(rootfs_of(&manifest)).is_err() {
            let layers = manifest.blobs().map(Ok::<_, ImageError>);
            let layer = |blob| self.blob(&repository, blob, self.progress.layer(blob));
            stream::iter(layers).try_for_each_concurrent(LAYERS, layer).await?;
        }
        Ok(manifest)
    }

    /// From the name through indexes to the manifest for this platform; all of them come into the store,
    /// and the config.
    async fn manifest(
        &self,
        repository: &Repository,
        layout: &Layout,
        image: &str,
    ) -> Result<Descriptor, ImageError> {
        let wanted = match self.name.version() {
            Version::Digest(digest) => Some(*digest),
            Version::Tag(_) => None,
        };
        let mut descriptor = self.document(repository, wanted).await?;
        for _ in 0..MAX_DEPTH {
            match layout.next(image, &descriptor)? {
                Next::Manifest(chosen) => {
                    self.document(repository, Some(oci::blob(&chosen)?.digest)).await?;
                    descriptor = *chosen;
                }
                Next::Config(config) if config.size > MAX_JSON => {
                    let object = format!("the config {}", config.digest);
                    return Err(ImageError::LargeJson {
                        object,
                        size: config.size,
                        limit: MAX_JSON,
                    });
                }
                Next::Config(config) => {
                    self.blob(repository, config, LayerBar::none()).await?;
                    return Ok(descriptor);
                }
            }
        }
        let object = format!("the index {}", descriptor.digest());
        Err(ImageError::MediaType { object, media_type: descriptor.media_type().to_string() })
    }

    /// One manifest or index, verified and put into the store.
    async fn document(
        &self,
        repository: &Repository,
        wanted: Option<Digest>,
    ) -> Result<Descriptor, ImageError> {
        let fetch = async || self.of(repository.manifest(wanted).await);
        let bytes = self.retry(fetch).await?;
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        let object = format!("the manifest {}", wanted.unwrap_or(digest));
        if size > MAX_JSON {
            return Err(ImageError::LargeJson { object, size, limit: MAX_JSON });
        }
        if let Some(digest) = wanted.filter(|wanted| *wanted != digest) {
            return Err(ImageError::BlobDigest { digest, actual: Digest::of(&bytes) });
        }
        let descriptor =
            describe(&bytes, digest).map_err(|source| ImageError::Json { object, source })?;
        self.store.save_blob(digest, &bytes)?;
        Ok(descriptor)
    }

    /// One blob, verified and put into the store.
    async fn blob(
        &self,
        repository: &Repository,
        blob: Blob,
        bar: LayerBar,
    ) -> Result<(), ImageError> {
        loop {
            let Some(mut partial) = self.store.begin_blob(blob).await? else {
                bar.done("already here");
                return Ok(());
            };
            let went_on = partial.at > 0;
            self.retry(async || self.stream(repository, blob, &mut partial, &bar).await).await?;
            let finished = spawn_blocking(move || partial.finish()).await;
            match finished.map_err(|e| ImageError::EventLoop { source: e.into() })? {
                // What an earlier pull left was not what it should be; it is gone now.
                Err(ImageError::BlobDigest { .. } | ImageError::BlobSize { .. }) if went_on => {}
                finished => return finished.map(|()| bar.done("pulled")),
            }
        }
    }

    /// What is missing of a blob, as far as it comes.
    async fn stream(
        &self,
        repository: &Repository,
        blob: Blob,
        partial: &mut Partial,
        bar: &LayerBar,
    ) -> Result<(), ImageError> {
        if partial.is_complete() {
            return Ok(());
        }
        let mut stream = self.of(repository.blob(blob.digest, partial.at).await)?;
        if stream.start != partial.at {
            partial.restart()?;
        }
        bar.at(partial.at);
        while !partial.is_complete() {
            let Some(bytes) = self.of(stream.next().await)? else {
                let (host, object) = (self.endpoint.host.clone(), blob.digest.to_string());
                let (at, size) = (partial.at, blob.size);
                return self.of(Err(RegistryError::Short { host, object, at, size }));
            };
            partial.write(bytes.as_ref())?;
            bar.at(partial.at);
        }
        Ok(())
    }

    /// Tries again after what may pass, a bounded number of times.
    async fn retry<T>(
        &self,
        mut attempt: impl AsyncFnMut() -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let mut pause = PAUSE;
        for _ in 1..TRIES {
            match attempt().await {
                Err(ImageError::Pull { source, .. }) if source.is_transient() => {
                    self.progress.line(&format!("{}; trying again", chain_text(&source)));
                }
                other => return other,
            }
            sleep(pause).await;
            pause *= 2;
        }
        attempt().await
    }

    fn of<T>(&self, result: Result<T, RegistryError>) -> Result<T, ImageError> {
        result.map_err(|source| ImageError::Pull { name: self.name.familiar(), source })
    }
}

/// The descriptor of a document that came by a name alone.
fn describe(bytes: &[u8], digest: Digest) -> Result<Descriptor, serde_json::Error> {
    let peek: Peek = serde_json::from_slice(bytes)?;
    let implied = if peek.manifests.is_some() { INDEXES[0] } else { MANIFESTS[0] };
    let media_type = MediaType::from(peek.media_type.as_deref().unwrap_or(implied));
    Ok(Blob { digest, size: bytes.len() as u64 }.describe(media_type))
}
