//! The image store: a directory that owns converted images and their names.
//!
//! ```text
//! ROOT/images/NAME.json     a name (`/` written as `%`), its digest, its config, its root file system
//! ROOT/rootfs/KEY.erofs     a root file system; KEY is a digest over all that determines its bytes
//! ROOT/locks/KEY            held by who converts KEY; the file stays, empty
//! ROOT/tmp/KEY.*            the work of who holds that lock; anyone may remove it who gets the lock
//! ```
//!
//! A file appears under `images` or `rootfs` by a rename, complete and on disk, and is never written
//! again. Whoever dies leaves nothing but files in `tmp`, which the next [`Store::open`] removes. Only
//! this module writes here. All calls block: async callers use a blocking thread.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::digest::{Digest, Hashing};
use super::directory::Directory;
use super::erofs;
use super::error::ImageError;
use super::layer::{self, Layer, LayerKind};
use super::lock::Lock;
use super::oci::{self, Layout};
use super::reference::{Name, Reference};
use super::spool::Spool;
use super::tree::Tree;
use super::{Image, ImageConfig};

/// How long a conversion of the same image by another process is waited for.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// How long a root file system without a name is kept after its last use.
const KEEP: Duration = Duration::from_secs(24 * 60 * 60);

pub struct Store {
    root: PathBuf,
    progress: fn(&str),
}

/// What `images/NAME.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    name: Name,
    digest: Digest,
    rootfs: Digest,
    config: ImageConfig,
}

/// A root file system of the store and what is to be run on it.
struct Converted {
    digest: Digest,
    rootfs: Digest,
    config: ImageConfig,
}

impl Store {
    /// Opens the store at `root`, making it if it is not there, and clears what killed processes left.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let store = Self { root: root.into(), progress: |_| {} };
        for part in ["images", "rootfs", "locks", "tmp"] {
            let path = store.root.join(part);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|source| ImageError::Store { path, source })?;
        }
        store.sweep()?;
        Ok(store)
    }

    /// Has `line` called with what takes long enough to be told.
    pub fn with_progress(self, line: fn(&str)) -> Self {
        Self { progress: line, ..self }
    }

    /// The image a reference means; files are converted the first time their content is seen.
    pub fn resolve(&self, reference: &Reference) -> Result<Image, ImageError> {
        if let Reference::Name(name) = reference {
            return self.load(name);
        }
        let converted = self.convert(reference)?;
        Ok(self.image(reference.to_string(), converted))
    }

    /// Resolves `source` and gives the image these names as well, taking them from whoever had them.
    pub fn import(&self, source: &Reference, names: &[Name]) -> Result<Image, ImageError> {
        let converted = match source {
            Reference::Name(name) => self.record(name)?.into(),
            source => self.convert(source)?,
        };
        for name in names {
            self.save(name, &converted)?;
        }
        self.prune(KEEP)?;
        let reference = names.first().map_or_else(|| source.to_string(), Name::to_string);
        Ok(self.image(reference, converted))
    }

    /// All named images, sorted by name.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let records = self.records()?.into_iter();
        Ok(records.map(|record| self.image(record.name.to_string(), record.into())).collect())
    }

    /// Forgets a name. What no name needs any more goes when it has not been used for a day.
    pub fn remove(&self, name: &Name) -> Result<(), ImageError> {
        match fs::remove_file(self.record_path(name)) {
            Ok(()) => self.prune(KEEP),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(self.unknown(name)),
            Err(source) => Err(ImageError::Store { path: self.record_path(name), source }),
        }
    }

    /// Removes root file systems without a name that nobody used for `unused`. Running sandboxes are
    /// not disturbed: they hold the file itself.
    pub fn prune(&self, unused: Duration) -> Result<(), ImageError> {
        let named: Vec<PathBuf> =
            self.records()?.iter().map(|record| self.rootfs_path(record.rootfs)).collect();
        for path in self.files("rootfs")?.into_iter().filter(|path| !named.contains(path)) {
            let used = path.metadata().and_then(|meta| meta.modified());
            let used = used.unwrap_or_else(|_| SystemTime::now());
            if SystemTime::now().duration_since(used).unwrap_or_default() >= unused {
                self.remove_unlocked(&path)?;
            }
        }
        Ok(())
    }

    fn convert(&self, source: &Reference) -> Result<Converted, ImageError> {
        match source {
            Reference::Name(name) => self.record(name).map(Converted::from),
            Reference::Oci { layout, tag } => self.convert_oci(source, layout, tag.as_deref()),
            Reference::Directory(path) => self.convert_directory(source, path),
            Reference::Tar(path) => self.convert_tar(source, path),
        }
    }

    fn convert_oci(
        &self,
        source: &Reference,
        path: &Path,
        tag: Option<&str>,
    ) -> Result<Converted, ImageError> {
        let layout = Layout::open(path)?;
        let manifest = layout.manifest(tag)?;
        let rootfs = key("oci", manifest.diff_ids());
        self.build(rootfs, source, |tree, spool| {
            layout.layers(&manifest).try_for_each(|layer| layer::merge(&layer?, tree, spool))
        })?;
        Ok(Converted { digest: manifest.digest, rootfs, config: manifest.config })
    }

    fn convert_directory(&self, source: &Reference, path: &Path) -> Result<Converted, ImageError> {
        let directory = Directory::open(path)?;
        let rootfs = key("dir", [&directory.digest]);
        self.build(rootfs, source, |tree, spool| directory.merge(tree, spool))?;
        Ok(Converted { digest: directory.digest, rootfs, config: ImageConfig::of_rootfs() })
    }

    fn convert_tar(&self, source: &Reference, path: &Path) -> Result<Converted, ImageError> {
        let unreadable = |source| ImageError::Source { path: path.into(), source };
        let hashed = oci::open_regular(path).and_then(|file| Hashing::new(file).finish());
        let (digest, size) = hashed.map_err(unreadable)?;
        let rootfs = key("tar", [&digest]);
        self.build(rootfs, source, |tree, spool| {
            let blob = oci::open_regular(path).map_err(unreadable)?;
            layer::merge(&Layer { blob, size, digest, kind: LayerKind::Rootfs }, tree, spool)
        })?;
        Ok(Converted { digest, rootfs, config: ImageConfig::of_rootfs() })
    }

    /// Makes sure that the root file system `key` is there and whole; `merge` says what is in it.
    fn build(
        &self,
        key: Digest,
        source: &Reference,
        merge: impl FnOnce(&mut Tree, &mut Spool) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        if self.is_built(key) {
            return Ok(());
        }
        let _lock = self.lock(&key.hex(), &source.to_string())?;
        if self.is_built(key) {
            return Ok(());
        }
        (self.progress)(&format!("converting {source}"));
        let mut tree = Tree::new();
        let mut spool = Spool::new(self.unnamed(key)?);
        merge(&mut tree, &mut spool)?;
        self.publish(&format!("{}.erofs", key.hex()), &self.rootfs_path(key), |file, path| {
            let id = key.as_bytes().first_chunk().copied().unwrap_or_default();
            let written = erofs::write(&tree, &spool, id, file);
            written.map_err(|source| ImageError::Write { path: path.into(), source })
        })
    }

    /// Whether a root file system is there and whole; if so, it counts as used now.
    fn is_built(&self, key: Digest) -> bool {
        let file = File::open(self.rootfs_path(key));
        let built = file.ok().filter(|file| erofs::check(file).is_ok());
        // Only age depends on the time: a store that cannot be written to is still good to run from.
        built.inspect(|file| drop(file.set_modified(SystemTime::now()))).is_some()
    }

    /// A file in `tmp` without a name; its key's lock is held.
    fn unnamed(&self, key: Digest) -> Result<File, ImageError> {
        let path = self.root.join("tmp").join(format!("{}.spool", key.hex()));
        let open = || {
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        };
        open().map_err(|source| ImageError::Store { path: path.clone(), source })
    }

    /// Writes a file in `tmp`, brings it to disk and moves it to its place; its key's lock is held.
    fn publish(
        &self,
        temporary: &str,
        place: &Path,
        write: impl FnOnce(&File, &Path) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let path = self.root.join("tmp").join(temporary);
        let failed = |source| ImageError::Store { path: path.clone(), source };
        let options =
            File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = options.map_err(failed)?;
        let written = write(&file, &path)
            .and_then(|()| file.sync_all().and_then(|()| fs::rename(&path, place)).map_err(failed));
        if written.is_err() {
            // The first error is the one to tell; what stays is swept by the next to open the store.
            let _ = fs::remove_file(&path);
        }
        written
    }

    fn load(&self, name: &Name) -> Result<Image, ImageError> {
        let record = self.record(name)?;
        let path = self.rootfs_path(record.rootfs);
        let whole = File::open(&path).map_err(Into::into).and_then(|file| erofs::check(&file));
        let familiar = name.familiar();
        whole.map_err(|source| ImageError::Damaged { name: familiar, path, source })?;
        Ok(self.image(name.to_string(), record.into()))
    }

    fn save(&self, name: &Name, image: &Converted) -> Result<(), ImageError> {
        let _lock = self.lock("names", "the names of the store")?;
        let Converted { digest, rootfs, config } = image;
        let record =
            Record { name: name.clone(), digest: *digest, rootfs: *rootfs, config: config.clone() };
        self.publish("names.json", &self.record_path(name), |mut file, path| {
            let text = serde_json::to_vec_pretty(&record).map_err(io::Error::from);
            let written = text.and_then(|text| file.write_all(&text));
            written.map_err(|source| ImageError::Store { path: path.into(), source })
        })
    }

    fn record(&self, name: &Name) -> Result<Record, ImageError> {
        match self.read_record(&self.record_path(name))? {
            Some(record) => Ok(record),
            None => Err(self.unknown(name)),
        }
    }

    fn records(&self) -> Result<Vec<Record>, ImageError> {
        let mut records = Vec::new();
        for path in self.files("images")? {
            records.extend(self.read_record(&path)?);
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }

    fn read_record(&self, path: &Path) -> Result<Option<Record>, ImageError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ImageError::Store { path: path.into(), source }),
        };
        let damaged = |source| ImageError::Record { path: path.into(), source };
        serde_json::from_slice(&text).map(Some).map_err(damaged)
    }

    fn unknown(&self, name: &Name) -> ImageError {
        let known = self.records().unwrap_or_default();
        let known: Vec<String> = known.iter().map(|record| record.name.familiar()).collect();
        let known = if known.is_empty() { "no images".into() } else { known.join(", ") };
        ImageError::Unknown { name: name.familiar(), store: self.root.clone(), known }
    }

    fn image(&self, reference: String, Converted { digest, rootfs, config }: Converted) -> Image {
        Image { reference, digest: digest.to_string(), rootfs: self.rootfs_path(rootfs), config }
    }

    fn rootfs_path(&self, key: Digest) -> PathBuf {
        self.root.join("rootfs").join(format!("{}.erofs", key.hex()))
    }

    fn record_path(&self, name: &Name) -> PathBuf {
        self.root.join("images").join(format!("{}.json", name.to_string().replace('/', "%")))
    }

    fn lock(&self, name: &str, what: &str) -> Result<Lock, ImageError> {
        let path = self.root.join("locks").join(name);
        let waiting = || (self.progress)(&format!("waiting for another process to finish {what}"));
        Lock::take(&path, PATIENCE, waiting).map_err(|source| match source.kind() {
            io::ErrorKind::TimedOut => {
                ImageError::Busy { what: what.into(), minutes: PATIENCE.as_secs() / 60 }
            }
            _ => ImageError::Store { path, source },
        })
    }

    /// Removes from `tmp` what nobody is working on.
    fn sweep(&self) -> Result<(), ImageError> {
        self.files("tmp")?.iter().try_for_each(|path| self.remove_unlocked(path))
    }

    /// Removes a file if the lock of its key is free.
    fn remove_unlocked(&self, path: &Path) -> Result<(), ImageError> {
        let key = path.file_stem().unwrap_or_default();
        let remove = || match Lock::try_take(&self.root.join("locks").join(key))? {
            Some(_lock) => fs::remove_file(path),
            None => Ok(()),
        };
        match remove() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ImageError::Store { path: path.into(), source: error })
            }
            _ => Ok(()),
        }
    }

    fn files(&self, part: &str) -> Result<Vec<PathBuf>, ImageError> {
        let path = self.root.join(part);
        let entries = fs::read_dir(&path).and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()
        });
        entries.map_err(|source| ImageError::Store { path, source })
    }
}

impl From<Record> for Converted {
    fn from(Record { digest, rootfs, config, .. }: Record) -> Self {
        Self { digest, rootfs, config }
    }
}

/// The key of a root file system: all that its bytes depend on.
fn key<'a>(kind: &str, contents: impl IntoIterator<Item = &'a Digest>) -> Digest {
    let version = erofs::VERSION.to_le_bytes();
    let contents = contents.into_iter().map(|digest| &digest.as_bytes()[..]);
    Digest::of_parts([kind.as_bytes(), &version].into_iter().chain(contents))
}
