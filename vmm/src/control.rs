//! The control socket once the guest runs: a subscriber of the event loop that turns [`Request`]s into calls
//! of the devices and answers with [`Event`]s. It owns nothing but its share of the devices.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ampoule_vmm_api::{Channel, ChannelError, Event, Request, StopCause};
use event_manager::{EventOps, EventSet, Events as Ready, MutEventSubscriber};

use crate::{
    error::describe,
    events::Events,
    request::check_net,
    stop::StopLatch,
    virtio::{block::Block, net::Net, vsock::Vsock},
};

/// Requests served before the devices get their turn again.
const BATCH: usize = 16;

/// Characters of a failed request that its event repeats.
const REQUEST_NAME: usize = 200;

/// The control socket's seat in the event loop.
pub struct Control {
    pub channel: Arc<Channel>,
    pub events: Events,
    pub latch: StopLatch,
    /// By slot.
    pub disks: Vec<Arc<Mutex<Block>>>,
    pub vsock: Arc<Mutex<Vsock>>,
    /// In the order of the boot request.
    pub nets: Vec<Arc<Mutex<Net>>>,
}

impl Control {
    /// Serves one request if there is one. Returns whether there was.
    fn serve_one(&self) -> bool {
        match self.channel.recv::<Request>() {
            Ok((request, fds)) => {
                self.serve(request, fds);
                true
            }
            Err(e) if e.would_block() => false,
            Err(ChannelError::Closed) => {
                self.latch.raise(StopCause::ShimGone, "");
                false
            }
            Err(e) => {
                self.latch.raise(StopCause::Internal, describe(&e));
                false
            }
        }
    }

    fn serve(&self, request: Request, fds: Vec<OwnedFd>) {
        let name: String = format!("{request:?}").chars().take(REQUEST_NAME).collect();
        match self.execute(request, fds) {
            Ok(Some(answer)) => self.events.send(&answer),
            Ok(None) => {}
            Err(error) => self.events.send(&Event::RequestFailed { request: name, error }),
        }
    }

    fn execute(&self, request: Request, fds: Vec<OwnedFd>) -> Result<Option<Event>, String> {
        match request {
            Request::Boot(_) => Err("the VM runs already".into()),
            Request::Stop => {
                self.latch.raise(StopCause::Requested, "");
                Ok(None)
            }
            Request::ListenVsock { port } => {
                lock(&self.vsock).listen(port, one(fds)?).map_err(|e| describe(&e))?;
                Ok(None)
            }
            Request::ConnectVsock { port } => {
                lock(&self.vsock).connect(port, one(fds)?).map_err(|e| describe(&e))?;
                Ok(None)
            }
            Request::AttachDisk { slot, disk } => {
                self.disk(slot)?.attach(&disk, one(fds)?).map_err(|e| describe(&e))?;
                Ok(Some(Event::DiskAttached { slot }))
            }
            Request::DetachDisk { slot } => {
                self.disk(slot)?.detach().map_err(|e| describe(&e))?;
                Ok(Some(Event::DiskDetached { slot }))
            }
            Request::PlugNet { number, mac, mtu } => {
                check_net(mac, mtu).map_err(|e| describe(&e))?;
                self.net(number)?.plug(mac, mtu);
                Ok(None)
            }
            Request::UnplugNet { number } => {
                self.net(number)?.unplug();
                Ok(None)
            }
        }
    }

    fn disk(&self, slot: u8) -> Result<MutexGuard<'_, Block>, String> {
        let disk =
            self.disks.get(usize::from(slot)).ok_or_else(|| format!("there is no slot {slot}"))?;
        Ok(lock(disk))
    }

    fn net(&self, number: u8) -> Result<MutexGuard<'_, Net>, String> {
        let net = self.nets.get(usize::from(number));
        Ok(lock(net.ok_or_else(|| format!("there is no network device {number}"))?))
    }
}

impl MutEventSubscriber for Control {
    fn process(&mut self, _: Ready, _: &mut EventOps) {
        for _ in 0..BATCH {
            if !self.serve_one() {
                break;
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Ready::new_raw(self.channel.as_fd().as_raw_fd(), EventSet::IN)) {
            self.latch.raise(StopCause::Internal, format!("the control socket: {e}"));
        }
    }
}

fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd, String> {
    let count = fds.len();
    match <[OwnedFd; 1]>::try_from(fds) {
        Ok([fd]) => Ok(fd),
        Err(_) => Err(format!("{count} descriptors instead of 1")),
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;

    use ampoule_vmm_api::DiskConfig;

    use super::*;

    fn control() -> (Channel, Control) {
        let (shim, vmm) = Channel::pair().unwrap();
        let channel = Arc::new(vmm);
        let spare = Block::new(&DiskConfig { id: String::new(), read_only: false }, None).unwrap();
        let control = Control {
            events: Events::new(channel.clone()),
            channel,
            latch: StopLatch::new().unwrap(),
            disks: vec![Arc::new(Mutex::new(spare))],
            vsock: Arc::new(Mutex::new(Vsock::new(3).unwrap())),
            nets: vec![],
        };
        (shim, control)
    }

    /// The answer to one request.
    fn ask(request: Request, fds: &[BorrowedFd<'_>]) -> (Option<Event>, Control) {
        let (shim, control) = control();
        shim.send(&request, fds).unwrap();
        assert!(control.serve_one());
        assert!(!control.serve_one());
        (shim.recv().ok().map(|(event, _)| event), control)
    }

    fn attach(slot: u8) -> Request {
        Request::AttachDisk { slot, disk: DiskConfig { id: "scratch".into(), read_only: false } }
    }

    #[test]
    fn disks_come_and_go() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let (shim, control) = control();
        for (request, answer) in [
            (attach(0), Event::DiskAttached { slot: 0 }),
            (Request::DetachDisk { slot: 0 }, Event::DiskDetached { slot: 0 }),
            (attach(0), Event::DiskAttached { slot: 0 }),
        ] {
            let fds = [file.as_fd()];
            let fds = if matches!(request, Request::AttachDisk { .. }) { &fds[..] } else { &[] };
            shim.send(&request, fds).unwrap();
            assert!(control.serve_one());
            assert_eq!(shim.recv::<Event>().unwrap().0, answer);
        }
    }

    #[test]
    fn what_cannot_be_done_is_answered_and_ends_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let fd = file.as_fd();
        for (request, fds, reason) in [
            (attach(1), &[fd][..], "there is no slot 1"),
            (attach(0), &[], "0 descriptors instead of 1"),
            (attach(0), &[fd, fd], "2 descriptors instead of 1"),
            (Request::DetachDisk { slot: 0 }, &[], "the slot has no disk"),
            (Request::DetachDisk { slot: 255 }, &[], "there is no slot 255"),
            (Request::ListenVsock { port: 1 }, &[], "0 descriptors instead of 1"),
            (Request::ConnectVsock { port: 1 }, &[], "0 descriptors instead of 1"),
            (
                Request::PlugNet { number: 0, mac: [2; 6], mtu: 1500 },
                &[],
                "there is no network device 0",
            ),
            (Request::UnplugNet { number: 1 }, &[], "there is no network device 1"),
        ] {
            let (answer, control) = ask(request.clone(), fds);
            let Some(Event::RequestFailed { error, .. }) = answer else {
                panic!("{request:?} was answered by {answer:?}")
            };
            assert_eq!(error, reason, "{request:?}");
            assert_eq!(control.latch.raised(), None);
        }
    }

    #[test]
    fn a_stop_and_the_end_of_the_shim_end_the_vm() {
        let (answer, control) = ask(Request::Stop, &[]);
        assert_eq!(answer, None);
        assert_eq!(control.latch.raised().unwrap().cause, StopCause::Requested);
        let (shim, control) = self::control();
        drop(shim);
        assert!(!control.serve_one());
        assert_eq!(control.latch.raised().unwrap().cause, StopCause::ShimGone);
    }

    #[test]
    fn a_request_that_cannot_be_read_ends_the_vm() {
        let (shim, control) = control();
        shim.send(&[0xffu8; 32], &[]).unwrap();
        assert!(!control.serve_one());
        assert_eq!(control.latch.raised().unwrap().cause, StopCause::Internal);
    }
}
