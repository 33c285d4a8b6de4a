//! Docker inside: its daemon is the command of a privileged sandbox, and containers run in there.

use std::{env, process::Command};

use ampoule_tests::{ampoule, detached, program};
use tempfile::TempDir;

/// As Docker's image of itself does it: once controllers are handed on, only leaves of a cgroup tree have processes.
const START: &str = "cd /sys/fs/cgroup && mkdir init && echo 0 > init/cgroup.procs && \
    sed 's/^/+/; s/ / +/g' cgroup.controllers > cgroup.subtree_control && exec dockerd --storage-driver overlay2 2>&1";

mod inside_again {
    use super::*;

    #[test]
    fn docker_runs_containers() {
        let images = TempDir::new().unwrap();
        let archive = env::var("AMPOULE_ALPINE_ARCHIVE").expect("see tests/run");
        let [from, to] = [
            format!("oci-archive:{archive}"),
            format!("docker-archive:{}/alpine.tar:alpine:latest", images.path().display()),
        ];
        let mut copy = Command::new("skopeo");
        copy.args(["--insecure-policy", "copy", "--quiet", &from, &to]);
        program(copy).output().ended_with(0);

        let shared = format!("{}:/images:ro", images.path().display());
        let options =
            ["--privileged", "--memory", "1g", "-v", "/var/lib/docker", "--tmpfs", "/run"];
        let command = ["-v", &shared, "docker", "sh", "-c", START];
        let docker = detached([&options[..], &command].concat());
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
        ampoule(["stop", "--timeout", "60", &docker.0]).output().ended_with(0);
        assert_eq!(docker.record()["ended"]["code"], 0);
    }
}
