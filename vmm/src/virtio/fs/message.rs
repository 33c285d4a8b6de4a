//! The headers of FUSE messages (`struct fuse_in_header` and `struct fuse_out_header` of
//! include/uapi/linux/fuse.h), as far as the device has to know them. Pure.

/// Of a request.
pub const REQUEST_HEADER: usize = 40;
/// Of a reply.
pub const REPLY_HEADER: usize = 16;
/// Longest message: 128 KiB of data, and room for what comes before it.
pub const MAX_MESSAGE: usize = (128 << 10) + 4096;

const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const NOTIFY_REPLY: u32 = 41;
const BATCH_FORGET: u32 = 42;

/// What is to be done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Forwarded, and its reply waited for.
    Answered,
    /// Forwarded; there is no reply.
    Unanswered,
    /// Nothing: it speaks of other messages by numbers that are the driver's own, and has no reply.
    Dropped,
}

/// A request's header, copied from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub [u8; REQUEST_HEADER]);

impl Request {
    /// Of the whole message, in bytes, as it says itself.
    pub fn said_len(&self) -> usize {
        u32::from_le_bytes(field(&self.0, 0)) as usize
    }

    pub fn kind(&self) -> Kind {
        match u32::from_le_bytes(field(&self.0, 4)) {
            FORGET | BATCH_FORGET => Kind::Unanswered,
            INTERRUPT | NOTIFY_REPLY => Kind::Dropped,
            _ => Kind::Answered,
        }
    }

    /// By which its reply is known.
    pub fn unique(&self) -> u64 {
        u64::from_le_bytes(field(&self.0, 8))
    }

    pub fn with_unique(mut self, unique: u64) -> Self {
        self.0[8..16].copy_from_slice(&unique.to_le_bytes());
        self
    }
}

/// A reply's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply(pub [u8; REPLY_HEADER]);

impl Reply {
    /// The reply to a request that could not be served: `EIO`.
    pub fn io_error(unique: u64) -> Self {
        let mut header = [0; REPLY_HEADER];
        header[..4].copy_from_slice(&(REPLY_HEADER as u32).to_le_bytes());
        header[4..8].copy_from_slice(&(-libc::EIO).to_le_bytes());
        Self(header).with_unique(unique)
    }

    /// Of the request.
    pub fn unique(&self) -> u64 {
        u64::from_le_bytes(field(&self.0, 8))
    }

    pub fn with_unique(mut self, unique: u64) -> Self {
        self.0[8..16].copy_from_slice(&unique.to_le_bytes());
        self
    }

    /// Whether it agrees with itself, being `len` bytes long: an error has nothing behind it, and is one that
    /// programs know.
    pub fn is_sound(&self, len: usize) -> bool {
        let said = u32::from_le_bytes(field(&self.0, 0)) as usize;
        let error = i32::from_le_bytes(field(&self.0, 4));
        said == len && (error == 0 || (-511..0).contains(&error) && len == REPLY_HEADER)
    }
}

fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(len: u32, error: i32) -> Reply {
        let mut header = [0; REPLY_HEADER];
        header[..4].copy_from_slice(&len.to_le_bytes());
        header[4..8].copy_from_slice(&error.to_le_bytes());
        Reply(header)
    }

    #[test]
    fn replies_are_believed_only_if_they_agree_with_themselves() {
        for (len, error, real) in [(16, 0, 16), (100, 0, 100), (16, -2, 16), (16, -510, 16)] {
            assert!(reply(len, error).is_sound(real), "{len} {error} {real}");
        }
        for (len, error, real) in
            [(16, 0, 17), (0, 0, 16), (20, -2, 20), (16, 2, 16), (16, -512, 16), (16, i32::MIN, 16)]
        {
            assert!(!reply(len, error).is_sound(real), "{len} {error} {real}");
        }
        assert!(Reply::io_error(7).is_sound(REPLY_HEADER));
        assert_eq!(Reply::io_error(7).unique(), 7);
    }

    #[test]
    fn only_the_unique_changes() {
        let request = Request([0x11; REQUEST_HEADER]).with_unique(0x22);
        assert_eq!(request.unique(), 0x22);
        assert!(request.0[..8].iter().chain(&request.0[16..]).all(|&byte| byte == 0x11));
    }
}
