//! The socket of a group's daemon. Whoever starts the group's first container makes it; the others find it.
//!
//! A lock on the folder makes each of finding, making and removing one step, so that of several that start at
//! once one makes the socket, and none sees it before it is listened at.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, MetadataExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use sha2::{Digest, Sha256};

/// Where shims have their sockets unless containerd says otherwise.
pub const DIRECTORY: &str = "/run/containerd/s";
/// Longest path in bytes that every version of containerd can dial.
const MAX_PATH: usize = 106;
/// The lock is held for microseconds.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error(
        "socket {}: must be an absolute path of at most {MAX_PATH} bytes: choose a shorter state folder \
         in containerd's configuration", .0.display()
    )]
    Path(PathBuf),
    #[error("socket folder {}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("socket {}", path.display())]
    Socket { path: PathBuf, source: io::Error },
}

/// Where the daemon of `group` listens.
pub fn path(
    directory: &Path,
    containerd: &str,
    namespace: &str,
    group: &str,
) -> Result<PathBuf, SocketError> {
    let mut hash = Sha256::new();
    // The name first: another runtime's daemon of a group of the same name is not ours.
    for part in ["io.containerd.ampoule.v2", containerd, namespace, group] {
        hash.update(part);
        hash.update([0]);
    }
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let path = directory.join(name);
    let good = path.is_absolute() && path.as_os_str().len() <= MAX_PATH;
    if good { Ok(path) } else { Err(SocketError::Path(path)) }
}

/// What [`claim`] found.
#[derive(Debug)]
pub enum Claim {
    /// Nobody: now it is ours.
    Made(UnixListener),
    /// A daemon that lives.
    Served,
}

/// Makes the socket, unless a daemon listens there already and is to be `shared`. One that is not may be on its
/// way out: a container that is started again at once must not be given to it.
pub fn claim(path: &Path, shared: bool) -> Result<Claim, SocketError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let failed = |source| SocketError::Folder { path: directory.into(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    let _lock = lock(directory).map_err(failed)?;
    let failed = |source| SocketError::Socket { path: path.into(), source };
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if shared && is_served(path).map_err(failed)? {
                return Ok(Claim::Served);
            }
            fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path)
        }
        made => made,
    }
    .and_then(|listener| {
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(Claim::Made(listener))
    })
    .map_err(failed)
}

/// Removes what a daemon that was killed left.
pub fn remove_dead(path: &Path) -> io::Result<()> {
    let _lock = lock(path.parent().unwrap_or(Path::new("/")))?;
    if path.exists() && !is_served(path)? {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Whether somebody listens. A full backlog is somebody too.
fn is_served(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Held while the file is open.
fn lock(directory: &Path) -> io::Result<File> {
    let file = File::open(directory)?;
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// The name of a listening socket, known from the beginning so that a later one of the same name is not
/// removed in its place.
#[derive(Debug)]
pub struct SocketName {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
}

impl SocketName {
    /// Of a listener.
    pub fn of(listener: &UnixListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let path = address.as_pathname().ok_or(io::ErrorKind::InvalidInput)?.to_path_buf();
        let file = identity(&path)?;
        Ok(Self { path, file })
    }

    /// From now on nobody new connects, and the next daemon may take the name.
    pub fn remove(&self) {
        let _lock = self.path.parent().and_then(|directory| lock(directory).ok());
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            // Nobody can help it; the next one of the name replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// The listener that [`super::start`] passed on as standard input, which becomes `/dev/null`.
pub fn inherited() -> io::Result<UnixListener> {
    let stdin = rustix::stdio::stdin();
    if !rustix::net::sockopt::socket_acceptconn(stdin).unwrap_or(false) {
        return Err(io::ErrorKind::NotConnected.into());
    }
    let listener: OwnedFd = stdin.try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(listener.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn paths_differ_by_everything_and_are_short() {
        let of = |containerd, namespace, group| {
            path(Path::new(DIRECTORY), containerd, namespace, group).unwrap()
        };
        let one = of("/run/c", "n", "g");
        assert_eq!(one, of("/run/c", "n", "g"));
        assert_eq!(one.as_os_str().len(), DIRECTORY.len() + 65);
        for other in [of("/run/d", "n", "g"), of("/run/c", "m", "g"), of("/run/c", "ng", "")] {
            assert_ne!(one, other);
        }
        let long = format!("/{}", "x".repeat(41));
        assert!(path(Path::new(&long), "", "", "").is_err());
        assert!(path(Path::new(&long[..41]), "", "", "").is_ok());
        assert!(path(Path::new("relative"), "", "", "").is_err());
    }

    #[test]
    fn the_first_makes_it_and_the_others_find_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s/socket");
        let Claim::Made(listener) = claim(&path, true).unwrap() else { panic!("nobody was there") };
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert!(matches!(claim(&path, true).unwrap(), Claim::Served));
        remove_dead(&path).unwrap();
        assert!(path.exists());
        // A crashed daemon leaves its name.
        drop(listener);
        assert!(matches!(claim(&path, true).unwrap(), Claim::Made(_)));
        remove_dead(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_full_backlog_is_a_daemon_that_lives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let Claim::Made(listener) = claim(&path, true).unwrap() else { panic!("nobody was there") };
        rustix::net::listen(&listener, 0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        assert!(matches!(claim(&path, true).unwrap(), Claim::Served));
    }

    #[test]
    fn of_many_at_once_one_makes_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for stale in [false, true] {
            if stale {
                drop(UnixListener::bind(&path).unwrap());
            }
            let claims: Vec<Claim> = thread::scope(|scope| {
                let all: Vec<_> =
                    (0..20).map(|_| scope.spawn(|| claim(&path, true).unwrap())).collect();
                all.into_iter().map(|one| one.join().unwrap()).collect()
            });
            let made = claims.iter().filter(|claim| matches!(claim, Claim::Made(_)));
            assert_eq!(made.count(), 1);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn one_that_is_not_shared_is_replaced_and_then_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let Claim::Made(first) = claim(&path, false).unwrap() else { panic!("nobody was there") };
        let name = SocketName::of(&first).unwrap();
        let Claim::Made(second) = claim(&path, false).unwrap() else { panic!("not shared") };
        name.remove();
        UnixStream::connect(&path).unwrap();
        SocketName::of(&second).unwrap().remove();
        assert!(!path.exists());
    }
}
