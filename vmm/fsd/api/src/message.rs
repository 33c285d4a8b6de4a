//! Requests and replies.

use serde::{Deserialize, Serialize};

/// Shim to file server. The descriptor named is sent in the same packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The descriptor becomes the entry `number` of the file system's root: a directory, or a single file.
    Add { number: u32, access: Access, kind: Kind },
    /// Takes a share away. What the guest still holds of it answers ESTALE.
    Remove { number: u32 },
    /// Once: the file server confines itself, then answers FUSE requests on the `SOCK_SEQPACKET` socket sent
    /// along, one message each.
    Serve,
    /// Once, before [`Request::Serve`]: what the host changes in directories that the guest knows, and that the guest is to
    /// forget some, is told as [`Hint`]s on the `SOCK_SEQPACKET` socket sent along. If that is refused the host cannot tell of
    /// changes, and all else is told.
    Watch,
}

/// What a guest may do with a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    Read,
    /// All but devices, as theirs would be the host's.
    Write,
    /// As [`Access::Write`], and an overlay's marks for what is not there, which are devices by name only: what a directory
    /// takes that is an overlay's upper one.
    WriteUpper,
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
    Moved(Moved),
    /// There were more changes than could be told.
    Lost,
    /// The guest knows so many files that there is hardly room for more: it is to forget those it does not use.
    Crowded,
}

/// An entry of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    pub share: u32,
    /// The number by which the guest knows the directory; of a file that is shared alone, its own.
    pub node: u64,
    /// Empty for a file that is shared alone.
    pub name: Vec<u8>,
}

/// What happened to an entry, in so far as the guest did not do it. Several things may be told as one. What came from,
/// or went to, where the guest knows nothing was created or deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub place: Place,
    pub is_dir: bool,
    pub created: bool,
    pub deleted: bool,
    pub written: bool,
    pub attributes: bool,
}

/// An entry has another name now, and maybe is in another directory of the share. What had that name before is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    pub from: Place,
    pub to: Place,
    pub is_dir: bool,
}
