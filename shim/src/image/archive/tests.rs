use std::process::Command;

use proptest::prelude::*;
use tar::EntryType;

use super::*;
use crate::image::testing::Tar;

type Read1 = (String, Content, Vec<u8>);

/// All members: path, content, and the body's bytes.
fn read(bytes: &[u8]) -> Result<Vec<Read1>, ArchiveError> {
    let mut archive = Archive::new(bytes);
    let mut members = Vec::new();
    while let Some(member) = archive.next_member()? {
        let mut body = Vec::new();
        if let Content::File { .. } = member.content {
            archive.body().take(1 << 20).read_to_end(&mut body).map_err(early)?;
        }
        members.push((lossy(&member.path), member.content, body));
    }
    Ok(members)
}

fn one(bytes: &[u8]) -> Member {
    Archive::new(bytes).next_member().unwrap().unwrap()
}

fn dense(body: &[u8]) -> Content {
    let length = body.len() as u64;
    Content::File { size: length, parts: vec![Extent { offset: 0, length }] }
}

#[test]
fn all_kinds_of_members() {
    let tar = Tar::default()
        .directory("d/")
        .file("d/f", b"hello")
        .file("old/", b"")
        .symlink("s", "d/f")
        .link("h", "d/f")
        .entry(EntryType::Char, "c", "", b"")
        .entry(EntryType::Block, "b", "", b"")
        .entry(EntryType::Fifo, "p", "", b"");
    let members = read(&tar.end()).unwrap();
    let contents: Vec<_> = members.iter().map(|(path, content, _)| (&path[..], content)).collect();
    assert_eq!(
        contents,
        [
            ("d/", &Content::Node(Node::Directory)),
            ("d/f", &dense(b"hello")),
            ("old/", &Content::Node(Node::Directory)),
            ("s", &Content::Node(Node::Symlink(b"d/f".to_vec()))),
            ("h", &Content::Link(b"d/f".to_vec())),
            ("c", &Content::Node(Node::CharDevice(1, 3))),
            ("b", &Content::Node(Node::BlockDevice(1, 3))),
            ("p", &Content::Node(Node::Fifo)),
        ]
    );
    assert_eq!(members[1].2, b"hello");
}

#[test]
fn what_has_no_body_has_none_whatever_its_size_says() {
    let mut bytes = Tar::default().symlink("s", "t").file("f", b"x").end();
    bytes[124..136].copy_from_slice(b"00000000777\0");
    let mut header = Header::from_byte_slice(&bytes[..512]).clone();
    header.set_cksum();
    bytes[..512].copy_from_slice(header.as_bytes());
    assert_eq!(read(&bytes).unwrap().len(), 2);
}

#[test]
fn pax_overrides_the_header() {
    let long = "n/".repeat(400) + "x";
    let tar = Tar::default().pax(&[
        ("path", long.as_bytes()),
        ("uid", b"4000000000"),
        ("gid", b"3000000000"),
        ("mtime", b"-1.5"),
        ("SCHILY.xattr.user.x", b"a\nb=\0"),
    ]);
    let member = one(&tar.file("short", b"").end());
    assert_eq!(member.path, long.as_bytes());
    assert_eq!((member.meta.uid, member.meta.gid), (4_000_000_000, 3_000_000_000));
    assert_eq!(member.meta.mtime, (-2, 500_000_000));
    assert_eq!(member.meta.xattrs, [(b"user.x".to_vec(), b"a\nb=\0".to_vec())].into());
}

#[test]
fn an_extension_ends_with_its_member_and_a_global_one_says_nothing() {
    let tar = Tar::default()
        .entry(EntryType::XGlobalHeader, "g", "", b"11 path=gg\n")
        .pax(&[("path", b"one")])
        .file("x", b"")
        .file("two", b"");
    let paths: Vec<String> = read(&tar.end()).unwrap().into_iter().map(|member| member.0).collect();
    assert_eq!(paths, ["one", "two"]);
}

#[test]
fn gnu_names_may_be_long() {
    let long = "d/".repeat(200) + "f";
    let tar = Tar::default()
        .entry(EntryType::GNULongLink, "././@LongLink", "", long.as_bytes())
        .entry(
            EntryType::GNULongName,
            "././@LongLink",
            "",
            [long.as_bytes(), b"\0"].concat().as_slice(),
        )
        .symlink("cut", "cut");
    let member = one(&tar.end());
    assert_eq!(member.path, long.as_bytes());
    assert_eq!(member.content, Content::Node(Node::Symlink(long.into_bytes())));
}

#[test]
fn sparse_files_of_every_format_come_out_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let file = std::fs::File::create(&path).unwrap();
    let mut expected = vec![0; 5 << 20];
    for i in 0..40 {
        let at = i * 131_072;
        expected[at..at + 5000].fill(i as u8 + 1);
        std::os::unix::fs::FileExt::write_all_at(&file, &expected[at..at + 5000], at as u64)
            .unwrap();
    }
    file.set_len(5 << 20).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let mut tar = Command::new("tar");
        let tar = tar.args(format).args(["--sparse", "-C"]).arg(directory.path()).args(["-c", "s"]);
        let members = read(&tar.output().unwrap().stdout).unwrap();
        let [(path, Content::File { size, parts }, body)] = &members[..] else {
            panic!("{members:?}")
        };
        assert_eq!((&path[..], *size), ("s", 5 << 20), "{format:?}");
        assert!(parts.len() > 20, "{format:?} is not sparse: {}", parts.len());
        let mut content = vec![0; *size as usize];
        let mut at = 0;
        for part in parts {
            let length = part.length as usize;
            content[part.offset as usize..][..length].copy_from_slice(&body[at..at + length]);
            at += length;
        }
        assert!(content == expected, "{format:?}");
    }
}

#[test]
fn hostile_archives_are_refused() {
    let good = || Tar::default().file("f", [7; 600]);
    let sparse = |map: &[u8], size: &[u8]| {
        let map = [("GNU.sparse.map", map), ("GNU.sparse.size", size)];
        Tar::default().pax(&map).file("f", b"12345678").end()
    };
    let in_body = |map: &[u8]| {
        let version: [(&str, &[u8]); 3] =
            [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9")];
        Tar::default().pax(&version).file("f", map).end()
    };
    let huge = Tar::default().pax(&[("size", b"9999999999999999")]).file("f", b"");
    let extension = vec![b'x'; (1 << 20) + 1];
    let mut device = Tar::default().entry(EntryType::Char, "c", "", b"").cut();
    let mut header = Header::from_byte_slice(&device).clone();
    header.set_device_major(1 << 12).unwrap();
    header.set_cksum();
    device.copy_from_slice(header.as_bytes());
    for (what, bytes) in [
        ("a cut header", good().cut()[..100].to_vec()),
        ("a cut body", good().cut()[..800].to_vec()),
        ("noise", vec![0x55; 1024]),
        ("a large extension", Tar::default().entry(EntryType::XHeader, "x", "", &extension).end()),
        ("a large name", Tar::default().entry(EntryType::GNULongName, "x", "", &extension).end()),
        ("malformed pax", Tar::default().entry(EntryType::XHeader, "x", "", b"99 a=b\n").end()),
        (
            "an owner beyond 32 bits",
            Tar::default().pax(&[("uid", b"4294967296")]).file("f", b"").end(),
        ),
        ("a size beyond all disks", huge.end()),
        ("an unknown type", Tar::default().entry(EntryType::new(b'Q'), "q", "", b"").end()),
        ("a device number beyond Linux", device),
        ("parts in disorder", sparse(b"4,4,0,4", b"100")),
        ("parts that overlap", sparse(b"0,4,2,4", b"100")),
        ("a part beyond the end", sparse(b"0,4,97,4", b"100")),
        ("a part that wraps", sparse(b"0,4,18446744073709551615,4", b"100")),
        ("parts longer than the body", sparse(b"0,9", b"100")),
        ("parts shorter than the body", sparse(b"0,4", b"100")),
        ("half a part", sparse(b"0,8,9", b"100")),
        ("an endless map", in_body(&[b'9'; 2048])),
        ("a map of too many parts", in_body(b"99999999\n")),
        ("a map without a body", in_body(b"")),
    ] {
        let result = read(&bytes);
        assert!(result.is_err(), "{what}: {result:?}");
    }
}

#[test]
fn the_end_mark_is_noticed() {
    for (bytes, ended) in
        [(Tar::default().file("f", b"x").end(), true), (Tar::default().cut(), false)]
    {
        let mut archive = Archive::new(&bytes[..]);
        while archive.next_member().unwrap().is_some() {}
        assert_eq!(archive.ended(), ended);
    }
}

proptest! {
    #[test]
    fn damaged_archives_never_panic(at in 0usize..6000, byte: u8, cut in 0usize..6000) {
        let tar = Tar::default()
            .pax(&[("GNU.sparse.map", b"0,4,8,4"), ("GNU.sparse.size", b"100")])
            .file("f", b"12345678")
            .pax(&[("SCHILY.xattr.user.x", b"y"), ("mtime", b"1.5")])
            .symlink("s", "f");
        let mut bytes = tar.end();
        let length = bytes.len();
        bytes[at % length] = byte;
        bytes.truncate(cut.max(1) % (length + 1));
        let _ = read(&bytes);
    }
}
