//! System containers: images whose PID 1 is an init boot to their default target, run services, and end by their own
//! stop signal.

use std::{
    thread,
    time::{Duration, Instant},
};

use ampoule_tests::{Detached, ampoule, detached};

/// As `docker run` has to be told for systemd, too.
const OPTIONS: [&str; 12] = [
    "--privileged",
    "--memory",
    "512m",
    "-e",
    "container=ampoule",
    "--tmpfs",
    "/run",
    "--tmpfs",
    "/run/lock",
    "--tmpfs",
    "/tmp",
    "--stop-signal",
];
const LIMIT: Duration = Duration::from_secs(120);

fn boots(image: &str, stop_signal: &str) -> Detached {
    detached([&OPTIONS[..], &[stop_signal, image, "/sbin/init"]].concat())
}

/// Waits until a script prints this.
fn until(sandbox: &Detached, script: &str, wanted: &str) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let said = sandbox.sh(script);
        if said.text() == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{script}: {said:?}\n{:?}", sandbox.verb("logs"));
        thread::sleep(Duration::from_millis(500));
    }
}

fn stops(sandbox: &Detached) -> i64 {
    ampoule(["stop", "--timeout", "60", &sandbox.0]).output().ended_with(0);
    sandbox.record()["ended"]["code"].as_i64().unwrap()
}

mod inits_again {
    use super::*;

    #[test]
    fn systemd_boots_debian() {
        let debian = boots("systemd", "RTMIN+3");
        until(&debian, "systemctl is-system-running", "running");
        let says = |script: &str, word: &str| {
            let said = debian.sh(script).ended_with(0).text();
            assert!(said.contains(word), "no {word:?} in {script}: {said}");
        };
        says("systemctl --failed --no-pager", "0 loaded units");
        says("systemctl is-active $(systemctl get-default)", "active");
        says("journalctl --no-pager", "Reached target");
        // Services have cgroups of their own, with limits.
        says(
            "systemctl set-property --runtime systemd-journald MemoryMax=100M; sleep 1; \
            cat /sys/fs/cgroup/system.slice/systemd-journald.service/memory.max",
            "104857600",
        );
        // As with runc: who switches a PID namespace off is killed by a signal in its place (pid_namespaces(7)).
        assert_eq!(stops(&debian), 130);
    }

    #[test]
    fn openrc_boots_alpine() {
        let alpine = boots("openrc", "USR2");
        until(&alpine, "rc-status --runlevel", "default");
        let crond = "rc-service crond start >/dev/null && rc-service crond status; ps -o comm | grep -c crond";
        let said = alpine.sh(crond).ended_with(0).text();
        assert!(said.contains("started") && said.ends_with('1'), "{said}");
        assert_eq!(stops(&alpine), 130);
    }
}
