//! The table of the OCI runtime specification (1.2, and of 1.3 what `oci-spec` knows): who sees to each field, and how.
//!
//! It decides what happens to a spec ([`super::decide`]), what `ampoule features` says, and the page `shim/oci-spec.md`.
//! A path has `[]` for the entries of a list; a row stands for all below it. What is not in here is not known, and
//! refused unless `strict = false`.

/// Who sees to a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The agent, in the guest.
    Guest,
    /// The host.
    Host,
    /// The host's kernel, in a cgroup of the sandbox's own. Where there is none it is as [`By::Strict`].
    Cgroup,
    /// Every sandbox has it, or something stronger, by being a VM.
    Vm,
    /// Nobody: asked for, it is refused, whatever the configuration says.
    Refused,
    /// Nobody, and no protection is lost with it: refused, unless `strict = false`.
    Strict,
}
use By::{Cgroup, Guest, Host, Refused, Strict, Vm};

/// A row.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub path: &'static str,
    pub by: By,
    /// How it is enforced; or why not, and the way out.
    pub note: &'static str,
}

const fn row(path: &'static str, by: By, note: &'static str) -> Field {
    Field { path, by, note }
}

const OTHER_SYSTEM: &str = "for another operating system; leave it out";
const HOOK_OF_HOST: &str = "a program of the host, in its namespaces; the state's pid is a process in the sandbox's network namespace";
const HOOK_LIMIT: &str = "30 seconds unless given";
pub const NO_CGROUP: &str =
    "this container has no cgroup on the host that is its VM's alone; leave it out";
const NOT_IN_V2: &str = "not in cgroup v2, which guests have; leave it out";
const OBSOLETE: &str = "obsolete since Linux 5.4; use linux.resources.memory.limit";
const MAPPED: &str = "of a tmpfs; of binds by the host, which takes root; of others it is refused";
const OF_USERS: &str =
    "with a user namespace; where one is joined by its path, they must be those that it has";
const NOTHING_LISTENS: &str =
    "a listener of the host cannot be reached from the guest; use another action";
const BY_KERNEL: &str = "";

/// In the order of the specification.
pub const FIELDS: &[Field] = &[
    row("ociVersion", Host, "1.x"),
    row("root.path", Host, "becomes a disk of the VM"),
    row("root.readonly", Guest, BY_KERNEL),
    row("mounts[].destination", Guest, "absolute, without `..`; resolved inside the root"),
    row(
        "mounts[].type",
        Guest,
        "proc, sysfs, tmpfs, devpts, mqueue, cgroup (v2), cgroup2; scratch, of ampoule alone: a directory of the disk that the root is written to, without its overlay; bind: directories and files are shared, live; devices, sockets, FIFOs, `/` and file systems of the host's kernel are refused",
    ),
    row("mounts[].source", Guest, BY_KERNEL),
    row(
        "mounts[].options",
        Guest,
        "those of `ampoule features`; others go to the file system, which refuses what it does not know",
    ),
    row("mounts[].uidMappings", Guest, MAPPED),
    row("mounts[].gidMappings", Guest, MAPPED),
    row("process.terminal", Guest, BY_KERNEL),
    row("process.consoleSize.height", Guest, BY_KERNEL),
    row("process.consoleSize.width", Guest, BY_KERNEL),
    row("process.cwd", Guest, "made where it is missing"),
    row("process.env", Guest, BY_KERNEL),
    row("process.args", Guest, BY_KERNEL),
    row("process.commandLine", Refused, OTHER_SYSTEM),
    row("process.user.uid", Guest, BY_KERNEL),
    row("process.user.gid", Guest, BY_KERNEL),
    row("process.user.umask", Guest, "0022 unless given"),
    row("process.user.additionalGids", Guest, BY_KERNEL),
    row("process.user.username", Guest, "looked up in the container's own /etc/passwd, /etc/group"),
    row("process.capabilities.bounding", Guest, BY_KERNEL),
    row("process.capabilities.effective", Guest, BY_KERNEL),
    row("process.capabilities.inheritable", Guest, BY_KERNEL),
    row("process.capabilities.permitted", Guest, BY_KERNEL),
    row("process.capabilities.ambient", Guest, BY_KERNEL),
    row("process.rlimits[].type", Guest, BY_KERNEL),
    row("process.rlimits[].soft", Guest, BY_KERNEL),
    row("process.rlimits[].hard", Guest, BY_KERNEL),
    row("process.noNewPrivileges", Guest, BY_KERNEL),
    row(
        "process.apparmorProfile",
        Vm,
        "container engines' default profiles and `unconfined`: what they keep from the host is not in the VM; others are refused",
    ),
    row(
        "process.selinuxLabel",
        Vm,
        "container engines' usual types (container_t, ...), likewise; others are refused",
    ),
    row("process.oomScoreAdj", Guest, "the first container's is its VMM's on the host too"),
    row("process.ioPriority.class", Guest, BY_KERNEL),
    row("process.ioPriority.priority", Guest, BY_KERNEL),
    row("process.scheduler.policy", Guest, BY_KERNEL),
    row("process.scheduler.nice", Guest, BY_KERNEL),
    row("process.scheduler.priority", Guest, BY_KERNEL),
    row(
        "process.scheduler.flags",
        Guest,
        "SCHED_FLAG_RECLAIM, SCHED_FLAG_KEEP_POLICY, SCHED_FLAG_KEEP_PARAMS; others are refused",
    ),
    row("process.scheduler.runtime", Guest, BY_KERNEL),
    row("process.scheduler.deadline", Guest, BY_KERNEL),
    row("process.scheduler.period", Guest, BY_KERNEL),
    row(
        "process.execCPUAffinity.initial",
        Guest,
        "CPUs of the VM; for execs, an exec's own before the container's",
    ),
    row("process.execCPUAffinity.final", Guest, "likewise"),
    row("hostname", Guest, "needs a UTS namespace of the container's own"),
    row("domainname", Guest, "likewise"),
    row("hooks.prestart[].path", Host, HOOK_OF_HOST),
    row("hooks.prestart[].args", Host, BY_KERNEL),
    row("hooks.prestart[].env", Host, BY_KERNEL),
    row("hooks.prestart[].timeout", Host, HOOK_LIMIT),
    row("hooks.createRuntime[].path", Host, HOOK_OF_HOST),
    row("hooks.createRuntime[].args", Host, BY_KERNEL),
    row("hooks.createRuntime[].env", Host, BY_KERNEL),
    row("hooks.createRuntime[].timeout", Host, HOOK_LIMIT),
    row(
        "hooks.createContainer",
        Refused,
        "a program of the host that works on the container's mounts, which are in the VM; use createRuntime or startContainer",
    ),
    row(
        "hooks.startContainer[].path",
        Guest,
        "a program of the container, with its command's user, capabilities and seccomp profile; the state's bundle is `/`",
    ),
    row("hooks.startContainer[].args", Guest, BY_KERNEL),
    row("hooks.startContainer[].env", Guest, BY_KERNEL),
    row("hooks.startContainer[].timeout", Guest, "30 seconds unless given; a start has 60 in all"),
    row(
        "hooks.poststart[].path",
        Host,
        "a program of the host, likewise; if it fails the container is killed",
    ),
    row("hooks.poststart[].args", Host, BY_KERNEL),
    row("hooks.poststart[].env", Host, BY_KERNEL),
    row("hooks.poststart[].timeout", Host, HOOK_LIMIT),
    row(
        "hooks.poststop[].path",
        Host,
        "a program of the host; if it fails that is logged; not run for a shim that was killed",
    ),
    row("hooks.poststop[].args", Host, BY_KERNEL),
    row("hooks.poststop[].env", Host, BY_KERNEL),
    row("hooks.poststop[].timeout", Host, HOOK_LIMIT),
    row(
        "annotations",
        Host,
        "`io.ampoule.SETTING`, see `ampoule config --help`; others mean nothing here",
    ),
    row(
        "linux.namespaces[].type",
        Guest,
        "a kind that is not named is shared with the VM; mount must be there",
    ),
    row(
        "linux.namespaces[].path",
        Guest,
        "for further containers of a sandbox: the first one's; on the host only the network's is looked at",
    ),
    row("linux.uidMappings[].containerID", Guest, OF_USERS),
    row("linux.uidMappings[].hostID", Guest, "an id of the VM"),
    row("linux.uidMappings[].size", Guest, BY_KERNEL),
    row("linux.gidMappings[].containerID", Guest, OF_USERS),
    row("linux.gidMappings[].hostID", Guest, "an id of the VM"),
    row("linux.gidMappings[].size", Guest, BY_KERNEL),
    row("linux.timeOffsets", Guest, "with a time namespace of the container's own"),
    row(
        "linux.devices[].path",
        Guest,
        "devices every Linux has under the same numbers: null, zero, full, random, urandom, tty, kmsg, fuse, net/tun, loop-control; FIFOs; block devices of the host become disks of the VM; others are refused. Where `linux.resources.devices` allows all of them (`--privileged`) the list is that of the host, and the guest's own take its place: these, and loop0 to loop7; a block device is passed in if it is listed twice, or at another path than the host's",
    ),
    row("linux.devices[].type", Guest, BY_KERNEL),
    row(
        "linux.devices[].major",
        Guest,
        "of a disk that is passed in, the guest's takes its place, here and in `linux.resources.devices`",
    ),
    row("linux.devices[].minor", Guest, BY_KERNEL),
    row("linux.devices[].fileMode", Guest, BY_KERNEL),
    row("linux.devices[].uid", Guest, BY_KERNEL),
    row("linux.devices[].gid", Guest, BY_KERNEL),
    row(
        "linux.netDevices",
        Strict,
        "interfaces of the host cannot be moved into a guest; leave it out",
    ),
    row("linux.cgroupsPath", Vm, "in the guest a container's cgroup has its id for a name"),
    row("linux.rootfsPropagation", Guest, "among mounts of the VM"),
    row("linux.maskedPaths", Guest, BY_KERNEL),
    row("linux.readonlyPaths", Guest, BY_KERNEL),
    row(
        "linux.mountLabel",
        Vm,
        "container engines' usual types (container_file_t, ...); others are refused",
    ),
    row("linux.sysctl", Guest, "any: the kernel is the sandbox's own"),
    row("linux.resources.devices[].allow", Guest, "a BPF program"),
    row("linux.resources.devices[].type", Guest, BY_KERNEL),
    row("linux.resources.devices[].major", Guest, BY_KERNEL),
    row("linux.resources.devices[].minor", Guest, BY_KERNEL),
    row("linux.resources.devices[].access", Guest, BY_KERNEL),
    row("linux.resources.memory.limit", Guest, "memory.max; also how large the VM is"),
    row("linux.resources.memory.reservation", Guest, "memory.low"),
    row("linux.resources.memory.swap", Guest, "memory.swap.max, less the limit"),
    row("linux.resources.memory.kernel", Strict, OBSOLETE),
    row("linux.resources.memory.kernelTCP", Strict, OBSOLETE),
    row("linux.resources.memory.swappiness", Strict, NOT_IN_V2),
    row("linux.resources.memory.disableOOMKiller", Strict, NOT_IN_V2),
    row("linux.resources.memory.useHierarchy", Vm, "always so in cgroup v2"),
    row(
        "linux.resources.memory.checkBeforeUpdate",
        Guest,
        "a limit below what is used is refused, not enforced by the OOM killer",
    ),
    row("linux.resources.cpu.shares", Guest, "cpu.weight, as Kubernetes converts it"),
    row("linux.resources.cpu.quota", Guest, "cpu.max; also how many CPUs the VM has"),
    row("linux.resources.cpu.period", Guest, "likewise"),
    row("linux.resources.cpu.burst", Guest, "cpu.max.burst"),
    row("linux.resources.cpu.idle", Guest, "cpu.idle"),
    row("linux.resources.cpu.realtimeRuntime", Strict, NOT_IN_V2),
    row("linux.resources.cpu.realtimePeriod", Strict, NOT_IN_V2),
    row(
        "linux.resources.cpu.cpus",
        Host,
        "the VM and its file server run on them; those of all containers of a sandbox together",
    ),
    row(
        "linux.resources.cpu.mems",
        Host,
        "all memory nodes of the host; a choice of them is refused",
    ),
    row("linux.resources.pids.limit", Guest, "pids.max"),
    row(
        "linux.resources.blockIO.weight",
        Cgroup,
        "io.bfq.weight if the host has it, else io.weight, converted as runc does; refused if it has neither",
    ),
    row("linux.resources.blockIO.leafWeight", Strict, NOT_IN_V2),
    row(
        "linux.resources.blockIO.weightDevice",
        Cgroup,
        "likewise, of a whole disk of the host that such weights are in force on; others, and `leafWeight`, are refused",
    ),
    row(
        "linux.resources.blockIO.throttleReadBpsDevice",
        Cgroup,
        "io.max; the device is a whole disk of the host",
    ),
    row("linux.resources.blockIO.throttleWriteBpsDevice", Cgroup, "likewise"),
    row("linux.resources.blockIO.throttleReadIOPSDevice", Cgroup, "likewise"),
    row("linux.resources.blockIO.throttleWriteIOPSDevice", Cgroup, "likewise"),
    row("linux.resources.hugepageLimits[].pageSize", Guest, BY_KERNEL),
    row("linux.resources.hugepageLimits[].limit", Guest, "hugetlb.SIZE.max"),
    row("linux.resources.network", Strict, NOT_IN_V2),
    row("linux.resources.rdma", Strict, "a sandbox has no RDMA devices; leave it out"),
    row("linux.resources.unified", Guest, "any file of the container's cgroup that the guest has"),
    row("linux.seccomp.defaultAction", Guest, "all but SCMP_ACT_NOTIFY"),
    row("linux.seccomp.defaultErrnoRet", Guest, BY_KERNEL),
    row("linux.seccomp.architectures", Vm, "a guest runs x86-64 programs alone, and filters those"),
    row("linux.seccomp.flags", Guest, BY_KERNEL),
    row("linux.seccomp.listenerPath", Refused, NOTHING_LISTENS),
    row("linux.seccomp.listenerMetadata", Refused, NOTHING_LISTENS),
    row(
        "linux.seccomp.syscalls[].names",
        Guest,
        "names that libseccomp does not know match nothing",
    ),
    row("linux.seccomp.syscalls[].action", Guest, "all but SCMP_ACT_NOTIFY"),
    row("linux.seccomp.syscalls[].errnoRet", Guest, BY_KERNEL),
    row("linux.seccomp.syscalls[].args[].index", Guest, BY_KERNEL),
    row("linux.seccomp.syscalls[].args[].value", Guest, BY_KERNEL),
    row("linux.seccomp.syscalls[].args[].valueTwo", Guest, BY_KERNEL),
    row("linux.seccomp.syscalls[].args[].op", Guest, BY_KERNEL),
    row("linux.intelRdt", Strict, "the host's cache cannot be divided from a guest; leave it out"),
    row("linux.memoryPolicy", Strict, "a sandbox has one memory node; leave it out"),
    row("linux.personality.domain", Guest, "LINUX, LINUX32"),
    row("linux.personality.flags", Strict, "the specification defines none; leave it out"),
    row("solaris", Refused, OTHER_SYSTEM),
    row("windows", Refused, OTHER_SYSTEM),
    row("zos", Refused, OTHER_SYSTEM),
    row("freebsd", Refused, OTHER_SYSTEM),
    row("vm", Refused, "the VM is ampoule's to choose; see `sandbox` in config.toml"),
    row("uidMappings", Refused, "use linux.uidMappings"),
    row("gidMappings", Refused, "use linux.gidMappings"),
];

/// The row of a path.
pub fn find(path: &str) -> Option<&'static Field> {
    FIELDS.iter().find(|field| field.path == path)
}

/// Whether there are rows below a path.
pub fn has_below(path: &str) -> bool {
    FIELDS.iter().any(|field| is_below(field.path, path))
}

/// Whether `path` is a part of what `above` names.
pub fn is_below(path: &str, above: &str) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.starts_with(['.', '[', '{']))
}
