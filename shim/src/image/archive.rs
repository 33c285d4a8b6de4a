//! A tar stream as entries: POSIX ustar and pax, GNU long names and sparse files.
//!
//! Every byte is hostile: an extension header is bounded before it is read, numbers are checked, and a
//! body ends exactly where its header said. (The `tar` crate decodes the 512-byte header and nothing
//! else: its reader takes an extension of any size into memory and cuts pax values at newlines, which
//! binary attributes contain.)

mod pax;
mod sparse;

use std::io::{self, Read};

use tar::{EntryType, Header};

use pax::Pax;
pub use sparse::Segment;

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
    File { size: u64, parts: Vec<Segment> },
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
            self.body = number(header.entry_size(), &header, "size")?;
            self.padding = (BLOCK - self.body % BLOCK) % BLOCK;
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
        let mut pax = ext.pax;
        let path =
            pax.take("path").or(ext.path).unwrap_or_else(|| header.path_bytes().into_owned());
        let path = pax.take("GNU.sparse.name").unwrap_or(path);
        if let Some(size) = pax.number("size")? {
            self.body = size;
            self.padding = (BLOCK - size % BLOCK) % BLOCK;
        }
        if !has_body(header.entry_type()) {
            (self.body, self.padding) = (0, 0);
        }
        let meta = metadata(header, &mut pax)?;
        let link = pax.take("linkpath").or(ext.link);
        let link = link.or_else(|| header.link_name_bytes().map(|name| name.into_owned()));
        let link = link.unwrap_or_default();
        let bad = |what| ArchiveError::Field(lossy(&path), what);
        let device = || -> Result<(u32, u32), ArchiveError> {
            let major = header.device_major().ok().flatten().filter(|major| *major < 1 << 12);
            let minor = header.device_minor().ok().flatten().filter(|minor| *minor < 1 << 20);
            major.zip(minor).ok_or_else(|| bad("device number"))
        };
        let content = match header.entry_type() {
            EntryType::Link => Content::Link(link),
            EntryType::Symlink => Content::Node(Node::Symlink(link)),
            EntryType::Char => {
                device().map(|(major, minor)| Node::CharDevice(major, minor))?.into()
            }
            EntryType::Block => {
                device().map(|(major, minor)| Node::BlockDevice(major, minor))?.into()
            }
            EntryType::Fifo => Node::Fifo.into(),
            EntryType::Directory => Node::Directory.into(),
            // Archives older than ustar mark a directory by a slash alone.
            EntryType::Regular if path.ends_with(b"/") => Node::Directory.into(),
            EntryType::Regular | EntryType::Continuous => {
                self.file(&path, sparse::of_pax(&mut pax)?)?
            }
            EntryType::GNUSparse => self.file(&path, sparse::Map::of_gnu(header))?,
            other => return Err(ArchiveError::Type(lossy(&path), other.as_byte() as char)),
        };
        Ok(Member { path, meta, content })
    }

    fn file(&mut self, path: &[u8], map: sparse::Map) -> Result<Content, ArchiveError> {
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

    fn skip(&mut self) -> Result<(), ArchiveError> {
        io::copy(&mut self.body(), &mut io::sink()).map_err(early)?;
        let padding = std::mem::take(&mut self.padding) as usize;
        self.source.read_exact(&mut [0; BLOCK as usize][..padding]).map_err(early)?;
        self.position += padding as u64;
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

impl From<Node> for Content {
    fn from(node: Node) -> Self {
        Self::Node(node)
    }
}

/// Whatever their size field says, links, devices and directories have no body, as Go's reader has it:
/// the two must not see different archives.
fn has_body(kind: EntryType) -> bool {
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

fn metadata(header: &Header, pax: &mut Pax) -> Result<Metadata, ArchiveError> {
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

fn number(
    value: io::Result<u64>,
    header: &Header,
    what: &'static str,
) -> Result<u64, ArchiveError> {
    value.map_err(|_| ArchiveError::Field(lossy(&header.path_bytes()), what))
}

/// The sum of the header's bytes, its checksum field taken as spaces.
fn checksum(header: &[u8; BLOCK as usize]) -> u32 {
    let counted = header.iter().enumerate().map(|(at, &byte)| match at {
        148..156 => u32::from(b' '),
        _ => u32::from(byte),
    });
    counted.sum()
}

fn early(error: io::Error) -> ArchiveError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ArchiveError::Truncated,
        _ => ArchiveError::Read(error),
    }
}
