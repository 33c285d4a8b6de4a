//! Docker inside: its daemon is the command of a privileged sandbox, and containers run in there.

use std::{env, fs, io::Write, net::TcpListener, path::Path, process::Command, thread};

use ampoule_tests::{
    Runtime, ampoule, detached,
    engine::{Engine, Kind},
    host_address, no_passt, program, skip,
};
use tempfile::TempDir;

/// As Docker's image of itself does it: once controllers are handed on, only leaves of a cgroup tree have processes.
const START: &str = "cd /sys/fs/cgroup && mkdir init && echo 0 > init/cgroup.procs && \
    sed 's/^/+/; s/ / +/g' cgroup.controllers > cgroup.subtree_control && exec dockerd --storage-driver overlay2 2>&1";

/// As `docker save` writes it.
fn save_alpine(folder: &Path) {
    let archive = env::var("AMPOULE_ALPINE_ARCHIVE").expect("see tests/run");
    let mut copy = Command::new("skopeo");
    copy.args(["--insecure-policy", "copy", "--quiet", &format!("oci-archive:{archive}")]);
    copy.arg(format!("docker-archive:{}/alpine.tar:alpine:latest", folder.display()));
    program(copy).output().ended_with(0);
}

mod inside_again {
    use super::*;

    #[test]
    fn docker_runs_containers() {
        let images = TempDir::new().unwrap();
        save_alpine(images.path());
        let shared = format!("{}:/images:ro", images.path().display());
        let options =
            ["--privileged", "--memory", "1g", "-v", "/var/lib/docker", "--tmpfs", "/run"];
        let network = match no_passt() {
            None => &["--network", "user"][..],
            Some(why) => {
                skip("inside_again::docker_runs_containers: --network user", why);
                &[]
            }
        };
        let command = ["-v", &shared, "docker", "sh", "-c", START];
        let docker = detached([&options[..], network, &command].concat());
        docker.logged("API listen on");
        let does = |script: &str| docker.sh(script).ended_with(0).text();
        assert_eq!(
            does("docker info --format '{{.Driver}} {{.CgroupVersion}} {{.DriverStatus}}'"),
            "overlay2 2 [[Backing Filesystem extfs] [Supports d_type true] [Native Overlay Diff true] [userxattr false]]"
        );
        assert_eq!(does("docker load --input /images/alpine.tar"), "Loaded image: alpine:latest");
        let limited = "docker run --rm --network none --memory 64m --read-only alpine \
            sh -c 'cat /sys/fs/cgroup/memory.max; uname -r; touch /x 2>&1'; true";
        let said = does(limited);
        assert!(
            said.starts_with("67108864\n6.") && said.ends_with("Read-only file system"),
            "{said}"
        );

        // Its bridge, with a port published to the sandbox.
        does("docker run -d --name web -p 8080:80 alpine nc -lk -p 80 -e echo hello");
        let address = does("docker inspect --format '{{.NetworkSettings.IPAddress}}' web");
        assert_eq!(does(&format!("docker run --rm alpine nc -w 20 {address} 80")), "hello");
        assert_eq!(does("bash -c 'cat < /dev/tcp/127.0.0.1/8080'"), "hello");
        assert_eq!(does("docker exec web sh -c 'echo 6 > /x; cat /x'"), "6");
        if !network.is_empty() {
            // By Docker's NAT out of the container, and by passt's out of the sandbox.
            let host = TcpListener::bind((host_address().unwrap(), 0)).unwrap();
            let address = host.local_addr().unwrap();
            thread::spawn(move || host.accept().map(|(mut to, _)| to.write_all(b"outside\n")));
            let (ip, port) = (address.ip(), address.port());
            assert_eq!(does(&format!("docker run --rm alpine nc -w 20 {ip} {port}")), "outside");
        }
        ampoule(["stop", "--timeout", "60", &docker.0]).output().ended_with(0);
        assert_eq!(docker.record()["ended"]["code"], 0);
    }

    /// On a tmpfs, in the place of a directory of the sandbox's own disk.
    fn docker_in(kind: Kind) {
        let e = match Engine::new(kind, Runtime::Ampoule) {
            Ok(engine) => engine,
            Err(why) => return skip(&format!("inside_again::docker_in: {kind:?}"), &why),
        };
        let image = env::var("AMPOULE_DOCKER_TAR").expect("see tests/run");
        e.does(&["import", &image, "docker"]).ended_with(0);
        let images = e.inside.path("/run/test/images");
        fs::create_dir(&images).unwrap();
        save_alpine(&images);
        let options = "-d --name docker --privileged --memory 1g --tmpfs /run \
            --tmpfs /var/lib/docker:rw,exec,dev,suid,size=500m -v /run/test/images:/images:ro docker sh -c";
        let words: Vec<&str> = options.split_whitespace().chain([START]).collect();
        let bridge = if kind == Kind::Podman { "podman" } else { "bridge" };
        e.run_with_network(bridge, &words).output().ended_with(0);
        e.until_logged("docker", "API listen on");
        let does =
            |script: &str| e.does(&["exec", "docker", "sh", "-c", script]).ended_with(0).text();
        assert_eq!(does("docker load --input /images/alpine.tar"), "Loaded image: alpine:latest");
        let limited = "docker run --rm --memory 64m alpine cat /sys/fs/cgroup/memory.max";
        assert_eq!(does(limited), "67108864");
        // Out of the container in the sandbox, and out of that: the engine's end of its bridge.
        let outer = "docker run --rm --network host alpine ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'";
        let outer = does(outer);
        let reach =
            format!("docker run --rm alpine ping -c 1 -w 20 {outer} >/dev/null && echo reached");
        assert_eq!(does(&reach), "reached");
        e.does(&["stop", "-t", "60", "docker"]).ended_with(0);
        assert_eq!(e.inspect("docker", "{{.State.Status}} {{.State.ExitCode}}"), "exited 0");
        e.does(&["rm", "docker"]).ended_with(0);
    }

    #[test]
    fn docker_in_podman() {
        docker_in(Kind::Podman);
    }

    #[test]
    fn docker_in_docker() {
        docker_in(Kind::Docker);
    }

    #[test]
    fn docker_in_docker_26() {
        docker_in(Kind::Docker26);
    }
}
