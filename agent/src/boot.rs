//! The agent as PID 1: from its first instruction to the end of the VM, in one readable recipe.
//!
//! Only what the host waits for comes before the hello; what a container needs comes while the
//! connection is being made.

use std::{fs, io, sync::Arc, time::Duration};

use ampoule_vmm_api::guest::Mark;
use rustix::{
    fs::{Mode, mkdir},
    io::Errno,
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
};
use tokio::{runtime, time::timeout};

use crate::{
    cgroup, host, network,
    plan::{StepError, at},
    ports,
    reaper::Reaper,
    registry::Registry,
    service::{Sandbox, Service},
};

/// Descriptors for the agent and, unless their spec says otherwise, for its containers.
const MAX_FILES: u64 = 1 << 20;
/// How long the containers may take to end when the VM is switched off.
const GOODBYE: Duration = Duration::from_secs(30);

/// Source and type, target, flags, options.
type FileSystem = (&'static str, &'static str, MountFlags, &'static str);

const NO_EXEC: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const NO_DEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// In this order. The kernel has mounted devtmpfs on /dev already.
const FILE_SYSTEMS: [FileSystem; 7] = [
    ("proc", "/proc", NO_EXEC, ""),
    ("sysfs", "/sys", NO_EXEC, ""),
    ("cgroup2", "/sys/fs/cgroup", NO_EXEC, "nsdelegate"),
    ("devpts", "/dev/pts", MountFlags::NOSUID.union(MountFlags::NOEXEC), "mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", NO_DEV, "mode=1777"),
    ("tmpfs", "/run", NO_DEV, "mode=0755"),
    ("tmpfs", "/tmp", NO_DEV, "mode=1777"),
];

/// Runs the guest and switches it off.
pub fn run() -> ! {
    ports::mark(Mark::AgentStarted);
    if let Err(error) = live() {
        // To the console, of which the host keeps the last lines.
        eprintln!("ampoule-agent: {error}");
    }
    rustix::fs::sync();
    ports::power_off()
}

fn live() -> Result<(), StepError> {
    mount_file_systems()?;
    ports::mark(Mark::Mounted);
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(at("boot", "runtime"))?;
    runtime.block_on(async {
        let reaper = Reaper::start().map_err(at("boot", "reaper"))?;
        let sandbox = Arc::new(Sandbox {
            reaper,
            containers: Registry::default(),
            networks: Default::default(),
            shutdown: Default::default(),
        });
        ports::mark(Mark::Hello);
        let dialling = tokio::spawn(host::dial());
        tokio::task::yield_now().await;
        prepare_for_containers()?;
        let stream = dialling
            .await
            .map_err(io::Error::from)
            .flatten()
            .map_err(at("boot", "connection to the host"))?;
        tokio::select! {
            served = host::serve(stream, Service(sandbox.clone())) => {
                served.map_err(|e| at("boot", "service")(io::Error::other(e)))?;
            }
            () = sandbox.shutdown.notified() => {}
        }
        goodbye(&sandbox).await;
        Ok(())
    })
}

fn mount_file_systems() -> Result<(), StepError> {
    for (kind, target, flags, options) in FILE_SYSTEMS {
        match mkdir(target, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(at("boot", target)(e)),
        }
        let options = std::ffi::CString::new(options).unwrap_or_default();
        mount(kind, target, kind, flags, options.as_c_str()).map_err(at("boot", target))?;
    }
    Ok(())
}

fn prepare_for_containers() -> Result<(), StepError> {
    network::loopback_up().map_err(at("boot", "lo"))?;
    cgroup::set_up().map_err(at("boot", "cgroup"))?;
    // Whatever a container does, the agent is not what the kernel kills for its memory.
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(at("boot", "oom_score_adj"))?;
    let files = Rlimit { current: Some(MAX_FILES), maximum: Some(MAX_FILES) };
    setrlimit(Resource::Nofile, files).map_err(at("boot", "file limit"))?;
    let processes = Rlimit { current: None, maximum: None };
    setrlimit(Resource::Nproc, processes).map_err(at("boot", "process limit"))
}

/// Ends every container and gives its disks back.
async fn goodbye(sandbox: &Sandbox) {
    let _ = cgroup::kill_all();
    let everything = async {
        for (id, container) in sandbox.containers.all() {
            if let Err(error) = container.destroy().await {
                eprintln!("ampoule-agent: {id}: {error}");
            }
        }
    };
    let _ = timeout(GOODBYE, everything).await;
}
