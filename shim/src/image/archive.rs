//! A tar stream as entries: POSIX ustar and pax, GNU long names and sparse files.
//!
//! Every byte is hostile: an extension header is bounded before it is read, numbers are checked, and a
//! body ends exactly where its header said. (The `tar` crate decodes the 512-byte header and nothing
//! else: its reader takes an extension of any size into memory and cuts pax values at newlines, which
//! binary attributes contain.)

mod header;
mod pax;
mod sparse;

use std::borrow::Cow;
use std::io::{self, Read};

use tar::{EntryType, Header};

use header::{checksum, has_body, metadata, number, special};
use pax::Pax;
use sparse::Map;

use super::tree::{Extent, Metadata, Node, lossy};

const BLOCK: u64 = 512;
/// Largest extension header read: attributes of 64 KiB each fit, a bomb does not.
const MAX_EXTENSION: u64 = 1 << 20;
/// Largest file; 2⁴³ bytes is half of what an EROFS image can address.
const MAX_FILE: u64 = 1 << 43;

/// One member of an archive. Paths are as written, unchecked.
#[derive(Debug)]
pub struct Member {
    pub path: Vec<u8>,
    pub meta: Metadata,
    pub content: Content,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Content {
    /// All but a file: complete as it is.
    Node(Node),
    /// One more name of the entry with this path.
    Link(Vec<u8>),
    /// A file of `size` bytes, whose body holds these parts one after the other; the rest are holes.
    File { size: u64, parts: Vec<Extent> },
}

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("the archive cannot be read")]
    Read(#[from] io::Error),
    #[error("the archive ends in the middle of an entry")]
    Truncated,
    #[error("the header at byte {0} is not a tar header: its checksum is wrong")]
    Checksum(u64),
    #[error("`{0}`: its tar header has a bad {1}")]
    Field(String, &'static str),
    #[error("an extension header of {0} bytes is larger than {MAX_EXTENSION}")]
    LargeExtension(u64),
    #[error("a pax extension header is malformed")]
    Pax,
    #[error("`{0}`: its size of {1} bytes is larger than {MAX_FILE}")]
    LargeFile(String, u64),
    #[error("`{0}`: its sparse map is malformed or does not match its size")]
    SparseMap(String),
    #[error("`{0}`: entries of tar type `{1}` are not supported")]
    Type(String, char),
}

pub struct Archive<R> {
    source: R,
    /// Bytes of the current body not yet read, and the zeros that fill its last block.
    body: u64,
    padding: u64,
    /// Bytes taken from the source, for messages.
    position: u64,
    /// The zero block that ends an archive has been seen.
    ended: bool,
}

/// What stands in front of a member and changes it.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Pax,
}

impl<R: Read> Archive<R> {
    pub fn new(source: R) -> Self {
        Self { source, body: 0, padding: 0, position: 0, ended: false }
    }

    /// Whether the archive's own end mark was read; a stream cut between two entries lacks it.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// The next member, or `None` at the end. What is left of the last body is skipped.
    pub fn next_member(&mut self) -> Result<Option<Member>, ArchiveError> {
        let mut extensions = Extensions::default();
        while let Some(header) = self.header()? {
            self.start_body(number(header.entry_size(), &header, "size")?);
            match header.entry_type() {
                EntryType::GNULongName => extensions.path = Some(self.long_name()?),
                EntryType::GNULongLink => extensions.link = Some(self.long_name()?),
                EntryType::XHeader => extensions.pax = Pax::parse(&self.extension()?)?,
                EntryType::XGlobalHeader => self.skip()?,
                // The volume label of a GNU archive.
                kind if kind.as_byte() == b'V' => self.skip()?,
                _ => return self.member(&header, extensions).map(Some),
            }
        }
        Ok(None)
    }

    /// The body of the current member; what ends early is an error of kind `UnexpectedEof`.
    pub fn body(&mut self) -> Body<'_, R> {
        Body(self)
    }

    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        self.skip()?;
        let mut header = Header::new_old();
        let start = self.position;
        let block = header.as_mut_bytes();
        match self.source.read(&mut block[..1])? {
            0 => return Ok(None),
            _ => self.source.read_exact(&mut block[1..]).map_err(early)?,
        }
        self.position += BLOCK;
        if block.iter().all(|&byte| byte == 0) {
            self.ended = true;
            return Ok(None);
        }
        if header.cksum().ok() != Some(checksum(header.as_bytes())) {
            return Err(ArchiveError::Checksum(start));
        }
        Ok(Some(header))
    }

    fn member(&mut self, header: &Header, ext: Extensions) -> Result<Member, ArchiveError> {
        let Extensions { path, link, mut pax } = ext;
        let path = pax.take("path").or(path).unwrap_or_else(|| header.path_bytes().into_owned());
        let path = pax.take("GNU.sparse.name").unwrap_or(path);
        let link = pax.take("linkpath").or(link);
        let link = link.or_else(|| header.link_name_bytes().map(Cow::into_owned));
        match pax.number("size")? {
            _ if !has_body(header.entry_type()) => self.start_body(0),
            Some(size) => self.start_body(size),
            None => {}
        }
        let meta = metadata(header, &mut pax)?;
        let content = match header.entry_type() {
            EntryType::GNUSparse => self.file(&path, Map::of_gnu(header))?,
            // Archives older than ustar mark a directory by a slash alone.
            EntryType::Regular if path.ends_with(b"/") => Content::Node(Node::Directory),
            EntryType::Regular | EntryType::Continuous => {
                self.file(&path, Map::of_pax(&mut pax)?)?
            }
            EntryType::Link => Content::Link(link.unwrap_or_default()),
            _ => Content::Node(special(header, &path, link.unwrap_or_default())?),
        };
        Ok(Member { path, meta, content })
    }

    fn file(&mut self, path: &[u8], map: Map) -> Result<Content, ArchiveError> {
        let bad = || ArchiveError::SparseMap(lossy(path));
        let (size, parts) = map.read(self)?.ok_or_else(bad)?;
        if size > MAX_FILE || self.body > MAX_FILE {
            return Err(ArchiveError::LargeFile(lossy(path), size.max(self.body)));
        }
        if !sparse::is_valid(&parts, size, self.body) {
            return Err(bad());
        }
        Ok(Content::File { size, parts })
    }

    fn long_name(&mut self) -> Result<Vec<u8>, ArchiveError> {
        let mut name = self.extension()?;
        name.truncate(name.iter().position(|&byte| byte == 0).unwrap_or(name.len()));
        Ok(name)
    }

    fn extension(&mut self) -> Result<Vec<u8>, ArchiveError> {
        if self.body > MAX_EXTENSION {
            return Err(ArchiveError::LargeExtension(self.body));
        }
        let mut bytes = vec![0; self.body as usize];
        self.body().read_exact(&mut bytes).map_err(early)?;
        Ok(bytes)
    }

    fn start_body(&mut self, size: u64) {
        self.body = size;
        self.padding = (BLOCK - size % BLOCK) % BLOCK;
    }

    fn skip(&mut self) -> Result<(), ArchiveError> {
        io::copy(&mut self.body(), &mut io::sink()).map_err(early)?;
        // Archives by umoci lack the last padding together with the end mark.
        let padding = std::mem::take(&mut self.padding);
        self.position += io::copy(&mut (&mut self.source).take(padding), &mut io::sink())?;
        Ok(())
    }
}

/// Reads the current body and stops at its end.
pub struct Body<'a, R>(&'a mut Archive<R>);

impl<R: Read> Read for Body<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.0.body).unwrap_or(usize::MAX));
        let n = self.0.source.read(&mut buffer[..want])?;
        if n == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.0.body -= n as u64;
        self.0.position += n as u64;
        Ok(n)
    }
}

fn early(error: io::Error) -> ArchiveError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ArchiveError::Truncated,
        _ => ArchiveError::Read(error),
    }
}

#[cfg(test)]
mod tests;
