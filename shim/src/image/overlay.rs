//! A layer of an overlayfs mount as a layer of a tree.
//!
//! A layer's directory holds what it adds and marks for what it hides (kernel documentation,
//! `filesystems/overlayfs.rst`): a character device 0:0 is a whiteout, a directory whose attribute
//! `overlay.opaque` is `y` hides what is below it. The attributes begin with `trusted.`, or with `user.` if
//! the mount has the option `userxattr`; a file of an image may well carry those of the other kind as its own.
//! By `overlay.redirect` and `overlay.metacopy` a file's content lies elsewhere: such a layer is refused.
//! containerd and Docker make none.

use std::path::Path;

use super::directory::{Attributes, Found, Links, WalkError, is_carried, walk};
use super::error::ImageError;
use super::spool::Spool;
use super::tree::{Metadata, Node, Tree, lossy};

/// What the agent's overlay understands.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// What becomes of the marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// There are none: it is a whole root file system, and what looks like them is its own.
    None,
    /// They act on the layers merged before.
    Applied,
    /// They stay, to act on the layers that the guest puts below.
    Kept,
}

/// Whose attributes are overlayfs's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dialect {
    #[default]
    Trusted,
    /// With the mount option `userxattr`.
    User,
}

impl Dialect {
    fn prefix(self) -> &'static [u8] {
        match self {
            Self::Trusted => b"trusted.overlay.",
            Self::User => b"user.overlay.",
        }
    }
}

/// Puts the layer at `path` on top of what is in `tree`.
pub fn merge(
    path: &Path,
    marks: Marks,
    dialect: Dialect,
    tree: &mut Tree,
    spool: &mut Spool,
) -> Result<(), ImageError> {
    tree.next_layer();
    let mut links = Links::new();
    walk(path, |found| {
        if marks == Marks::None {
            return found.add(tree, spool, &mut links, found.attributes()?);
        }
        if found.is_whiteout() {
            return whiteout(found, marks, tree);
        }
        let (mut attributes, opaque) = attributes(found, dialect)?;
        if opaque && marks == Marks::Kept {
            attributes.insert(OPAQUE.into(), b"y".into());
        }
        found.add(tree, spool, &mut links, attributes)?;
        if opaque && marks == Marks::Applied {
            tree.opaque(found.path)?;
        }
        Ok(())
    })
    .map(drop)
}

fn whiteout(found: &Found, marks: Marks, tree: &mut Tree) -> Result<(), WalkError> {
    match marks {
        Marks::Applied => tree.whiteout(found.path)?,
        Marks::Kept | Marks::None => {
            tree.put(found.path, Metadata::default(), Node::CharDevice(0, 0))?;
        }
    }
    Ok(())
}

/// A file's own attributes, and whether it is an opaque directory.
fn attributes(found: &Found, dialect: Dialect) -> Result<(Attributes, bool), WalkError> {
    let prefix = dialect.prefix();
    let mut opaque = false;
    let mut own = Attributes::new();
    let wanted = |name: &[u8]| name.starts_with(prefix) || is_carried(name);
    for (name, value) in found.attributes_where(wanted)? {
        match name.strip_prefix(prefix) {
            None => drop(own.insert(name, value)),
            Some(b"opaque") if value == b"y" => opaque = true,
            Some(b"opaque" | b"redirect" | b"metacopy" | b"whiteout") => {
                return Err(WalkError::Overlay(lossy(&name)));
            }
            // Where it came from, and other notes.
            Some(_) => {}
        }
    }
    Ok((own, opaque))
}
