//! What the host changes in the directories that the guest knows, and in files that are shared alone, told as hints.
//!
//! An fanotify group without privileges is told of all changes, and whether this process made them: those are the
//! guest's, who knows. A mark goes with the node.
//!
//! Who in the guest watches is only known there. So a directory costs a mark when the guest first looks at it, which
//! none is late for, and nothing further until the host changes something in it.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ampoule_fsd_api::message::{Change, Hint, Moved, Place};
use ampoule_vmm_api::{Channel, ChannelError};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::fstatfs,
    io::Errno,
};

use crate::{nodes::Node, server::Server};

/// Things worth telling of a directory's entries. Nobody is told of a file that was only read.
const EVENTS: u64 = libc::FAN_CREATE
    | libc::FAN_DELETE
    | FAN_RENAME
    | CONTENT
    | libc::FAN_EVENT_ON_CHILD
    | libc::FAN_ONDIR;
/// And of a file.
const CONTENT: u64 = libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE | libc::FAN_ATTRIB;
/// With both names, where both are of marked directories.
const FAN_RENAME: u64 = 0x1000_0000;

/// Of marks: they keep no inode in the host's memory.
const FAN_MARK_EVICTABLE: libc::c_uint = 0x200;
/// struct fanotify_event_metadata, struct fanotify_event_info_header, the file system's id, and the two numbers before a
/// handle.
const METADATA: usize = 24;
const HEADER: usize = 4;
const SYSTEM: usize = 8;
const HANDLE: usize = 8;
/// FAN_EVENT_INFO_TYPE_*: what is told of. A file, an entry of a directory, that before and that after a rename.
const FILE: u8 = 1;
const ENTRY: u8 = 2;
const OLD_ENTRY: u8 = 10;
const NEW_ENTRY: u8 = 12;
/// MAX_HANDLE_SZ of Linux.
const MAX_HANDLE: usize = 128;

/// A file, by its file system and its handle there: as events name it.
type Key = Arc<[u8]>;

/// An fanotify group, and which directories and files it is about.
#[derive(Debug)]
pub struct Watch {
    group: OwnedFd,
    known: Mutex<Known>,
}

/// Which of the guest's numbers mean which file: several, if it is in several shares.
#[derive(Debug, Default)]
struct Known {
    by_key: HashMap<Key, Vec<u64>>,
    by_id: HashMap<u64, Key>,
}

impl Known {
    fn enter(&mut self, key: Key, id: u64) {
        self.by_key.entry(key.clone()).or_default().push(id);
        self.by_id.insert(id, key);
    }

    /// Whether nothing else means that file any more.
    fn remove(&mut self, id: u64) -> bool {
        let Some(key) = self.by_id.remove(&id) else { return false };
        let Some(ids) = self.by_key.get_mut(&key) else { return false };
        ids.retain(|known| *known != id);
        let last = ids.is_empty();
        if last {
            self.by_key.remove(&key);
        }
        last
    }
}

impl Watch {
    pub fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_REPORT_FID
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

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A directory's entries, or a file that is shared alone, from now on; where the file system has no handles, not.
    pub fn add(&self, id: u64, node: &Node) {
        let Ok(key) = key(node) else { return };
        if self.mark(libc::FAN_MARK_ADD | FAN_MARK_EVICTABLE, node).is_ok() {
            self.lock().enter(key, id);
        }
    }

    pub fn remove(&self, id: u64, node: &Node) {
        let mut known = self.lock();
        if known.remove(id) {
            let _ = self.mark(libc::FAN_MARK_REMOVE, node);
        }
    }

    /// Those still known; the marks of others are told nobody, and go with the host's memory of the directory.
    pub fn keep(&self, known: impl Fn(u64) -> bool) {
        let mut watched = self.lock();
        let gone: Vec<_> = watched.by_id.keys().copied().filter(|id| !known(*id)).collect();
        for id in gone {
            watched.remove(id);
        }
    }

    /// None of them any more.
    pub fn clear(&self) {
        *self.lock() = Known::default();
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
        let events = if node.is_dir() { EVENTS } else { CONTENT };
        // SAFETY: a NUL-terminated name, which outlives the call.
        let result = unsafe {
            libc::fanotify_mark(
                self.group.as_raw_fd(),
                how,
                events,
                libc::AT_FDCWD,
                name.as_c_str().as_ptr(),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Tells until nobody listens. Who does not listen in time finds that changes were lost: the kernel keeps 16,384.
pub fn tell(server: &Server) {
    let (Some(watch), Some(hints)) = (server.watch.get(), server.hints.get()) else { return };
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
        if self.own {
            return Vec::new();
        }
        let records: Vec<_> = Records(self.info).collect();
        let places = |kind| {
            let record = records.iter().find(|record: &&Record<'_>| record.kind == kind);
            record.map(|record| record.places(server, watch)).unwrap_or_default()
        };
        if self.did(FAN_RENAME) {
            return self.moved(places(OLD_ENTRY), places(NEW_ENTRY));
        }
        let changed = [places(ENTRY), places(FILE)].concat().into_iter();
        changed.map(|place| Hint::Changed(self.change(place))).collect()
    }

    fn did(&self, events: u64) -> bool {
        self.mask & events != 0
    }

    fn change(&self, place: Place) -> Change {
        Change {
            place,
            is_dir: self.did(libc::FAN_ONDIR),
            created: self.did(libc::FAN_CREATE),
            deleted: self.did(libc::FAN_DELETE),
            written: self.did(libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE),
            attributes: self.did(libc::FAN_ATTRIB),
        }
    }

    /// Within each share.
    fn moved(&self, old: Vec<Place>, mut new: Vec<Place>) -> Vec<Hint> {
        let is_dir = self.did(libc::FAN_ONDIR);
        let mut hints = Vec::new();
        for from in old {
            hints.push(match new.iter().position(|to| to.share == from.share) {
                Some(n) => Hint::Moved(Moved { from, to: new.swap_remove(n), is_dir }),
                None => {
                    let deleted =
                        Change { place: from, is_dir, deleted: true, ..Change::default() };
                    Hint::Changed(deleted)
                }
            });
        }
        let created = |place| Change { place, is_dir, created: true, ..Change::default() };
        hints.extend(new.into_iter().map(created).map(Hint::Changed));
        hints
    }
}

/// What an event is about.
struct Records<'a>(&'a [u8]);

struct Record<'a> {
    kind: u8,
    key: &'a [u8],
    name: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        let length = u16::from_ne_bytes(self.0.get(2..HEADER)?.try_into().ok()?);
        let (record, rest) = self.0.split_at_checked((length as usize).max(HEADER))?;
        self.0 = rest;
        let handle = number(record, HEADER + SYSTEM)? as usize;
        let (key, name) = record[HEADER..].split_at_checked(SYSTEM + HANDLE + handle)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Record { kind: record[0], key, name })
    }
}

impl Record<'_> {
    /// Where the guest knows it.
    fn places(&self, server: &Server, watch: &Watch) -> Vec<Place> {
        // Of a directory itself its own entry tells.
        if self.name == b"." {
            return Vec::new();
        }
        let ids = watch.lock().by_key.get(self.key).cloned().unwrap_or_default();
        let nodes = ids.into_iter().filter_map(|id| Some((id, server.nodes.find(id).ok()?)));
        let told = nodes.filter(|(_, node)| node.is_dir() == (self.kind != FILE));
        let place = |(id, node): (u64, Arc<Node>)| Place {
            share: node.share(),
            node: id,
            name: self.name.to_vec(),
        };
        told.map(place).collect()
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
    Ok([&id, &handle[..HANDLE + length.min(MAX_HANDLE)]].concat().into())
}
