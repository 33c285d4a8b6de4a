use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::image::testing::{Mounted, fsck};
use crate::image::tree::Metadata;

struct Image {
    tree: Tree,
    spool: Spool,
}

impl Image {
    fn new() -> Self {
        Self { tree: Tree::new(), spool: Spool::new(tempfile::tempfile().unwrap()) }
    }

    fn put(&mut self, path: &str, node: Node) {
        self.tree
            .put(path.as_bytes(), Metadata { mode: 0o644, ..Metadata::default() }, node)
            .unwrap();
    }

    fn file(&mut self, path: &str, content: &[u8]) {
        let whole = [Extent { offset: 0, length: content.len() as u64 }];
        let extent = self.spool.store(&mut &content[..], content.len() as u64, &whole).unwrap();
        self.put(path, Node::File(extent));
    }

    fn write(&self) -> tempfile::NamedTempFile {
        let out = tempfile::NamedTempFile::new().unwrap();
        write(&self.tree, &self.spool, [7; 16], out.as_file()).unwrap();
        check(out.as_file()).unwrap();
        fsck(out.path());
        out
    }
}

/// Bytes that differ from block to block.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i / 7 + i / 4096) as u8 | 1).collect()
}

#[test]
fn files_of_every_awkward_size_come_back() {
    let mut image = Image::new();
    let sizes = [
        0, 1, 31, 32, 1023, 1024, 1025, 3967, 3968, 4000, 4095, 4096, 4097, 5000, 8191, 8192,
        99_999,
    ];
    for size in sizes {
        image.file(&format!("f{size}"), &pattern(size));
        image.put(
            &format!("s{}", size.clamp(1, 4095)),
            Node::Symlink(vec![b'x'; size.clamp(1, 4095)]),
        );
    }
    let out = image.write();
    let Some(mounted) = Mounted::new(out.path()) else { return };
    for size in sizes {
        assert!(
            fs::read(mounted.path().join(format!("f{size}"))).unwrap() == pattern(size),
            "{size}"
        );
        let length = size.clamp(1, 4095);
        let target = fs::read_link(mounted.path().join(format!("s{length}"))).unwrap();
        assert_eq!(target.as_os_str().len(), length);
    }
}

#[test]
fn directories_of_many_blocks_find_and_list_every_name() {
    let mut image = Image::new();
    // Names on both sides of `.` and `..` in byte order, and bytes that are no text.
    let names: Vec<Vec<u8>> = (0..3000u32)
        .map(|i| {
            format!(
                "{}{i:0width$}",
                ['!', '-', '0', 'z'][i as usize % 4],
                width = 1 + i as usize % 250
            )
        })
        .map(String::into_bytes)
        .chain([b"\xff\xfe".to_vec(), b"...".to_vec(), vec![b'n'; 255]])
        .collect();
    for name in &names {
        let path = [b"d/", &name[..]].concat();
        image.tree.put(&path, Metadata::default(), Node::Fifo).unwrap();
    }
    let out = image.write();
    let Some(mounted) = Mounted::new(out.path()) else { return };
    let directory = mounted.path().join("d");
    let mut listed: Vec<Vec<u8>> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
        .collect();
    listed.sort();
    let mut expected = names.clone();
    expected.sort();
    expected.dedup();
    assert_eq!(listed, expected);
    for name in names {
        let path = directory.join(std::ffi::OsStr::from_bytes(&name));
        assert!(fs::symlink_metadata(path).is_ok(), "{name:?}");
    }
    assert!(fs::symlink_metadata(directory.join("absent")).is_err());
}

#[test]
fn metadata_arrives_whole() {
    let mut image = Image::new();
    let value = |byte, length| vec![byte; length];
    let meta = Metadata {
        mode: 0o6751,
        uid: 4_000_000_000,
        gid: 3_000_000_000,
        mtime: (-12345, 678_000_000),
        xattrs: BTreeMap::from([
            (b"user.small".to_vec(), value(1, 3)),
            (b"user.empty".to_vec(), Vec::new()),
            (b"user.large".to_vec(), value(2, 60_000)),
            (b"trusted.t".to_vec(), value(3, 100)),
            (
                b"security.capability".to_vec(),
                b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
            ),
        ]),
    };
    let whole = [Extent { offset: 0, length: 5000 }];
    let extent = image.spool.store(&mut &pattern(5000)[..], 5000, &whole).unwrap();
    image.tree.put(b"f", meta.clone(), Node::File(extent)).unwrap();
    image.tree.link(b"d/e/hard", b"f").unwrap();
    let with_xattr =
        Metadata { xattrs: [(b"trusted.l".to_vec(), value(4, 90))].into(), ..meta.clone() };
    image.tree.put(b"link", with_xattr, Node::Symlink(b"f".to_vec())).unwrap();
    image.put("c", Node::CharDevice(4095, 0xf_ffff));
    image.put("b", Node::BlockDevice(8, 300));
    image.put("s", Node::Socket);
    let out = image.write();
    let Some(mounted) = Mounted::new(out.path()) else { return };
    let stat = |path: &str| fs::symlink_metadata(mounted.path().join(path)).unwrap();
    let file = stat("f");
    assert_eq!(file.mode(), 0o106_751);
    assert_eq!((file.uid(), file.gid(), file.nlink()), (meta.uid, meta.gid, 2));
    assert_eq!((file.mtime(), file.mtime_nsec()), (-12345, 678_000_000));
    assert_eq!(stat("d/e/hard").ino(), file.ino());
    assert_eq!((stat("").nlink(), stat("d").nlink(), stat("d/e").nlink()), (3, 3, 2));
    let device =
        |path| (rustix::fs::major(stat(path).rdev()), rustix::fs::minor(stat(path).rdev()));
    assert_eq!((device("c"), device("b")), ((4095, 0xf_ffff), (8, 300)));
    assert_eq!(stat("s").mode() & 0o170_000, 0o140_000);
    for (name, expected) in meta.xattrs.iter().chain([(&b"trusted.l".to_vec(), &value(4, 90))]) {
        let path = mounted.path().join(if name == b"trusted.l" { "link" } else { "f" });
        let mut got = vec![0; 65536];
        let length = rustix::fs::lgetxattr(&path, &name[..], &mut got[..]).unwrap();
        assert!(got[..length] == expected[..], "{name:?}");
    }
}

#[test]
fn holes_cost_nothing_on_the_host() {
    let mut image = Image::new();
    let size = 1 << 40;
    let parts = [Extent { offset: 1 << 39, length: 5 }];
    let extent = image.spool.store(&mut &b"hello"[..], size, &parts).unwrap();
    image.put("huge", Node::File(extent));
    let out = image.write();
    assert!(out.as_file().metadata().unwrap().blocks() * 512 <= 64 << 10);
    let Some(mounted) = Mounted::new(out.path()) else { return };
    let file = fs::File::open(mounted.path().join("huge")).unwrap();
    let mut bytes = [1; 6];
    file.read_exact_at(&mut bytes, (1 << 39) - 1).unwrap();
    assert_eq!((&bytes, file.metadata().unwrap().len()), (b"\0hello", size));
}

#[test]
fn what_exceeds_the_format_is_refused() {
    let mut image = Image::new();
    for i in 0..3 {
        image.put(&format!("f{i}"), Node::File(Extent { offset: 0, length: 1 << 43 }));
    }
    let out = tempfile::tempfile().unwrap();
    let result = write(&image.tree, &image.spool, [0; 16], &out);
    assert!(matches!(result, Err(FormatError::TooLarge)), "{result:?}");
    let mut image = Image::new();
    let xattrs = (0..5).map(|i| (format!("user.{i}").into_bytes(), vec![0; 65_000])).collect();
    let meta = Metadata { xattrs, ..Metadata::default() };
    image.tree.put(b"d/x", meta, Node::Fifo).unwrap();
    let result = write(&image.tree, &image.spool, [0; 16], &out);
    assert!(matches!(&result, Err(FormatError::Attributes(path)) if path == "/d/x"), "{result:?}");
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let make = |order: &[usize]| {
        let mut image = Image::new();
        for i in order {
            image.file(&format!("d{}/f{i}", i % 3), &pattern(i * 1000));
        }
        fs::read(image.write().path()).unwrap()
    };
    assert!(make(&[1, 2, 3, 4, 5, 6]) == make(&[1, 2, 3, 4, 5, 6]));
}

#[test]
fn damage_is_noticed() {
    let mut image = Image::new();
    image.file("f", &pattern(50_000));
    let whole = fs::read(image.write().path()).unwrap();
    let check_of = |bytes: &[u8]| {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        check(&file)
    };
    check_of(&whole).unwrap();
    for cut in [0, 100, 4095, 4096, whole.len() - 4096, whole.len() - 1] {
        assert!(matches!(check_of(&whole[..cut]), Err(FormatError::Length { .. })), "{cut}");
    }
    let mut flipped = whole.clone();
    flipped[1024 + 40] ^= 1;
    assert!(matches!(check_of(&flipped), Err(FormatError::Checksum)));
    assert!(matches!(check_of(&[0; 8192]), Err(FormatError::Magic)));
}
