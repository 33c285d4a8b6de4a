//! The records of EROFS on disk, little-endian, as pure functions (Linux `fs/erofs/erofs_fs.h`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::super::tree::{Inode, Metadata, Node, ROOT};
use super::plan::{Place, Plan};

pub const BLOCK: u64 = 4096;
const BLOCK_BITS: u8 = 12;
/// An inode's address is counted in slots of this size.
pub const SLOT: u64 = 32;
/// `struct erofs_inode_extended`: it keeps the modification time, which the compact form does not.
pub const INODE_SIZE: u64 = 64;
/// `struct erofs_dirent`.
const DIRENT_SIZE: usize = 12;
/// `struct erofs_xattr_ibody_header` and `struct erofs_xattr_entry`.
const XATTR_HEADER: usize = 12;
const XATTR_ENTRY: usize = 4;
/// `i_xattr_icount` counts words of 4 bytes in 16 bits.
const MAX_ATTRIBUTES: usize = XATTR_HEADER + 4 * (u16::MAX as usize - 1);

const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_CHECKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;

#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(
        "the extended attributes of `{0}` fit in no EROFS inode: names up to 255 bytes, values below \
         64 KiB, together below 256 KiB"
    )]
    Attributes(String),
    #[error("the files of the image together exceed the 16 TiB an EROFS image can hold")]
    TooLarge,
    #[error("it is not an EROFS image")]
    Magic,
    #[error("its superblock is corrupt")]
    Checksum,
    #[error("it is {actual} bytes long where its superblock says {expected}")]
    Length { expected: u64, actual: u64 },
}

/// The first block: nothing but the superblock, at byte 1024.
pub fn superblock(plan: &Plan, id: [u8; 16]) -> [u8; BLOCK as usize] {
    let mut block = [0; BLOCK as usize];
    let mut put =
        |at: usize, bytes: &[u8]| block[SUPERBLOCK + at..][..bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    put(12, &[BLOCK_BITS]);
    put(14, &(plan.place(ROOT).nid() as u16).to_le_bytes());
    put(16, &(plan.order().len() as u64).to_le_bytes());
    put(36, &(plan.blocks() as u32).to_le_bytes());
    put(48, &id);
    let sum = crc32c(&block[SUPERBLOCK..]);
    block[SUPERBLOCK + 4..][..4].copy_from_slice(&sum.to_le_bytes());
    block
}

/// Whether a file is a whole image as [`superblock`] describes it. File contents are not looked at.
pub fn check(image: &File) -> Result<(), FormatError> {
    let mut block = [0; BLOCK as usize];
    let actual = image.metadata()?.len();
    if actual < BLOCK {
        return Err(FormatError::Length { expected: BLOCK, actual });
    }
    image.read_exact_at(&mut block, 0)?;
    let word = |block: &[u8], at: usize| {
        u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
    };
    let (magic, sum) = (word(&block, SUPERBLOCK), word(&block, SUPERBLOCK + 4));
    let expected = u64::from(word(&block, SUPERBLOCK + 36)) * BLOCK;
    block[SUPERBLOCK + 4..][..4].fill(0);
    match () {
        () if magic != MAGIC => Err(FormatError::Magic),
        () if sum != crc32c(&block[SUPERBLOCK..]) => Err(FormatError::Checksum),
        () if actual != expected => Err(FormatError::Length { expected, actual }),
        () => Ok(()),
    }
}

/// CRC-32C as the superblock wants it: seed of ones, no final inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ (0x82f6_3b78 * (crc & 1)))
    })
}

pub struct InodeRecord<'a> {
    pub meta: &'a Metadata,
    pub node: &'a Node,
    pub place: &'a Place,
}

impl InodeRecord<'_> {
    /// `struct erofs_inode_extended`.
    pub fn encode(&self, inode: Inode, attributes: usize) -> [u8; INODE_SIZE as usize] {
        let mut record = [0; INODE_SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| record[at..][..bytes.len()].copy_from_slice(bytes);
        let layout: u16 = if self.place.tail > 0 { 2 } else { 0 };
        let words = if attributes == 0 { 0 } else { (attributes - XATTR_HEADER) / 4 + 1 };
        put(0, &(1 | layout << 1).to_le_bytes());
        put(2, &(words as u16).to_le_bytes());
        put(4, &(file_type(self.node) | self.meta.mode).to_le_bytes());
        put(8, &self.place.size.to_le_bytes());
        put(16, &self.address().to_le_bytes());
        put(20, &(inode.0 + 1).to_le_bytes());
        put(24, &self.meta.uid.to_le_bytes());
        put(28, &self.meta.gid.to_le_bytes());
        put(32, &self.meta.mtime.0.to_le_bytes());
        put(40, &self.meta.mtime.1.to_le_bytes());
        put(44, &self.place.links.to_le_bytes());
        record
    }

    /// The first block of the content, or the device number in the kernel's encoding.
    fn address(&self) -> u32 {
        match *self.node {
            Node::CharDevice(major, minor) | Node::BlockDevice(major, minor) => {
                minor & 0xff | major << 8 | (minor & !0xff) << 12
            }
            _ => self.place.block,
        }
    }
}

/// The type bits of a mode.
fn file_type(node: &Node) -> u16 {
    match node {
        Node::Fifo => 0o010_000,
        Node::CharDevice(..) => 0o020_000,
        Node::Directory => 0o040_000,
        Node::BlockDevice(..) => 0o060_000,
        Node::File(_) => 0o100_000,
        Node::Symlink(_) => 0o120_000,
        Node::Socket => 0o140_000,
    }
}

/// The type of a directory entry.
pub fn kind(node: &Node) -> u8 {
    match node {
        Node::File(_) => 1,
        Node::Directory => 2,
        Node::CharDevice(..) => 3,
        Node::BlockDevice(..) => 4,
        Node::Fifo => 5,
        Node::Socket => 6,
        Node::Symlink(_) => 7,
    }
}

pub struct DirEntry<'a> {
    pub name: &'a [u8],
    pub nid: u64,
    pub kind: u8,
}

/// A directory's content: each block holds its entries, then their names, and is filled with zeros.
pub fn directory<'a>(entries: impl Iterator<Item = DirEntry<'a>>) -> Vec<u8> {
    let mut content = Vec::new();
    let mut block: Vec<DirEntry> = Vec::new();
    let mut used = 0;
    for entry in entries {
        let need = DIRENT_SIZE + entry.name.len();
        if used + need > BLOCK as usize {
            directory_block(&mut content, &block);
            content.resize(content.len().next_multiple_of(BLOCK as usize), 0);
            block.clear();
            used = 0;
        }
        used += need;
        block.push(entry);
    }
    directory_block(&mut content, &block);
    content
}

/// The size [`directory`] gives for these names.
pub fn directory_size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (full, used) = names.fold((0, 0), |(full, used), name| {
        let need = (DIRENT_SIZE + name.len()) as u64;
        if used + need > BLOCK { (full + BLOCK, need) } else { (full, used + need) }
    });
    full + used
}

fn directory_block(content: &mut Vec<u8>, entries: &[DirEntry]) {
    let mut name_at = DIRENT_SIZE * entries.len();
    for entry in entries {
        content.extend(entry.nid.to_le_bytes());
        content.extend((name_at as u16).to_le_bytes());
        content.extend([entry.kind, 0]);
        name_at += entry.name.len();
    }
    for entry in entries {
        content.extend(entry.name);
    }
}

/// The attributes that follow an inode; nothing where there are none.
pub fn attributes(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut body = vec![0; XATTR_HEADER];
    for (name, value) in xattrs {
        let Some((index, suffix)) = split_prefix(name) else { continue };
        body.extend([suffix.len() as u8, index]);
        body.extend((value.len() as u16).to_le_bytes());
        body.extend(suffix);
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    if body.len() == XATTR_HEADER { Vec::new() } else { body }
}

/// The length of [`attributes`]; `None` if no inode can hold them.
pub fn attributes_size(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Option<u64> {
    let known = xattrs.iter().filter_map(|(name, value)| Some((split_prefix(name)?.1, value)));
    let mut size = 0;
    for (suffix, value) in known {
        if suffix.len() > u8::MAX.into() || value.len() > u16::MAX.into() {
            return None;
        }
        size += (XATTR_ENTRY + suffix.len() + value.len()).next_multiple_of(4);
    }
    match size {
        0 => Some(0),
        size => {
            Some(size + XATTR_HEADER).filter(|size| *size <= MAX_ATTRIBUTES).map(|size| size as u64)
        }
    }
}

/// A name's prefix as its number, and the rest. Of `system.`, EROFS knows the two POSIX ACLs; any other
/// is private to the file system it came from and stays behind.
fn split_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    let prefixes: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => {
            prefixes.iter().find_map(|(index, prefix)| Some((*index, name.strip_prefix(*prefix)?)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_its_published_check_value() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_directory_is_as_large_as_planned() {
        for (count, length) in [(0, 1), (1, 1), (200, 10), (300, 255), (341, 12), (1000, 3)] {
            let names: Vec<Vec<u8>> = (0..count).map(|i| format!("{i:0length$}").into()).collect();
            let entries = names.iter().map(|name| DirEntry { name, nid: 1, kind: 1 });
            let size = directory_size(names.iter().map(|name| &name[..]));
            assert_eq!(directory(entries).len() as u64, size, "{count} names of {length}");
        }
    }

    #[test]
    fn attributes_are_as_large_as_planned() {
        let name = |name: &str| name.as_bytes().to_vec();
        let xattrs = BTreeMap::from([
            (name("user.a"), vec![1; 5]),
            (name("security.capability"), vec![2; 20]),
            (name("system.posix_acl_access"), vec![3; 28]),
            (name("system.nfs4_acl"), vec![4; 9]),
        ]);
        let size = attributes_size(&xattrs).unwrap();
        assert_eq!(attributes(&xattrs).len() as u64, size);
        assert_eq!(size, 12 + 12 + 36 + 32);
        assert_eq!(attributes(&BTreeMap::new()).len(), 0);
    }

    #[test]
    fn what_no_inode_can_hold_is_refused() {
        let one = |name: String, size: usize| BTreeMap::from([(name.into_bytes(), vec![0; size])]);
        assert!(attributes_size(&one(format!("user.{}", "x".repeat(256)), 1)).is_none());
        assert!(attributes_size(&one("user.x".into(), 65536)).is_none());
        let many = (0..5).map(|i| (format!("user.{i}").into_bytes(), vec![0; 65535])).collect();
        assert!(attributes_size(&many).is_none());
    }
}
