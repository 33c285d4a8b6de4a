//! From a source to a root file system in the store, once for each content.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::SystemTime;

use super::{Converted, KEEP, Store};
use crate::error::refusal;
use crate::image::digest::{Digest, Hashing};
use crate::image::directory::Directory;
use crate::image::erofs::{self, FormatError};
use crate::image::layer::{self, Layer, LayerKind};
use crate::image::oci::{self, Layout, Manifest};
use crate::image::spool::Spool;
use crate::image::tree::Tree;
use crate::image::{ImageConfig, ImageError, Reference};

impl Store {
    /// The root file system of any source; a name's is there already.
    pub(super) fn convert(&self, source: &Reference) -> Result<Converted, ImageError> {
        match source {
            Reference::Name(name) => self.record(name).map(Converted::from),
            Reference::Oci { layout, tag } => {
                let layout = Layout::open(layout)?;
                let manifest = layout.manifest(tag.as_deref())?;
                self.convert_layout(&layout, manifest, &source.to_string())
            }
            Reference::Directory(path) => self.convert_directory(source, path),
            Reference::Tar(path) => self.convert_tar(source, path),
            Reference::DockerArchive(path) => self.convert_docker_archive(source, path),
        }
    }

    /// The root file system of an image whose blobs `layout` has; `source` is what to call it.
    pub(super) fn convert_layout(
        &self,
        layout: &Layout,
        manifest: Manifest,
        source: &str,
    ) -> Result<Converted, ImageError> {
        let rootfs = rootfs_of(&manifest);
        self.build(rootfs, source, |tree, spool| {
            layout.layers(&manifest).try_for_each(|layer| layer::merge(&layer?, tree, spool))
        })?;
        Ok(Converted { digest: manifest.digest, rootfs, config: manifest.config })
    }

    fn convert_directory(&self, source: &Reference, path: &Path) -> Result<Converted, ImageError> {
        let directory = Directory::open(path)?;
        let rootfs = key("dir", [&directory.digest]);
        self.build(rootfs, &source.to_string(), |tree, spool| directory.merge(tree, spool))?;
        Ok(Converted { digest: directory.digest, rootfs, config: ImageConfig::of_rootfs() })
    }

    fn convert_tar(&self, source: &Reference, path: &Path) -> Result<Converted, ImageError> {
        let unreadable = |source| ImageError::Source { path: path.into(), source };
        let hashed = oci::open_regular(path).and_then(|file| Hashing::new(file).finish());
        let (digest, size) = hashed.map_err(unreadable)?;
        let rootfs = key("tar", [&digest]);
        self.build(rootfs, &source.to_string(), |tree, spool| {
            let blob = oci::open_regular(path).map_err(unreadable)?;
            let layer = Layer { blob, size, digest, kind: LayerKind::Rootfs };
            layer::merge(&layer, tree, spool).map_err(|error| error.named(&source.to_string()))
        })?;
        Ok(Converted { digest, rootfs, config: ImageConfig::of_rootfs() })
    }

    /// Makes sure that the root file system `key` is there and whole; `merge` says what is in it.
    fn build(
        &self,
        key: Digest,
        source: &str,
        merge: impl FnOnce(&mut Tree, &mut Spool) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        if self.claim(key).is_ok() {
            return Ok(());
        }
        let _lock = self.lock(&key.hex(), source)?;
        if self.claim(key).is_ok() {
            return Ok(());
        }
        self.write(key, &self.rootfs_path(key), source, merge, |_| Ok(()))?;
        self.prune(KEEP).map(drop)
    }

    /// Converts what `merge` says to the file `place`, and has `kept` called with where it lies just before;
    /// its key's lock is held.
    pub(super) fn write(
        &self,
        key: Digest,
        place: &Path,
        source: &str,
        merge: impl FnOnce(&mut Tree, &mut Spool) -> Result<(), ImageError>,
        kept: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<(), ImageError> {
        (self.progress)(&format!("converting {source}"));
        let mut tree = Tree::new();
        let mut spool = Spool::new(self.unnamed(key)?);
        merge(&mut tree, &mut spool).map_err(|error| self.out_of_room(error))?;
        let id = key.as_bytes().first_chunk().copied().unwrap_or_default();
        self.publish(&format!("{}.erofs", key.hex()), place, |file, path| {
            let written = erofs::write(&tree, &spool, id, file);
            let written = written.and_then(|()| Ok(kept(path)?));
            written.map_err(|source| ImageError::Write { path: path.into(), source })
        })
    }

    /// Whether a root file system is there and whole; if so, it counts as used now.
    pub(super) fn claim(&self, key: Digest) -> Result<(), FormatError> {
        let file = File::open(self.rootfs_path(key))?;
        erofs::check(&file)?;
        // Only its age depends on this: a store that cannot be written to is still good to run from.
        let _ = file.set_modified(SystemTime::now());
        Ok(())
    }

    /// A file in `tmp` without a name; its key's lock is held.
    pub(super) fn unnamed(&self, key: Digest) -> Result<File, ImageError> {
        let path = self.root.join("tmp").join(format!("{}.spool", key.hex()));
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).open(&path);
        let unnamed = file.and_then(|file| fs::remove_file(&path).map(|()| file));
        unnamed.map_err(|source| ImageError::Store { path, source })
    }

    /// It is never what is read that has no room left.
    pub(super) fn out_of_room(&self, error: ImageError) -> ImageError {
        let full = refusal(&error).filter(|errno| [libc::ENOSPC, libc::EDQUOT].contains(errno));
        match full {
            None => error,
            Some(errno) => ImageError::Store {
                path: self.root.join("tmp"),
                source: io::Error::from_raw_os_error(errno),
            },
        }
    }
}

/// The key of an OCI image's root file system.
pub(super) fn rootfs_of(manifest: &Manifest) -> Digest {
    key("oci", manifest.diff_ids())
}

/// The key of a root file system: all that its bytes depend on.
pub(super) fn key<'a>(kind: &str, contents: impl IntoIterator<Item = &'a Digest>) -> Digest {
    let version = erofs::VERSION.to_le_bytes();
    let contents = contents.into_iter().map(|digest| &digest.as_bytes()[..]);
    Digest::of_parts([kind.as_bytes(), &version].into_iter().chain(contents))
}
