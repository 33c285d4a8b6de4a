//! Writes a [`Tree`] as an EROFS file system: uncompressed, 4 KiB blocks, the same bytes for the same
//! tree (on-disk format: Linux `fs/erofs/erofs_fs.h`, `Documentation/filesystems/erofs.rst`).
//!
//! Written here rather than by `mkfs.erofs`: that of Debian 12 (1.5) reads directories only, so a
//! hostile tree would have to be unpacked on the host, as root, for its owners, devices and attributes.
//!
//! Not compressed: sandboxes of one image share the host's page cache whichever way it is stored, so
//! compression would save disk alone, and cost every guest the decompression of every cold read.
//!
//! - [`format`]: the records on disk, as pure functions
//! - [`plan`]: which inode and which block goes where

mod format;
mod plan;

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::fs::FileExt;

use format::{BLOCK, DirEntry, InodeRecord};
use plan::{Place, Plan};

use super::sparse;
use super::spool::Spool;
use super::tree::{Extent, Inode, Node, Tree};

pub use format::{FormatError, check};

/// Part of every cache key: raise it whenever the same tree would give another file.
pub const VERSION: u32 = 1;

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
        stream.write_all(&format::superblock(self.plan, id))?;
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
        let attributes = format::attributes(&meta.xattrs);
        let head = InodeRecord { meta, node: self.tree.node(inode), place };
        let mut record = head.encode(inode, attributes.len()).to_vec();
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
                    kind: format::kind(self.tree.node(child)),
                };
                format::directory(self.plan.names(self.tree, inode).into_iter().map(entry))
            }
            _ => Vec::new(),
        }
    }
}

fn write_zeros(stream: &mut impl Write, count: u64) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), count), stream).map(drop)
}
