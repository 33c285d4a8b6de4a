//! `ampoule-fsd` behind this machine's own kernel: its messages are relayed to and from `/dev/fuse`, so that
//! any program can be run on a share without a VM.

use std::{
    collections::HashSet,
    ffi::CString,
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use ampoule_fsd_api::{Access, Fsd};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    net::{
        AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send,
        shutdown, socketpair,
    },
};

/// Large enough for any message.
const MESSAGE: usize = 256 << 10;

/// A file server, mounted. Dropping it unmounts it and ends the server.
pub struct Mounted {
    pub fsd: Fsd,
    pub root: PathBuf,
    requests: Arc<OwnedFd>,
    _dir: tempfile::TempDir,
}

/// Why nothing can be mounted here, in a line.
pub fn impossible() -> Option<String> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let reason = match (rustix::process::geteuid().is_root(), device) {
        (false, _) => "needs root".to_owned(),
        (true, Err(e)) => format!("needs /dev/fuse: {e}"),
        (true, Ok(_)) => return None,
    };
    eprintln!("skipped: {reason}");
    Some(reason)
}

/// Opened as the shim does it.
pub fn path_of(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

impl Mounted {
    /// `shares`: what is to be found under the names "0", "1" and so on, and whether it is read-only.
    pub fn new(shares: &[(&Path, bool)]) -> Self {
        Self::prepared(shares, |_| ())
    }

    /// With something done just before it serves.
    pub fn prepared(shares: &[(&Path, bool)], prepare: impl FnOnce(&Fsd)) -> Self {
        let fsd = Fsd::spawn(
            Path::new(env!("CARGO_BIN_EXE_ampoule-fsd")),
            "test",
            Duration::from_secs(10),
        )
        .unwrap();
        for (number, (path, read_only)) in (0..).zip(shares) {
            let access = if *read_only { Access::Read } else { Access::Write };
            fsd.add(number, path_of(path).as_fd(), access, None).unwrap();
        }
        prepare(&fsd);
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        fsd.serve(theirs).unwrap();
        let requests = Arc::new(ours);
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        relay(mount(&root), &requests);
        Self { fsd, root, requests, _dir: dir }
    }

    pub fn share(&self, number: u32) -> PathBuf {
        self.root.join(number.to_string())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let root = CString::new(self.root.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: a NUL-terminated path.
        unsafe { libc::umount2(root.as_ptr(), libc::MNT_DETACH) };
        let _ = shutdown(&*self.requests, Shutdown::Both);
    }
}

fn mount(root: &Path) -> Arc<File> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!(
        "fd={},rootmode=40555,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let (root, options) = (
        CString::new(root.as_os_str().as_encoded_bytes()).unwrap(),
        CString::new(options).unwrap(),
    );
    // SAFETY: NUL-terminated strings.
    let mounted = unsafe {
        libc::mount(
            c"ampoule".as_ptr(),
            root.as_ptr(),
            c"fuse".as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    };
    assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
    Arc::new(device)
}

/// What the VMM's device does: each message once, and EIO for all when the file server is gone.
fn relay(device: Arc<File>, requests: &Arc<OwnedFd>) {
    let pending = Arc::new(Mutex::new(Some(HashSet::new())));
    let (from, to, waiting) = (device.clone(), requests.clone(), pending.clone());
    thread::spawn(move || {
        let mut message = vec![0; MESSAGE];
        while let Ok(length) = (&*from).read(&mut message) {
            let request = &message[..length];
            let unique = number(request, 8);
            let gone = match &mut *waiting.lock().unwrap() {
                Some(pending) => {
                    pending.insert(unique);
                    send(&*to, request, SendFlags::NOSIGNAL).is_err()
                }
                None => true,
            };
            if gone {
                answer_eio(&from, unique);
            }
        }
    });
    let from = requests.clone();
    thread::spawn(move || {
        let mut message = vec![0; MESSAGE];
        while let Ok((_, length @ 1..)) = recv(&*from, &mut message[..], RecvFlags::empty()) {
            if let Some(pending) = &mut *pending.lock().unwrap() {
                pending.remove(&number(&message, 8));
            }
            // A request whose process was killed has nobody to be answered.
            let _ = (&*device).write(&message[..length]);
        }
        for unique in pending.lock().unwrap().take().unwrap_or_default() {
            answer_eio(&device, unique);
        }
    });
}

fn number(message: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(message[at..at + 8].try_into().unwrap())
}

fn answer_eio(mut device: &File, unique: u64) {
    let mut reply = [0; 16];
    reply[..4].copy_from_slice(&16u32.to_ne_bytes());
    reply[4..8].copy_from_slice(&(-libc::EIO).to_ne_bytes());
    reply[8..].copy_from_slice(&unique.to_ne_bytes());
    let _ = device.write(&reply);
}
