//! The names of the store: one small file each.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Converted, Store};
use crate::image::digest::Digest;
use crate::image::{FormatError, Image, ImageConfig, ImageError, Name};

/// What `images/NAME.json` holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub name: Name,
    pub digest: Digest,
    pub rootfs: Digest,
    pub config: ImageConfig,
}

impl Store {
    /// The image a name stands for, its root file system there and whole.
    pub(super) fn load(&self, name: &Name) -> Result<Image, ImageError> {
        let record = self.record(name)?;
        self.claim(record.rootfs).map_err(|error| {
            let path = self.rootfs_path(record.rootfs);
            match error {
                FormatError::Io(source) if source.kind() != io::ErrorKind::NotFound => {
                    ImageError::Store { path, source }
                }
                source => ImageError::Damaged { name: name.familiar(), path, source },
            }
        })?;
        Ok(self.image(name.to_string(), record.into()))
    }

    pub(super) fn save(&self, name: &Name, image: &Converted) -> Result<(), ImageError> {
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

    pub(super) fn record(&self, name: &Name) -> Result<Record, ImageError> {
        read(&self.record_path(name))?.ok_or_else(|| self.unknown(name))
    }

    /// All records, sorted by name.
    pub(super) fn records(&self) -> Result<Vec<Record>, ImageError> {
        let mut records = Vec::new();
        for path in self.files("images")? {
            records.extend(read(&path)?);
        }
        records.sort_by(|a: &Record, b| a.name.cmp(&b.name));
        Ok(records)
    }

    pub(super) fn unknown(&self, name: &Name) -> ImageError {
        let known = self.records().unwrap_or_default();
        let known: Vec<String> = known.iter().map(|record| record.name.familiar()).collect();
        let known = if known.is_empty() { "no images".into() } else { known.join(", ") };
        ImageError::Unknown { name: name.familiar(), store: self.root.clone(), known }
    }

    pub(super) fn record_path(&self, name: &Name) -> PathBuf {
        self.root.join("images").join(format!("{}.json", name.to_string().replace('/', "%")))
    }
}

/// A record, or `None` if the name is not there (any more).
fn read(path: &Path) -> Result<Option<Record>, ImageError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ImageError::Store { path: path.into(), source }),
    };
    let damaged = |source| ImageError::Record { path: path.into(), source };
    serde_json::from_slice(&text).map(Some).map_err(damaged)
}

impl From<Record> for Converted {
    fn from(Record { digest, rootfs, config, .. }: Record) -> Self {
        Self { digest, rootfs, config }
    }
}
