//! Requests and replies.

use serde::{Deserialize, Serialize};

/// Shim to file server. The descriptor named is sent in the same packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The descriptor becomes the entry `number` of the file system's root: a directory, or a single file.
    Add { number: u32, read_only: bool, kind: Kind },
    /// Takes a share away. What the guest still holds of it answers ESTALE.
    Remove { number: u32 },
    /// Once: the file server confines itself, then answers FUSE requests on the `SOCK_SEQPACKET` socket sent
    /// along, one message each.
    Serve,
    /// Once, before [`Request::Serve`]: what the host changes in directories that the guest knows is told as
    /// [`Hint`]s on the `SOCK_SEQPACKET` socket sent along.
    Watch,
}

/// What the descriptor of [`Request::Add`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The root of a detached mount ([`crate::mount::detach`]).
    Mount,
    /// A file or directory opened with O_PATH, of which the file server makes the detached mount in its own
    /// user namespace: how users without privileges do it. Before [`Request::Serve`] only.
    Path,
}

/// File server to shim: one for each request, in order. The text says why not.
pub type Reply = Result<(), String>;

/// File server to shim, on the socket of [`Request::Watch`]: made by a process that a guest may have taken over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hint {
    Changed(Change),
    /// There were more changes than could be told.
    Lost,
}

/// What happened to an entry of a directory, in so far as the guest did not do it. Several things may be told as
/// one; a file that was moved is deleted here and created there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub share: u32,
    /// The directory's path in the share: "/" is the share itself.
    pub directory: Vec<u8>,
    pub name: Vec<u8>,
    pub is_dir: bool,
    pub created: bool,
    pub deleted: bool,
    pub written: bool,
    pub attributes: bool,
}

/// Group ids by which the guest's agent says that a request only repeats, for its own kernel to tell whoever watches,
/// what the host has done: the file server answers as if it did it, and does nothing.
pub mod replay {
    /// mknod(2) and mkdir(2).
    pub const CREATE: u32 = 0xffff_fff0;
    /// unlink(2) of what is no directory.
    pub const DELETE: u32 = 0xffff_fff1;
    /// rmdir(2).
    pub const DELETE_DIR: u32 = 0xffff_fff2;
    /// fallocate(2) for a write, chmod(2) for attributes.
    pub const CHANGE: u32 = 0xffff_fff3;
}
