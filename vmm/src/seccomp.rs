//! System call filters, one for each kind of thread. What is not listed kills the process: there is no
//! `open`, `socket`, `connect`, `execve`, `fork` or `clone` in here, and no memory becomes executable.

use ampoule_vmm_api::seccomp::{Arguments::*, Filter, Rule, SeccompError, THREAD};
use libc::*;

/// KVM_RUN, `_IO(0xae, 0x80)`.
const KVM_RUN: u32 = 0xae80;
/// KVM_GET_REGS, `_IOR(0xae, 0x81, struct kvm_regs)`.
const KVM_GET_REGS: u32 = 0x8090_ae81;

/// A tap's offloads, and whether one of its queues is used; without effect on anything else.
const SET_OFFLOAD: u32 = TUNSETOFFLOAD as u32;
const SET_QUEUE: u32 = TUNSETQUEUE as u32;

/// The two modes of fallocate that a disk uses; neither changes the size of the file.
const PUNCH_HOLE: u32 = (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) as u32;
const ZERO_RANGE: u32 = (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE) as u32;

/// Device work, which is done on a vCPU's thread, the main one or that of a pair of queues.
const DEVICES: &[Rule] = &[
    // Eventfds from KVM.
    (SYS_read, Any),
    // The standard library's check, in debug builds, that what it closes is open.
    (SYS_fcntl, OneOf(1, &[F_GETFD as u32])),
    // Events to the shim; FUSE requests to ampoule-fsd.
    (SYS_sendmsg, Any),
    // vsock stops watching its streams when the guest resets it.
    (SYS_epoll_ctl, Any),
    // Time stamps, where the vDSO cannot answer.
    (SYS_clock_gettime, Any),
];

/// vCPU threads: the guest runs, and accesses to device registers are answered.
const VCPU: &[Rule] = &[
    // Run the guest; say where it was when KVM could not go on; tell a tap which offloads the driver has
    // accepted, which is done where it writes DRIVER_OK.
    (SYS_ioctl, OneOf(1, &[KVM_RUN, KVM_GET_REGS, SET_OFFLOAD])),
];

/// The main thread: control socket and devices.
const MAIN: &[Rule] = &[
    // The event loop, vsock's own set of streams, a network device's of its tap, the file system device's of its
    // socket.
    (SYS_epoll_wait, Any),
    (SYS_epoll_pwait, Any),
    // Room for the last message.
    (SYS_poll, Any),
    (SYS_ppoll, Any),
    // Requests with their descriptors; vsock streams; FUSE replies.
    (SYS_recvmsg, Any),
    (SYS_shutdown, Any),
    // Disks: read, write, flush, discard, write zeroes.
    (SYS_preadv, Any),
    (SYS_pwritev, Any),
    (SYS_fdatasync, Any),
    (SYS_fallocate, OneOf(1, &[PUNCH_HOLE, ZERO_RANGE])),
    // Frames from and to a tap.
    (SYS_readv, Any),
    (SYS_writev, Any),
    // When a network device may go on after a rate limit.
    (SYS_timerfd_settime, Any),
    // A disk being attached: its kind and size.
    (SYS_fstat, Any),
    (SYS_lseek, Any),
    // virtio-rng, and the seeds of hash maps.
    (SYS_getrandom, Any),
    // Goes on with a wait that a signal interrupted.
    (SYS_restart_syscall, Any),
];

/// Threads that serve further pairs of queues of network devices.
const PAIRS: &[Rule] = &[
    // The event loop, and each tap's own set.
    (SYS_epoll_wait, Any),
    (SYS_epoll_pwait, Any),
    // Frames.
    (SYS_readv, Any),
    (SYS_writev, Any),
    // When they may go on after a rate limit.
    (SYS_timerfd_settime, Any),
    // Whether the tap's queue is used, when the driver has said that.
    (SYS_ioctl, OneOf(1, &[SET_QUEUE])),
    // Goes on with a wait that a signal interrupted.
    (SYS_restart_syscall, Any),
];

/// The filter of vCPU threads.
pub fn vcpu() -> Result<Filter, SeccompError> {
    Filter::compile(&[THREAD, DEVICES, VCPU])
}

/// The filter of the main thread.
pub fn main() -> Result<Filter, SeccompError> {
    Filter::compile(&[THREAD, DEVICES, MAIN])
}

/// The filter of the threads of further pairs of queues.
pub fn pairs() -> Result<Filter, SeccompError> {
    Filter::compile(&[THREAD, DEVICES, PAIRS])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What no thread may ever do.
    const FORBIDDEN: [c_long; 20] = [
        SYS_open,
        SYS_openat,
        SYS_openat2,
        SYS_creat,
        SYS_socket,
        SYS_socketpair,
        SYS_connect,
        SYS_bind,
        SYS_execve,
        SYS_execveat,
        SYS_fork,
        SYS_vfork,
        SYS_clone,
        SYS_clone3,
        SYS_ptrace,
        SYS_mount,
        SYS_unshare,
        SYS_setns,
        SYS_prctl,
        SYS_io_uring_setup,
    ];

    #[test]
    fn the_filters_compile_and_leave_the_dangerous_calls_out() {
        let kinds = [VCPU, MAIN, PAIRS];
        for lists in kinds.map(|kind| [THREAD, DEVICES, kind]) {
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

    /// Runs `act` in a child process under a filter; returns the signal that killed it, or 0.
    fn under(filter: &Filter, act: fn()) -> i32 {
        // SAFETY: the child calls only what is written here and leaves by _exit.
        unsafe {
            let pid = fork();
            if pid == 0 {
                if filter.install().is_err() {
                    _exit(1);
                }
                act();
                syscall(SYS_exit_group, 0);
            }
            let mut status = 0;
            waitpid(pid, &mut status, 0);
            assert!(
                WIFSIGNALED(status) || WEXITSTATUS(status) == 0,
                "the filter was not installed"
            );
            if WIFSIGNALED(status) { WTERMSIG(status) } else { 0 }
        }
    }

    #[test]
    fn forbidden_calls_and_arguments_kill() {
        fn call(number: c_long, arguments: [c_long; 3]) {
            // SAFETY: system calls that fail or do nothing, in a child made for it.
            unsafe { syscall(number, arguments[0], arguments[1], arguments[2]) };
        }
        let (main, vcpu, pairs) = (main().unwrap(), vcpu().unwrap(), pairs().unwrap());
        let allowed: [fn(); 4] = [
            || call(SYS_getpid, [0; 3]),
            || call(SYS_write, [-1, 0, 0]),
            || call(SYS_mmap, [0, 0, PROT_READ.into()]),
            || call(SYS_madvise, [0, 0, MADV_DONTNEED.into()]),
        ];
        let forbidden: [fn(); 7] = [
            || call(SYS_openat, [-1, 0, 0]),
            || call(SYS_socket, [AF_UNIX.into(), SOCK_STREAM.into(), 0]),
            || call(SYS_execve, [0; 3]),
            || call(SYS_clone, [0; 3]),
            || call(SYS_mmap, [0, 0, (PROT_READ | PROT_EXEC).into()]),
            || call(SYS_mprotect, [0, 0, PROT_EXEC.into()]),
            || call(SYS_ioctl, [-1, FIOCLEX as c_long, 0]),
        ];
        for filter in [&main, &vcpu, &pairs] {
            assert!(allowed.iter().all(|act| under(filter, *act) == 0));
            assert!(forbidden.iter().all(|act| under(filter, *act) == SIGSYS));
        }
        let run: fn() = || call(SYS_ioctl, [-1, KVM_RUN.into(), 0]);
        assert_eq!((under(&vcpu, run), under(&main, run)), (0, SIGSYS));
        let offload: fn() = || call(SYS_ioctl, [-1, SET_OFFLOAD.into(), 0]);
        assert_eq!((under(&vcpu, offload), under(&main, offload)), (0, SIGSYS));
        let queue: fn() = || call(SYS_ioctl, [-1, SET_QUEUE.into(), 0]);
        assert_eq!(
            (under(&vcpu, queue), under(&main, queue), under(&pairs, queue)),
            (SIGSYS, SIGSYS, 0)
        );
        let receive: fn() = || call(SYS_recvmsg, [-1, 0, 0]);
        assert_eq!((under(&vcpu, receive), under(&main, receive)), (SIGSYS, 0));
    }
}
