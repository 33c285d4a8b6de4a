//! Who opens a directory to look what is in there waits until all is there that should be.
//!
//! Linux asks an fanotify group first (FAN_OPEN_PERM, fanotify(7)), also when it is an overlay above the directory that is
//! opened; not for a file whose name is known. Such a group takes root. When it is closed, and so when this process ends,
//! all who wait go on.

use std::{
    convert::Infallible,
    io, mem,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::future::OptionFuture;
use rustix::io::{Errno, read, write};
use tokio::{
    io::unix::AsyncFd,
    sync::{oneshot, watch},
    time::Instant,
};

use crate::vm::watch as registered;

/// Whoever looks at a directory opens it twice, at least where that is an overlay: it is not brought up to date in between.
const FRESH: Duration = Duration::from_millis(250);
/// struct fanotify_event_metadata.
const METADATA: usize = 24;
/// Read at once: each comes with a descriptor.
const EVENTS: usize = 16;

#[derive(Debug)]
pub struct Gate {
    group: Arc<AsyncFd<OwnedFd>>,
}

/// Somebody opens the directory, and goes on when this is dropped.
#[derive(Debug)]
struct Opening {
    /// PID.
    by: u32,
    directory: OwnedFd,
    group: Arc<AsyncFd<OwnedFd>>,
}

impl Gate {
    /// Of a directory, opened with O_PATH.
    ///
    /// # Errors
    /// `EPERM` without root; `EMFILE` if the host has no more groups (fs.fanotify.max_user_groups).
    pub fn new(directory: &OwnedFd) -> io::Result<Self> {
        let flags = libc::FAN_CLASS_CONTENT | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
        // SAFETY: takes numbers; the descriptor is new, and nobody else's.
        let group = unsafe {
            match libc::fanotify_init(flags, (libc::O_RDONLY | libc::O_CLOEXEC) as u32) {
                -1 => return Err(io::Error::last_os_error()),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        let path = format!("/proc/self/fd/{}\0", directory.as_raw_fd());
        let events = libc::FAN_OPEN_PERM | libc::FAN_ONDIR;
        // SAFETY: takes numbers and a text that ends with zero.
        let marked = unsafe {
            libc::fanotify_mark(
                group.as_raw_fd(),
                libc::FAN_MARK_ADD | libc::FAN_MARK_ONLYDIR,
                events,
                libc::AT_FDCWD,
                path.as_ptr().cast(),
            )
        };
        match marked {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(Self { group: Arc::new(registered(group)?) }),
        }
    }

    /// Calls `update` when somebody opens the directory, and lets them go on when that is done; the file server, which it
    /// takes, at once. Until `closed`, or until an update says that there is no use in others.
    pub async fn keep<F: Future<Output = bool>>(
        self,
        server: watch::Receiver<Option<u32>>,
        mut closed: oneshot::Receiver<Infallible>,
        update: impl Fn() -> F,
    ) {
        let (mut waiting, mut next) = (Vec::new(), Vec::new());
        let mut updating = pin!(OptionFuture::<F>::default());
        let (mut is_updating, mut is_closed) = (false, false);
        let mut fresh = Instant::now();
        while !is_closed || is_updating {
            tokio::select! {
                biased;
                Some(is_useful) = &mut updating, if is_updating => {
                    (is_updating, is_closed) = (false, is_closed || !is_useful);
                    fresh = Instant::now() + FRESH;
                    waiting.clear();
                }
                _ = &mut closed, if !is_closed => is_closed = true,
                openings = self.openings() => {
                    let openings = match openings {
                        Ok(openings) => openings,
                        Err(error) => {
                            tracing::warn!(%error, "who looks at a container that runs is not seen any more");
                            return;
                        }
                    };
                    let own = [Some(std::process::id()), *server.borrow()];
                    next.extend(openings.into_iter().filter(|o| !own.contains(&Some(o.by))));
                    if !is_updating && Instant::now() < fresh {
                        next.clear();
                    }
                }
            }
            if !is_updating && !is_closed && !next.is_empty() {
                waiting = mem::take(&mut next);
                updating.set(Some(update()).into());
                is_updating = true;
            }
        }
    }

    async fn openings(&self) -> io::Result<Vec<Opening>> {
        let mut events = [0; EVENTS * METADATA];
        let length = loop {
            let mut ready = self.group.readable().await?;
            match read(self.group.get_ref(), &mut events) {
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                length => break length?,
            }
        };
        let opening = |event: &[u8]| {
            let [fd, by] = [16, 20].map(|at| Some(i32::from_ne_bytes(*event[at..].first_chunk()?)));
            // FAN_NOFD: it tells of something else.
            let fd = fd.filter(|fd| *fd >= 0)?;
            // SAFETY: Linux has just given us this descriptor.
            let directory = unsafe { OwnedFd::from_raw_fd(fd) };
            Some(Opening { by: by?.unsigned_abs(), directory, group: self.group.clone() })
        };
        Ok(events[..length].chunks_exact(METADATA).filter_map(opening).collect())
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        // struct fanotify_response. It fails for who has been killed meanwhile.
        let fd = self.directory.as_raw_fd().to_ne_bytes();
        let _ = write(self.group.as_fd(), &[fd, libc::FAN_ALLOW.to_ne_bytes()].concat());
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::Path,
        sync::atomic::{AtomicU32, Ordering},
    };

    use rustix::fs::{Mode, OFlags, open};
    use tokio::process::Command;

    use super::*;

    /// A gate of this directory, if this machine lets us have one.
    fn gate(directory: &Path) -> Option<Gate> {
        let directory = open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        match Gate::new(&directory) {
            Ok(gate) => Some(gate),
            Err(error) => {
                eprintln!("skipped: {error}");
                None
            }
        }
    }

    /// What another process finds in it.
    async fn listed(directory: &Path) -> String {
        let output = Command::new("ls").arg(directory).kill_on_drop(true).output();
        let output = tokio::time::timeout(Duration::from_secs(10), output).await;
        String::from_utf8(output.expect("it waits for ever").unwrap().stdout).unwrap()
    }

    #[tokio::test]
    async fn who_looks_waits_until_all_is_there_and_the_file_server_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let Some(gate) = gate(path) else { return };
        let (server, pid) = watch::channel(None);
        let (close, closed) = oneshot::channel();
        let updates = Arc::new(AtomicU32::new(0));
        let update = || {
            let number = updates.fetch_add(1, Ordering::Relaxed);
            let server = server.clone();
            async move {
                // As the file server does, which may look.
                let mut list = Command::new("sh");
                list.args(["-c", &format!("sleep 0.2; exec ls {}", path.display())]);
                let list = list.kill_on_drop(true).spawn().unwrap();
                server.send_replace(list.id());
                list.wait_with_output().await.unwrap();
                fs::write(path.join(number.to_string()), "").unwrap();
                true
            }
        };
        let look = async {
            assert_eq!(listed(path).await, "0\n");
            // The same who looks, and who only asks for a file.
            assert_eq!(listed(path).await, "0\n");
            fs::read(path.join("0")).unwrap();
            tokio::time::sleep(FRESH).await;
            let both = tokio::join!(listed(path), listed(path));
            assert!(both.0.starts_with("0\n1\n") && both.1.starts_with("0\n1\n"), "{both:?}");
            drop(close);
        };
        tokio::join!(gate.keep(pid, closed, update), look);
        let count = updates.load(Ordering::Relaxed);
        assert!((2..=3).contains(&count), "{count}");
        tokio::time::sleep(FRESH).await;
        listed(path).await;
        assert_eq!(updates.load(Ordering::Relaxed), count);
    }

    #[tokio::test]
    async fn who_waits_goes_on_when_there_is_no_use_in_it_and_when_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        for is_closed_meanwhile in [false, true] {
            let Some(gate) = gate(folder.path()) else { return };
            let (close, closed) = oneshot::channel();
            let close = std::sync::Mutex::new(Some(close));
            let update = || {
                if is_closed_meanwhile {
                    drop(close.lock().unwrap().take());
                }
                async move {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    is_closed_meanwhile
                }
            };
            let (_server, pid) = watch::channel(None);
            let end = gate.keep(pid, closed, update);
            assert_eq!(tokio::join!(end, listed(folder.path())), ((), String::new()));
        }
    }
}
