//! What can go wrong with an image: the object, the cause, and what to do about it.

use std::io;
use std::path::PathBuf;

use super::archive::ArchiveError;
use super::digest::{Digest, ParseDigestError};
use super::erofs::FormatError;
use super::reference::ReferenceError;
use super::registry::RegistryError;
use super::tree::TreeError;
use crate::cli::Memory;
use crate::config::ConfigError;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error("there is no image `{name}` in {store} (it has: {known})")]
    Unknown { name: String, store: PathBuf, known: String },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("`{name}` cannot be pulled")]
    Pull { name: String, source: RegistryError },
    #[error("what {host} gives as `{name}` is not what it should be")]
    Given { name: String, host: String, source: Box<ImageError> },
    #[error("the event loop of a pull cannot run")]
    EventLoop { source: io::Error },
    #[error("{path} is not an OCI layout: it needs oci-layout and index.json")]
    NotALayout { path: PathBuf, source: io::Error },
    #[error("{layout} has no image tagged `{tag}` (it has: {known})")]
    UnknownTag { layout: PathBuf, tag: String, known: String },
    #[error("{layout} holds several images (it has: {known})")]
    WhichTag { layout: PathBuf, known: String },
    #[error("{image} is not made for linux/amd64 (it is for: {found})")]
    Platform { image: String, found: String },
    #[error("{object} has the media type `{media_type}`, which ampoule does not read")]
    MediaType { object: String, media_type: String },
    #[error("{object} names a blob that cannot be looked up")]
    BadDigest { object: String, source: ParseDigestError },
    #[error("blob {digest} cannot be read from {path}")]
    Blob { digest: Digest, path: PathBuf, source: io::Error },
    #[error("blob {digest} is truncated or changed: {actual} bytes instead of {expected}")]
    BlobSize { digest: Digest, expected: u64, actual: u64 },
    #[error("blob {digest} is corrupt: its content has the digest {actual}")]
    BlobDigest { digest: Digest, actual: Digest },
    #[error("{object} is {size} bytes long; at most {limit} are read")]
    LargeJson { object: String, size: u64, limit: u64 },
    #[error("{object} is not the JSON the OCI image specification describes")]
    Json { object: String, source: serde_json::Error },
    #[error("{image} has no layers: there is nothing to run")]
    NoLayers { image: String },
    #[error("{image} has {layers} layers, but its config counts {diff_ids}")]
    LayerCount { image: String, layers: usize, diff_ids: usize },
    #[error("{layer} cannot be used")]
    Layer { layer: String, source: LayerError },
    #[error("{archive} is not what `docker save` writes, or not all of it: it has no {member}")]
    ArchiveMember { archive: String, member: String },
    #[error("{archive} holds {count} images; one is read")]
    ArchiveImages { archive: String, count: usize },
    #[error("{path} cannot be read")]
    Source { path: PathBuf, source: io::Error },
    #[error("{path} is not a directory")]
    NotADirectory { path: PathBuf },
    #[error("`{entry}` in {path} cannot be part of an image")]
    SourceEntry { path: PathBuf, entry: String, source: TreeError },
    #[error(
        "`{entry}` in {path} has the attribute {attribute}: a layer made with overlayfs's redirect_dir or \
         metacopy cannot be read on its own; set both to off for the snapshotter"
    )]
    SourceOverlay { path: PathBuf, entry: String, attribute: String },
    #[error("{path} changed while it was read")]
    Changed { path: PathBuf },
    #[error("the image {path} cannot be written")]
    Write { path: PathBuf, source: FormatError },
    #[error("the root file system of `{name}`, {path}, is damaged")]
    Damaged { name: String, path: PathBuf, source: FormatError },
    #[error("the image store cannot use {path}")]
    Store { path: PathBuf, source: io::Error },
    #[error("{path}, a name in the image store, is damaged")]
    Record { path: PathBuf, source: serde_json::Error },
    #[error("another process has been at work on {what} for {minutes} minutes")]
    Busy { what: String, minutes: u64 },
    #[error("it cannot have {size}, but from {least} to {most}")]
    ScratchSize { size: Memory, least: Memory, most: Memory },
    #[error("`mkfs.ext4` is not installed")]
    NoMkfs { source: io::Error },
    #[error("`mkfs.ext4` failed on {path}: {output}")]
    Mkfs { path: PathBuf, output: String },
}

impl ImageError {
    /// Names who gave an image that contradicts its own digests and sizes, or is no image.
    pub(super) fn given_by(self, host: &str, name: &str) -> Self {
        match self {
            Self::BlobDigest { .. }
            | Self::BlobSize { .. }
            | Self::BadDigest { .. }
            | Self::LargeJson { .. }
            | Self::MediaType { .. }
            | Self::Json { .. } => {
                Self::Given { name: name.into(), host: host.into(), source: Box::new(self) }
            }
            other => other,
        }
    }

    /// The image, the file or the blob that it is about.
    pub fn object(&self) -> Option<String> {
        let path = |path: &PathBuf| path.display().to_string();
        Some(match self {
            Self::Reference(error) => return error.object(),
            Self::Config(error) => error.object(),
            Self::EventLoop { .. } => return None,
            Self::NoMkfs { .. } => "mkfs.ext4".into(),
            Self::Unknown { name, .. }
            | Self::Pull { name, .. }
            | Self::Given { name, .. }
            | Self::Damaged { name, .. } => name.clone(),
            Self::NotALayout { path: file, .. }
            | Self::UnknownTag { layout: file, .. }
            | Self::WhichTag { layout: file, .. }
            | Self::Source { path: file, .. }
            | Self::NotADirectory { path: file }
            | Self::SourceEntry { path: file, .. }
            | Self::SourceOverlay { path: file, .. }
            | Self::Changed { path: file }
            | Self::Write { path: file, .. }
            | Self::Store { path: file, .. }
            | Self::Record { path: file, .. }
            | Self::Mkfs { path: file, .. } => path(file),
            Self::Blob { digest, .. }
            | Self::BlobSize { digest, .. }
            | Self::BlobDigest { digest, .. } => digest.to_string(),
            Self::Platform { image: object, .. }
            | Self::NoLayers { image: object }
            | Self::LayerCount { image: object, .. }
            | Self::MediaType { object, .. }
            | Self::BadDigest { object, .. }
            | Self::LargeJson { object, .. }
            | Self::Json { object, .. }
            | Self::Layer { layer: object, .. }
            | Self::ArchiveMember { archive: object, .. }
            | Self::ArchiveImages { archive: object, .. }
            | Self::Busy { what: object, .. } => object.clone(),
            Self::ScratchSize { .. } => "--scratch-size".into(),
        })
    }

    /// The way out, where it does not depend on why the system refused something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Reference(_) => {
                "an image is NAME[:TAG], NAME@DIGEST, oci:DIR[:TAG], dir:PATH, tar:FILE or \
                                   docker-archive:FILE"
                    .into()
            }
            Self::Unknown { name, .. } => format!(
                "`ampoule image pull {name}` or `ampoule image import SOURCE {name}` puts one there; oci:DIR, \
                 dir:PATH and tar:FILE run without a name"
            ),
            Self::Pull { source, .. } => return source.hint(),
            Self::Given { .. } => {
                "nothing of it was kept; pull again, or from another registry".into()
            }
            Self::UnknownTag { .. } | Self::WhichTag { .. } => {
                "name a tag it has: oci:DIR:TAG".into()
            }
            Self::Platform { .. } => "build or copy the image for linux/amd64".into(),
            Self::Blob { .. } | Self::BlobSize { .. } | Self::BlobDigest { .. } => {
                "pull or copy the image again".into()
            }
            Self::ArchiveImages { .. } => "save one image alone".into(),
            Self::Changed { .. } => "run again when nothing writes to it".into(),
            Self::Damaged { .. } => "pull or import the image again".into(),
            Self::Record { .. } => "remove the file, and pull or import the image again".into(),
            Self::Busy { .. } => "wait for that process, or end it".into(),
            Self::ScratchSize { .. } => {
                "--scratch-size, or sandbox.scratch_size in config.toml, sets it".into()
            }
            Self::NoMkfs { .. } => "`apt-get install e2fsprogs`".into(),
            _ => return None,
        })
    }

    /// Calls a layer by another name than its digest.
    pub(super) fn named(self, name: &str) -> Self {
        match self {
            Self::Layer { source, .. } => Self::Layer { layer: name.into(), source },
            other => other,
        }
    }

    /// Whether another place to pull from would not help.
    pub(super) fn is_of_this_host(&self) -> bool {
        matches!(self, Self::Store { .. } | Self::Busy { .. } | Self::EventLoop { .. })
    }
}

/// Why a layer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("its entry `{entry}` is refused")]
    Entry { entry: String, source: TreeError },
    #[error("its entry `{entry}` cannot be stored")]
    Content { entry: String, source: io::Error },
    #[error("it cannot be decompressed")]
    Decompress { source: io::Error },
    #[error("it ends without an end mark: it was cut off")]
    NoEnd,
    #[error("its content is not what the image's config promises: {actual} instead of {expected}")]
    DiffId { expected: Digest, actual: Digest },
}
