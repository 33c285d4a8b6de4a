//! The record locks, fcntl(2), that the guest has on files: each owner's on a file are locks of the host's kernel on an open
//! file description of their own, so that they hold against the guest's other owners, other sandboxes and the host.
//!
//! Nobody waits here: the guest's kernel asks again. What it can have the host's kernel keep is bounded, and known for
//! that: each owner's ranges, cut and joined as that kernel does it.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;

/// Owners of locks, each once for each file.
pub const MAX_OWNERS: usize = 1024;
/// Ranges, of all of them together.
pub const MAX_RANGES: usize = 16_384;

/// The last byte that there can be: a lock that ends there ends nowhere.
const LAST: u64 = i64::MAX as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Shared,
    Exclusive,
}

/// Bytes `first` to `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    first: u64,
    last: u64,
}

impl Range {
    pub fn new(first: u64, last: u64) -> Result<Self, Errno> {
        if first > last || last > LAST { Err(Errno::INVAL) } else { Ok(Self { first, last }) }
    }

    pub fn first(self) -> u64 {
        self.first
    }

    pub fn last(self) -> u64 {
        self.last
    }
}

/// Whose: the node of a file, and the number that the guest's kernel has for a process or an open file.
pub type Owner = (u64, u64);

/// All of them.
#[derive(Debug)]
pub struct Locks {
    owned: Mutex<BTreeMap<Owner, Owned>>,
    most_owners: usize,
    most_ranges: usize,
}

#[derive(Debug)]
struct Owned {
    file: OwnedFd,
    share: u32,
    /// By which a lock was last asked for.
    handle: u64,
    ranges: Vec<(Range, Kind)>,
}

impl Locks {
    pub fn new(most_owners: usize, most_ranges: usize) -> Self {
        Self { owned: Mutex::default(), most_owners, most_ranges }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Owner, Owned>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks a range, for it to be released with `handle` at the latest; `open` opens the file for a new owner.
    ///
    /// # Errors
    /// EAGAIN if somebody else has one in its way.
    pub fn set(
        &self,
        owner: Owner,
        (share, handle): (u32, u64),
        range: Range,
        kind: Kind,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<(), Errno> {
        let mut locks = self.lock();
        let known: usize = locks.values().map(|owned| owned.ranges.len()).sum();
        let owners = locks.len();
        let (mut entry, ranges) = match locks.entry(owner) {
            Entry::Occupied(entry) => {
                let ranges = changed(&entry.get().ranges, range, Some(kind));
                (entry, ranges)
            }
            Entry::Vacant(_) if owners >= self.most_owners => return Err(Errno::NOLCK),
            Entry::Vacant(entry) => {
                let new = Owned { file: open()?, share, handle, ranges: Vec::new() };
                (entry.insert_entry(new), vec![(range, kind)])
            }
        };
        let more = ranges.len().saturating_sub(entry.get().ranges.len());
        let set = match more > 0 && known + more > self.most_ranges {
            true => Err(Errno::NOLCK),
            false => lock(&entry.get().file, libc::F_OFD_SETLK, Some(kind), range).map(|_| ()),
        };
        if set.is_ok() {
            let owned = entry.get_mut();
            (owned.ranges, owned.handle) = (ranges, handle);
        } else if entry.get().ranges.is_empty() {
            entry.remove();
        }
        set
    }

    pub fn unset(&self, owner: Owner, range: Range) -> Result<(), Errno> {
        let mut locks = self.lock();
        let Entry::Occupied(mut entry) = locks.entry(owner) else { return Ok(()) };
        let ranges = changed(&entry.get().ranges, range, None);
        if ranges.is_empty() {
            entry.remove();
            return Ok(());
        }
        lock(&entry.get().file, libc::F_OFD_SETLK, None, range)?;
        entry.get_mut().ranges = ranges;
        Ok(())
    }

    /// The lock in the way of one, of whomever.
    pub fn find(
        &self,
        owner: Owner,
        range: Range,
        kind: Kind,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<Option<(Range, Kind)>, Errno> {
        match self.lock().get(&owner) {
            Some(owned) => lock(&owned.file, libc::F_OFD_GETLK, Some(kind), range),
            None => lock(&open()?, libc::F_OFD_GETLK, Some(kind), range),
        }
    }

    /// A handle is closed. The guest's kernel has released its locks, unless it could not.
    pub fn release(&self, handle: u64) {
        self.lock().retain(|_, owned| owned.handle != handle);
    }

    pub fn release_share(&self, share: u32) {
        self.lock().retain(|_, owned| owned.share != share);
    }

    pub fn clear(&self) {
        self.lock().clear();
    }
}

/// The ranges once one of them has become `kind`, or free.
fn changed(before: &[(Range, Kind)], range: Range, kind: Option<Kind>) -> Vec<(Range, Kind)> {
    let mut after: Vec<(Range, Kind)> = Vec::with_capacity(before.len() + 2);
    for &(old, of) in before {
        if old.first < range.first {
            after.push((Range { first: old.first, last: old.last.min(range.first - 1) }, of));
        }
        if old.last > range.last {
            after.push((Range { first: old.first.max(range.last + 1), last: old.last }, of));
        }
    }
    after.extend(kind.map(|kind| (range, kind)));
    after.sort_by_key(|(range, _)| range.first);
    after.dedup_by(|(next, of), (range, kind)| {
        let joined = of == kind && next.first == range.last + 1;
        if joined {
            range.last = next.last;
        }
        joined
    });
    after
}

/// fcntl(2) with F_OFD_SETLK or F_OFD_GETLK; the latter finds what is in the way.
fn lock(
    file: impl AsFd,
    command: libc::c_int,
    kind: Option<Kind>,
    range: Range,
) -> Result<Option<(Range, Kind)>, Errno> {
    let kind = match kind {
        Some(Kind::Shared) => libc::F_RDLCK,
        Some(Kind::Exclusive) => libc::F_WRLCK,
        None => libc::F_UNLCK,
    };
    let endless = range.last == LAST;
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.first as i64,
        l_len: if endless { 0 } else { (range.last - range.first + 1) as i64 },
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the lock outlives the call.
    if unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) } < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    let first = lock.l_start as u64;
    let last = if lock.l_len == 0 { LAST } else { first.saturating_add(lock.l_len as u64 - 1) };
    Ok(match libc::c_int::from(lock.l_type) {
        libc::F_RDLCK => Some((Range { first, last }, Kind::Shared)),
        libc::F_WRLCK => Some((Range { first, last }, Kind::Exclusive)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn owners_and_ranges_are_bounded_and_give_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (locks, of) = (Locks::new(3, 4), (0, 1));
        let open = || Ok(File::options().read(true).write(true).open(&file).unwrap().into());
        let set = |owner, byte| {
            locks.set((9, owner), of, Range::new(byte, byte).unwrap(), Kind::Exclusive, open)
        };
        assert_eq!([set(1, 0), set(1, 2), set(2, 4)], [Ok(()); 3]);
        assert_eq!(set(2, 2), Err(Errno::AGAIN), "another owner's");
        assert_eq!(set(3, 2), Err(Errno::AGAIN), "and no third one comes of it");
        assert_eq!([set(1, 6), set(1, 8)], [Ok(()), Err(Errno::NOLCK)]);
        // Beside one that is there, or in it, is no more.
        assert_eq!([set(1, 1), set(1, 2)], [Ok(()); 2]);
        assert_eq!([set(3, 10), set(4, 12)], [Ok(()), Err(Errno::NOLCK)]);
        let whole = Range::new(0, LAST).unwrap();
        assert_eq!(locks.unset((9, 1), whole), Ok(()));
        assert_eq!(set(4, 2), Ok(()));
        locks.release(1);
        assert_eq!(set(5, 4), Ok(()));
    }

    fn kind() -> impl Strategy<Value = Option<Kind>> {
        prop_oneof![Just(None), Just(Some(Kind::Shared)), Just(Some(Kind::Exclusive))]
    }

    proptest! {
        /// Byte by byte it comes to the same, in as few ranges as there can be.
        #[test]
        fn ranges_are_cut_and_joined(
            changes in proptest::collection::vec((0u64..40, 0u64..20, kind()), 1..40),
        ) {
            let (mut ranges, mut bytes) = (Vec::new(), [None; 64]);
            for (first, length, kind) in changes {
                let last = first + length;
                ranges = changed(&ranges, Range::new(first, last).unwrap(), kind);
                bytes[first as usize..=last as usize].fill(kind);
                let mut expected: Vec<(Range, Kind)> = Vec::new();
                for (at, kind) in (0..).zip(bytes) {
                    match (expected.last_mut(), kind) {
                        (Some((range, of)), Some(kind)) if *of == kind && range.last + 1 == at => range.last = at,
                        (_, Some(kind)) => expected.push((Range { first: at, last: at }, kind)),
                        (_, None) => {}
                    }
                }
                prop_assert_eq!(&ranges, &expected);
            }
        }
    }
}
