//! The namespaces by which others find a container. They look for those of the process that stands for it, and these are
//! of its first thread, which does nothing else than stand in them. All work is done by a second thread that stays on
//! the host, where the VMM, hooks and files belong.

use std::{
    io,
    panic::resume_unwind,
    sync::mpsc::channel,
    thread::{self, Builder},
};

use super::{
    OciError, Result, network,
    view::{self, View},
};
use crate::task::HostNetwork;

/// Enters the namespaces with this thread, the only one, and then does `work` with another one.
pub fn stand_in<T: Send>(
    wanted: &HostNetwork,
    work: impl FnOnce(Option<View>) -> Result<T> + Send,
) -> Result<T> {
    let (entered, begin) = channel();
    thread::scope(|scope| {
        // There is nothing to do if we do not come to stand there.
        let worker = Builder::new()
            .name("keeper".into())
            .spawn_scoped(scope, move || begin.recv().map_or(Err(OciError::Interrupted), work));
        let worker = worker.map_err(failed)?;
        let stands = network::enter(wanted).and_then(|()| view::cover()).map(|view| {
            let _ = entered.send(view);
        });
        drop(entered);
        let worked = worker.join().unwrap_or_else(|panic| resume_unwind(panic));
        stands.and(worked)
    })
}

fn failed(error: io::Error) -> OciError {
    OciError::Host("start a thread", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_only_where_the_namespaces_are_entered() {
        let refused = stand_in(&HostNetwork::Host, |_| -> Result<()> { panic!("no work") });
        assert!(matches!(refused, Err(OciError::Network(..))), "{refused:?}");
    }
}
