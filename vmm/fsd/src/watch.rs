//! What the host changes in the directories that the guest knows, told as hints.
//!
//! An fanotify group without privileges is told of all changes, and whether this process made them: those are the
//! guest's, who knows. A mark goes with the directory's node.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ampoule_fsd_api::message::{Change, Hint};
use ampoule_vmm_api::{Channel, ChannelError};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{CWD, fstatfs, readlinkat},
    io::Errno,
};

use crate::{nodes::Node, server::Server};

/// Things worth telling. Nobody is told of a file that was only read.
const EVENTS: u64 = libc::FAN_CREATE
    | libc::FAN_DELETE
    | libc::FAN_MOVED_FROM
    | libc::FAN_MOVED_TO
    | libc::FAN_MODIFY
    | libc::FAN_CLOSE_WRITE
    | libc::FAN_ATTRIB
    | libc::FAN_EVENT_ON_CHILD
    | libc::FAN_ONDIR;

/// Of marks: they keep no inode in the host's memory.
const FAN_MARK_EVICTABLE: libc::c_uint = 0x200;
/// struct fanotify_event_metadata, struct fanotify_event_info_header with the file system's id, and the two numbers
/// before a handle.
const METADATA: usize = 24;
const INFO: usize = 12;
const HANDLE: usize = 8;
/// MAX_HANDLE_SZ of Linux.
const MAX_HANDLE: usize = 128;

/// A file, by its file system and its handle there: as events name it.
type Key = Vec<u8>;

/// An fanotify group, and which directories it is about.
#[derive(Debug)]
pub struct Watch {
    group: OwnedFd,
    known: Mutex<HashMap<Key, Vec<u64>>>,
}

impl Watch {
    pub fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_REPORT_DIR_FID
            | libc::FAN_REPORT_NAME;
        // SAFETY: takes numbers; the descriptor is new, and nobody else's.
        let group = unsafe {
            match libc::fanotify_init(flags, libc::O_RDONLY as u32) {
                -1 => return Err(io::Error::last_os_error()),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        Ok(Self { group, known: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Vec<u64>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on; where the file system has no handles, not.
    pub fn add(&self, id: u64, node: &Node) {
        if !node.is_dir() {
            return;
        }
        let Ok(key) = key(node) else { return };
        if self.mark(libc::FAN_MARK_ADD | FAN_MARK_EVICTABLE, node).is_ok() {
            self.lock().entry(key).or_default().push(id);
        }
    }

    pub fn remove(&self, id: u64, node: &Node) {
        let Some(key) = node.is_dir().then(|| key(node).ok()).flatten() else { return };
        let mut known = self.lock();
        let Some(ids) = known.get_mut(&key) else { return };
        ids.retain(|known| *known != id);
        if ids.is_empty() {
            known.remove(&key);
            let _ = self.mark(libc::FAN_MARK_REMOVE, node);
        }
    }

    /// Those still known; the marks of others are told nobody, and go with the host's memory of the directory.
    pub fn keep(&self, known: impl Fn(u64) -> bool) {
        self.lock().retain(|_, ids| {
            ids.retain(|id| known(*id));
            !ids.is_empty()
        });
    }

    /// None of them any more.
    pub fn clear(&self) {
        self.lock().clear();
        // SAFETY: takes numbers; without a path.
        unsafe {
            libc::fanotify_mark(
                self.group.as_raw_fd(),
                libc::FAN_MARK_FLUSH,
                0,
                libc::AT_FDCWD,
                std::ptr::null(),
            )
        };
    }

    fn mark(&self, how: libc::c_uint, node: &Node) -> io::Result<()> {
        let name = node.name();
        // SAFETY: a NUL-terminated name, which outlives the call.
        let result = unsafe {
            libc::fanotify_mark(
                self.group.as_raw_fd(),
                how | libc::FAN_MARK_ONLYDIR,
                EVENTS,
                libc::AT_FDCWD,
                name.as_c_str().as_ptr(),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Tells until nobody listens. Who does not listen in time finds that changes were lost: the kernel keeps 16,384.
pub fn tell(server: &Server, hints: &Channel) {
    let Some(watch) = server.watch.get() else { return };
    let mut buffer = vec![0; 64 << 10];
    loop {
        let events = match rustix::io::read(&watch.group, &mut buffer[..]) {
            Err(Errno::INTR) => continue,
            Err(_) | Ok(0) => return,
            Ok(length) => &buffer[..length],
        };
        for hint in Events(events).flat_map(|event| event.hints(server, watch)) {
            if send(hints, &hint).is_err() {
                return;
            }
        }
    }
}

fn send(hints: &Channel, hint: &Hint) -> Result<(), ChannelError> {
    loop {
        match hints.send(hint, &[]) {
            Err(e) if e.would_block() => {}
            sent => return sent,
        }
        match poll(&mut [PollFd::new(hints, PollFlags::OUT)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(ChannelError::Io(e.into())),
        }
    }
}

/// The events of one read. They are the host kernel's, but nothing is taken for granted.
struct Events<'a>(&'a [u8]);

struct Event<'a> {
    mask: u64,
    /// Whether this process did it.
    own: bool,
    info: &'a [u8],
}

impl<'a> Iterator for Events<'a> {
    type Item = Event<'a>;

    fn next(&mut self) -> Option<Event<'a>> {
        let length = number(self.0, 0)? as usize;
        let (event, rest) = self.0.split_at_checked(length.max(METADATA))?;
        self.0 = rest;
        let mask = u64::from_ne_bytes(event.get(8..16)?.try_into().ok()?);
        Some(Event { mask, own: number(event, 20)? != 0, info: &event[METADATA..] })
    }
}

impl Event<'_> {
    fn hints(&self, server: &Server, watch: &Watch) -> Vec<Hint> {
        if self.mask & libc::FAN_Q_OVERFLOW != 0 {
            return vec![Hint::Lost];
        }
        match self.place() {
            Some((key, name)) if !self.own => {
                let ids = watch.lock().get(key).cloned().unwrap_or_default();
                let nodes = ids.into_iter().filter_map(|id| server.nodes.find(id).ok());
                nodes.filter_map(|node| self.hint(&node, name)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Which directory, and which entry of it.
    fn place(&self) -> Option<(&[u8], &[u8])> {
        let handle = number(self.info, INFO)? as usize;
        let (place, name) = self.info.split_at_checked(INFO + HANDLE + handle)?;
        let name = name.split(|byte| *byte == 0).next()?;
        // Of the directory itself its own entry tells.
        (name != b".").then_some((&place[4..], name))
    }

    fn hint(&self, node: &Arc<Node>, name: &[u8]) -> Option<Hint> {
        let did = |events| self.mask & events != 0;
        Some(Hint::Changed(Change {
            share: node.share(),
            directory: readlinkat(CWD, node.name(), Vec::new()).ok()?.into_bytes(),
            name: name.to_vec(),
            is_dir: did(libc::FAN_ONDIR),
            created: did(libc::FAN_CREATE | libc::FAN_MOVED_TO),
            deleted: did(libc::FAN_DELETE | libc::FAN_MOVED_FROM),
            written: did(libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE),
            attributes: did(libc::FAN_ATTRIB),
        }))
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// As an event names it: the file system's id, the handle's length and type, the handle.
fn key(node: &Node) -> io::Result<Key> {
    let mut handle = [0u8; HANDLE + MAX_HANDLE];
    handle[..4].copy_from_slice(&(MAX_HANDLE as u32).to_ne_bytes());
    let mut mount = 0;
    let name = node.name();
    // SAFETY: the name is NUL-terminated, and the handle has as much room as it says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            name.as_c_str().as_ptr(),
            handle.as_mut_ptr(),
            &raw mut mount,
            libc::AT_SYMLINK_FOLLOW,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let length = number(&handle, 0).unwrap_or(0) as usize;
    let id = fstatfs(node)?.f_fsid;
    // SAFETY: two numbers without padding, of which the bytes are read.
    let id: [u8; 8] = unsafe { std::mem::transmute(id) };
    Ok([&id, &handle[..HANDLE + length.min(MAX_HANDLE)]].concat())
}
