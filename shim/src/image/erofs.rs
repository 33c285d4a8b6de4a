//! Writes a [`Tree`] as an EROFS file system: uncompressed, 4 KiB blocks, the same bytes for the same
//! tree (on-disk format: Linux `fs/erofs/erofs_fs.h`, `Documentation/filesystems/erofs.rst`).
//!
//! Written here rather than by `mkfs.erofs`: that of Debian 12 (1.5) reads directories only, so a
//! hostile tree would have to be unpacked on the host, as root, for its owners, devices and attributes.
//!
//! Not compressed: sandboxes of one image share the host's page cache whichever way it is stored, so
//! compression would save disk alone. Measured with `mkfs.erofs` on 745 MB of libraries: lz4hc halves
//! the file (362 MB), takes 28 s instead of 2.3 to write, and 0 to 40 % longer to read.
//!
//! - [`plan`]: which inode and which block goes where
//! - [`superblock`], [`inode`], [`xattr`], [`dirent`]: the records on disk, as pure functions

mod dirent;
mod inode;
mod plan;
mod superblock;
mod xattr;

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::fs::FileExt;

use dirent::DirEntry;
use plan::{Place, Plan};

use super::sparse;
use super::spool::Spool;
use super::tree::{Extent, Inode, Node, Tree};

pub use superblock::check;

/// Part of every cache key: raise it whenever the same tree would give another file.
pub const VERSION: u32 = 1;

const BLOCK: u64 = 4096;

/// Why an image cannot be written, or is none.
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

/// Writes `tree`, with file contents from `spool`, to the empty file `out`. `id` becomes the UUID.
pub fn write(tree: &Tree, spool: &Spool, id: [u8; 16], out: &File) -> Result<(), FormatError> {
    let plan = Plan::new(tree)?;
    out.set_len(plan.blocks() * BLOCK)?;
    let mut writer = Writer { tree, spool, plan: &plan, out };
    writer.metadata(id)?;
    writer.contents()?;
    Ok(())
}

struct Writer<'a> {
    tree: &'a Tree,
    spool: &'a Spool,
    plan: &'a Plan,
    out: &'a File,
}

impl Writer<'_> {
    /// The superblock, then every inode with its attributes and the tail of its content.
    fn metadata(&mut self, id: [u8; 16]) -> io::Result<()> {
        let mut stream = BufWriter::with_capacity(1 << 20, self.out);
        stream.rewind()?;
        stream.write_all(&superblock::encode(self.plan, id))?;
        let mut at = BLOCK;
        for &inode in self.plan.order() {
            let place = self.plan.place(inode);
            write_zeros(&mut stream, place.offset - at)?;
            let record = self.record(inode, place)?;
            stream.write_all(&record)?;
            at = place.offset + record.len() as u64;
        }
        stream.flush()
    }

    fn record(&self, inode: Inode, place: &Place) -> io::Result<Vec<u8>> {
        let meta = self.tree.metadata(inode);
        let attributes = xattr::encode(&meta.xattrs);
        let head = inode::Record { inode, meta, node: self.tree.node(inode), place };
        let mut record = head.encode(attributes.len()).to_vec();
        record.extend(attributes);
        record.extend(self.tail(inode, place)?);
        Ok(record)
    }

    /// The last part of the content, kept right behind the inode.
    fn tail(&self, inode: Inode, place: &Place) -> io::Result<Vec<u8>> {
        let tail = place.tail as usize;
        match self.tree.node(inode) {
            Node::File(extent) if tail > 0 => {
                let mut bytes = vec![0; tail];
                let end = extent.offset + extent.length;
                self.spool.read_at(&mut bytes, end - u64::from(place.tail))?;
                Ok(bytes)
            }
            _ if tail > 0 => {
                let mut content = self.small_content(inode);
                Ok(content.split_off(content.len() - tail))
            }
            _ => Ok(Vec::new()),
        }
    }

    /// All that is in blocks of its own.
    fn contents(&mut self) -> io::Result<()> {
        for &inode in self.plan.order() {
            let place = self.plan.place(inode);
            let length = place.size - u64::from(place.tail);
            let at = u64::from(place.block) * BLOCK;
            match self.tree.node(inode) {
                _ if length == 0 => {}
                Node::File(extent) => {
                    let whole = Extent { offset: extent.offset, length };
                    sparse::copy(self.spool.file(), whole, self.out, at)?;
                }
                _ => self.out.write_all_at(&self.small_content(inode)[..length as usize], at)?,
            }
        }
        Ok(())
    }

    /// The content of a directory or a symbolic link.
    fn small_content(&self, inode: Inode) -> Vec<u8> {
        match self.tree.node(inode) {
            Node::Symlink(target) => target.clone(),
            Node::Directory => {
                let entry = |(name, child)| DirEntry {
                    name,
                    nid: self.plan.place(child).nid(),
                    kind: dirent::kind(self.tree.node(child)),
                };
                dirent::encode(self.plan.names(self.tree, inode).into_iter().map(entry))
            }
            _ => Vec::new(),
        }
    }
}

fn write_zeros(stream: &mut impl Write, count: u64) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), count), stream).map(drop)
}

#[cfg(test)]
mod tests;
