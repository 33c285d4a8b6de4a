//! Sparse files in tar: which parts of a file its body holds (GNU tar manual, "Storing Sparse Files").

use std::io::Read;

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::pax::{Pax, decimal};
use super::{Archive, ArchiveError, BLOCK, Extent, early};

/// The most parts a map may have.
const MAX_PARTS: usize = 1 << 18;
/// The most bytes a map in the body may have: two numbers of 20 digits for each part.
const MAX_MAP: usize = 2 * 21 * MAX_PARTS;

/// Which parts of a file its body holds is told in one of these places.
pub enum Map {
    /// Not sparse: the body is the file.
    Dense,
    /// GNU's own format: the first parts in the header, more in blocks before the body.
    Gnu { size: Option<u64>, parts: Option<Vec<Extent>>, more: bool },
    /// Pax 0.1: in the header, as `offset,length,…`.
    Listed { size: Option<u64>, list: Vec<u8> },
    /// Pax 1.0: in front of the body, one number a line.
    InBody { size: Option<u64> },
}

impl Map {
    /// The map of a pax member. Version 0.0, which no archiver has written since 2006, is refused.
    pub fn of_pax(pax: &mut Pax) -> Result<Self, ArchiveError> {
        let size = pax.number("GNU.sparse.size")?;
        let size = pax.number("GNU.sparse.realsize")?.or(size);
        let version = pax.number("GNU.sparse.major")?.zip(pax.number("GNU.sparse.minor")?);
        match (pax.take("GNU.sparse.map"), version) {
            (Some(list), _) => Ok(Self::Listed { size, list }),
            (None, Some((1, 0))) => Ok(Self::InBody { size }),
            (None, None) if size.is_none() => Ok(Self::Dense),
            _ => Err(ArchiveError::Pax),
        }
    }

    pub fn of_gnu(header: &Header) -> Self {
        let gnu = header.as_gnu();
        Self::Gnu {
            size: gnu.and_then(|header| header.real_size().ok()),
            parts: gnu.and_then(|header| segments(&header.sparse)),
            more: gnu.is_some_and(|header| header.is_extended()),
        }
    }

    /// The file's size and parts, reading what stands before the body; `None` if malformed.
    pub fn read<R: Read>(
        self,
        archive: &mut Archive<R>,
    ) -> Result<Option<(u64, Vec<Extent>)>, ArchiveError> {
        let (size, parts) = match self {
            Self::Dense => {
                (Some(archive.body), Some(vec![Extent { offset: 0, length: archive.body }]))
            }
            Self::Gnu { size, parts: Some(parts), more } => (size, archive.gnu_parts(parts, more)?),
            Self::Gnu { size, parts: None, .. } => (size, None),
            Self::Listed { size, list } => (size, pairs(list.split(|&b| b == b',').map(decimal))),
            Self::InBody { size } => (size, archive.parts_in_body()?),
        };
        Ok(size.zip(parts))
    }
}

/// Parts in order, apart, inside the file, and together as long as the body.
pub fn is_valid(parts: &[Extent], size: u64, body: u64) -> bool {
    let mut end = 0;
    let mut total: u64 = 0;
    for part in parts {
        let Some(next) = part.offset.checked_add(part.length) else { return false };
        if part.offset < end || next > size {
            return false;
        }
        end = next;
        total += part.length;
    }
    total == body
}

impl<R: Read> Archive<R> {
    /// Reads the blocks that continue the map of a GNU header; they are not part of the body.
    fn gnu_parts(
        &mut self,
        mut parts: Vec<Extent>,
        mut more: bool,
    ) -> Result<Option<Vec<Extent>>, ArchiveError> {
        while more {
            let mut block = GnuExtSparseHeader::new();
            self.source.read_exact(block.as_mut_bytes()).map_err(early)?;
            self.position += BLOCK;
            let Some(continued) = segments(&block.sparse) else { return Ok(None) };
            parts.extend(continued);
            if parts.len() > MAX_PARTS {
                return Ok(None);
            }
            more = block.is_extended();
        }
        Ok(Some(parts))
    }

    /// Reads the map at the start of the body: a count, then offset and length of each part, in whole
    /// blocks.
    fn parts_in_body(&mut self) -> Result<Option<Vec<Extent>>, ArchiveError> {
        let mut text = Vec::new();
        let mut lines = 0;
        let mut wanted = 1;
        while lines < wanted {
            let mut block = [0; BLOCK as usize];
            if self.body < BLOCK || text.len() > MAX_MAP {
                return Ok(None);
            }
            self.body().read_exact(&mut block).map_err(early)?;
            text.extend_from_slice(&block);
            lines += block.iter().filter(|&&byte| byte == b'\n').count();
            let first = text.split(|&byte| byte == b'\n').next().and_then(decimal);
            let count = first.and_then(|count| usize::try_from(count).ok());
            let Some(count) = count.filter(|count| *count <= MAX_PARTS) else { return Ok(None) };
            wanted = 1 + 2 * count;
        }
        let numbers = text.split(|&byte| byte == b'\n').skip(1).take(wanted - 1).map(decimal);
        Ok(pairs(numbers))
    }
}

fn segments(headers: &[GnuSparseHeader]) -> Option<Vec<Extent>> {
    let used = headers.iter().filter(|header| !header.is_empty());
    let segment = |header: &GnuSparseHeader| {
        Some(Extent { offset: header.offset().ok()?, length: header.length().ok()? })
    };
    used.map(segment).collect()
}

fn pairs(mut numbers: impl Iterator<Item = Option<u64>>) -> Option<Vec<Extent>> {
    let mut parts = Vec::new();
    while let Some(offset) = numbers.next() {
        parts.push(Extent { offset: offset?, length: numbers.next()?? });
    }
    (parts.len() <= MAX_PARTS).then_some(parts)
}
