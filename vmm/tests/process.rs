//! The program as a process, as far as it gets without KVM: how it is confined, how it refuses, how it ends.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    fs::{self, File},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use ampoule_vmm_api::{
    Channel, DiskConfig, Event, Request, StopCause, VmConfig, VmmExit, VmmProcess,
    console::ConsoleReader,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const LIMIT: Duration = Duration::from_secs(10);

fn start() -> (VmmProcess, Channel) {
    let (ours, theirs) = Channel::pair().unwrap();
    (VmmProcess::spawn(Path::new(env!("CARGO_BIN_EXE_ampoule-vmm")), "test", theirs).unwrap(), ours)
}

fn readable(fd: impl AsFd) {
    let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).unwrap(), 1, "too late");
}

/// The next event, or `None` at the end.
fn next(channel: &Channel) -> Option<Event> {
    readable(channel);
    channel.recv().ok().map(|(event, _)| event)
}

fn exit(vmm: &mut VmmProcess) -> VmmExit {
    readable(&*vmm);
    vmm.wait().unwrap()
}

fn config() -> VmConfig {
    VmConfig {
        vcpus: 1,
        memory_mib: 64,
        cmdline: String::new(),
        disks: vec![DiskConfig { id: "guest".into(), read_only: true }],
        spare_disks: 0,
        guest_cid: 3,
        listen: vec![],
        hide_random: false,
        nets: vec![],
        share: false,
    }
}

/// The only answer there can be without KVM.
fn refused(request: &Request, fds: &[BorrowedFd<'_>]) -> String {
    let (mut vmm, channel) = start();
    channel.send(request, fds).unwrap();
    let Some(Event::Stopped { cause, detail, .. }) = next(&channel) else { panic!("no answer") };
    assert_eq!(cause, StopCause::BootFailed);
    assert_eq!(exit(&mut vmm), VmmExit::Code(StopCause::BootFailed.exit_code().into()));
    assert_eq!(vmm.stderr(), b"");
    detail
}

#[test]
fn it_ends_with_the_shim() {
    let (mut vmm, channel) = start();
    drop(channel);
    assert_eq!(exit(&mut vmm), VmmExit::Code(StopCause::ShimGone.exit_code().into()));
}

#[test]
fn a_boot_that_cannot_work_says_why() {
    let null = File::open("/dev/null").unwrap();
    let (_console, console) = ConsoleReader::new().unwrap();
    let fds = [null.as_fd(), null.as_fd(), console.as_fd(), null.as_fd()];
    assert_eq!(
        refused(&Request::Boot(config()), &fds),
        "KVM: the descriptor passed for /dev/kvm is not KVM's"
    );
    assert_eq!(
        refused(&Request::Boot(config()), &fds[..3]),
        "3 descriptors came with the boot request instead of 4"
    );
    let many = VmConfig { vcpus: 99, ..config() };
    assert_eq!(
        refused(&Request::Boot(many), &fds),
        "the number of vCPUs is 99, which is not between 1 and 16"
    );
    assert_eq!(refused(&Request::Stop, &[]), "the first request is not Boot");
}

/// What /proc says of the process once it waits for its first request.
fn confined(vmm: &VmmProcess) -> (PathBuf, String) {
    let proc = PathBuf::from(format!("/proc/{}", vmm.pid()));
    let end = Instant::now() + LIMIT;
    loop {
        // The last step of the confinement makes /proc/PID belong to root: it may become unreadable.
        let status = fs::read_to_string(proc.join("status")).unwrap();
        if status.contains("NoNewPrivs:\t1") {
            sleep(Duration::from_millis(50));
            return (proc, status);
        }
        assert!(Instant::now() < end, "not confined in time: {status}");
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn it_is_confined_before_it_reads_anything() {
    let (vmm, _channel) = start();
    let (proc, _) = confined(&vmm);
    let status = fs::read_to_string(proc.join("status")).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let empty = format!("{set}:\t0000000000000000");
        // The bounding set of a caller that may not change it limits nothing: there is nothing to gain.
        let may = set != "CapBnd" || rustix::process::geteuid().is_root();
        assert!(!may || status.contains(&empty), "{set}: {status}");
    }
    let permitted = vmm.stderr().is_empty();
    if permitted && rustix::process::geteuid().is_root() {
        let root: Vec<_> = fs::read_dir(proc.join("root")).unwrap().collect();
        assert!(root.is_empty(), "{root:?}");
        assert_eq!(fs::read_to_string(proc.join("mountinfo")).unwrap().lines().count(), 1);
        for namespace in ["mnt", "net", "ipc", "uts", "cgroup", "pid"] {
            let of = |proc: &Path| fs::read_link(proc.join("ns").join(namespace)).unwrap();
            assert_ne!(of(&proc), of(Path::new("/proc/self")), "{namespace}");
        }
        let limits = fs::read_to_string(proc.join("limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"));
    }
}
