//! One layer: a tar, compressed or not, verified while it is merged into the tree.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use zstd::Decoder as ZstdDecoder;

use super::archive::{Archive, ArchiveError, Content, Member};
use super::digest::{Digest, Hashing};
use super::error::{ImageError, LayerError};
use super::spool::Spool;
use super::tree::{Node, Tree, TreeError, lossy};

const BUFFER: usize = 128 << 10;
/// A whiteout's name, and how those begin that speak of more than one name (OCI image specification,
/// "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A blob that holds a layer, and what it must turn out to be.
#[derive(Debug)]
pub struct Layer {
    pub blob: File,
    pub size: u64,
    pub digest: Digest,
    pub kind: LayerKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// A changeset over the layers below: whiteouts mean removal; the digest of its tar is known.
    Changeset { diff_id: Digest },
    /// A whole root file system: every name is a name. It must end as an archive ends, since there is
    /// nobody's digest to tell whether all of it is there.
    Rootfs,
}

/// Merges a layer into `tree`, its file contents into `spool`. On success the blob is what it must be.
pub fn merge(layer: &Layer, tree: &mut Tree, spool: &mut Spool) -> Result<(), ImageError> {
    let mut blob = BufReader::with_capacity(BUFFER, Hashing::new((&layer.blob).take(layer.size)));
    let merged = merge_blob(&mut blob, layer.kind, tree, spool);
    let unreadable = |source| named(layer, LayerError::Decompress { source });
    let (actual, bytes) = blob.into_inner().finish().map_err(unreadable)?;
    // A corrupt blob is the cause of whatever error it led to.
    if bytes != layer.size {
        let (digest, expected) = (layer.digest, layer.size);
        return Err(ImageError::BlobSize { digest, expected, actual: bytes });
    }
    if actual != layer.digest {
        return Err(ImageError::BlobDigest { digest: layer.digest, actual });
    }
    merged.map_err(|source| named(layer, source))
}

fn named(layer: &Layer, source: LayerError) -> ImageError {
    ImageError::Layer { layer: format!("layer {}", layer.digest), source }
}

fn merge_blob(
    blob: &mut impl BufRead,
    kind: LayerKind,
    tree: &mut Tree,
    spool: &mut Spool,
) -> Result<(), LayerError> {
    let mut plain = Hashing::new(decompress(blob)?);
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER, &mut plain));
    tree.next_layer();
    while let Some(member) = archive.next_member()? {
        add(member, &mut archive, kind, tree, spool)?;
    }
    let ended = archive.ended();
    drop(archive);
    let (actual, _) = plain.finish().map_err(|source| LayerError::Decompress { source })?;
    match kind {
        LayerKind::Changeset { diff_id: expected } if actual != expected => {
            Err(LayerError::DiffId { expected, actual })
        }
        LayerKind::Rootfs if !ended => Err(LayerError::NoEnd),
        _ => Ok(()),
    }
}

/// By the stream's first bytes: media types are often wrong about compression.
pub fn decompress<'a>(blob: &'a mut impl BufRead) -> Result<Box<dyn Read + 'a>, LayerError> {
    let decompress = |source| LayerError::Decompress { source };
    match blob.fill_buf().map_err(decompress)? {
        [0x1f, 0x8b, ..] => Ok(Box::new(MultiGzDecoder::new(blob))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Ok(Box::new(ZstdDecoder::with_buffer(blob).map_err(decompress)?))
        }
        _ => Ok(Box::new(blob)),
    }
}

fn add(
    member: Member,
    archive: &mut Archive<impl Read>,
    kind: LayerKind,
    tree: &mut Tree,
    spool: &mut Spool,
) -> Result<(), LayerError> {
    let Member { path, meta, content } = member;
    let refused = |source| LayerError::Entry { entry: lossy(&path), source };
    if kind != LayerKind::Rootfs
        && let Some(mark) = Whiteout::of(&path)
    {
        return mark.apply(tree).map_err(refused);
    }
    match content {
        Content::Node(node) => tree.put(&path, meta, node).map(drop).map_err(refused),
        Content::Link(target) => tree.link(&path, target.as_slice()).map_err(refused),
        Content::File { size, parts } => {
            let extent = spool.store(&mut archive.body(), size, &parts);
            let extent = extent.map_err(|source| content_error(&path, source))?;
            tree.put(&path, meta, Node::File(extent)).map(drop).map_err(refused)
        }
    }
}

fn content_error(path: &[u8], source: io::Error) -> LayerError {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => ArchiveError::Truncated.into(),
        _ => LayerError::Content { entry: lossy(path), source },
    }
}

/// An entry that removes instead of adding.
#[derive(Debug, PartialEq, Eq)]
enum Whiteout<'a> {
    Name {
        directory: &'a [u8],
        name: &'a [u8],
    },
    Opaque {
        directory: &'a [u8],
    },
    /// Bookkeeping of aufs, of no meaning to anyone else.
    Ignored,
}

impl<'a> Whiteout<'a> {
    fn of(path: &'a [u8]) -> Option<Self> {
        let path = path.strip_suffix(b"/").unwrap_or(path);
        if path
            .split(|&byte| byte == b'/')
            .rev()
            .skip(1)
            .any(|part| part.starts_with(WHITEOUT_META))
        {
            return Some(Self::Ignored);
        }
        let slash = path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
        let (directory, base) = path.split_at(slash);
        match base {
            OPAQUE => Some(Self::Opaque { directory }),
            base if base.starts_with(WHITEOUT_META) => Some(Self::Ignored),
            base => base.strip_prefix(WHITEOUT).map(|name| Self::Name { directory, name }),
        }
    }

    fn apply(self, tree: &mut Tree) -> Result<(), TreeError> {
        match self {
            Self::Ignored => Ok(()),
            Self::Opaque { directory } => tree.opaque(directory),
            Self::Name { name: b"" | b"." | b"..", .. } => Err(TreeError::BadWhiteout),
            Self::Name { directory, name } => tree.whiteout(&[directory, name].concat()),
        }
    }
}

#[cfg(test)]
mod tests;
