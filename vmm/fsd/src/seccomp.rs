//! System call filters, one for each kind of thread. What is not listed kills the process:
//! there is no `socket`, `connect`, `execve`, `fork`, `clone`, `mount` or `ioctl` in here, no way to open a file by
//! its handle, and no memory becomes executable.

use ampoule_vmm_api::seccomp::{
    Arguments::{self, *},
    Filter, Rule, SeccompError, THREAD,
};
use libc::*;

/// fcntl(2) for the standard library's check, in debug builds, that what it closes is open.
const IS_OPEN: Arguments = OneOf(1, &[F_GETFD as u32]);

/// Further, of all threads.
const COMMON: &[Rule] = &[
    // Seeds of hash maps.
    (SYS_getrandom, Any),
    // Goes on with a wait that a signal interrupted.
    (SYS_restart_syscall, Any),
];

/// The main thread: the shim's requests.
const MAIN: &[Rule] = &[
    (SYS_fcntl, IS_OPEN),
    // Waiting for one.
    (SYS_poll, Any),
    (SYS_ppoll, Any),
    // A request with its descriptor, its reply.
    (SYS_recvmsg, Any),
    (SYS_sendmsg, Any),
];

/// The workers: the guest's requests.
const WORKER: &[Rule] = &[
    // A message, its answer.
    (SYS_recvfrom, Any),
    (SYS_sendto, Any),
    // Names: each is one component below a share's descriptor, or a number in `/proc/self/fd`.
    (SYS_openat, Any),
    (SYS_readlinkat, Any),
    (SYS_unlinkat, Any),
    (SYS_renameat2, Any),
    // Making things.
    (SYS_mkdirat, Any),
    (SYS_mknodat, Any),
    (SYS_symlinkat, Any),
    (SYS_linkat, Any),
    // As the guest's process: its umask, ids and group, without the capabilities it has not.
    (SYS_umask, Any),
    (SYS_setfsuid, Any),
    (SYS_setfsgid, Any),
    (SYS_setgroups, Any),
    (SYS_capset, Any),
    // Attributes.
    (SYS_statx, Any),
    (SYS_fstatfs, Any),
    (SYS_fchmodat, Any),
    (SYS_fchownat, Any),
    (SYS_utimensat, Any),
    (SYS_ftruncate, Any),
    // Extended attributes.
    (SYS_setxattr, Any),
    (SYS_getxattr, Any),
    (SYS_listxattr, Any),
    (SYS_removexattr, Any),
    // What is in files and directories.
    (SYS_pread64, Any),
    (SYS_pwrite64, Any),
    (SYS_pwritev2, Any),
    (SYS_fsync, Any),
    (SYS_fdatasync, Any),
    (SYS_fallocate, Any),
    (SYS_lseek, Any),
    (SYS_copy_file_range, Any),
    (SYS_getdents64, Any),
    // Locks, which nobody waits for; a share's root for the guest.
    (
        SYS_flock,
        OneOf(1, &[(LOCK_SH | LOCK_NB) as u32, (LOCK_EX | LOCK_NB) as u32, LOCK_UN as u32]),
    ),
    (
        SYS_fcntl,
        OneOf(1, &[F_GETFD as u32, F_DUPFD_CLOEXEC as u32, F_OFD_SETLK as u32, F_OFD_GETLK as u32]),
    ),
];

/// The workers, further, of a server that tells hints.
const TELLING: &[Rule] = &[
    // That the guest is to forget; how long it may take, where the host's kernel maps no clock.
    (SYS_sendmsg, Any),
    (SYS_clock_gettime, Any),
    // What the guest knows; its handles are only compared.
    (SYS_fanotify_mark, Any),
    (SYS_name_to_handle_at, Any),
];

/// The thread that tells what the host changes.
const WATCH: &[Rule] = &[
    (SYS_fcntl, IS_OPEN),
    // Events.
    (SYS_read, Any),
    // Hints, and room for them.
    (SYS_sendmsg, Any),
    (SYS_poll, Any),
    (SYS_ppoll, Any),
];

/// The filter of the main thread.
pub fn main() -> Result<Filter, SeccompError> {
    Filter::compile(&[THREAD, COMMON, MAIN])
}

/// The filter of the threads that answer the guest.
pub fn worker(telling: bool) -> Result<Filter, SeccompError> {
    Filter::compile(&[THREAD, COMMON, WORKER, if telling { TELLING } else { &[] }])
}

/// The filter of the thread that tells what the host changes.
pub fn watch() -> Result<Filter, SeccompError> {
    Filter::compile(&[THREAD, COMMON, WATCH])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What no thread may ever do.
    const FORBIDDEN: [c_long; 26] = [
        SYS_open,
        SYS_openat2,
        SYS_open_by_handle_at,
        SYS_creat,
        SYS_chdir,
        SYS_fchdir,
        SYS_chroot,
        SYS_pivot_root,
        SYS_mount,
        SYS_move_mount,
        SYS_open_tree,
        SYS_unshare,
        SYS_setns,
        SYS_setuid,
        SYS_setresuid,
        SYS_socket,
        SYS_connect,
        SYS_execve,
        SYS_execveat,
        SYS_fork,
        SYS_clone,
        SYS_clone3,
        SYS_ptrace,
        SYS_kill,
        SYS_ioctl,
        SYS_io_uring_setup,
    ];

    #[test]
    fn the_filters_compile_and_leave_the_dangerous_calls_out() {
        for lists in [
            [THREAD, COMMON, WORKER, TELLING],
            [THREAD, COMMON, WATCH, &[]],
            [THREAD, COMMON, MAIN, &[]],
        ] {
            Filter::compile(&lists).unwrap();
            let mut allowed: Vec<_> =
                lists.concat().into_iter().map(|(syscall, _)| syscall).collect();
            assert!(FORBIDDEN.iter().all(|forbidden| !allowed.contains(forbidden)));
            let count = allowed.len();
            allowed.sort();
            allowed.dedup();
            assert_eq!(allowed.len(), count, "a second rule for a call would replace the first");
        }
    }
}
