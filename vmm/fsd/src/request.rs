//! Reading a request. Every byte is the guest's: lengths, names and numbers are checked here, and nothing is
//! allocated.

use std::ffi::CStr;

use rustix::io::Errno;

use crate::abi::{EXT_GROUPS, IN_HEADER, NAME_MAX};

/// struct fuse_in_header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
}

/// A message: its header, and a cursor over the rest.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    pub header: Header,
    body: &'a [u8],
    extensions: &'a [u8],
}

impl<'a> Request<'a> {
    /// `Err` holds what an answer needs, if there is enough to answer at all.
    pub fn parse(message: &'a [u8]) -> Result<Self, Option<Header>> {
        let mut cursor = Self { header: Header::NONE, body: message, extensions: &[] };
        let (length, extension_words, header) = cursor.header().map_err(|_| None)?;
        cursor.header = header;
        let body = message.len().checked_sub(IN_HEADER + 8 * usize::from(extension_words));
        match body {
            Some(body) if length as usize == message.len() => {
                (cursor.body, cursor.extensions) = message[IN_HEADER..].split_at(body);
                Ok(cursor)
            }
            _ => Err(Some(header)),
        }
    }

    fn header(&mut self) -> Result<(u32, u16, Header), Errno> {
        let (length, opcode) = (self.u32()?, self.u32()?);
        let (unique, node) = (self.u64()?, self.u64()?);
        let (uid, gid, _pid) = (self.u32()?, self.u32()?, self.u32()?);
        let [a, b, _, _] = self.u32()?.to_ne_bytes();
        Ok((length, u16::from_ne_bytes([a, b]), Header { opcode, unique, node, uid, gid }))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (array, rest) = self.body.split_first_chunk().ok_or(Errno::INVAL)?;
        self.body = rest;
        Ok(*array)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_ne_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_ne_bytes)
    }

    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.body.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.body = rest;
        Ok(bytes)
    }

    /// A NUL-terminated string of any length and content.
    pub fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.body).map_err(|_| Errno::INVAL)?;
        self.body = &self.body[string.count_bytes() + 1..];
        Ok(string)
    }

    /// One component of a path, and never a way out of its directory.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }

    /// The one group of the caller's that matters: that of the directory in which something is created.
    pub fn group(&self) -> Result<Option<u32>, Errno> {
        let mut rest = Self { header: self.header, body: self.extensions, extensions: &[] };
        while !rest.body.is_empty() {
            let (size, kind) = (rest.u32()?, rest.u32()?);
            let body = (size as usize).checked_sub(8).ok_or(Errno::INVAL)?;
            let mut body = Self { body: rest.bytes(body)?, ..rest.clone() };
            if kind == EXT_GROUPS && body.u32()? > 0 {
                return body.u32().map(Some);
            }
        }
        Ok(None)
    }
}

impl Header {
    const NONE: Self = Self { opcode: 0, unique: 0, node: 0, uid: 0, gid: 0 };
}
