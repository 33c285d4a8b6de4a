//! The network of the guest goes the way of that of its namespace on the host, see [`Follower`](super::Follower).

use super::{Done, Owner};
use crate::{
    agent::AgentError,
    error::chain_text,
    id::Id,
    network::{Link, Resolver},
    sandbox::{Reply, SandboxError, answer, follower::Looked, wire::answers},
};

impl Owner {
    pub(super) fn attach_network(&mut self, container: Id, reply: Reply<()>) {
        match self.network.attach(container) {
            Some(look) => {
                self.calls.spawn(async move { Done::NetworkLooked(look.await, Some(reply)) });
            }
            None => answer(reply, Ok(())),
        }
    }

    pub(super) fn follow_network(&mut self) {
        if let Some(change) = self.network.follow() {
            self.calls.spawn(async move { Done::NetworkLooked(change.await, None) });
        }
    }

    pub(super) fn network_looked(&mut self, looked: Looked, reply: Option<Reply<()>>) {
        let change = match self.network.looked(looked) {
            Ok(Some(change)) => change,
            Ok(None) => return self.network_told(Vec::new(), Ok(()), reply),
            Err(error) => {
                return match reply {
                    Some(reply) => answer(reply, Err(error.into())),
                    None => {
                        let error = chain_text(&error);
                        tracing::warn!(error, "the guest's network does not follow any more");
                    }
                };
            }
        };
        let plugged = self.plug(&change.plugged, change.resolver);
        let mut request = change.request;
        match plugged {
            Ok(port) => request.resolver_port = port,
            Err(error) => return reply.map_or((), |reply| answer(reply, Err(error))),
        }
        let agent = self.agent.clone();
        self.calls.spawn(async move {
            let told = agent.configure_network(&request).await;
            Done::NetworkTold(change.unplugged, told, reply)
        });
    }

    /// Returns the port on which the guest has names looked up.
    fn plug(&self, links: &[(u8, Link)], resolver: Option<Resolver>) -> Result<u32, SandboxError> {
        let vm = self.alive()?;
        for (number, link) in links {
            vm.plug_net(*number, link).map_err(SandboxError::Vm)?;
        }
        answers(vm, resolver).map_err(SandboxError::Vm)
    }

    pub(super) fn network_told(
        &mut self,
        unplugged: Vec<u8>,
        told: Result<(), AgentError>,
        reply: Option<Reply<()>>,
    ) {
        if let Some(vm) = &self.vm {
            // Without it the VM ends, whose death says why.
            unplugged.into_iter().for_each(|number| drop(vm.unplug_net(number)));
        }
        match (reply, told) {
            (Some(reply), told) => self.pass_on(reply, told.map_err(SandboxError::from)),
            (None, Err(error)) => {
                tracing::warn!(%error, "the guest's network is not what the host's is");
            }
            (None, Ok(())) => {}
        }
        self.follow_network();
    }
}
