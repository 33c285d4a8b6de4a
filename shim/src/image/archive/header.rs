//! The fields of a tar header, each checked.

use std::io;

use tar::{EntryType, Header};

use super::pax::Pax;
use super::{ArchiveError, BLOCK, Metadata, Node, lossy};

/// Whatever their size field says, links, devices and directories have no body, as Go's reader has it:
/// the two must not see different archives.
pub fn has_body(kind: EntryType) -> bool {
    !matches!(
        kind,
        EntryType::Link
            | EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Fifo
            | EntryType::Directory
    )
}

pub fn metadata(header: &Header, pax: &mut Pax) -> Result<Metadata, ArchiveError> {
    let uid = pax.number("uid")?.map_or_else(|| number(header.uid(), header, "owner"), Ok)?;
    let gid = pax.number("gid")?.map_or_else(|| number(header.gid(), header, "group"), Ok)?;
    let bad = |what| ArchiveError::Field(lossy(&header.path_bytes()), what);
    Ok(Metadata {
        mode: (number(header.mode().map(u64::from), header, "mode")? & 0o7777) as u16,
        uid: u32::try_from(uid).map_err(|_| bad("owner"))?,
        gid: u32::try_from(gid).map_err(|_| bad("group"))?,
        // Base-256 numbers are signed: a time before 1970 arrives as its two's complement.
        mtime: match pax.time("mtime")? {
            Some(time) => time,
            None => (number(header.mtime(), header, "time")? as i64, 0),
        },
        xattrs: pax.attributes(),
    })
}

pub fn number(
    value: io::Result<u64>,
    header: &Header,
    what: &'static str,
) -> Result<u64, ArchiveError> {
    value.map_err(|_| ArchiveError::Field(lossy(&header.path_bytes()), what))
}

/// The sum of the header's bytes, its checksum field taken as spaces.
pub fn checksum(header: &[u8; BLOCK as usize]) -> u32 {
    let counted = header.iter().enumerate().map(|(at, &byte)| match at {
        148..156 => u32::from(b' '),
        _ => u32::from(byte),
    });
    counted.sum()
}

/// What is neither a file nor a hard link.
pub fn special(header: &Header, path: &[u8], link: Vec<u8>) -> Result<Node, ArchiveError> {
    Ok(match header.entry_type() {
        EntryType::Directory => Node::Directory,
        EntryType::Symlink => Node::Symlink(link),
        EntryType::Fifo => Node::Fifo,
        EntryType::Char => {
            device(header, path).map(|(major, minor)| Node::CharDevice(major, minor))?
        }
        EntryType::Block => {
            device(header, path).map(|(major, minor)| Node::BlockDevice(major, minor))?
        }
        other => return Err(ArchiveError::Type(lossy(path), other.as_byte() as char)),
    })
}

/// A device's major and minor number, within what Linux can hold.
fn device(header: &Header, path: &[u8]) -> Result<(u32, u32), ArchiveError> {
    let major = header.device_major().ok().flatten().filter(|major| *major < 1 << 12);
    let minor = header.device_minor().ok().flatten().filter(|minor| *minor < 1 << 20);
    major.zip(minor).ok_or_else(|| ArchiveError::Field(lossy(path), "device number"))
}
