//! What comes and goes in a namespace while its guest runs, as by `docker network connect`.

use std::{collections::HashSet, fs::File, io, mem, os::fd::OwnedFd, time::Duration};

use ampoule_agent_api::agent::ConfigureNetworkRequest;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv,
        socket_with,
    },
};
use tokio::time::sleep;

use super::{Joined, Link, NetworkError, Resolver, Result, found::Found, inside, redirect::Seat};
use crate::{error::chain_text, vm::watch};

/// Of links, addresses and routes (rtnetlink(7)).
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE;
/// Changes come in groups: after the first one so long is waited for the others.
const SETTLES: Duration = Duration::from_millis(100);
/// Messages that are passed over at a time: whoever makes them makes no end of them.
const MAX_PASSED: usize = 4096;

/// What the kernel tells of a namespace, and what of it has been told on.
#[derive(Debug)]
pub struct Changes {
    socket: OwnedFd,
    namespace: File,
    /// The guest has names looked up there.
    resolves: bool,
    /// Refused interfaces that were logged.
    refused: HashSet<String>,
}

impl Changes {
    /// Of this thread's namespace, from now on.
    pub fn listen() -> Result<Self> {
        let failed = |e: Errno| NetworkError::Host("listen for the network's changes", e.into());
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None);
        let socket = socket.map_err(failed)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS as u32)).map_err(failed)?;
        let namespace = File::open("/proc/thread-self/ns/net");
        let namespace =
            namespace.map_err(|e| NetworkError::Host("look at the network namespace", e))?;
        Ok(Self { socket, namespace, resolves: false, refused: HashSet::new() })
    }

    /// A server of names that has not been found before.
    pub fn resolver(&mut self) -> Option<Resolver> {
        if self.resolves {
            return None;
        }
        let found = inside(&self.namespace, || Ok(Resolver::find())).ok().flatten();
        self.resolves = found.is_some();
        found
    }

    /// Waits for some, then for the end of them.
    pub(super) async fn come(&self) -> io::Result<()> {
        let socket = watch(self.socket.try_clone()?)?;
        drop(socket.readable().await?);
        sleep(SETTLES).await;
        self.pass_over();
        Ok(())
    }

    /// What they say is found out by looking.
    fn pass_over(&self) {
        let mut message = [0; 16];
        // Too many of them are an error, once. What is left is a change of its own.
        for _ in 0..MAX_PASSED {
            if recv(&self.socket, &mut message, RecvFlags::empty()) == Err(Errno::AGAIN) {
                break;
            }
        }
    }

    /// Logs it, once for each interface as long as it stays.
    fn refuse(&mut self, refused: &[NetworkError]) {
        let texts: HashSet<_> = refused.iter().map(|error| chain_text(error)).collect();
        for error in texts.difference(&self.refused) {
            tracing::warn!(error, "the guest does not get an interface that came");
        }
        self.refused = texts;
    }
}

/// What a guest is to be told.
#[derive(Debug, Default)]
pub struct Change {
    /// Devices that it is to find, by their numbers.
    pub plugged: Vec<(u8, Link)>,
    /// And those that it has no more, which are not among the others.
    pub unplugged: Vec<u8>,
    /// All that there is now.
    pub request: ConfigureNetworkRequest,
    /// If there is one now.
    pub resolver: Option<Resolver>,
}

impl Joined {
    /// Whether the guest is to be told what changes.
    pub fn follows(&self) -> bool {
        self.changes.is_some() && !self.seats.is_empty()
    }

    /// Waits for a change.
    pub async fn changes(&self) -> io::Result<()> {
        match &self.changes {
            Some(changes) => changes.come().await,
            None => std::future::pending().await,
        }
    }

    /// Joins what has come, as far as there are devices, and leaves what has gone; what cannot be joined is logged. Blocks,
    /// for milliseconds.
    pub fn follow(&mut self) -> Result<Change> {
        let (change, refused) = self.look()?;
        if let Some(changes) = &mut self.changes {
            changes.refuse(&refused);
        }
        Ok(change)
    }

    /// Likewise, but everything can be joined.
    pub fn follow_all(&mut self) -> Result<Change> {
        let (change, refused) = self.look()?;
        refused.into_iter().next().map_or(Ok(change), Err)
    }

    fn look(&mut self) -> Result<(Change, Vec<NetworkError>)> {
        let found = Found::look(&mut self.netlink)?;
        let taps: Vec<_> = self.seats.iter().map(|seat| &*seat.tap).collect();
        let (mut links, mut refused) = (Vec::new(), Vec::new());
        for link in found.links(&taps) {
            match link {
                Ok(link) => links.push(link),
                Err(error) => refused.push(error),
            }
        }
        let left = self.leave_all_but(&links);
        let mut plugged = Vec::new();
        for link in links {
            if self.seat(&link).is_some() {
                continue;
            }
            match self.take_seat(&link) {
                Ok(number) => plugged.push((number, link)),
                Err(error) => refused.push(error),
            }
        }
        let links: Vec<_> = self.seats.iter().filter_map(|seat| seat.link.clone()).collect();
        for (_, gone) in left.iter().filter(|(_, gone)| !links.iter().any(|l| l.name == gone.name))
        {
            let interface = &gone.name;
            tracing::info!(
                interface,
                "the guest has an interface no more: on the host it has gone, or is down"
            );
        }
        let mut unplugged: Vec<_> = left.into_iter().map(|(number, _)| number).collect();
        unplugged.retain(|gone| !plugged.iter().any(|(number, _)| number == gone));
        let request = found.request(&links);
        let resolver = self.changes.as_mut().and_then(Changes::resolver);
        Ok((Change { plugged, unplugged, request, resolver }, refused))
    }

    /// Returns the devices that stand for nothing any more, and what they stood for.
    fn leave_all_but(&mut self, links: &[Link]) -> Vec<(u8, Link)> {
        let mut seats = mem::take(&mut self.seats);
        let mut left = Vec::new();
        for (number, seat) in (0..).zip(&mut seats) {
            let stays = |link: &mut Link| links.iter().any(|other| other.is_same(link));
            if let Some(link) = seat.link.take_if(|link| !stays(link)) {
                self.part(link.index, &seat.tap);
                left.push((number, link));
            }
        }
        self.seats = seats;
        left
    }

    fn seat(&self, link: &Link) -> Option<&Seat> {
        self.seats.iter().find(|seat| seat.link.as_ref().is_some_and(|own| own.is_same(link)))
    }

    /// Joins an interface to the first device that is free, and has its tap still.
    fn take_seat(&mut self, link: &Link) -> Result<u8> {
        let mut failed = None;
        for number in 0..self.seats.len() {
            if self.seats[number].link.is_some() {
                continue;
            }
            let tap = self.seats[number].tap.clone();
            match self.join(link, &tap) {
                Ok(()) => {
                    self.seats[number].link = Some(link.clone());
                    return Ok(number as u8);
                }
                Err(error) => {
                    self.part(link.index, &tap);
                    failed = Some(error);
                }
            }
        }
        Err(failed.unwrap_or_else(|| self.no_room(link)))
    }

    fn no_room(&self, link: &Link) -> NetworkError {
        let why = format!(
            "it came after the VM was booted, which has {} network devices and each in use: let who boots it find it \
             there (a CRI pod, a hook createRuntime, a namespace with a path), or take another one away",
            self.seats.len()
        );
        NetworkError::Refused { name: link.name.clone(), why }
    }
}
