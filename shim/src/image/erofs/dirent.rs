//! Directories (`struct erofs_dirent`): blocks of entries, each block followed by its names.

use super::BLOCK;
use crate::image::tree::Node;

const SIZE: usize = 12;

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

/// A name in a directory.
pub struct DirEntry<'a> {
    pub name: &'a [u8],
    pub nid: u64,
    pub kind: u8,
}

/// A directory's content: each block holds its entries, then their names, and is filled with zeros.
pub fn encode<'a>(entries: impl Iterator<Item = DirEntry<'a>>) -> Vec<u8> {
    let mut content = Vec::new();
    let mut block: Vec<DirEntry> = Vec::new();
    let mut used = 0;
    for entry in entries {
        let need = SIZE + entry.name.len();
        if used + need > BLOCK as usize {
            write_block(&mut content, &block);
            content.resize(content.len().next_multiple_of(BLOCK as usize), 0);
            block.clear();
            used = 0;
        }
        used += need;
        block.push(entry);
    }
    write_block(&mut content, &block);
    content
}

/// The size [`encode`] gives for these names.
pub fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (full, used) = names.fold((0, 0), |(full, used), name| {
        let need = (SIZE + name.len()) as u64;
        if used + need > BLOCK { (full + BLOCK, need) } else { (full, used + need) }
    });
    full + used
}

fn write_block(content: &mut Vec<u8>, entries: &[DirEntry]) {
    let mut name_at = SIZE * entries.len();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_as_large_as_planned() {
        for (count, length) in [(0, 1), (1, 1), (200, 10), (300, 255), (341, 12), (1000, 3)] {
            let names: Vec<Vec<u8>> = (0..count).map(|i| format!("{i:0length$}").into()).collect();
            let entries = names.iter().map(|name| DirEntry { name, nid: 1, kind: 1 });
            let planned = size(names.iter().map(|name| &name[..]));
            assert_eq!(encode(entries).len() as u64, planned, "{count} names of {length}");
        }
    }
}
