//! The sandbox of a shim's containers: a VM, and its process on the host.

use std::fmt;

use super::anchor::Anchor;
use crate::{id::Id, sandbox::Sandbox};

/// It is ended by [`Sandbox::shutdown`]; who only drops it leaves that to the others who have it.
pub struct Pod {
    pub sandbox: Sandbox,
    anchor: Anchor,
    /// The container whose namespaces are the pod's.
    pub first: Id,
}

impl Pod {
    pub fn new(sandbox: Sandbox, anchor: Anchor, first: Id) -> Self {
        Self { sandbox, anchor, first }
    }

    pub fn pid(&self) -> u32 {
        self.anchor.pid()
    }

    /// Ends the sandbox when somebody kills its process; returns when it has ended.
    pub async fn guard(&self) {
        tokio::select! {
            () = self.anchor.ended() => drop(self.sandbox.shutdown().await),
            _ = self.sandbox.ended() => {}
        }
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pod of {}", self.first)
    }
}
