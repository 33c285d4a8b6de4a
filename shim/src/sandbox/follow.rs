//! What the host changes in a sandbox's shares, from the file server's hints to the agent, who tells whoever watches; and
//! that the guest is to forget files that it does not use.
//!
//! Nothing is kept but one request of [`MOST`] changes at most: as long as the agent works on it, or is left alone,
//! hints wait in their socket, then in the kernel's queue of the file server, which says when it has lost some. So the
//! agent is asked at most every half second as long as nobody watches and there is room, else not more than half of the time.
//!
//! A hint is made by a process that a guest may have taken over, for the guest: nothing here is decided from it.

use std::{collections::HashMap, time::Duration};

use ampoule_agent_api::agent::{FollowRequest, follow_request};
use ampoule_fsd_api::{Change, Hint, Moved, Place};
use ampoule_vmm_api::{Channel, ChannelError};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, sleep},
};

use crate::agent::{Agent, AgentError, Code};

/// Changes of one request, which the agent is to be done with well within its limit.
const MOST: usize = 64;
/// Several things that happen to a file at once are told as one.
const GATHER: Duration = Duration::from_millis(10);
/// Between two requests.
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(500);

/// Until there are no hints any more, or nobody to tell.
pub(super) async fn follow(hints: AsyncFd<Channel>, agent: Agent) {
    let mut request = Request::default();
    while let Ok(hint) = next(&hints).await {
        request.add(hint);
        sleep(GATHER).await;
        while request.has_room()
            && let Ok((hint, _)) = hints.get_ref().recv()
        {
            request.add(hint);
        }
        let begun = Instant::now();
        let message = std::mem::take(&mut request).message;
        let pause = match agent.follow(&message).await {
            // What waits for room is not to wait for long.
            Ok(watched) if watched || message.crowded => begun.elapsed().clamp(SHORTEST, LONGEST),
            Ok(_) => LONGEST,
            Err(AgentError::Disconnected { .. }) => return,
            Err(AgentError::Refused { code: Code::UNIMPLEMENTED, .. }) => {
                tracing::warn!("the agent of this guest image tells nobody what the host changes");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "changes of shared files were not told");
                request.message.lost = true;
                LONGEST
            }
        };
        sleep(pause).await;
    }
}

async fn next(hints: &AsyncFd<Channel>) -> Result<Hint, ChannelError> {
    loop {
        let mut ready = hints.readable().await.map_err(ChannelError::Io)?;
        match ready.get_inner().recv() {
            Ok((hint, _)) => return Ok(hint),
            Err(e) if e.would_block() => ready.clear_ready(),
            Err(e) => return Err(e),
        }
    }
}

/// A request in the making.
#[derive(Debug, Default)]
struct Request {
    message: FollowRequest,
    /// Where an entry is told of already.
    told: HashMap<Place, usize>,
}

impl Request {
    fn has_room(&self) -> bool {
        self.message.changes.len() < MOST
    }

    fn add(&mut self, hint: Hint) {
        match hint {
            Hint::Changed(change) => self.changed(change),
            Hint::Moved(moved) => self.moved(moved),
            Hint::Lost => self.message.lost = true,
            Hint::Crowded => self.message.crowded = true,
        }
    }

    fn changed(&mut self, change: Change) {
        let changes = &mut self.message.changes;
        let n = *self.told.entry(change.place.clone()).or_insert(changes.len());
        if n == changes.len() {
            changes.push(follow_request::Change {
                place: Some(place(change.place)).into(),
                ..Default::default()
            });
        }
        let told = &mut changes[n];
        told.directory = change.is_dir;
        told.created |= change.created;
        told.deleted |= change.deleted;
        told.written |= change.written;
        told.attributes |= change.attributes;
    }

    /// What happens to either name later is not what happened before.
    fn moved(&mut self, moved: Moved) {
        self.told.clear();
        self.message.changes.push(follow_request::Change {
            place: Some(place(moved.from)).into(),
            moved_to: Some(place(moved.to)).into(),
            directory: moved.is_dir,
            ..Default::default()
        });
    }
}

fn place(place: Place) -> follow_request::Place {
    let Place { share, node, name } = place;
    follow_request::Place { share, node, name, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> Place {
        Place { share: 1, node: 7, name: name.into() }
    }

    fn written(name: &str) -> Hint {
        Hint::Changed(Change { place: place(name), written: true, ..Change::default() })
    }

    #[test]
    fn several_things_that_happen_to_an_entry_are_told_as_one_until_it_moves() {
        let mut request = Request::default();
        let created = Change { place: place("a"), created: true, ..Change::default() };
        request.add(Hint::Changed(created));
        request.add(written("b"));
        request.add(written("a"));
        request.add(Hint::Moved(Moved { from: place("a"), to: place("b"), is_dir: false }));
        request.add(written("b"));
        let told = request.message.changes.iter();
        let told: Vec<_> = told
            .map(|change| {
                let to = change.moved_to.as_ref().map_or(&b""[..], |to| &to.name);
                (&change.place.name[..], change.created, change.written, to)
            })
            .collect();
        let expected: [(&[u8], bool, bool, &[u8]); 4] = [
            (b"a", true, true, b""),
            (b"b", false, true, b""),
            (b"a", false, false, b"b"),
            (b"b", false, true, b""),
        ];
        assert_eq!(told, expected);
        assert!(!request.message.lost);
    }

    #[test]
    fn a_request_has_an_end_and_a_loss_is_told() {
        let mut request = Request::default();
        for n in 0..10 * MOST {
            if request.has_room() {
                request.add(written(&n.to_string()));
            }
        }
        request.add(Hint::Lost);
        request.add(Hint::Crowded);
        let Request { message, .. } = request;
        assert_eq!((message.changes.len(), message.lost, message.crowded), (MOST, true, true));
    }
}
