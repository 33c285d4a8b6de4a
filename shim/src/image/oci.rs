//! An OCI image layout on disk (OCI image specification 1.1, "Image Layout"): from a tag to a manifest,
//! its config and its layers. Nothing is believed before its size and digest have been compared.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oci_spec::image::{
    Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, OciLayout, Os,
    Platform,
};
use serde::de::DeserializeOwned;

use super::digest::Digest;
use super::error::ImageError;
use super::layer::{Layer, LayerKind};
use super::{ImageConfig, digest};

/// The most a JSON document may have, as registries limit it.
pub const MAX_JSON: u64 = 4 << 20;
/// How deep an index may lie in an index.
pub const MAX_DEPTH: u32 = 4;
const TAG: &str = "org.opencontainers.image.ref.name";
const DEFAULT_TAG: &str = "latest";

pub const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
pub const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// How the media types of layers begin; compression is read from the blob itself.
const LAYERS: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

pub struct Layout {
    path: PathBuf,
}

/// An image of a layout: verified but for its layers, which are verified as they are read.
#[derive(Debug)]
pub struct Manifest {
    pub digest: Digest,
    pub config: ImageConfig,
    layers: Vec<(Blob, Digest)>,
}

/// A blob as a descriptor tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
}

/// What has to be there before an image of single blobs can be [loaded](Layout::load).
pub enum Next {
    /// This manifest or index, to ask again with.
    Manifest(Box<Descriptor>),
    /// Its config, and nothing more.
    Config(Blob),
}

impl Blob {
    pub fn describe(self, media_type: MediaType) -> Descriptor {
        Descriptor::new(media_type, self.size, self.digest)
    }
}

impl Layout {
    /// A layout whose images are known by descriptors instead of tags: `path/blobs` is all there is.
    pub fn of_blobs(path: &Path) -> Self {
        Self { path: path.into() }
    }

    /// What is needed after the manifest or index `descriptor`, which is there.
    pub fn next(&self, image: &str, descriptor: &Descriptor) -> Result<Next, ImageError> {
        if !INDEXES.contains(&descriptor.media_type().as_ref()) {
            expect_media_type(
                descriptor,
                &MANIFESTS,
                &format!("manifest {}", descriptor.digest()),
            )?;
            let manifest: ImageManifest = self.json(descriptor, "the manifest")?;
            return Ok(Next::Config(blob(manifest.config())?));
        }
        let index: ImageIndex = self.json(descriptor, "the index")?;
        let ours = |d: &&Descriptor| d.platform().as_ref().is_none_or(is_ours);
        match index.manifests().iter().find(ours) {
            Some(chosen) => Ok(Next::Manifest(Box::new(chosen.clone()))),
            None => {
                let platforms = index.manifests().iter().filter_map(|d| d.platform().as_ref());
                let found = platforms.map(|p| format!("{}/{}", p.os(), p.architecture()));
                Err(ImageError::Platform { image: image.into(), found: list(found.collect()) })
            }
        }
    }

    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let layout = Self { path: path.into() };
        let not_a_layout = |source| ImageError::NotALayout { path: path.into(), source };
        let mark = path.join("oci-layout");
        let file = open_regular(&mark).map_err(not_a_layout)?;
        let _: OciLayout = read_json(file, &mark.display().to_string())?;
        Ok(layout)
    }

    /// The image with this tag; without one, the only image or the one tagged `latest`.
    pub fn manifest(&self, tag: Option<&str>) -> Result<Manifest, ImageError> {
        let image = match tag {
            Some(tag) => format!("oci:{}:{tag}", self.path.display()),
            None => format!("oci:{}", self.path.display()),
        };
        let index: ImageIndex = self.index()?;
        let tagged = self.tagged(&index, tag)?;
        let mut found = Vec::new();
        let Some(descriptor) = self.find(tagged.into_iter().cloned().collect(), &mut found, 0)?
        else {
            return Err(ImageError::Platform { image, found: list(found) });
        };
        self.load(&image, &descriptor)
    }

    /// The layers of an image of this layout, lowest first.
    pub fn layers(&self, manifest: &Manifest) -> impl Iterator<Item = Result<Layer, ImageError>> {
        manifest.layers.iter().map(|&(blob, diff_id)| {
            let file = self.open_blob(blob)?;
            let kind = LayerKind::Changeset { diff_id };
            Ok(Layer { blob: file, size: blob.size, digest: blob.digest, kind })
        })
    }

    fn index(&self) -> Result<ImageIndex, ImageError> {
        let path = self.path.join("index.json");
        let not_a_layout = |source| ImageError::NotALayout { path: self.path.clone(), source };
        read_json(open_regular(&path).map_err(not_a_layout)?, &path.display().to_string())
    }

    fn tagged<'i>(
        &self,
        index: &'i ImageIndex,
        tag: Option<&str>,
    ) -> Result<Vec<&'i Descriptor>, ImageError> {
        let mut known: Vec<&str> = index.manifests().iter().filter_map(tag_of).collect();
        known.sort_unstable();
        known.dedup();
        let with = |tag| index.manifests().iter().filter(|d| tag_of(d) == Some(tag)).collect();
        let names = || list(known.iter().map(|tag| tag.to_string()).collect());
        match tag {
            Some(tag) if known.contains(&tag) => Ok(with(tag)),
            Some(tag) => {
                let (layout, tag) = (self.path.clone(), tag.into());
                Err(ImageError::UnknownTag { layout, tag, known: names() })
            }
            None if known.len() <= 1 => Ok(index.manifests().iter().collect()),
            None if known.contains(&DEFAULT_TAG) => Ok(with(DEFAULT_TAG)),
            None => Err(ImageError::WhichTag { layout: self.path.clone(), known: names() }),
        }
    }

    /// The first manifest for linux/amd64, through nested indexes; `found` collects the others.
    fn find(
        &self,
        descriptors: Vec<Descriptor>,
        found: &mut Vec<String>,
        depth: u32,
    ) -> Result<Option<Descriptor>, ImageError> {
        for descriptor in descriptors {
            let media_type = descriptor.media_type().to_string();
            if INDEXES.contains(&media_type.as_str()) && depth < MAX_DEPTH {
                let index: ImageIndex = self.json(&descriptor, "the index")?;
                if let Some(descriptor) = self.find(index.manifests().clone(), found, depth + 1)? {
                    return Ok(Some(descriptor));
                }
            } else if !MANIFESTS.contains(&media_type.as_str()) {
                let object = format!("manifest {}", descriptor.digest());
                return Err(ImageError::MediaType { object, media_type });
            } else if descriptor.platform().as_ref().is_none_or(is_ours) {
                return Ok(Some(descriptor));
            } else if let Some(platform) = descriptor.platform() {
                found.push(format!("{}/{}", platform.os(), platform.architecture()));
            }
        }
        Ok(None)
    }

    /// The image of a manifest that is there with its config; `image` is what to call it.
    pub fn load(&self, image: &str, descriptor: &Descriptor) -> Result<Manifest, ImageError> {
        let manifest: ImageManifest = self.json(descriptor, "the manifest")?;
        expect_media_type(manifest.config(), &CONFIGS, "the config")?;
        let config: ImageConfiguration = self.json(manifest.config(), "the config")?;
        if (config.os(), config.architecture()) != (&Os::Linux, &Arch::Amd64) {
            let found = format!("{}/{}", config.os(), config.architecture());
            return Err(ImageError::Platform { image: image.into(), found });
        }
        let layers = layers(image, &manifest, &config)?;
        Ok(Manifest { digest: blob(descriptor)?.digest, config: run_config(&config), layers })
    }

    fn json<T: DeserializeOwned>(&self, of: &Descriptor, what: &str) -> Result<T, ImageError> {
        let blob = blob(of)?;
        let object = format!("{what} {}", blob.digest);
        let file = self.open_blob(blob)?;
        let bytes = read_limited(file, &object)?;
        let actual = Digest::of(&bytes);
        if actual != blob.digest {
            return Err(ImageError::BlobDigest { digest: blob.digest, actual });
        }
        serde_json::from_slice(&bytes).map_err(|source| ImageError::Json { object, source })
    }

    fn open_blob(&self, Blob { digest, size }: Blob) -> Result<File, ImageError> {
        let path = self.path.join("blobs/sha256").join(digest.hex());
        let unreadable = |source| ImageError::Blob { digest, path: path.clone(), source };
        let file = open_regular(&path).map_err(unreadable)?;
        let actual = file.metadata().map_err(unreadable)?.len();
        if actual != size {
            return Err(ImageError::BlobSize { digest, expected: size, actual });
        }
        Ok(file)
    }
}

impl Manifest {
    /// The digests of the uncompressed layers: what the merged tree depends on.
    pub fn diff_ids(&self) -> impl Iterator<Item = &Digest> {
        self.layers.iter().map(|(_, diff_id)| diff_id)
    }

    /// The layers' blobs, lowest first.
    pub fn blobs(&self) -> impl Iterator<Item = Blob> {
        self.layers.iter().map(|(blob, _)| *blob)
    }
}

fn layers(
    image: &str,
    manifest: &ImageManifest,
    config: &ImageConfiguration,
) -> Result<Vec<(Blob, Digest)>, ImageError> {
    let (layers, diff_ids) = (manifest.layers(), config.rootfs().diff_ids());
    if layers.is_empty() {
        return Err(ImageError::NoLayers { image: image.into() });
    }
    if layers.len() != diff_ids.len() {
        let (layers, diff_ids) = (layers.len(), diff_ids.len());
        return Err(ImageError::LayerCount { image: image.into(), layers, diff_ids });
    }
    let layer = |(layer, diff_id): (&Descriptor, &String)| {
        let media_type = layer.media_type().to_string();
        if !LAYERS.iter().any(|known| media_type.starts_with(known)) {
            let object = format!("layer {}", layer.digest());
            return Err(ImageError::MediaType { object, media_type });
        }
        Ok((blob(layer)?, parse_digest(diff_id, "the config's list of layers")?))
    };
    layers.iter().zip(diff_ids).map(layer).collect()
}

fn run_config(image: &ImageConfiguration) -> ImageConfig {
    let Some(config) = image.config() else { return ImageConfig::default() };
    ImageConfig {
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        env: config.env().clone().unwrap_or_default(),
        volumes: config.volumes().clone().unwrap_or_default(),
        user: config.user().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        stop_signal: config.stop_signal().clone(),
    }
}

fn tag_of(descriptor: &Descriptor) -> Option<&str> {
    descriptor.annotations().as_ref()?.get(TAG).map(String::as_str)
}

fn is_ours(platform: &Platform) -> bool {
    (platform.os(), platform.architecture()) == (&Os::Linux, &Arch::Amd64)
}

pub fn blob(descriptor: &Descriptor) -> Result<Blob, ImageError> {
    let digest = parse_digest(descriptor.digest().as_ref(), descriptor.media_type().as_ref())?;
    Ok(Blob { digest, size: descriptor.size() })
}

fn parse_digest(text: &str, object: &str) -> Result<Digest, ImageError> {
    let bad =
        |source: digest::ParseDigestError| ImageError::BadDigest { object: object.into(), source };
    text.parse().map_err(bad)
}

fn expect_media_type(of: &Descriptor, known: &[&str], object: &str) -> Result<(), ImageError> {
    let media_type = of.media_type().to_string();
    if known.contains(&media_type.as_str()) {
        return Ok(());
    }
    Err(ImageError::MediaType { object: object.into(), media_type })
}

fn read_json<T: DeserializeOwned>(file: File, object: &str) -> Result<T, ImageError> {
    let bytes = read_limited(file, object)?;
    serde_json::from_slice(&bytes)
        .map_err(|source| ImageError::Json { object: object.into(), source })
}

fn read_limited(file: File, object: &str) -> Result<Vec<u8>, ImageError> {
    let unreadable = |source| ImageError::Source { path: object.into(), source };
    let size = file.metadata().map_err(unreadable)?.len();
    if size > MAX_JSON {
        return Err(ImageError::LargeJson { object: object.into(), size, limit: MAX_JSON });
    }
    let mut bytes = Vec::new();
    file.take(MAX_JSON).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

/// Opens a file for reading; anything but a regular file is refused and never waited for.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

fn list(names: Vec<String>) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests;
