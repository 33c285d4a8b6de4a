//! Images that come as one stream: their parts become blobs of the store, and then an image as any other.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use oci_spec::image::{Descriptor, ImageManifestBuilder, MediaType};
use serde::Deserialize;
use serde_json::from_slice;

use super::{Converted, Store};
use crate::image::archive::{Archive, ArchiveError, Content, Member};
use crate::image::digest::{Digest, Hashing};
use crate::image::layer::decompress;
use crate::image::oci::{self, Blob, Layout, MAX_JSON};
use crate::image::tree::{Node, lossy};
use crate::image::{Image, ImageError, LayerError, Name, Reference};

const BUFFER: usize = 128 << 10;

/// What `docker save` writes as `manifest.json`: one of these for each image.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
}

/// The members of an archive by their paths.
#[derive(Default)]
struct Members {
    blobs: HashMap<String, Blob>,
    /// Older dockers write a layer once and links to it.
    links: HashMap<String, String>,
}

impl Store {
    /// Imports a tar of a root file system from a stream.
    pub fn import_stream(
        &self,
        stream: &mut impl Read,
        names: &[Name],
    ) -> Result<Image, ImageError> {
        let key = format!("stream-{}", std::process::id());
        let _lock = self.lock(&key, "another stream")?;
        let blob = self.add_blob(&key, "standard input", stream)?;
        let mut image = self.import(&Reference::Tar(self.blob_path(blob.digest)), names)?;
        if names.is_empty() {
            image.reference = "-".into();
        }
        Ok(image)
    }

    /// Reads what `docker save` wrote, compressed or not.
    pub(super) fn convert_docker_archive(
        &self,
        source: &Reference,
        path: &Path,
    ) -> Result<Converted, ImageError> {
        let unreadable = |source| ImageError::Source { path: path.into(), source };
        let file = oci::open_regular(path).map_err(unreadable)?;
        let name = source.to_string();
        let members = self.members(file, &name)?;
        let saved: Vec<Saved> = self.read_json(members.find("manifest.json", &name)?, &name)?;
        let [saved] = &saved[..] else {
            return Err(ImageError::ArchiveImages { archive: name, count: saved.len() });
        };
        let config = members.find(&saved.config, &name)?;
        let layers = saved.layers.iter().map(|layer| members.find(layer, &name));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let descriptor = self.save_manifest(config, &layers)?;
        let layout = Layout::of_blobs(&self.root);
        let manifest = layout.load(&name, &descriptor)?;
        self.convert_layout(&layout, manifest, &name)
    }

    /// Makes blobs of all files of an archive.
    fn members(&self, file: File, name: &str) -> Result<Members, ImageError> {
        let failed = |source: LayerError| ImageError::Layer { layer: name.into(), source };
        let key = Digest::of(name.as_bytes()).hex();
        let _lock = self.lock(&key, name)?;
        let mut reader = BufReader::with_capacity(BUFFER, file);
        let mut archive = Archive::new(decompress(&mut reader).map_err(failed)?);
        let mut members = Members::default();
        while let Some(member) = archive.next_member().map_err(|e| failed(e.into()))? {
            let Member { path, content, .. } = member;
            let path = lossy(&path);
            match content {
                Content::File { .. } => {
                    members.blobs.insert(path, self.add_blob(&key, name, &mut archive.body())?);
                }
                Content::Node(Node::Symlink(to)) | Content::Link(to) => {
                    // `../LAYER/layer.tar` in a folder beside the target's, or a path.
                    let to = lossy(&to);
                    members.links.insert(path, to.trim_start_matches("../").into());
                }
                Content::Node(_) => {}
            }
        }
        match archive.ended() {
            true => Ok(members),
            false => Err(failed(ArchiveError::Truncated.into())),
        }
    }

    /// Takes a stream into the store; the lock of `key` is held, `from` is what to call the stream.
    fn add_blob(&self, key: &str, from: &str, stream: &mut impl Read) -> Result<Blob, ImageError> {
        let path = self.root.join("tmp").join(format!("{key}.blob"));
        let added = self.place_blob(&path, from, stream);
        if added.is_err() {
            // Of a full disk it takes no room; what stays all the same is swept by the next to open the store.
            let _ = fs::remove_file(&path);
        }
        added
    }

    fn place_blob(&self, path: &Path, from: &str, stream: impl Read) -> Result<Blob, ImageError> {
        let failed = |source| ImageError::Store { path: path.into(), source };
        let unreadable = |source| ImageError::Source { path: from.into(), source };
        let mut file = File::create(path).map_err(failed)?;
        let mut stream = Hashing::new(stream);
        let mut buffer = vec![0; BUFFER];
        loop {
            match stream.read(&mut buffer).map_err(unreadable)? {
                0 => break,
                n => file.write_all(&buffer[..n]).map_err(failed)?,
            }
        }
        let (digest, size) = stream.finish().map_err(unreadable)?;
        let placed = file.sync_all().and_then(|()| fs::rename(path, self.blob_path(digest)));
        placed.map_err(failed)?;
        Ok(Blob { digest, size })
    }

    fn save_manifest(&self, config: Blob, layers: &[Blob]) -> Result<Descriptor, ImageError> {
        let object = || "the manifest of an archive".to_string();
        let layers = layers.iter().map(|layer| layer.describe(MediaType::ImageLayer));
        let manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(config.describe(MediaType::ImageConfig))
            .layers(layers.collect::<Vec<_>>())
            .build()
            .map_err(|e| io::Error::other(e.to_string()))
            .and_then(|manifest| Ok(serde_json::to_vec(&manifest)?));
        let bytes =
            manifest.map_err(|source| ImageError::Source { path: object().into(), source })?;
        let blob = Blob { digest: Digest::of(&bytes), size: bytes.len() as u64 };
        self.save_blob(blob.digest, &bytes)?;
        Ok(blob.describe(MediaType::ImageManifest))
    }

    fn read_json<T: for<'de> Deserialize<'de>>(
        &self,
        Blob { digest, size }: Blob,
        object: &str,
    ) -> Result<T, ImageError> {
        let object = format!("manifest.json of {object}");
        if size > MAX_JSON {
            return Err(ImageError::LargeJson { object, size, limit: MAX_JSON });
        }
        let path = self.blob_path(digest);
        let bytes = fs::read(&path).map_err(|source| ImageError::Store { path, source })?;
        from_slice(&bytes).map_err(|source| ImageError::Json { object, source })
    }
}

impl Members {
    fn find(&self, path: &str, archive: &str) -> Result<Blob, ImageError> {
        let path = self.links.get(path).map_or(path, String::as_str);
        let missing = || ImageError::ArchiveMember { archive: archive.into(), member: path.into() };
        self.blobs.get(path).copied().ok_or_else(missing)
    }
}
