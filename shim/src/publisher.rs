//! Events, to containerd: in order, over a connection that comes back when containerd does.

use std::time::Duration;

use protobuf::MessageFull;

/// A queue of events; clones feed the same one.
#[derive(Clone, Debug)]
pub struct Publisher {}

impl Publisher {
    /// `ttrpc_address` is what containerd gives as `TTRPC_ADDRESS`; without one, events go nowhere. To be
    /// called in a tokio runtime.
    pub fn new(_ttrpc_address: Option<String>, _namespace: String) -> Self {
        Self {}
    }

    /// Queues an event and returns at once. Those of [`containerd_shim_protos::topics`] have the types of
    /// [`containerd_shim_protos::events::task`].
    pub fn publish(&self, _topic: &'static str, _event: impl MessageFull) {}

    /// Waits until all that was queued has been delivered, but no longer than `limit`.
    pub async fn flush(&self, _limit: Duration) {}
}
