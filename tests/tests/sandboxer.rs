//! A sandbox as containerd 2 makes it with the sandboxer "shim": by the shim's Sandbox service, then tasks in it. This is
//! the client, with containerd's calls in their order and the words of 2.3, faults between them; `pods` has a real one, of 2.1.

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use ampoule_shim::{
    image::Store,
    kvm,
    paths::{Environment, Paths},
};
use ampoule_tests::{assert_nothing_left, program, root, skip, stage};
use containerd_shim_protos::{
    api::{
        ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, Mount, ShutdownRequest,
        StartRequest, StateRequest, StatsRequest, WaitRequest,
    },
    bootstrap_api::{BootstrapParams, BootstrapResult},
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{Message, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
        SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest,
        StopSandboxRequest, WaitSandboxRequest,
    },
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use ttrpc::context::{self, Context};

/// For any call, in the bed too.
const LIMIT: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "test";
const SANDBOX: &str = "sandboxed";
/// `runtime.v1.PodSandboxConfig`: the pod's host name, and the only server of names.
const POD: &[u8] = b"\x12\x03web\x22\x0c\x0a\x0a192.0.2.53";

fn limit() -> Context {
    context::with_duration(LIMIT)
}

/// A network namespace that CRI has made for the pod, with a veth whose other end is here.
struct Network;

const NETNS: &str = "ampoule-sandboxer";
const MAC: &str = "02:00:00:00:77:02";

impl Network {
    fn new() -> Self {
        let network = Self;
        ip("netns add ampoule-sandboxer");
        ip(
            "link add sandboxer0 mtu 9000 type veth peer name eth0 mtu 9000 netns ampoule-sandboxer",
        );
        ip("address add 192.0.2.1/24 dev sandboxer0");
        ip("address add 2001:db8::1/64 dev sandboxer0 nodad");
        ip("link set sandboxer0 up");
        for inside in [
            "link set eth0 address 02:00:00:00:77:02 up",
            "address add 192.0.2.2/24 dev eth0",
            "address add 2001:db8::2/64 dev eth0 nodad",
            "route add default via 192.0.2.1",
            "route add 198.51.100.0/24 via 192.0.2.1 metric 9 mtu 1300",
            "neighbour add 192.0.2.9 lladdr 02:00:00:00:77:09 dev eth0",
        ] {
            ip(&format!("-n {NETNS} {inside}"));
        }
        network
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(NETNS)
    }

    /// The names of its interfaces, and those whose frames go elsewhere.
    fn state(&self) -> (String, String) {
        let mut tc = Command::new("tc");
        tc.args(["-n", NETNS, "qdisc", "show", "ingress"]);
        let redirected = program(tc).output().ended_with(0).text();
        (ip(&format!("-n {NETNS} -o link")), redirected)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let mut delete = Command::new("ip");
        delete.args(["netns", "delete", NETNS]);
        program(delete).output();
    }
}

fn ip(words: &str) -> String {
    let mut ip = Command::new("ip");
    ip.args(words.split(' '));
    program(ip).output().ended_with(0).text()
}

/// What the guest is to have, as it sees it itself.
const LOOK: &str = "ip address show eth0; \
    ip route; ip neigh; \
    for host in 192.0.2.1 2001:db8::1; do ping -c 1 -w 20 -s 8900 $host >/dev/null && echo reached $host; done";

const PINGS_NOBODY: &str = "ping -c 1 -w 2 192.0.2.1 >/dev/null || echo nobody";

/// Sends a mebibyte and gets it back, by either protocol.
async fn echoes(address: &str) {
    let sent: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    let talk = async {
        let mut stream = loop {
            match TcpStream::connect(address).await {
                Ok(stream) => break stream,
                // It does not listen yet.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        let (mut read, mut write) = stream.split();
        let mut got = vec![0; sent.len()];
        tokio::try_join!(write.write_all(&sent), read.read_exact(&mut got)).unwrap();
        got == sent
    };
    let done = tokio::time::timeout(LIMIT, talk).await;
    assert!(
        done.unwrap_or_else(|_| panic!("no echo of {address}")),
        "{address}: not what was sent"
    );
}

/// What containerd 2 keeps of a shim.
struct Shim {
    folder: TempDir,
    address: String,
    sandbox: SandboxClient,
    task: TaskClient,
}

impl Shim {
    /// A bundle without a specification, and the daemon that `start` leaves behind for it.
    async fn start() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join(SANDBOX)).unwrap();
        let params = BootstrapParams {
            instance_id: SANDBOX.into(),
            namespace: NAMESPACE.into(),
            socket_dir: Some(folder.path().join("s").display().to_string()),
            ..Default::default()
        };
        let output = binary(folder.path(), SANDBOX, "start", &params.write_to_bytes().unwrap());
        let address = BootstrapResult::parse_from_bytes(&output.stdout).unwrap().address;
        let client = Client::connect(&address).await.unwrap();
        let (sandbox, task) = (SandboxClient::new(client.clone()), TaskClient::new(client));
        Self { folder, address, sandbox, task }
    }

    async fn status(&self) -> SandboxStatusResponse {
        let request = SandboxStatusRequest {
            sandbox_id: SANDBOX.into(),
            verbose: true,
            ..Default::default()
        };
        self.sandbox.sandbox_status(limit(), &request).await.unwrap()
    }

    /// What it costs the host: memory in bytes, CPU time in microseconds.
    async fn cost(&self) -> (u64, u64) {
        let request = SandboxMetricsRequest { sandbox_id: SANDBOX.into(), ..Default::default() };
        let metrics = self.sandbox.sandbox_metrics(limit(), &request).await.unwrap().metrics;
        let metrics = metrics.unwrap();
        assert_eq!(metrics.id, SANDBOX);
        used(&metrics.data)
    }

    /// Starts a container of the pod as CRI makes it: its namespaces are those of the sandbox's process.
    async fn run(&self, id: &str, pid: u32, script: &str) {
        let request = member(self.folder.path(), id, pid, script);
        assert_eq!(self.task.create(limit(), &request).await.unwrap().pid, pid);
        let start = StartRequest { id: id.into(), ..Default::default() };
        assert_eq!(self.task.start(limit(), &start).await.unwrap().pid, pid);
    }

    async fn memory_of(&self, id: &str) -> u64 {
        let request = StatsRequest { id: id.into(), ..Default::default() };
        let stats = self.task.stats(limit(), &request).await.unwrap().stats;
        used(&stats.unwrap()).0
    }

    /// Waits for a container's end, and takes it away; returns its exit status.
    async fn end_of(&self, id: &str) -> u32 {
        let wait = WaitRequest { id: id.into(), ..Default::default() };
        let status = self.task.wait(limit(), &wait).await.unwrap().exit_status;
        let delete = DeleteRequest { id: id.into(), ..Default::default() };
        assert_eq!(self.task.delete(limit(), &delete).await.unwrap().exit_status, status);
        let shutdown = ShutdownRequest { id: id.into(), ..Default::default() };
        self.task.shutdown(limit(), &shutdown).await.unwrap();
        status
    }

    fn said(&self, id: &str) -> String {
        fs::read_to_string(self.folder.path().join(id).join("out")).unwrap()
    }
}

/// The shim's program as containerd runs it, in a bundle. It says nothing that is not its answer.
fn binary(folder: &Path, id: &str, verb: &str, input: &[u8]) -> Output {
    let bundle = folder.join(id);
    let mut command = Command::new(stage().join("bin/containerd-shim-ampoule-v2"));
    command.args(["-namespace", NAMESPACE, "-address", "/c.sock", "-id", id, verb]);
    command.current_dir(&bundle).env("AMPOULE_ROOT", folder.join("root"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = command.spawn().unwrap();
    running.stdin.take().unwrap().write_all(input).unwrap();
    let output = running.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{verb}: {output:?}");
    output
}

fn member(folder: &Path, id: &str, pid: u32, script: &str) -> CreateTaskRequest {
    let bundle = folder.join(id);
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    let shared = [("network", "net"), ("ipc", "ipc"), ("uts", "uts"), ("pid", "pid")];
    let shared = shared
        .map(|(kind, name)| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{name}") }));
    let ping = ["CAP_NET_RAW"];
    let namespaces = [&shared[..], &[json!({ "type": "mount" })]].concat();
    let spec = json!({
        "ociVersion": "1.1.0",
        "annotations": { "io.kubernetes.cri.sandbox-id": SANDBOX },
        "process": {
            "args": ["/bin/sh", "-c", script], "cwd": "/", "user": { "uid": 0, "gid": 0 },
            "capabilities": { "bounding": ping, "effective": ping, "permitted": ping },
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
        ],
        "linux": { "namespaces": namespaces },
    });
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    let paths = Paths::new(&Environment { root: Some(root().into()), ..Environment::default() });
    let image = Store::open(&paths.store).unwrap().resolve(&"alpine".parse().unwrap()).unwrap();
    // An only layer as containerd hands it over, for writing.
    let mount = Mount {
        type_: "erofs".into(),
        source: image.rootfs.display().to_string(),
        options: vec!["loop".into()],
        ..Default::default()
    };
    CreateTaskRequest {
        id: id.into(),
        bundle: bundle.display().to_string(),
        rootfs: vec![mount],
        stdout: format!("file://{}/out", bundle.display()),
        ..Default::default()
    }
}

/// Memory in bytes, and CPU time in microseconds.
fn used(metrics: &Any) -> (u64, u64) {
    match &*metrics.type_url {
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics = v1::Metrics::parse_from_bytes(&metrics.value).unwrap();
            (metrics.memory.usage.usage, metrics.cpu.usage.total / 1000)
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let metrics = v2::Metrics::parse_from_bytes(&metrics.value).unwrap();
            (metrics.memory.usage, metrics.cpu.usage_usec)
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_sandbox_comes_before_its_containers_and_goes_after_them() {
    if let Err(error) = kvm::open() {
        return skip("a_sandbox_comes_before_its_containers", &error.to_string());
    }
    let (network, shim) = (Network::new(), Shim::start().await);
    let bundle = shim.folder.path().join(SANDBOX);
    let id = || SANDBOX.to_string();
    let type_url = "runtime.v1.PodSandboxConfig".into();
    let create = CreateSandboxRequest {
        sandbox_id: id(),
        bundle_path: bundle.display().to_string(),
        netns_path: network.path().display().to_string(),
        options: Some(Any { type_url, value: POD.into(), ..Default::default() }).into(),
        ..Default::default()
    };
    shim.sandbox.create_sandbox(limit(), &create).await.unwrap();
    let created = shim.status().await;
    assert_eq!((&*created.state, created.pid), ("SANDBOX_NOTREADY", 0));

    let request = StartSandboxRequest { sandbox_id: id(), ..Default::default() };
    let started = shim.sandbox.start_sandbox(limit(), &request).await.unwrap();
    let pid = started.pid;
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let of_process = PathBuf::from(format!("/proc/{pid}/ns/net"));
    assert_eq!(inode(&of_process), inode(&network.path()));
    let ready = shim.status().await;
    assert_eq!((&*ready.state, ready.pid), ("SANDBOX_READY", pid));
    assert!(started.created_at.is_some() && started.created_at == ready.created_at);
    assert!(ready.info["kernel"].starts_with('6'), "{:?}", ready.info);
    let request = PlatformRequest { sandbox_id: id(), ..Default::default() };
    let platform = shim.sandbox.platform(limit(), &request).await.unwrap().platform.unwrap();
    assert_eq!((&*platform.os, &*platform.architecture), ("linux", "amd64"));
    let ping = PingRequest { sandbox_id: id(), ..Default::default() };
    shim.sandbox.ping_sandbox(limit(), &ping).await.unwrap();
    let ended = tokio::spawn({
        let (sandbox, request) =
            (shim.sandbox.clone(), WaitSandboxRequest { sandbox_id: id(), ..Default::default() });
        async move { sandbox.wait_sandbox(limit(), &request).await.unwrap() }
    });

    // One after the other: between them the VM stays, with what they share. Neither is their first process.
    for (name, found) in [("one", ""), ("two", "left by one\n")] {
        let script = format!(
            "hostname; test $$ -gt 1 && echo {name}; cat /etc/hostname /etc/resolv.conf; \
            grep -q localhost /etc/hosts && cat /dev/shm/*; echo left by {name} > /dev/shm/common; exit 3"
        );
        shim.run(name, pid, &script).await;
        assert_eq!(shim.end_of(name).await, 3);
        let said = format!("web\n{name}\nweb\nnameserver 192.0.2.53\n{found}");
        assert_eq!(shim.said(name), said);
        // For `delete`, after a crash.
        let saved = fs::read_to_string(shim.folder.path().join(name).join("init.pid")).unwrap();
        assert_eq!(saved, pid.to_string());
    }
    shim.run("network", pid, LOOK).await;
    assert_eq!(shim.end_of("network").await, 0);
    let seen = shim.said("network");
    let seen = seen.split_whitespace().collect::<Vec<_>>().join(" ");
    for expected in [
        MAC,
        "mtu 9000",
        "inet 192.0.2.2/24",
        "inet6 2001:db8::2/64 scope global",
        "default via 192.0.2.1 dev eth0",
        "192.0.2.0/24 dev eth0 scope link",
        "198.51.100.0/24 via 192.0.2.1 dev eth0 metric 9",
        "192.0.2.9 dev eth0 lladdr 02:00:00:00:77:09",
        "PERMANENT",
        "reached 192.0.2.1",
        "reached 2001:db8::1",
    ] {
        assert!(seen.contains(expected), "no {expected:?} in {seen}");
    }
    let (links, redirected) = network.state();
    assert!(links.contains("ampoule0") && redirected.lines().count() == 2, "{links}{redirected}");
    shim.run("three", pid, "exec nc -lk -p 8080 -e cat").await;
    echoes("192.0.2.2:8080").await;
    echoes("[2001:db8::2]:8080").await;
    // What the host filters at its end stays out.
    let filter = |verb| {
        let mut iptables = Command::new("iptables");
        iptables.args([verb, "INPUT", "-i", "sandboxer0", "-p", "icmp", "-j", "DROP"]);
        program(iptables).output().ended_with(0);
    };
    filter("-I");
    shim.run("filtered", pid, PINGS_NOBODY).await;
    assert_eq!((shim.end_of("filtered").await, &*shim.said("filtered")), (0, "nobody\n"));
    filter("-D");
    // Faults: its namespace loses its name, its tap is deleted; the pod lives on.
    ip(&format!("netns delete {NETNS}"));
    echoes("192.0.2.2:8080").await;
    ip(&format!("netns attach {NETNS} {pid}"));
    ip(&format!("-n {NETNS} link delete ampoule0"));
    shim.run("alone", pid, PINGS_NOBODY).await;
    assert_eq!((shim.end_of("alone").await, &*shim.said("alone")), (0, "nobody\n"));
    // And the interface is, from the host's end.
    ip("link delete sandboxer0");
    shim.run("less", pid, "while ip link show eth0; do sleep 0.2; done 2>&1").await;
    assert_eq!(shim.end_of("less").await, 0);
    assert!(shim.said("less").contains("can't find device"), "{}", shim.said("less"));
    // What containerd runs for a container that it knows nothing of any more: it ends that one alone.
    shim.run("four", pid, "exec sleep 600").await;
    let params = json!({ "version": 3, "address": shim.address, "protocol": "ttrpc" });
    fs::write(shim.folder.path().join("four/bootstrap.json"), params.to_string()).unwrap();
    let deleted = binary(shim.folder.path(), "four", "delete", b"").stdout;
    assert_eq!(DeleteResponse::parse_from_bytes(&deleted).unwrap().exit_status, 137);
    let gone = StateRequest { id: "four".into(), ..Default::default() };
    assert!(shim.task.state(limit(), &gone).await.is_err());
    assert_eq!(shim.status().await.state, "SANDBOX_READY");
    let ((memory, cpu), container) = (shim.cost().await, shim.memory_of("three").await);
    // A kernel, an agent and all containers: that is what the host pays for.
    assert!(memory > 16 << 20 && memory > container && cpu > 0, "{memory} {container} {cpu}");
    // A containerd that was started again asks so whether the sandbox is still there.
    let connect = ConnectRequest { id: id(), ..Default::default() };
    let daemon = shim.task.connect(limit(), &connect).await.unwrap().shim_pid;

    assert!(!ended.is_finished());
    let stop = StopSandboxRequest { sandbox_id: id(), timeout_secs: 5, ..Default::default() };
    let began = Instant::now();
    shim.sandbox.stop_sandbox(limit(), &stop).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    let ended = ended.await.unwrap();
    assert_eq!(ended.exit_status, 0);
    let stopped = shim.status().await;
    assert_eq!((&*stopped.state, stopped.pid), ("SANDBOX_NOTREADY", 0));
    assert!(stopped.exited_at.is_some() && stopped.exited_at == ended.exited_at);
    assert_eq!(shim.end_of("three").await, 137);
    let (links, redirected) = network.state();
    assert!(!links.contains("ampoule") && redirected.is_empty(), "{links}{redirected}");
    shim.sandbox.stop_sandbox(limit(), &stop).await.unwrap();

    let shutdown = ShutdownSandboxRequest { sandbox_id: id(), ..Default::default() };
    shim.sandbox.shutdown_sandbox(limit(), &shutdown).await.unwrap();
    let socket = Path::new(shim.address.strip_prefix("unix://").unwrap());
    while socket.exists() || fs::read_link(format!("/proc/{daemon}/exe")).is_ok() {
        assert!(began.elapsed() < LIMIT, "the daemon stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // containerd, when it sees that the daemon has gone.
    let deleted = binary(shim.folder.path(), SANDBOX, "delete", b"").stdout;
    assert_eq!(DeleteResponse::parse_from_bytes(&deleted).unwrap().exit_status, 137);
    assert_nothing_left(SANDBOX);
}
