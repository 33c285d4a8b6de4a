//! The image store: from a name, an OCI layout, a tar or a directory to one read-only EROFS file.
//!
//! Everything here blocks and none of it needs privileges: an image is never unpacked on the host.
//! Its layers are merged in memory ([`tree`], names and metadata only), the bytes of its files wait in
//! one unlinked file ([`spool`]), and [`erofs`] writes both out as a file system. A hostile archive
//! therefore meets no path of the host, only a map. In reading order:
//!
//! - [`reference`]: what a user may write where an image is wanted
//! - [`store`]: the store: resolve, pull, import, list; one conversion per content, safe against kills
//! - [`registry`], [`progress`]: where images are pulled from, and what the user sees of it
//! - [`oci`]: an OCI layout: index, manifest, config, verified blobs
//! - [`layer`]: one layer: decompressed, verified, merged into the tree
//! - [`archive`]: the tar stream and its extensions
//! - [`tree`]: the merged tree: replacement, whiteouts, hard links
//! - [`directory`]: a directory of the host as a tree
//! - [`overlay`], [`identity`]: layers of containerd and Docker as a tree, and how they are known again
//! - [`spool`]: file contents on their way into the image
//! - [`erofs`]: a tree as an EROFS file system
//! - [`scratch`]: the empty ext4 disk a container writes to
//! - [`sparse`], [`digest`], [`lock`], [`error`]: copying without filling holes, SHA-256, locks, errors

mod archive;
mod digest;
mod directory;
mod erofs;
mod error;
mod identity;
mod layer;
mod lock;
mod oci;
mod overlay;
mod progress;
mod reference;
mod registry;
mod scratch;
mod sparse;
mod spool;
mod store;
#[cfg(test)]
pub(crate) mod testing;
mod tree;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::Config;

pub use digest::Digest;
pub use erofs::FormatError;
pub use error::{ImageError, LayerError};
pub use overlay::{Dialect, Marks};
pub use reference::{Name, Reference, ReferenceError, Version};
pub use registry::RegistryError;
pub use scratch::{lasting_scratch, scratch};
pub use store::Store;

/// What a pull has to know of the world outside.
#[derive(Debug, Default)]
pub struct Registries {
    pub config: Config,
    /// Docker's `config.json`.
    pub credentials: Option<PathBuf>,
}

/// An image that can be run: one file for its root, and what its author wants run on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The full name, as `docker.io/library/alpine:latest`, or the source as it was given.
    pub reference: String,
    /// `sha256:…` of the OCI manifest, of the tar, or of a directory's metadata.
    pub digest: String,
    /// The root file system: one EROFS file, never written again.
    pub rootfs: PathBuf,
    pub config: ImageConfig,
}

/// The part of the OCI image configuration a run obeys. Labels and ports stay behind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    #[serde(default)]
    pub entrypoint: Vec<String>,
    #[serde(default)]
    pub cmd: Vec<String>,
    /// `NAME=value` each.
    #[serde(default)]
    pub env: Vec<String>,
    /// As written in the image: a name or a number, with or without `:group`; empty is root.
    #[serde(default)]
    pub user: String,
    /// Empty is `/`.
    #[serde(default)]
    pub working_dir: String,
    /// As written in the image: `SIGQUIT`, `QUIT` or a number.
    #[serde(default)]
    pub stop_signal: Option<String>,
    /// Directories that are not to be part of the root file system.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
}

impl ImageConfig {
    /// What a bare root file system is run with: a shell, and the usual search path.
    pub fn of_rootfs() -> Self {
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        Self { cmd: vec!["/bin/sh".into()], env: vec![path.into()], ..Self::default() }
    }
}
