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
