//! The network of a running guest follows that of its namespace on the host. Whoever looks at that has it meanwhile: it is
//! here when nobody does.

use std::future::Future;

use ampoule_agent_api::agent::ConfigureNetworkRequest;

use crate::{
    id::Id,
    network::{Change, Joined, NetworkError},
};

pub(super) struct Follower {
    joined: Option<Joined>,
    of: Of,
    /// What was told last.
    told: Option<ConfigureNetworkRequest>,
}

/// Whose the network is.
#[derive(Clone, PartialEq, Eq)]
enum Of {
    /// Containers share it.
    Guest,
    Container(Id),
    /// There is none yet.
    Nobody,
}

/// What was found.
pub(super) struct Looked {
    joined: Joined,
    change: Result<Change, NetworkError>,
}

impl Follower {
    /// With what the guest itself was told at its boot, if anything.
    pub fn new(joined: Option<Joined>, told: Option<ConfigureNetworkRequest>) -> Self {
        Self { joined, of: told.as_ref().map_or(Of::Nobody, |_| Of::Guest), told }
    }

    /// Whether the guest itself has one.
    pub fn is_guests(&self) -> bool {
        self.of == Of::Guest
    }

    /// Looks for what a container is to have, if nobody has a network yet.
    pub fn attach(&mut self, container: Id) -> Option<impl Future<Output = Looked> + use<>> {
        if self.of != Of::Nobody {
            return None;
        }
        let joined = self.joined.take()?;
        self.of = Of::Container(container);
        Some(look(joined, Joined::follow_all))
    }

    /// Waits for a change and looks, if there is somebody to be told.
    pub fn follow(&mut self) -> Option<impl Future<Output = Looked> + use<>> {
        if self.of == Of::Nobody {
            return None;
        }
        let joined = self.joined.take_if(|joined| joined.follows())?;
        Some(async move {
            if joined.changes().await.is_err() {
                // Without the kernel's word nothing changes.
                std::future::pending::<()>().await;
            }
            look(joined, Joined::follow).await
        })
    }

    /// Takes it back. `None`: there is nothing to be told.
    pub fn looked(&mut self, looked: Looked) -> Result<Option<Change>, NetworkError> {
        let Looked { joined, change } = looked;
        if self.told.is_none() && (change.is_err() || !joined.follows()) {
            // Each container that starts is refused what it cannot have.
            self.of = Of::Nobody;
        }
        self.joined = Some(joined);
        let mut change = change?;
        if let Of::Container(container) = &self.of {
            change.request.container_id = container.to_string();
        }
        let nothing = self.told.is_none() && change.request.interfaces.is_empty();
        if nothing || self.told.as_ref() == Some(&change.request) && change.resolver.is_none() {
            return Ok(None);
        }
        self.told = Some(change.request.clone());
        Ok(Some(change))
    }

    /// The VM is gone: the namespace is left as it was.
    pub fn end(&mut self) {
        self.joined = None;
    }
}

async fn look(
    mut joined: Joined,
    how: impl FnOnce(&mut Joined) -> Result<Change, NetworkError> + Send + 'static,
) -> Looked {
    let looking = tokio::task::spawn_blocking(move || {
        let change = how(&mut joined);
        Looked { joined, change }
    });
    match looking.await {
        Ok(looked) => looked,
        // It does not panic, and the runtime ends with the sandbox.
        Err(_) => std::future::pending().await,
    }
}
