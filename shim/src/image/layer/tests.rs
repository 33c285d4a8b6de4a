use tar::EntryType;

use super::*;
use crate::image::testing::{Tar, file_of, gzip, zstd};
use crate::image::tree::{Extent, ROOT, components};

struct Merged {
    tree: Tree,
    spool: Spool,
}

impl Merged {
    fn new() -> Self {
        Self { tree: Tree::new(), spool: Spool::new(tempfile::tempfile().unwrap()) }
    }

    fn layer(&mut self, bytes: &[u8], kind: LayerKind) -> Result<(), ImageError> {
        let (blob, digest) = (file_of(bytes), Digest::of(bytes));
        let layer = Layer { blob, size: bytes.len() as u64, digest, kind };
        merge(&layer, &mut self.tree, &mut self.spool)
    }

    fn changeset(&mut self, tar: &[u8]) -> Result<(), ImageError> {
        self.layer(tar, LayerKind::Changeset { diff_id: Digest::of(tar) })
    }

    fn content(&self, path: &str) -> Option<Vec<u8>> {
        let inode = self.tree.lookup(&components(path.as_bytes()).unwrap())?;
        let Node::File(Extent { offset, length }) = *self.tree.node(inode) else { return None };
        let mut bytes = vec![0; length as usize];
        self.spool.read_at(&mut bytes, offset).unwrap();
        Some(bytes)
    }

    fn names(&self) -> Vec<String> {
        self.tree.children(ROOT).map(|(name, _)| lossy(name)).collect()
    }
}

/// An error with its causes, as it is printed.
fn chain(error: &dyn std::error::Error) -> String {
    let rest = error.source().map(|source| format!(": {}", chain(source)));
    format!("{error}{}", rest.unwrap_or_default())
}

#[test]
fn compression_is_told_from_the_bytes() {
    let tar = Tar::default().file("f", b"hello").end();
    let diff_id = Digest::of(&tar);
    let two_members = [gzip(&tar[..700]), gzip(&tar[700..])].concat();
    for blob in [tar.clone(), gzip(&tar), zstd(&tar), two_members] {
        let mut merged = Merged::new();
        merged.layer(&blob, LayerKind::Changeset { diff_id }).unwrap();
        assert_eq!(merged.content("f").unwrap(), b"hello");
    }
}

#[test]
fn layers_replace_and_whiteouts_remove() {
    let mut merged = Merged::new();
    let base = Tar::default().file("a/x", b"1").file("a/y", b"1").file("b", b"1").file("c/z", b"1");
    merged.changeset(&base.end()).unwrap();
    let upper = Tar::default()
        .file("a/x", b"2")
        .file("a/.wh.y", b"")
        .file(".wh.b", b"")
        .file("c/new", b"2")
        .file("c/.wh..wh..opq", b"")
        .file(".wh..wh.plnk/1.2", b"");
    merged.changeset(&upper.end()).unwrap();
    assert_eq!(merged.names(), ["a", "c"]);
    assert_eq!(merged.content("a/x").unwrap(), b"2");
    assert_eq!(merged.content("a/y"), None);
    assert_eq!(merged.content("c/z"), None);
    assert_eq!(merged.content("c/new").unwrap(), b"2");
}

#[test]
fn a_root_file_system_has_no_whiteouts_and_must_be_whole() {
    let tar = Tar::default().file("a", b"1").file(".wh.a", b"2");
    let mut merged = Merged::new();
    merged.layer(&tar.clone().end(), LayerKind::Rootfs).unwrap();
    assert_eq!(merged.names(), [".wh.a", "a"]);
    let error = merged.layer(&tar.cut(), LayerKind::Rootfs).unwrap_err();
    assert!(chain(&error).contains("cut off"), "{}", chain(&error));
}

#[test]
fn hostile_entries_are_refused_by_name() {
    let entry = |path: &str| Tar::default().file(path, b"x").end();
    let (long, deep) = ("n".repeat(256), "d/".repeat(2100));
    let pax = |path: &str| Tar::default().pax(&[("path", path.as_bytes())]).file("x", b"").end();
    for (tar, entry, why) in [
        (entry("../../etc/passwd"), "../../etc/passwd", "`..`"),
        (entry("a/../../b"), "a/../../b", "`..`"),
        (entry("/../etc/passwd"), "/../etc/passwd", "`..`"),
        (entry("a/.wh..."), "a/.wh...", "whiteout"),
        (entry(".wh.."), ".wh..", "whiteout"),
        (entry(".wh."), ".wh.", "whiteout"),
        (entry("../.wh.x"), "../.wh.x", "`..`"),
        (entry("../.wh..wh..opq"), "../.wh..wh..opq", "`..`"),
        (pax(&long), &long[..], "longer than 255"),
        (pax(&deep), &deep[..100], "longer than 4095"),
        (pax("a\0b"), "a\0b", "NUL"),
        (Tar::default().link("h", "/etc/shadow").end(), "h", "does not exist"),
        (Tar::default().link("h", "../etc/shadow").end(), "h", "link target"),
        (Tar::default().link("h", "nothing").end(), "h", "does not exist"),
        (Tar::default().directory("d").link("h", "d").end(), "h", "directory"),
        (Tar::default().symlink("s", "").end(), "s", "link target"),
        (Tar::default().symlink("s", "/etc").file("s/x", b"").end(), "s/x", "not a directory"),
        (Tar::default().symlink("s", "..").link("h", "s/x").end(), "h", "does not exist"),
        (Tar::default().file("f", b"").file("f/x", b"").end(), "f/x", "not a directory"),
        (Tar::default().symlink(".", "/").end(), ".", "root"),
        (Tar::default().entry(EntryType::new(b'Q'), "q", "", b"").end(), "q", "type `Q`"),
    ] {
        let error = chain(&Merged::new().changeset(&tar).unwrap_err());
        assert!(error.contains(entry) && error.contains(why), "{entry}: {error}");
    }
}

#[test]
fn a_damaged_blob_is_named_as_the_cause() {
    let tar = Tar::default().file("f", vec![7; 100_000]).end();
    let blob = gzip(&tar);
    let (digest, diff_id) = (Digest::of(&blob), Digest::of(&tar));
    let merge = |bytes: &[u8], diff_id| {
        let (blob, size) = (file_of(bytes), blob.len() as u64);
        let layer = Layer { blob, size, digest, kind: LayerKind::Changeset { diff_id } };
        let Merged { mut tree, mut spool } = Merged::new();
        merge(&layer, &mut tree, &mut spool)
    };
    let mut flipped = blob.clone();
    flipped[blob.len() / 2] ^= 1;
    assert!(matches!(merge(&flipped, diff_id), Err(ImageError::BlobDigest { .. })));
    let cut = merge(&blob[..blob.len() / 2], diff_id);
    assert!(matches!(cut, Err(ImageError::BlobSize { .. })), "{cut:?}");
    let other = merge(&blob, Digest::of(b"other"));
    assert!(matches!(other, Err(ImageError::Layer { source: LayerError::DiffId { .. }, .. })));
    merge(&blob, diff_id).unwrap();
}

#[test]
fn truncated_streams_inside_a_true_blob_are_refused() {
    let tar = Tar::default().file("f", vec![7; 100_000]).end();
    for blob in [gzip(&tar), zstd(&tar), tar.clone()] {
        for cut in [1, blob.len() / 2, blob.len() - 1] {
            let result = Merged::new().changeset(&blob[..cut]);
            // Without its last byte a plain tar still has an end mark; its digest is what it is.
            assert!(
                result.is_err() || (blob == tar && cut == blob.len() - 1),
                "{cut} of {}",
                blob.len()
            );
        }
    }
}

#[test]
fn a_bomb_costs_no_disk() {
    use std::os::unix::fs::MetadataExt;
    let zeros = vec![0; 8 << 20];
    let blob = zstd(&Tar::default().file("f", &zeros).end());
    assert!(blob.len() < 16 << 10);
    let mut merged = Merged::new();
    merged.layer(&blob, LayerKind::Rootfs).unwrap();
    assert!(merged.spool.file().metadata().unwrap().blocks() * 512 <= 64 << 10);
    assert_eq!(merged.content("f").unwrap(), zeros);
}
