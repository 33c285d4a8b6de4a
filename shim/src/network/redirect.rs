//! Whatever comes in at an interface goes out at another one: traffic control's `ingress` with a filter that matches
//! everything, and the action `mirred` (tc-mirred(8)).

use std::{io, mem, os::fd::AsFd};

use ampoule_agent_api::netlink::Netlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    tc::{
        TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcActionType,
        TcAttribute, TcFilterMatchAllOption, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
        TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
    },
};
use rustix::net::netdevice::name_to_index;

use super::{Changes, NetworkError, Result, found::Link, passt::Passt, tap::Tap};

/// `ffff:`
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };
/// The filter's priority in the upper half, in the lower one ETH_P_ALL in network order.
const FIRST_FOR_ALL: u32 = 1 << 16 | (libc::ETH_P_ALL as u16).to_be() as u32;

const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;
const CATCH: &str = "catch what comes in (tc)";

/// The interfaces that a guest is joined to, whose frames go back to the namespace when this is dropped. It keeps the
/// namespace alive.
#[derive(Debug)]
pub struct Joined {
    pub(super) netlink: Netlink,
    /// Of the guest's network devices, in their order.
    pub(super) seats: Vec<Seat>,
    /// Those with a filter of ours.
    indexes: Vec<u32>,
    /// What the namespace tells of, if the guest is to follow it.
    pub(super) changes: Option<Changes>,
    _passt: Option<Passt>,
}

/// One of a guest's network devices.
#[derive(Debug)]
pub(super) struct Seat {
    pub tap: String,
    /// What it stands for, if it is in use.
    pub link: Option<Link>,
}

impl Joined {
    /// None yet, in the namespace of this socket.
    pub fn new(netlink: Netlink, changes: Option<Changes>) -> Self {
        Self { netlink, seats: Vec::new(), indexes: Vec::new(), changes, _passt: None }
    }

    /// Adds a device by its tap, and joins that to an interface.
    pub fn add(&mut self, tap: &Tap, link: Option<Link>) -> Result<()> {
        if tap.queues.len() > 1 {
            self.pass_at_once(&tap.name)?;
        }
        if let Some(link) = &link {
            self.join(link, &tap.name)?;
        }
        self.seats.push(Seat { tap: tap.name.clone(), link });
        Ok(())
    }

    /// A tap with several queues could have 256, and the kernel would put a discipline before each of them, 6 MB in all.
    /// It holds nothing back: what waits for the VMM waits in the tap.
    fn pass_at_once(&mut self, tap: &str) -> Result<()> {
        let failed = |source| NetworkError::Interface {
            name: tap.into(),
            what: "leave out its queueing disciplines (tc)",
            source,
        };
        let index = name_to_index(self.netlink.as_fd(), tap).map_err(|e| failed(e.into()))?;
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = TcHandle::ROOT;
        message.attributes = vec![TcAttribute::Kind("noqueue".into())];
        self.netlink.change(libc::RTM_NEWQDISC, NEW, &message).map_err(failed)
    }

    /// Joins an interface and a tap, by its name, in both directions.
    pub(super) fn join(&mut self, link: &Link, tap: &str) -> Result<()> {
        let failed = |what| {
            let name = link.name.clone();
            move |source| NetworkError::Interface { name, what, source }
        };
        let index = name_to_index(self.netlink.as_fd(), tap);
        let index = index.map_err(|e| failed("find its tap")(e.into()))?;
        self.set_up(index, link.mtu).map_err(failed("set up its tap"))?;
        self.catch(index).map_err(failed(CATCH))?;
        self.redirect(index, link.index).map_err(failed("redirect its tap's frames to it (tc)"))?;
        self.catch(link.index).map_err(failed(CATCH))?;
        self.indexes.push(link.index);
        self.redirect(link.index, index).map_err(failed("redirect its frames to its tap (tc)"))
    }

    /// Gives the frames of an interface back to the namespace.
    pub(super) fn leave(&mut self, index: u32) {
        self.indexes.retain(|joined| *joined != index);
        match self.netlink.change(libc::RTM_DELQDISC, 0, &ingress(index)) {
            // The interface has gone, and all that it had with it.
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
                tracing::warn!(index, %error, "an interface keeps the redirection to its tap");
            }
            _ => {}
        }
    }

    /// Undoes a joining, or what has been done of it.
    pub(super) fn part(&mut self, index: u32, tap: &str) {
        if self.indexes.contains(&index) {
            self.leave(index);
        }
        if let Ok(tap) = name_to_index(self.netlink.as_fd(), tap) {
            // It may have none yet.
            let _ = self.netlink.change(libc::RTM_DELQDISC, 0, &ingress(tap));
        }
    }

    /// Keeps what is behind its interfaces as long as them.
    pub fn behind(mut self, passt: Passt) -> Self {
        self._passt = Some(passt);
        self
    }

    /// The tap is to say nothing of its own, as it would by IPv6.
    pub fn set_up(&mut self, tap: u32, mtu: u16) -> io::Result<()> {
        let silent = vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)];
        let mut message = LinkMessage::default();
        message.header.index = tap;
        message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(silent)])];
        match self.netlink.change(libc::RTM_SETLINK, 0, &message) {
            // A kernel without IPv6.
            Err(error) if error.raw_os_error() != Some(libc::EAFNOSUPPORT) => return Err(error),
            _ => {}
        }
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![LinkAttribute::Mtu(mtu.into())];
        self.netlink.change(libc::RTM_SETLINK, 0, &message)
    }

    /// Makes an `ingress`.
    fn catch(&mut self, from: u32) -> io::Result<()> {
        let qdisc = ingress(from);
        match self.netlink.change(libc::RTM_NEWQDISC, NEW, &qdisc) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.clear(from)?;
                self.netlink.change(libc::RTM_NEWQDISC, NEW, &qdisc)
            }
            made => made,
        }
    }

    /// Takes away what a sandbox has left whose shim was killed. What somebody else does there would be without effect: that
    /// is refused.
    fn clear(&mut self, index: u32) -> io::Result<()> {
        let mut all = TcMessage::with_index(index as i32);
        all.header.parent = INGRESS;
        let filters: Vec<TcMessage> = self.netlink.list(libc::RTM_GETTFILTER, &all)?;
        if filters.iter().all(leads_nowhere) {
            self.netlink.change(libc::RTM_DELQDISC, 0, &ingress(index))
        } else {
            Err(io::Error::other("somebody else has filters (tc) for what comes in there"))
        }
    }

    fn redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        let mut done = Ok(());
        for (kind, options) in [("matchall", match_all(to)), ("u32", match_u32(to))] {
            done = self.netlink.change(libc::RTM_NEWTFILTER, NEW, &filter(from, kind, options));
            // Not every kernel has the first one.
            if !matches!(&done, Err(e) if e.raw_os_error() == Some(libc::ENOENT)) {
                break;
            }
        }
        done
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        mem::take(&mut self.indexes).into_iter().for_each(|index| self.leave(index));
    }
}

/// Whether it does no more than a redirection to an interface that has gone.
fn leads_nowhere(filter: &TcMessage) -> bool {
    options(filter).all(|option| match option {
        TcOption::MatchAll(TcFilterMatchAllOption::Action(actions))
        | TcOption::U32(TcFilterU32Option::Action(actions)) => actions.iter().all(is_to_nobody),
        option => matches!(option, TcOption::MatchAll(_) | TcOption::U32(_)),
    })
}

fn options(filter: &TcMessage) -> impl Iterator<Item = &TcOption> {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten()
}

fn is_to_nobody(action: &TcAction) -> bool {
    action.attributes.iter().all(|attribute| match attribute {
        TcActionAttribute::Kind(kind) => kind == "mirred",
        TcActionAttribute::Options(options) => !options.iter().any(|option| {
            matches!(option, TcActionOption::Mirror(TcActionMirrorOption::Parms(to)) if to.ifindex != 0)
        }),
        _ => true,
    })
}

pub(super) fn ingress(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.handle = INGRESS;
    message.header.parent = TcHandle::INGRESS;
    message.attributes = vec![TcAttribute::Kind("ingress".into())];
    message
}

pub(super) fn filter(index: u32, kind: &str, options: Vec<TcOption>) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = INGRESS;
    message.header.info = FIRST_FOR_ALL;
    message.attributes = vec![TcAttribute::Kind(kind.into()), TcAttribute::Options(options)];
    message
}

fn match_all(to: u32) -> Vec<TcOption> {
    vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![redirection(to)]))]
}

/// No bit of the first word has to be anything.
pub(super) fn match_u32(to: u32) -> Vec<TcOption> {
    let mut anything = TcU32Selector::default();
    anything.flags = TcU32SelectorFlags::Terminal;
    anything.nkeys = 1;
    anything.keys = vec![TcU32Key::default()];
    vec![
        TcOption::U32(TcFilterU32Option::Selector(anything)),
        TcOption::U32(TcFilterU32Option::Action(vec![redirection(to)])),
    ]
}

fn redirection(to: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    action
}
