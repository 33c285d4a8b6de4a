//! What a shim and its file server, `ampoule-fsd`, say to each other.
//!
//! The file server is one process for one sandbox. It is started with one end of a `SOCK_SEQPACKET` socketpair
//! as its standard input, and ends when the other end is closed. The shim sends [`Request`]s, each is answered
//! by one [`Reply`]; descriptors only travel to the file server. In reading order:
//!
//! - [`message`]: requests and replies, and hints of what the host changes
//! - [`mount`]: a tree of the host as a detached mount, which is what a share is
//! - [`client`]: starting a file server, and asking it
//! - [`abi`]: the numbers of FUSE, in which it and guests speak

pub mod abi;
pub mod client;
pub mod message;
pub mod mount;

pub use client::{Fsd, FsdError};
pub use message::{Access, Change, Hint, Kind, Moved, Place, Reply, Request};
