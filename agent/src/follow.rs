//! What the host changes in its shares, told to whoever watches them in the guest with inotify(7).
//!
//! The guest's kernel knows only of what is done through it. So each change is repeated through it, as one of the
//! groups [`replay`](ampoule_vmm_api::guest::replay), for which the file server does nothing on the host and answers
//! as if it had ([`repeat`]). Repeated is only what somebody watches ([`watched`]): who that is, is looked up whenever
//! the host has changed something, and costs nothing as long as it does not.
//!
//! What changed is told by the file server, which a guest may have taken over. All that it can bring about are
//! operations on its own file system, below directories found by the numbers it has given them itself: no path of its
//! choice is walked, no link followed, and a name is one component.

mod repeat;
mod watched;

use std::{
    collections::HashMap,
    ffi::CString,
    fs,
    os::fd::OwnedFd,
    rc::Rc,
    sync::{LazyLock, Mutex, PoisonError, TryLockError},
};

use ampoule_agent_api::agent::{
    FollowRequest,
    follow_request::{Change, Place},
};
use rustix::{
    fs::{AtFlags, Dir, OFlags, StatxFlags, statx},
    io::{Errno, Result},
};

use crate::{
    plan::{StepError, refuse},
    share::{Share, remember},
};
use watched::{Places, Watched};

/// Entries that are told as changed when nobody knows what was.
const MOST_UNKNOWN: usize = 4096;

/// Documentation/admin-guide/sysctl/vm.rst of Linux: names and files, not what is in files.
const CACHES: &str = "/proc/sys/vm/drop_caches";
const NAMES: &str = "2";

/// Held by the one call there is.
static PLACES: LazyLock<Mutex<Places>> = LazyLock::new(Mutex::default);

/// Tells of all changes; says whether anything is watched. Blocks for as long as the file server does.
pub fn tell(request: &FollowRequest) -> std::result::Result<bool, StepError> {
    let mut places = match PLACES.try_lock() {
        Ok(places) => places,
        Err(TryLockError::Poisoned(places)) => PoisonError::into_inner(places),
        Err(TryLockError::WouldBlock) => {
            return Err(refuse("follow", "shares", "the call before is still under way"));
        }
    };
    let watched = Watched::look();
    places.keep(&watched);
    let mut told = Told { watched: &watched, places: &mut places, shares: HashMap::new() };
    if request.crowded {
        told.forget();
    }
    if watched.is_empty() {
        return Ok(false);
    }
    for change in &request.changes {
        // By now it may be another change again, of which there will be word too.
        let _ = told.change(change);
    }
    if request.lost {
        told.everything();
    }
    Ok(true)
}

/// What the changes of one call are told with.
struct Told<'a> {
    watched: &'a Watched,
    places: &'a mut Places,
    shares: HashMap<u32, Open>,
}

struct Open {
    share: Share,
    /// Those watched since the last call.
    new: HashMap<u64, OwnedFd>,
    /// In which something happened.
    directories: HashMap<u64, Rc<OwnedFd>>,
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        for open in self.shares.values() {
            open.new.values().for_each(remember);
            open.directories.values().for_each(|directory| remember(directory));
        }
    }
}

impl Told<'_> {
    fn share(&mut self, number: u32) -> Result<Share> {
        if let Some(open) = self.shares.get(&number) {
            return Ok(open.share.clone());
        }
        let share = Share::get(number).ok_or(Errno::NOENT)?;
        let new = self.places.add(&share, self.watched);
        let open = Open { share: share.clone(), new, directories: HashMap::new() };
        self.shares.insert(number, open);
        Ok(share)
    }

    fn entry(&mut self, place: &Place) -> Result<(Rc<OwnedFd>, CString)> {
        if matches!(&place.name[..], b"" | b"." | b"..") || place.name.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        let name = CString::new(&*place.name).map_err(|_| Errno::INVAL)?;
        let Open { share, directories, .. } =
            self.shares.get_mut(&place.share).ok_or(Errno::NOENT)?;
        if let Some(directory) = directories.get(&place.node) {
            return Ok((directory.clone(), name));
        }
        let directory = Rc::new(share.find(place.node, OFlags::PATH | OFlags::DIRECTORY)?);
        directories.insert(place.node, directory.clone());
        Ok((directory, name))
    }

    fn change(&mut self, change: &Change) -> Result<()> {
        let share = self.share(change.place.share)?;
        match change.moved_to.as_ref() {
            Some(to) => self.moved(&share, &change.place, to, change.directory),
            None if change.place.name.is_empty() => self.alone(&share, change),
            None => self.changed(&share, change),
        }
    }

    /// Whether anybody watches an entry or its directory.
    fn is_watched(&self, share: &Share, place: &Place) -> bool {
        self.watched.contains(share.device, place.node)
            || self.places.get(place.node, &place.name).is_some()
    }

    fn changed(&mut self, share: &Share, change: &Change) -> Result<()> {
        let place = &change.place;
        if !self.is_watched(share, place) {
            return Ok(());
        }
        let (directory, name) = self.entry(place)?;
        if change.deleted {
            self.ends(share, place);
            let _ = repeat::delete(&directory, &name, change.directory);
        }
        // It may be gone again.
        let now = repeat::look(&directory, &name)?;
        if change.created {
            let _ = repeat::create(&directory, &name, &now);
        }
        if change.written {
            let _ = repeat::write(&directory, &name, &now);
        }
        if change.attributes {
            let _ = repeat::attributes(&directory, &name, &now);
        }
        Ok(())
    }

    fn moved(&mut self, share: &Share, from: &Place, to: &Place, is_dir: bool) -> Result<()> {
        if !self.is_watched(share, from) && !self.is_watched(share, to) {
            return Ok(());
        }
        self.ends(share, to);
        self.places.moved((from.node, &from.name), Some((to.node, &to.name)));
        let (old_directory, old) = self.entry(from)?;
        let (directory, name) = self.entry(to)?;
        if repeat::rename(&old_directory, &old, &directory, &name, is_dir).is_err() {
            let _ = repeat::delete(&old_directory, &old, is_dir);
        }
        // From now on it is the file that has that name.
        repeat::look(&directory, &name).map(|_| ())
    }

    /// A file that is shared alone.
    fn alone(&self, share: &Share, change: &Change) -> Result<()> {
        let node = change.place.node;
        if !self.watched.contains(share.device, node) {
            return Ok(());
        }
        if change.written {
            repeat::write_to(|| share.find(node, OFlags::WRONLY))?;
        }
        if change.attributes {
            repeat::attributes_of(&share.find(node, OFlags::PATH)?)?;
        }
        Ok(())
    }

    /// The kernel tells of the end of a watched file when it forgets one that has no link any more: it is made to know
    /// that, and its name is forgotten by whoever repeats what happened to it.
    fn ends(&mut self, share: &Share, place: &Place) {
        let Some(node) = self.places.get(place.node, &place.name) else { return };
        let opened = self.shares.get_mut(&place.share).and_then(|open| open.new.remove(&node));
        if let Some(file) = opened.or_else(|| share.find(node, OFlags::PATH).ok()) {
            let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
            let _ = statx(&file, c"", flags, StatxFlags::NLINK);
        }
        self.places.moved((place.node, &place.name), None);
    }

    /// Has the kernel forget the names that nobody uses, and with them the files: of all file systems, since those that are
    /// mounted inside shares are mounted where somebody walked. What is watched has its name afterwards.
    fn forget(&mut self) {
        for number in Share::numbers() {
            let _ = self.share(number);
        }
        if let Err(error) = fs::write(CACHES, NAMES) {
            eprintln!("ampoule-agent: {CACHES}: {error}");
        }
    }

    /// All that is watched is told as changed.
    fn everything(&mut self) {
        let mut left = MOST_UNKNOWN;
        for number in Share::numbers() {
            let Ok(share) = self.share(number) else { continue };
            for node in self.watched.of(share.device) {
                let _ = unknown(&share, node, &mut left);
            }
        }
    }
}

/// A directory's entries, or a file.
fn unknown(share: &Share, node: u64, left: &mut usize) -> Result<()> {
    let named = share.find(node, OFlags::PATH)?;
    let told = match share.find(node, OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(directory) => unknown_entries(&directory, left),
        Err(_) => repeat::write_to(|| share.find(node, OFlags::WRONLY)),
    };
    remember(&named);
    told
}

fn unknown_entries(directory: &OwnedFd, left: &mut usize) -> Result<()> {
    for entry in Dir::read_from(directory)?.take(*left) {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        *left -= 1;
        let now = repeat::look(directory, name)?;
        if repeat::write(directory, name, &now).is_err() {
            let _ = repeat::attributes(directory, name, &now);
        }
    }
    Ok(())
}
