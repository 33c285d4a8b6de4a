//! The operations of the FUSE protocol, by what they are about.

mod attributes;
mod create;
mod directory;
mod extended;
mod file;
mod lock;
mod names;
mod replay;
mod root;
mod session;

pub(crate) use replay::Replay;
