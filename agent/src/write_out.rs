//! Writing out what a container has written: the upper directory of its overlay is applied to one that the host shares with
//! the agent for that time, so that who looks there (`docker cp`, `podman commit`) finds what a runtime without a VM leaves.
//!
//! The host's directory is the upper one of an overlay, too, whose lower ones are the image's: those of the container, but
//! for the first of them if that is what the host's directory had when the container began. What it is to hide of the image
//! it hides by whiteouts, name by name: marks of whole directories (`trusted.overlay.opaque`) take a privilege on the host.
//! There is no whiteout where there is nothing to hide: in a directory of which the image has nothing, it would be listed.
//!
//! Everything is a name in an open directory, and no link is followed. A container that runs meanwhile may change what is
//! being written out: what it has changed is left for the next time.

mod files;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Instant,
};

use files::*;
use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, Stat, Timespec, XattrFlags, chmodat, chownat, fgetxattr,
        fremovexattr, fsetxattr, fstat, futimens, linkat, mkdirat, mknodat, openat, readlinkat,
        symlinkat, utimensat,
    },
    io::Errno,
    time::{ClockId, clock_gettime},
};

/// How deep directories may lie in each other: each level is one of the stack's.
const DEPTH: usize = 400;
const CHUNK: usize = 1 << 20;
/// The kernel's clock of changes is coarser than the one that is read.
const COARSE: i64 = 1;
/// What `trusted.overlay.*` says of a file is the overlay's own business, but for what a container has written by a name
/// like that, which is escaped.
const OVERLAYS: &[u8] = b"trusted.overlay.";
const ESCAPED: &[u8] = b"trusted.overlay.overlay.";
/// The marks of an overlay without privileges, as the host's may be.
const FORGED: &[u8] = b"user.overlay.";

/// A failure, and where.
#[derive(Debug, thiserror::Error)]
#[error("{}", path.display())]
pub struct WriteOutError {
    pub path: PathBuf,
    pub source: io::Error,
}

type Result<T> = std::result::Result<T, WriteOutError>;

/// An overlay's directories.
#[derive(Debug)]
pub struct Overlay {
    pub upper: OwnedFd,
    /// What the host's directory had, if anything.
    pub start: Option<OwnedFd>,
    /// The image's, top first.
    pub image: Vec<OwnedFd>,
    /// The container may run.
    pub is_live: bool,
}

/// How much there is to write, or may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    pub files: u64,
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, stat: &Stat) {
        self.files += 1;
        self.bytes += bytes(stat);
    }

    pub fn exceeds(&self, most: &Self) -> bool {
        self.files > most.files || self.bytes > most.bytes
    }
}

/// What cannot be made on the host: device nodes, some attributes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    pub count: u64,
    /// The first of them.
    pub path: PathBuf,
}

/// What has been written out, for the next time in this guest.
#[derive(Debug, Default)]
pub struct Earlier {
    /// What has not changed since then need not be written again.
    before: Option<Timespec>,
    /// The names, by directory, of what was not there before. The container's overlay does not know them: it leaves no
    /// whiteout for one that it removes.
    created: BTreeMap<PathBuf, BTreeSet<OsString>>,
}

impl Earlier {
    fn is_nothing(&self) -> bool {
        self.before.is_none() && self.created.is_empty()
    }
}

impl Overlay {
    /// How much there is; no more is counted than a little above `most`.
    pub fn amount(&self, most: &Amount, earlier: &Earlier) -> Result<Amount> {
        let mut amount = Amount::default();
        self.count(self.upper.as_fd(), Path::new(""), &mut amount, most, 0)?;
        let looks = |directory: &OwnedFd| fstat(directory).map(|s| (s.st_mode, s.st_uid, s.st_gid));
        let top = self.start.iter().chain(&self.image).next().map(looks);
        // Its owner and mode may be all that has changed; or that it has nothing any more of what the host has.
        let has_changed = top.is_some_and(|top| top != looks(&self.upper));
        if amount.files == 0 && (has_changed || !earlier.is_nothing()) {
            amount.files = 1;
        }
        Ok(amount)
    }

    fn count(
        &self,
        directory: BorrowedFd<'_>,
        path: &Path,
        amount: &mut Amount,
        most: &Amount,
        depth: usize,
    ) -> Result<()> {
        check(depth, path)?;
        // No more names are held, of all directories together, than are counted.
        let mut directories = Vec::new();
        for name in entries(directory).at(path)? {
            let name = name.at(path)?;
            let path = path.join(&name);
            let stat = match look(directory, &name) {
                Err(Errno::NOENT) if self.is_live => continue,
                stat => stat.at(&path)?,
            };
            amount.add(&stat);
            if amount.exceeds(most) {
                return Ok(());
            }
            if is_directory(&stat) {
                directories.push(name);
            }
        }
        for name in directories {
            let path = path.join(&name);
            let below = match self::directory(directory, &name) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if self.is_live => continue,
                below => below.at(&path)?,
            };
            self.count(below.as_fd(), &path, amount, most, depth + 1)?;
            if amount.exceeds(most) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Applies the upper directory to another one, over what has been written out to it earlier.
    ///
    /// # Errors
    /// Also when that is not done at `end`, or if it is more than `most`: a container that runs can make it so.
    pub fn write_out(
        &self,
        to: OwnedFd,
        earlier: &mut Earlier,
        most: Amount,
        end: Instant,
    ) -> Result<LeftOut> {
        let mut before = clock_gettime(ClockId::Realtime);
        before.tv_sec -= COARSE;
        let from = directory(self.upper.as_fd(), OsStr::new(".")).at("")?;
        let start = self.start.as_ref().map(OwnedFd::try_clone).transpose().at("")?;
        let image = self.image.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>();
        let root = Place { from, to, start, image: image.at("")?, hides: false, new: false };
        let mut writer = Writer {
            earlier,
            is_live: self.is_live,
            most,
            end,
            amount: Amount::default(),
            created: BTreeMap::new(),
            left_out: LeftOut::default(),
            links: HashMap::new(),
            buffer: vec![0; CHUNK],
        };
        let written = writer.directory(&root, Path::new(""), 0);
        let Writer { created, left_out, .. } = writer;
        match written {
            Ok(()) => *earlier = Earlier { before: Some(before), created },
            // Some of both is there.
            Err(_) => created.into_iter().for_each(|(path, names)| {
                earlier.created.entry(path).or_default().extend(names);
            }),
        }
        written.map(|()| left_out)
    }

    /// Has the upper directory itself hide what was written out earlier, and has been removed since: it is what counts, when
    /// nothing more is written out.
    pub fn hide(&self, earlier: &Earlier) -> Result<()> {
        for (path, created) in &earlier.created {
            // Without the directory nothing is in it.
            let Ok(directory) = beneath(self.upper.as_fd(), path) else { continue };
            if self.is_cut_off(path).at(path)? {
                continue;
            }
            let stat = fstat(&directory).at(path)?;
            for name in created {
                if look(directory.as_fd(), name).is_err_and(|e| e == Errno::NOENT) {
                    make_whiteout(directory.as_fd(), name).at(path.join(name))?;
                }
            }
            futimens(&directory, &times(&stat)).at(path)?;
        }
        Ok(())
    }

    /// Whether nothing shows through in the upper directory's one of this path: whiteouts would be listed there.
    fn is_cut_off(&self, path: &Path) -> std::result::Result<bool, Errno> {
        for path in path.ancestors() {
            if is_opaque(&beneath(self.upper.as_fd(), path)?)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// A directory, what it is applied to, and what lies below.
struct Place {
    from: OwnedFd,
    to: OwnedFd,
    start: Option<OwnedFd>,
    /// Those of the same path, as far as they show through.
    image: Vec<OwnedFd>,
    /// Nothing of what lies below is seen in it.
    hides: bool,
    /// `to` was not there.
    new: bool,
}

impl Place {
    /// Whether the image has something of this name.
    fn has_below(&self, name: &OsStr) -> bool {
        let mut found = self.image.iter().filter_map(|layer| look(layer.as_fd(), name).ok());
        found.next().is_some_and(|stat| !is_whiteout(&stat))
    }

    /// All names that the image has.
    fn names_below(&self) -> std::result::Result<BTreeSet<OsString>, Errno> {
        let mut all = BTreeSet::new();
        for layer in &self.image {
            all.extend(names(layer.as_fd())?);
        }
        all.retain(|name| self.has_below(name));
        Ok(all)
    }

    /// The image's directories of this name that show through each other.
    fn image_below(&self, name: &OsStr) -> std::result::Result<Vec<OwnedFd>, Errno> {
        let mut below = Vec::new();
        for layer in &self.image {
            match look(layer.as_fd(), name) {
                Err(Errno::NOENT) => continue,
                Ok(stat) if is_directory(&stat) => {}
                _ => break,
            }
            let directory = directory(layer.as_fd(), name)?;
            let is_last = is_opaque(&directory)?;
            below.push(directory);
            if is_last {
                break;
            }
        }
        Ok(below)
    }

    /// Removes what has a name, and hides what the image has under it.
    fn take_away(&self, name: &OsStr, depth: usize) -> std::result::Result<(), Errno> {
        let to = self.to.as_fd();
        match (look(to, name), self.has_below(name)) {
            (Ok(there), true) if is_whiteout(&there) => return Ok(()),
            (Ok(_), _) => remove(to, name, depth)?,
            (Err(Errno::NOENT), _) => {}
            (Err(e), _) => return Err(e),
        }
        if self.has_below(name) { make_whiteout(to, name) } else { Ok(()) }
    }
}

struct Writer<'a> {
    earlier: &'a Earlier,
    is_live: bool,
    most: Amount,
    end: Instant,
    amount: Amount,
    /// For the next time.
    created: BTreeMap<PathBuf, BTreeSet<OsString>>,
    left_out: LeftOut,
    /// Files of several names, by device and inode: the first one, on the host.
    links: HashMap<(u64, u64), OwnedFd>,
    buffer: Vec<u8>,
}

impl Writer<'_> {
    fn directory(&mut self, place: &Place, path: &Path, depth: usize) -> Result<()> {
        check(depth, path)?;
        let (from, to) = (place.from.as_fd(), place.to.as_fd());
        let wanted = self.names(from).at(path)?;
        let mut gone = match (place.new, place.hides) {
            (true, _) => BTreeSet::new(),
            (_, true) => names(to).at(path)?,
            _ => self.earlier.created.get(path).cloned().unwrap_or_default(),
        };
        if place.hides {
            gone.extend(place.names_below().at(path)?);
        }
        for name in gone.difference(&wanted) {
            place.take_away(name, depth).at(path.join(name))?;
        }
        for name in &wanted {
            let at = path.join(name);
            let stat = match look(from, name) {
                Err(Errno::NOENT) if self.is_live => {
                    self.remember_created(path, name);
                    continue;
                }
                stat => stat.at(&at)?,
            };
            self.amount.bytes += bytes(&stat);
            self.may_go_on().at(&at)?;
            let written = self.entry(place, name, &stat, &at, depth);
            if written.is_err() && self.is_live && has_changed(from, name, &stat) {
                self.may_go_on().at(&at)?;
                self.remember_created(path, name);
            } else {
                written?;
            }
        }
        self.attributes(from, to, !place.new, path)?;
        let stat = fstat(from).at(path)?;
        set_owner_and_mode(to, &stat).at(path)?;
        futimens(to, &times(&stat)).at(path)
    }

    /// What was created earlier under a name, and in it, and may be there still.
    fn remember_created(&mut self, parent: &Path, name: &OsStr) {
        let Earlier { created, .. } = self.earlier;
        let itself = created.get(parent).and_then(|names| names.get(name));
        let itself = itself.map(|name| (parent.to_owned(), name.clone()));
        let path = parent.join(name);
        let below = created.range(path.clone()..).take_while(|(at, _)| at.starts_with(&path));
        let below =
            below.flat_map(|(at, names)| names.iter().map(|name| (at.clone(), name.clone())));
        for (at, name) in itself.into_iter().chain(below) {
            self.created.entry(at).or_default().insert(name);
        }
    }

    /// The container's. Of all directories together no more are held than may be.
    fn names(&mut self, directory: BorrowedFd<'_>) -> io::Result<BTreeSet<OsString>> {
        let left = self.most.files.saturating_sub(self.amount.files);
        let left = usize::try_from(left).unwrap_or(usize::MAX).saturating_add(1);
        let names =
            entries(directory)?.take(left).collect::<std::result::Result<BTreeSet<_>, _>>()?;
        self.amount.files += names.len() as u64;
        self.may_go_on().map(|()| names)
    }

    fn may_go_on(&self) -> io::Result<()> {
        if self.amount.exceeds(&self.most) {
            return Err(io::Error::other("it has become more than is written out"));
        }
        in_time(self.end)
    }

    fn entry(
        &mut self,
        place: &Place,
        name: &OsStr,
        stat: &Stat,
        path: &Path,
        depth: usize,
    ) -> Result<()> {
        let (from, to) = (place.from.as_fd(), place.to.as_fd());
        let there = match place.new {
            // Each question is a message to the host.
            true => None,
            false => match look(to, name) {
                Err(Errno::NOENT) => None,
                there => Some(there.at(path)?),
            },
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        let ours = self.earlier.created.get(parent).is_some_and(|all| all.contains(name));
        if ours || there.as_ref().is_none_or(is_whiteout) {
            self.created.entry(parent.into()).or_default().insert(name.into());
        }
        match kind(stat) {
            FileType::Directory => {
                let from = directory(from, name).at(path)?;
                let opaque = is_opaque(&from).at(path)?;
                // One that an engine has made may have a mark, which is not seen from here.
                let new =
                    there.as_ref().is_none_or(|there| !is_directory(there) || opaque && !ours);
                if new {
                    clear(to, name, there.as_ref(), depth).at(path)?;
                    mkdirat(to, name, Mode::RWXU).at(path)?;
                }
                // What a whiteout or a file on the host has hidden since the start has no mark here.
                let hides = place.hides || opaque || new && there.is_some();
                let start = place.start.as_ref().and_then(|s| directory(s.as_fd(), name).ok());
                let is_marked = start.as_ref().map_or(Ok(false), is_opaque).at(path)?;
                let image = match !new && is_marked {
                    true => Vec::new(),
                    false => place.image_below(name).at(path)?,
                };
                let to = directory(to, name).at(path)?;
                let below = Place { from, to, start, image, hides, new };
                self.directory(&below, path, depth + 1)
            }
            FileType::CharacterDevice if stat.st_rdev == 0 => place.take_away(name, depth).at(path),
            FileType::CharacterDevice | FileType::BlockDevice => {
                self.leave_out(path);
                place.take_away(name, depth).at(path)
            }
            _ if there.is_some_and(|there| self.is_unchanged(stat, &there)) => {
                self.remember(to, name, stat).at(path)
            }
            kind => {
                clear(to, name, there.as_ref(), depth).at(path)?;
                if let Some(first) = self.links.get(&identity(stat)) {
                    return linkat(first, "", to, name, AtFlags::EMPTY_PATH).at(path);
                }
                self.copy(from, to, name, kind, stat, path)?;
                self.remember(to, name, stat).at(path)
            }
        }
    }

    /// Whether it was written out earlier, and is as it was: nobody can give a file another time of its last change.
    fn is_unchanged(&self, stat: &Stat, there: &Stat) -> bool {
        let same = |of: fn(&Stat) -> (u32, i64, i64, i64)| of(stat) == of(there);
        let is_old = self.earlier.before.is_some_and(|before| {
            (stat.st_ctime, stat.st_ctime_nsec as i64) < (before.tv_sec, before.tv_nsec)
        });
        is_old
            && same(|s| (s.st_mode, s.st_size, s.st_mtime, s.st_mtime_nsec as i64))
            && (stat.st_nlink > 1) == (there.st_nlink > 1)
    }

    fn remember(
        &mut self,
        to: BorrowedFd<'_>,
        name: &OsStr,
        stat: &Stat,
    ) -> std::result::Result<(), Errno> {
        if stat.st_nlink > 1 {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            self.links.insert(identity(stat), openat(to, name, flags, Mode::empty())?);
        }
        Ok(())
    }

    /// Something that is no directory.
    fn copy(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &OsStr,
        kind: FileType,
        stat: &Stat,
        path: &Path,
    ) -> Result<()> {
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = open_regular(from, name).at(path)?;
                let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | flags;
                let copy = File::from(
                    openat(to, name, new, mode(stat) & Mode::from_raw_mode(0o777)).at(path)?,
                );
                let source = File::from(source);
                let (size, end) = (stat.st_size as u64, self.end);
                copy_data(&source, &copy, size, &mut self.buffer, end).at(path)?;
                // After chown(2) and write(2), which take some away.
                set_owner_and_mode(copy.as_fd(), stat).at(path)?;
                self.attributes(source.as_fd(), copy.as_fd(), false, path)?;
                return futimens(&copy, &times(stat)).at(path);
            }
            FileType::Symlink => {
                symlinkat(readlinkat(from, name, Vec::new()).at(path)?, to, name).at(path)?;
            }
            kind => mknodat(to, name, kind, Mode::RUSR | Mode::WUSR, 0).at(path)?,
        }
        let (user, group) = owner(stat);
        chownat(to, name, user, group, AtFlags::SYMLINK_NOFOLLOW).at(path)?;
        if kind != FileType::Symlink {
            chmodat(to, name, mode(stat), AtFlags::empty()).at(path)?;
        }
        utimensat(to, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW).at(path)
    }

    /// Gives a file or a directory the extended attributes of another, and those only if it may have some.
    fn attributes(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        may_have: bool,
        path: &Path,
    ) -> Result<()> {
        let wanted = attribute_names(from).at(path)?;
        if may_have {
            // On what lies on the host, others than a container's are somebody else's.
            let stale = attribute_names(to).at(path)?;
            for name in stale.iter().filter(|&n| is_containers(n.to_bytes()) && !wanted.contains(n))
            {
                fremovexattr(to, name.as_c_str()).at(path)?;
            }
        }
        for name in &wanted {
            let bytes = name.to_bytes();
            if !is_containers(bytes) {
                let lost = [ESCAPED, FORGED].iter().any(|prefix| bytes.starts_with(prefix));
                if lost || bytes.starts_with(b"trusted.") && !bytes.starts_with(OVERLAYS) {
                    self.leave_out(path);
                }
                continue;
            }
            let size = fgetxattr(from, name.as_c_str(), &mut self.buffer[..ATTRIBUTE]).at(path)?;
            let set = fsetxattr(to, name.as_c_str(), &self.buffer[..size], XattrFlags::empty());
            match set {
                // The host's file system has none, or none of that kind.
                Err(Errno::OPNOTSUPP | Errno::PERM) => self.leave_out(path),
                set => set.at(path)?,
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, path: &Path) {
        if self.left_out.count == 0 {
            self.left_out.path = path.into();
        }
        self.left_out.count += 1;
    }
}

/// Attributes that containers, and those who make images, give to files.
fn is_containers(name: &[u8]) -> bool {
    name.starts_with(b"user.") && !name.starts_with(FORGED)
        || name.starts_with(b"system.posix_acl_")
        || name == b"security.capability"
}

/// Makes room for something else.
fn clear(
    at: BorrowedFd<'_>,
    name: &OsStr,
    there: Option<&Stat>,
    depth: usize,
) -> std::result::Result<(), Errno> {
    there.map_or(Ok(()), |_| remove(at, name, depth))
}

fn check(depth: usize, path: &Path) -> Result<()> {
    if depth < DEPTH { Ok(()) } else { Err(Errno::NAMETOOLONG).at(path) }
}

trait At<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| WriteOutError { path: path.as_ref().into(), source: e.into() })
    }
}

#[cfg(test)]
mod tests;
