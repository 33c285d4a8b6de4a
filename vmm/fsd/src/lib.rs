//! `ampoule-fsd`, in reading order:
//!
//! - [`run`]: the process: control messages, then threads that answer
//! - [`confine`], [`seccomp`]: what it gives up
//! - [`worker`]: one thread: a message, its answer
//! - [`stream`]: the same of one directory, for who is at the other end of a stream
//! - [`server`]: from a request to an operation
//! - [`request`], [`reply`], [`abi`]: the messages of FUSE
//! - [`nodes`], [`handles`], [`locks`]: what the guest knows, has open and has locked
//! - [`crowd`]: when it is asked to forget
//! - [`caller`]: acting as the guest's process
//! - `ops`: the operations
//! - [`watch`]: what the host changes meanwhile
//!
//! Nothing in here trusts a byte of a request. The trees it serves are detached mounts
//! ([`ampoule_fsd_api::mount`]); a name of the guest's is one component, opened without following it, below a
//! descriptor in one of them.

pub mod caller;
pub mod confine;
pub mod crowd;
pub mod handles;
pub mod locks;
pub mod nodes;
mod ops;
pub mod reply;
pub mod request;
pub mod run;
pub mod seccomp;
pub mod server;
pub mod stream;
pub mod watch;
pub mod worker;

pub use ampoule_fsd_api::abi;
