//! Who the process is and what it may do: ids, capabilities, limits, signals.
//!
//! The order matters. Limits first (raising needs privilege), then the bounding set, the groups, the ids
//! with capabilities kept, the directory, and last the other capability sets. A seccomp filter without
//! no-new-privileges needs CAP_SYS_ADMIN: only then are the capability sets left for after the filter.

use std::{
    fs, io, mem,
    os::fd::{AsFd, BorrowedFd},
    ptr,
};

use rustix::{
    fs::{FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchown, fstat},
    io::Errno,
    process::{chdir, getcwd, umask},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stderr, stdin, stdout},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities,
        set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

use super::{
    paths::{Root, is_char_device},
    seccomp::Filter,
    user::User,
};
use crate::{
    oci::{Process, Rlimit},
    plan::{StepError, at, refuse},
};

const DEFAULT_UMASK: u32 = 0o022;
/// setrlimit(2)
const LIMITS: [(&str, libc::__rlimit_resource_t); 16] = [
    ("RLIMIT_CPU", libc::RLIMIT_CPU),
    ("RLIMIT_FSIZE", libc::RLIMIT_FSIZE),
    ("RLIMIT_DATA", libc::RLIMIT_DATA),
    ("RLIMIT_STACK", libc::RLIMIT_STACK),
    ("RLIMIT_CORE", libc::RLIMIT_CORE),
    ("RLIMIT_RSS", libc::RLIMIT_RSS),
    ("RLIMIT_NPROC", libc::RLIMIT_NPROC),
    ("RLIMIT_NOFILE", libc::RLIMIT_NOFILE),
    ("RLIMIT_MEMLOCK", libc::RLIMIT_MEMLOCK),
    ("RLIMIT_AS", libc::RLIMIT_AS),
    ("RLIMIT_LOCKS", libc::RLIMIT_LOCKS),
    ("RLIMIT_SIGPENDING", libc::RLIMIT_SIGPENDING),
    ("RLIMIT_MSGQUEUE", libc::RLIMIT_MSGQUEUE),
    ("RLIMIT_NICE", libc::RLIMIT_NICE),
    ("RLIMIT_RTPRIO", libc::RLIMIT_RTPRIO),
    ("RLIMIT_RTTIME", libc::RLIMIT_RTTIME),
];

pub struct Identity {
    pub user: User,
    umask: u32,
    no_new_privileges: bool,
    bounding: CapabilitySet,
    ambient: CapabilitySet,
    sets: CapabilitySets,
    limits: Vec<(libc::__rlimit_resource_t, Rlimit)>,
    /// Capability sets are set after the filter.
    late: bool,
}

impl Identity {
    pub fn new(process: &Process, user: User) -> Result<Self, StepError> {
        let wanted = &process.capabilities;
        let sets = CapabilitySets {
            effective: capability_set(&wanted.effective)?,
            permitted: capability_set(&wanted.permitted)?,
            inheritable: capability_set(&wanted.inheritable)?,
        };
        Ok(Self {
            user,
            umask: process.user.umask.unwrap_or(DEFAULT_UMASK),
            no_new_privileges: process.no_new_privileges,
            bounding: capability_set(&wanted.bounding)?,
            ambient: capability_set(&wanted.ambient)?,
            sets,
            limits: process.rlimits.iter().map(resource).collect::<Result<_, _>>()?,
            late: false,
        })
    }

    /// Takes the identity on, in the directory the process starts in.
    pub fn enter(&mut self, directory: &str, filtered: bool) -> Result<(), StepError> {
        // As root where its user may not go, as its user where root may not: either will do (runc).
        let entered = chdir(directory);
        self.limits.iter().try_for_each(|(number, limit)| set_limit(*number, limit))?;
        drop_bounding(self.bounding).map_err(at("capabilities", "bounding"))?;
        self.become_user()?;
        entered.or_else(|_| chdir(directory)).map_err(at("working directory", directory))?;
        check_directory(directory)?;
        umask(Mode::from_raw_mode(self.umask & 0o777));
        self.late = filtered && !self.no_new_privileges;
        if self.late {
            // The user's change took them out of effect.
            let mut all = capabilities(None).map_err(at("capabilities", "read"))?;
            all.effective = all.permitted;
            return set_capabilities(None, all).map_err(at("capabilities", "for the filter"));
        }
        self.set_capabilities()?;
        match self.no_new_privileges {
            true => set_no_new_privs(true).map_err(at("no new privileges", "process")),
            false => Ok(()),
        }
    }

    fn become_user(&self) -> Result<(), StepError> {
        let (uid, gid) = (Uid::from_raw(self.user.uid), Gid::from_raw(self.user.gid));
        let groups: Vec<Gid> = self.user.groups.iter().map(|g| Gid::from_raw(*g)).collect();
        set_keep_capabilities(true).map_err(at("user", "keep capabilities"))?;
        set_thread_groups(&groups).map_err(at("user", "groups"))?;
        set_thread_res_gid(gid, gid, gid).map_err(at("user", gid))?;
        set_thread_res_uid(uid, uid, uid).map_err(at("user", uid))?;
        set_keep_capabilities(false).map_err(at("user", "keep capabilities"))
    }

    fn set_capabilities(&self) -> Result<(), StepError> {
        set_capabilities(None, self.sets).map_err(at("capabilities", "process"))?;
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0)
            .map_err(at("capabilities", "ambient"))?;
        numbers(self.ambient)
            .try_for_each(|n| prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, n))
            .map_err(at("capabilities", "ambient"))
    }

    /// Puts the filter on; the workload is next.
    pub fn load(&self, filter: &Filter) -> Result<(), StepError> {
        filter.load()?;
        if self.late { self.set_capabilities() } else { Ok(()) }
    }
}

fn capability_set(names: &[String]) -> Result<CapabilitySet, StepError> {
    names.iter().try_fold(CapabilitySet::empty(), |set, name| {
        let known = name.strip_prefix("CAP_").and_then(CapabilitySet::from_name);
        let capability = known.ok_or_else(|| refuse("capabilities", name, "not known"))?;
        Ok(set | capability)
    })
}

fn numbers(set: CapabilitySet) -> impl Iterator<Item = libc::c_ulong> {
    (0..64).filter(move |n| set.bits() >> n & 1 == 1)
}

/// Keeps only these in the bounding set.
fn drop_bounding(keep: CapabilitySet) -> io::Result<()> {
    for n in numbers(!keep) {
        match prctl(libc::PR_CAPBSET_DROP, n as i32, 0) {
            // Beyond the last capability of this kernel.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            result => result?,
        }
    }
    Ok(())
}

fn resource(limit: &Rlimit) -> Result<(libc::__rlimit_resource_t, Rlimit), StepError> {
    let known = LIMITS.iter().find(|(name, _)| *name == limit.kind);
    let (_, number) = known.ok_or_else(|| refuse("limit", &limit.kind, "not known"))?;
    match limit.soft <= limit.hard {
        true => Ok((*number, limit.clone())),
        false => Err(refuse("limit", &limit.kind, "soft above hard")),
    }
}

/// What fs.nr_open is unless it is set.
const NR_OPEN: u64 = 1 << 20;

fn set_limit(number: libc::__rlimit_resource_t, limit: &Rlimit) -> Result<(), StepError> {
    let both = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: a whole rlimit64 that outlives the call.
    match unsafe { libc::setrlimit64(number, &both) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            _ if limit.kind == "RLIMIT_NOFILE" && limit.hard > NR_OPEN => {
                let cause = format!("{} is more than the guest's sysctl fs.nr_open", limit.hard);
                Err(refuse("limit", &limit.kind, cause))
            }
            error => Err(at("limit", &limit.kind)(error)),
        },
    }
}

/// A directory reached through a leaked descriptor lies outside of our root: the kernel says so.
fn check_directory(directory: &str) -> Result<(), StepError> {
    let cwd = getcwd(Vec::new()).map_err(at("working directory", directory))?;
    match cwd.to_bytes().first() {
        Some(b'/') => Ok(()),
        _ => Err(refuse("working directory", directory, "outside of the container")),
    }
}

/// No signal blocked, and none ignored that Rust ignores.
pub fn reset_signals() {
    // SAFETY: the set is local and initialised before it is read; SIG_DFL is always a valid disposition.
    unsafe {
        let mut none = mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Keys of other containers stay theirs. A kernel without keys has none to protect.
pub fn join_new_keyring() {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: keyctl(2) with a null name takes no other pointer.
    unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0, 0, 0, 0) };
}

/// The agent's own score is the lowest there is: it must not be inherited.
pub fn set_oom_score(score: i32) -> Result<(), StepError> {
    fs::write("/proc/self/oom_score_adj", score.to_string()).map_err(at("oom score", score))
}

/// Root of the user namespace just joined.
pub fn become_root() -> rustix::io::Result<()> {
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
}

/// Pipes become the user's, so that /dev/stdout can be opened again; the guest's /dev/null is exchanged
/// for the container's.
pub fn prepare_standard_streams(root: &Root, user: &User) -> Result<(), StepError> {
    for (n, stream) in [stdin(), stdout(), stderr()].into_iter().enumerate() {
        let stat = fstat(stream).map_err(at("standard streams", n))?;
        if is_char_device(&stat, 1, 3) {
            open_null(root, n).map_err(at("standard streams", "/dev/null"))?;
        } else if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo {
            give(stream, user).map_err(at("standard streams", n))?;
        }
    }
    Ok(())
}

fn open_null(root: &Root, n: usize) -> rustix::io::Result<()> {
    let null = root.open_with("/dev/null", OFlags::RDWR, ResolveFlags::NO_SYMLINKS)?;
    match (is_char_device(&fstat(&null)?, 1, 3), n) {
        (false, _) => Err(Errno::NODEV),
        (_, 0) => dup2_stdin(null),
        (_, 1) => dup2_stdout(null),
        _ => dup2_stderr(null),
    }
}

fn give(stream: BorrowedFd<'_>, user: &User) -> rustix::io::Result<()> {
    match fchown(stream.as_fd(), Some(Uid::from_raw(user.uid)), None) {
        // Not ours to give within a user namespace.
        Err(Errno::PERM | Errno::INVAL) => Ok(()),
        result => result,
    }
}

fn prctl(option: i32, second: i32, third: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take plain numbers.
    match unsafe { libc::prctl(option, second as libc::c_ulong, third, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_by_name() {
        let set = capability_set(&["CAP_CHOWN".into(), "CAP_CHECKPOINT_RESTORE".into()]).unwrap();
        assert_eq!(set.bits(), 1 | 1 << 40);
        assert_eq!(numbers(set).collect::<Vec<_>>(), [0, 40]);
        for bad in ["CHOWN", "CAP_NOTHING", "cap_chown", ""] {
            assert!(capability_set(&[bad.into()]).is_err(), "{bad}");
        }
    }

    #[test]
    fn limits_by_name() {
        let limit = |kind: &str, soft, hard| Rlimit { kind: kind.into(), soft, hard };
        assert_eq!(resource(&limit("RLIMIT_NOFILE", 1, 2)).unwrap().0, libc::RLIMIT_NOFILE);
        assert!(resource(&limit("RLIMIT_NOFILE", 3, 2)).is_err());
        assert!(resource(&limit("NOFILE", 1, 2)).is_err());
    }
}
