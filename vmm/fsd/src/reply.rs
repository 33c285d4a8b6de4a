//! Writing a reply, into one buffer that a thread uses again and again.

use rustix::{fs::Statx, io::Errno};

use crate::abi::{MAX_DATA, MAX_MESSAGE, OUT_HEADER};

/// How long a guest may believe an entry or attributes: what the host changes is seen within a second.
const VALID_NS: u32 = 500_000_000;

/// Bytes of struct fuse_attr.
const ATTRIBUTES: usize = 88;

/// A reply being written; its header is filled in last.
#[derive(Debug)]
pub struct Reply(Vec<u8>);

impl Reply {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let mut bytes = Vec::with_capacity(MAX_MESSAGE);
        bytes.resize(OUT_HEADER, 0);
        Self(bytes)
    }

    /// Starts anew.
    pub fn clear(&mut self) {
        self.0.truncate(OUT_HEADER);
    }

    /// The whole message. An error has no body.
    pub fn finish(&mut self, unique: u64, result: Result<(), Errno>) -> &[u8] {
        let error = match result {
            Ok(()) => 0,
            Err(e) => {
                self.clear();
                -e.raw_os_error()
            }
        };
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[4..8].copy_from_slice(&error.to_ne_bytes());
        self.0[8..16].copy_from_slice(&unique.to_ne_bytes());
        &self.0
    }

    /// Bytes of the body so far.
    pub fn len(&self) -> usize {
        self.0.len() - OUT_HEADER
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_ne_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_ne_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_ne_bytes());
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn zeros(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, 0);
    }

    /// At most `size` bytes, or a whole message, of what `read` puts there.
    pub fn fill(
        &mut self,
        size: usize,
        read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let start = self.0.len();
        self.zeros(size.min(MAX_DATA));
        let count = read(&mut self.0[start..])?;
        self.0.truncate(start + count);
        Ok(())
    }

    /// struct fuse_entry_out.
    pub fn entry(&mut self, node: u64, stat: &Statx, flags: u32) {
        self.entry_for(VALID_NS, node, stat, flags);
    }

    /// The same of a name that the guest is to look up again whenever it needs it.
    pub fn momentary_entry(&mut self, node: u64, stat: &Statx) {
        self.entry_for(0, node, stat, 0);
    }

    fn entry_for(&mut self, name_valid_ns: u32, node: u64, stat: &Statx, flags: u32) {
        self.u64(node);
        self.u64(0);
        self.valid();
        self.valid();
        self.u32(name_valid_ns);
        self.u32(VALID_NS);
        self.stat(stat, flags);
    }

    /// The same of a name that does not exist, which the guest may believe as long.
    pub fn no_entry(&mut self) {
        self.u64(0);
        self.u64(0);
        self.valid();
        self.valid();
        self.u32(VALID_NS);
        self.u32(VALID_NS);
        self.zeros(ATTRIBUTES);
    }

    /// struct fuse_attr_out.
    pub fn attributes(&mut self, stat: &Statx) {
        self.valid();
        self.u32(VALID_NS);
        self.u32(0);
        self.stat(stat, 0);
    }

    /// Whole seconds of validity: none.
    fn valid(&mut self) {
        self.u64(0);
    }

    /// struct fuse_attr.
    fn stat(&mut self, stat: &Statx, flags: u32) {
        self.u64(stat.stx_ino);
        self.u64(stat.stx_size);
        self.u64(stat.stx_blocks);
        let times = [stat.stx_atime, stat.stx_mtime, stat.stx_ctime];
        for time in &times {
            self.u64(time.tv_sec as u64);
        }
        for time in &times {
            self.u32(time.tv_nsec);
        }
        self.u32(stat.stx_mode.into());
        self.u32(stat.stx_nlink);
        self.u32(stat.stx_uid);
        self.u32(stat.stx_gid);
        self.u32(device(stat.stx_rdev_major, stat.stx_rdev_minor));
        self.u32(stat.stx_blksize);
        self.u32(flags);
    }
}

/// new_encode_dev of the kernel.
fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}
