//! Podman and Docker run containers: the same tests with runc, which proves every expectation, and with ampoule.

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use ampoule_tests::{
    Disk, Runtime,
    engine::{Engine, Kind},
    program,
    screen::Screen,
    skip, stage,
};

/// `engine!(name = Kind Runtime: test...)`: a module with these tests, each a function that takes an [`Engine`].
macro_rules! engine {
    ($name:ident = $kind:ident $runtime:ident: $($test:ident)*) => {
        mod $name {
            use super::*;
            $(#[test] fn $test() {
                match Engine::new(Kind::$kind, Runtime::$runtime) {
                    Ok(engine) => super::$test(&engine),
                    Err(why) => skip(concat!(stringify!($name), "::", stringify!($test)), &why),
                }
            })*
        }
    };
}

engine!(runc_podman = Podman Runc: life foreground network names pod disk);
engine!(runc_docker = Docker Runc: life foreground network names compose disk);
engine!(runc_docker_26 = Docker26 Runc: life foreground network names compose);
engine!(ampoule_podman = Podman Ampoule: life foreground network names pod disk refusals);
engine!(ampoule_docker = Docker Ampoule: life disk refusals);
engine!(ampoule_docker_again = Docker Ampoule: foreground network names compose);
engine!(ampoule_docker_26 = Docker26 Ampoule: life network names compose disk);
engine!(ampoule_docker_26_again = Docker26 Ampoule: foreground refusals);

/// The engine has systemd make a scope for each container, in which then is what that costs the host.
fn scope(kind: Kind, runtime: Runtime) {
    let e = match Engine::under_systemd(kind, runtime) {
        Ok(engine) => engine,
        Err(why) => return skip(&format!("under_systemd: {kind:?}"), &why),
    };
    let run = ["-d", "--name", "one", "--memory", "128m", "alpine", "sleep", "1000"];
    // Docker 26 has it made by who is called by a command line, too.
    let by: &[&str] = if kind == Kind::Docker26 { &["--runtime", runtime.name()] } else { &[] };
    e.run(&[by, &run].concat()).output().ended_with(0);
    let id = e.inspect("one", "{{.Id}}");
    let scope = match kind {
        Kind::Podman => format!("/machine.slice/libpod-{id}.scope"),
        Kind::Docker | Kind::Docker26 => format!("/system.slice/docker-{id}.scope"),
    };
    let pid = e.inspect("one", "{{.State.Pid}}");
    let cgroup = fs::read_to_string(e.inside.path(format!("/proc/{pid}/cgroup"))).unwrap();
    assert!(cgroup.contains(&scope), "{cgroup}");
    let scope = e.inside.path(format!("/sys/fs/cgroup{scope}"));
    assert!(scope.join("memory.current").exists());
    if runtime == Runtime::Ampoule {
        let members = fs::read_to_string(scope.join("cgroup.procs")).unwrap();
        assert!(members.lines().count() > 1, "the VM, too: {members}");
    }
    let stats = ["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "one"];
    let stats = e.does(&stats).ended_with(0).text();
    assert!(!stats.starts_with("0 ") && !stats.contains(" 0B /"), "{stats}");
    e.does(&["exec", "one", "true"]).ended_with(0);
    e.does(&["update", "--memory", "96m", "one"]).ended_with(0);
    e.does(&["kill", "one"]).ended_with(0);
    e.does(&["rm", "-f", "one"]).ended_with(0);
    assert!(!scope.exists());
}

/// How long a running container may take to have another network, in the bed too.
const LIMIT: Duration = Duration::from_secs(60);

/// Who may open /dev/kvm, and has ids to give to a user namespace, needs no root: neither for the VM nor for its network.
fn ordinary_user() {
    if ["newuidmap", "slirp4netns", "podman"]
        .iter()
        .any(|name| !Path::new("/usr/bin").join(name).exists())
    {
        return skip("podman_again::ordinary_user", "it takes podman, uidmap and slirp4netns");
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", ORDINARY_USER]).arg(stage());
    command.args([env::var("AMPOULE_ALPINE_ARCHIVE").expect("see tests/run").as_str(), PODMAN]);
    let out = program(command).output();
    let said = "guest\n7\nfrom the host\n0\nreached\nin exec\nfrom the guest 1234";
    assert_eq!(out.text(), said, "{out:?}");
}

mod podman_again {
    use super::*;

    #[test]
    fn ordinary_user() {
        super::ordinary_user();
    }

    #[test]
    fn under_systemd() {
        scope(Kind::Podman, Runtime::Runc);
        scope(Kind::Podman, Runtime::Ampoule);
    }
}

mod docker_again {
    use super::*;

    #[test]
    fn under_systemd() {
        scope(Kind::Docker, Runtime::Runc);
        scope(Kind::Docker, Runtime::Ampoule);
    }
}

mod docker_26_again {
    use super::*;

    #[test]
    fn under_systemd() {
        scope(Kind::Docker26, Runtime::Runc);
        scope(Kind::Docker26, Runtime::Ampoule);
    }
}

/// Of a mount namespace of its own; the stage, the image and what the user does are arguments.
const ORDINARY_USER: &str = r#"set -e
mount -t tmpfs none /mnt; mount --make-rshared /; mount -t tmpfs none /run
home=/run/joe; mkdir -p $home/.config/containers /run/user/1234
for file in passwd group subuid subgid; do touch /etc/$file; cp /etc/$file /mnt; done
echo joe:x:1234:1234::$home:/bin/sh >> /mnt/passwd; echo joe:x:1234: >> /mnt/group
echo joe:300000:65536 >> /mnt/subuid; echo joe:300000:65536 >> /mnt/subgid
for file in passwd group subuid subgid; do mount --bind /mnt/$file /etc/$file; done
mknod -m 666 /mnt/kvm c 10 232; mount --bind /mnt/kvm /dev/kvm; chmod 666 /dev/net/tun
cp -rL "$0" $home/ampoule; cp "$1" $home/alpine.tar
printf '%s\n' '[containers]' 'default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]' '[engine]' \
    'cgroup_manager = "cgroupfs"' 'events_logger = "file"' 'runtime_supports_json = ["ampoule"]' \
    "runtimes.ampoule = ['$home/ampoule/bin/ampoule']" > $home/.config/containers/containers.conf
chown -R 1234:1234 $home /run/user/1234; cd $home
exec setpriv --reuid 1234 --regid 1234 --clear-groups env -i HOME=$home USER=joe XDG_RUNTIME_DIR=/run/user/1234 \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -c "$2""#;

const PODMAN: &str = r#"
image=$(podman pull --quiet oci-archive:alpine.tar)
run() { podman --runtime ampoule run "$@"; }
run --rm --network none $image sh -c 'uname -r | grep -q ampoule && echo guest; exit 7'; echo $?
mkdir data; echo from the host > data/host
run --rm --network none -v $HOME/data:/data $image sh -c 'cat /data/host; echo from the guest > /data/guest'; echo $?
run -d --name one $image sleep 1000 >/dev/null
podman exec one ping -c 1 -w 20 10.0.2.2 >/dev/null && echo reached
podman exec one echo in exec; podman rm -f -t 0 one >/dev/null
echo $(cat data/guest) $(stat -c %u data/guest)
"#;

/// A workload that ends by TERM with 43.
const POLITE: &str = "trap 'echo bye; exit 43' TERM; echo up; while :; do sleep 0.1; done";

fn life(e: &Engine) {
    let options = ["-d", "--name", "one", "--env", "A=a", "--memory", "128m", "--tmpfs", "/tmpfs"];
    let run = [&options[..], &["alpine", "sh", "-c", POLITE]].concat();
    e.run(&run).output().ended_with(0);
    e.until_logged("one", "up");
    let ps = e.does(&["ps", "--format", "{{.Names}} {{.Status}}"]).ended_with(0).text();
    assert!(ps.starts_with("one Up"), "{ps}");
    let pid = e.inspect("one", "{{.State.Pid}}");
    assert!(fs::exists(e.inside.path(format!("/proc/{pid}/status"))).unwrap(), "{pid}");

    let options = ["exec", "-i", "--env", "B=b", "--workdir", "/tmp", "--user", "nobody", "one"];
    let script = ["sh", "-c", "echo $A $B $PWD $(id -un); cat; echo err >&2; exit 5"];
    let exec = e.call(&[&options[..], &script].concat()).stdin("piped\n").output().ended_with(5);
    assert_eq!((&*exec.text(), &*exec.error()), ("a b /tmp nobody\npiped", "err\n"));
    let nosuch = e.does(&["exec", "one", "nosuch"]);
    assert!([126, 127].contains(&nosuch.code), "{nosuch:?}");
    let said = nosuch.text() + &nosuch.error();
    assert!(said.contains("nosuch") && said.contains("not found"), "{said}");
    e.does(&["exec", "-d", "one", "sleep", "1000"]).ended_with(0);
    e.does(&["update", "--memory", "96m", "one"]).ended_with(0);
    top(e, &pid);
    if e.kind == Kind::Podman {
        copied(e, "one");
    }

    e.does(&["pause", "one"]).ended_with(0);
    assert_eq!(e.inspect("one", "{{.State.Status}}"), "paused");
    e.does(&["unpause", "one"]).ended_with(0);
    let stats = ["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "one"];
    let stats = e.does(&stats).ended_with(0).text();
    assert!(!stats.starts_with("0 ") && !stats.contains(" 0B /"), "{stats}");

    e.does(&["exec", "one", "sh", "-c", WRITES]).ended_with(0);
    seen_while_it_runs(e);
    e.does(&["stop", "-t", "20", "one"]).ended_with(0);
    assert_eq!(e.inspect("one", "{{.State.Status}} {{.State.ExitCode}}"), "exited 43");
    assert_eq!(e.does(&["logs", "one"]).ended_with(0).text(), "up\nbye");
    seen_when_it_has_ended(e);
    e.does(&["start", "one"]).ended_with(0);
    let found = e.does(&["exec", "one", "sh", "-c", FOUND]).ended_with(1).text();
    assert_eq!(found, "given\n700\nown", "what it wrote is there when it is started again");
    e.does(&["kill", "one"]).ended_with(0);
    assert_eq!(e.does(&["wait", "one"]).ended_with(0).text(), "137");
    e.does(&["rm", "one"]).ended_with(0);
    assert_eq!(e.does(&["ps", "--all", "--quiet"]).ended_with(0).text(), "");
}

/// Of all kinds: new, removed, a directory that takes the place of another.
const WRITES: &str = "echo written > /written; rm /etc/motd; mkdir -m 700 /folder; ln -s /written /folder/link; \
    rm -r /etc/apk; mkdir /etc/apk; touch /etc/apk/own";

const FOUND: &str = "cat /folder/link; stat -c %a /folder; ls /etc/apk; ls /etc/motd";

/// Docker pauses a container to commit it, Podman does not.
fn seen_while_it_runs(e: &Engine) {
    e.does(&["commit", "one", "live"]).ended_with(0);
    e.does(&["create", "--name", "live", "--network", "none", "live", "true"]).ended_with(0);
    e.does(&["cp", "live:/written", "/run/test/live"]).ended_with(0);
    let live = fs::read_to_string(e.inside.path("/run/test/live")).unwrap();
    assert_eq!(live, "written\n");
    e.does(&["rm", "live"]).ended_with(0);
    for name in ["/later", "/and-later"] {
        e.does(&["exec", "one", "touch", name]).ended_with(0);
        let diff = e.does(&["diff", "one"]).ended_with(0).text();
        for line in ["A /written", "D /etc/motd", &format!("A {name}")] {
            assert!(diff.lines().any(|found| found == line), "{line}: {diff}");
        }
    }
    if e.kind == Kind::Docker26 {
        // It leaves the container's root mounted after an export, with runc too.
        return;
    }
    e.does(&["exec", "one", "rm", "/later"]).ended_with(0);
    e.does(&["export", "--output", "/run/test/tar", "one"]).ended_with(0);
    let tar = e.inside.path("/run/test/tar");
    let mut list = Command::new("tar");
    list.args(["t", "--file"]).arg(&tar).args(["and-later", "written", "bin/busybox"]);
    program(list).output().ended_with(0);
    let mut gone = Command::new("tar");
    gone.args(["t", "--file"]).arg(&tar).arg("later");
    program(gone).output().ended_with(2);
    fs::remove_file(tar).unwrap();
}

/// The engine has its files, and gives it others.
fn seen_when_it_has_ended(e: &Engine) {
    e.does(&["cp", "one:/written", "/run/test/copy"]).ended_with(0);
    let copy = e.inside.path("/run/test/copy");
    assert_eq!(fs::read_to_string(&copy).unwrap(), "written\n");
    let diff = e.does(&["diff", "one"]).ended_with(0).text();
    for line in ["A /written", "D /etc/motd", "A /folder", "A /folder/link", "A /etc/apk/own"] {
        assert!(diff.lines().any(|found| found == line), "{line}: {diff}");
    }
    e.does(&["commit", "one", "copy"]).ended_with(0);
    let found = e.run(&["--rm", "copy", "sh", "-c", FOUND]).output().ended_with(1).text();
    assert_eq!(found, "written\n700\nown");
    let mut disks = e.inside.command("find");
    disks.args(["/run/test", "-name", "ampoule.ext4"]);
    assert_eq!(program(disks).output().text(), "", "what was on it is on the host");
    fs::write(copy, "given\n").unwrap();
    e.does(&["cp", "/run/test/copy", "one:/written"]).ended_with(0);
}

/// Podman runs the `ps` of the image when it is given options; Docker looks for the container's processes on the host.
fn top(e: &Engine, pid: &str) {
    let (top, found) = match e.kind {
        Kind::Podman => (["top", "one", "-o", "pid,args"], "sleep 1000"),
        Kind::Docker | Kind::Docker26 => (["top", "one", "-o", "pid,args"], pid),
    };
    let top = e.does(&top).ended_with(0).text();
    assert!(top.contains(found), "{top}");
    if e.kind != Kind::Podman && e.runtime == Runtime::Ampoule {
        assert_eq!(top.lines().count(), 2, "{top}");
    }
}

/// Podman looks for the files and processes of a running container where its process is.
fn copied(e: &Engine, name: &str) {
    let of = |path: &str| format!("{name}:{path}");
    let write = "mkdir -p /dir/sub; echo of it > /dir/sub/file; ln -s /dir/sub /link; echo shm > /tmpfs/file; \
        printf '#!/bin/sh' > /dir/run; chmod 4750 /dir/run; chown 5:6 /dir/sub/file";
    e.does(&["exec", name, "sh", "-c", write]).ended_with(0);
    let here = e.inside.path("/run/test/copied");
    fs::create_dir_all(&here).unwrap();
    e.does(&["cp", &of("/dir"), "/run/test/copied"]).ended_with(0);
    assert_eq!(fs::read_to_string(here.join("dir/sub/file")).unwrap(), "of it\n");
    assert_eq!(fs::metadata(here.join("dir/run")).unwrap().mode() & 0o7777, 0o4750);
    // By a link that leads to another place on the host, and of a mount of the container's own.
    e.does(&["cp", &of("/link/file"), "/run/test/copied/by-link"]).ended_with(0);
    assert_eq!(fs::read_to_string(here.join("by-link")).unwrap(), "of it\n");
    let tar = e.does(&["cp", &of("/tmpfs/file"), "-"]).ended_with(0).text();
    assert!(tar.contains("shm\n"), "{tar:?}");
    // It is there on the host.
    let absent = e.does(&["cp", &of("/run/test/copied/dir"), "/run/test/no"]).ended_with(125);
    absent.says(&["\"/run/test/copied/dir\" could not be found", "no such file or directory"]);

    e.does(&["cp", "/run/test/copied/dir", &of("/tmpfs")]).ended_with(0);
    let mut tar = Command::new("tar");
    tar.args(["c", "-C"]).arg(here.join("dir/sub")).arg("file");
    let tar = tar.output().unwrap().stdout;
    e.call(&["cp", "-", &of("/tmp")]).stdin(tar).output().ended_with(0);
    // What has changed is seen at once.
    let found = "cat /tmpfs/dir/sub/file /tmp/file; stat -c '%a %u' /tmpfs/dir/run; \
        rm /dir/sub/file; echo other > /dir/sub/file";
    let found = e.does(&["exec", name, "sh", "-c", found]).ended_with(0).text();
    assert_eq!(found, "of it\nof it\n4750 0");
    e.does(&["cp", &of("/dir/sub/file"), "/run/test/copied/again"]).ended_with(0);
    assert_eq!(fs::read_to_string(here.join("again")).unwrap(), "other\n");
    let top = e.does(&["top", name]).ended_with(0).text();
    assert!(top.contains("sh -c") && !top.contains("ampoule"), "{top}");
    fs::remove_dir_all(here).unwrap();
}

fn foreground(e: &Engine) {
    // Podman's tmpfs begin with what they hide, Docker's are empty.
    let script = "cat | wc -c; ls /etc/apk | grep -c arch; cat /data/file /one; echo guest > /data/new; \
        echo vol > /vol/x; touch /etc/apk/x /x; touch /one /data/ro/x; exit 7";
    let shared = e.inside.path("/run/test/shared");
    fs::create_dir_all(shared.join("ro")).unwrap();
    fs::write(shared.join("file"), "from the host\n").unwrap();
    let volumes = "-v /run/test/shared:/data -v /run/test/shared/file:/one:ro -v /run/test/shared/ro:/data/ro:ro \
        -v named:/vol";
    let options = ["--rm", "-i", "--read-only", "--tmpfs", "/etc/apk"];
    let command = ["alpine", "sh", "-c", script];
    let options: Vec<_> = options.into_iter().chain(volumes.split_whitespace()).collect();
    let run = e.run(&[&options[..], &command].concat());
    let out = run.stdin(vec![b'x'; 1 << 20]).output().ended_with(7);
    let copied = if e.kind == Kind::Podman { 1 } else { 0 };
    let refused = ["/x", "/one", "/data/ro/x"];
    let refused = refused.map(|path| format!("touch: {path}: Read-only file system\n")).concat();
    let text = format!("1048576\n{copied}\nfrom the host\nfrom the host");
    assert_eq!((out.text(), out.error()), (text, refused));
    assert_eq!(fs::read_to_string(shared.join("new")).unwrap(), "guest\n");
    let volume = e.does(&["volume", "inspect", "--format", "{{.Mountpoint}}", "named"]);
    let volume = e.inside.path(volume.ended_with(0).text());
    assert_eq!(fs::read_to_string(volume.join("x")).unwrap(), "vol\n");
    e.does(&["volume", "rm", "named"]).ended_with(0);

    let (mut screen, slave) = Screen::new();
    let run = e.run(&["--rm", "-it", "alpine", "sh"]).command;
    // A session of its own, so that the terminal tells its size.
    let mut setsid = Command::new("setsid");
    setsid.args(["--ctty", "--wait"]).arg(run.get_program()).args(run.get_args());
    setsid.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut child = Screen::on(&slave, program(setsid));
    screen.follows_its_window(|| ());
    screen.interrupts();
    screen.types("exit 9\n");
    assert_eq!(child.wait().unwrap().code(), Some(9));

    // runc looks for the command when a container is created, ampoule when it is started: Podman tells the difference.
    let late = (e.kind, e.runtime) == (Kind::Podman, Runtime::Ampoule);
    let nosuch = e.run(&["--name", "one", "alpine", "nosuch"]).output();
    nosuch.ended_with(if late { 126 } else { 127 }).says(&["nosuch", "not found"]);
    e.does(&["rm", "one"]).ended_with(0);
}

/// The engine's own bridge: a container reaches its other end, and the host a port of the container's.
fn network(e: &Engine) {
    let bridge = if e.kind == Kind::Podman { "podman" } else { "bridge" };
    let run =
        ["-d", "--name", "web", "-p", "8080:80", "alpine", "nc", "-lk", "-p", "80", "-e", "cat"];
    e.run_with_network(bridge, &run).output().ended_with(0);
    // A port of the host's is open before the container listens.
    let mut echo = e.inside.command("bash");
    echo.args(["-c", ECHO]);
    assert_eq!(program(echo).output().ended_with(0).text(), "hello");
    let out = e.does(&["exec", "web", "sh", "-c", PING]).ended_with(0).text();
    assert!(out.contains("eth0") && out.ends_with("reached"), "{out}");
    e.does(&["rm", "-f", "web"]).ended_with(0);
}

const ECHO: &str = "for try in {1..100}; do \
    exec 3<>/dev/tcp/127.0.0.1/8080 && echo hello >&3 && read -t 5 line <&3 && break; sleep 0.2; \
    done 2>/dev/null; echo $line";

const PING: &str = "ip -4 -o address show eth0; \
    ping -c 1 -w 20 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') >/dev/null && echo reached";

/// Docker has a DNS server for a network of one's own, on the loopback of each container; Podman's is on the bridge.
fn names(e: &Engine) {
    if e.kind == Kind::Podman && !Engine::has_netavark() {
        return skip("names", "netavark and aardvark-dns are not installed");
    }
    e.does(&["network", "create", "own"]).ended_with(0);
    let web = ["-d", "--name", "web", "alpine", "nc", "-lk", "-p", "80", "-e", "cat"];
    e.run_with_network("own", &web).output().ended_with(0);
    let script = "cat /etc/resolv.conf; nslookup web; nslookup nosuch | grep -c \"can't find\"; \
        for try in 1 2 3 4 5; do echo hello | nc -w 9 web 80 && break; sleep 1; done";
    let client = e.run_with_network("own", &["--rm", "alpine", "sh", "-c", script]);
    let said = client.output().ended_with(0).text();
    let server = if e.kind == Kind::Podman { "10." } else { "127.0.0.11" };
    for word in [&format!("nameserver {server}"), "Name:\tweb", "hello"] {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    connected_later(e, "web");
    e.does(&["rm", "-f", "web"]).ended_with(0);
    e.does(&["network", "rm", "own"]).ended_with(0);
}

/// A running container is connected to one more network, and disconnected from it.
fn connected_later(e: &Engine, web: &str) {
    e.does(&["network", "create", "--subnet", "10.66.0.0/24", "other"]).ended_with(0);
    let until = |script: &str, expected: &str| {
        let deadline = Instant::now() + LIMIT;
        loop {
            let said = e.does(&["exec", web, "sh", "-c", script]);
            if said.text() == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{said:?} is not {expected:?}: {}", e.log());
        }
    };
    // Its name and its address are the engine's choice.
    let reach = "ip -o -4 address | grep -o 'inet 10.66.0'; \
        ping -c 1 -w 20 10.66.0.1 >/dev/null && echo reached";
    for _ in 0..2 {
        e.does(&["network", "connect", "other", web]).ended_with(0);
        until(reach, "inet 10.66.0\nreached");
        e.does(&["network", "disconnect", "other", web]).ended_with(0);
        until("ip -o link | grep -c eth; ip -o -4 address | grep -c 10.66.0", "1\n0");
    }
    e.does(&["network", "rm", "other"]).ended_with(0);
}

/// Podman's: its containers share a host name, a loopback, shared memory; with ampoule a VM.
fn pod(e: &Engine) {
    e.does(&["pod", "create", "--name", "pod", "--network", "none"]).ended_with(0);
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let web = format!("echo shared > /dev/shm/x; {boot}; echo up; exec nc -lk -p 80 -e cat");
    let run = ["run", "-d", "--pod", "pod", "--name", "web", "alpine", "sh", "-c", &web];
    e.does(&run).ended_with(0);
    e.until_logged("web", "up");
    let first = e.does(&["logs", "web"]).ended_with(0).text();

    let script =
        format!("{boot}; hostname; cat /dev/shm/x; echo hello | nc -w 9 127.0.0.1 80; cat; exit 6");
    let run = ["run", "--rm", "-i", "--pod", "pod", "alpine", "sh", "-c", &script];
    let out = e.call(&run).stdin("piped").output().ended_with(6).text();
    let said: Vec<_> = out.lines().collect();
    assert_eq!(said[1..], ["pod", "shared", "hello", "piped"], "{out}");
    assert_eq!(Some(said[0]), first.lines().next());
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(said[0] == host.trim(), e.runtime == Runtime::Runc);

    // The end of one is not that of the others.
    let run = ["run", "-d", "--pod", "pod", "--name", "other", "alpine", "sh", "-c", POLITE];
    e.does(&run).ended_with(0);
    e.until_logged("other", "up");
    e.does(&["exec", "web", "true"]).ended_with(0);
    // Each has its own files.
    e.does(&["cp", "/etc/hostname", "other:/of-other"]).ended_with(0);
    e.does(&["exec", "other", "cat", "/of-other"]).ended_with(0);
    e.does(&["exec", "web", "cat", "/of-other"]).ended_with(1);
    e.does(&["stop", "-t", "20", "other"]).ended_with(0);
    assert_eq!(e.inspect("other", "{{.State.Status}} {{.State.ExitCode}}"), "exited 43");
    e.does(&["kill", "web"]).ended_with(0);
    assert_eq!(e.does(&["wait", "web"]).ended_with(0).text(), "137");
    e.does(&["start", "other"]).ended_with(0);
    e.does(&["rm", "-f", "-t", "0", "web"]).ended_with(0);
    assert_eq!(e.inspect("other", "{{.State.Status}}"), "running");
    e.does(&["pod", "rm", "-f", "-t", "0", "pod"]).ended_with(0);
}

/// A block device of the host, for writing or for reading only; and, with it, no other.
fn disk(e: &Engine) {
    let disk = Disk::new();
    let device = |access: &str| format!("{}:/dev/xvda{access}", disk.device);
    let script = "mount -t ext4 /dev/xvda /mnt && cat /mnt/host && echo from the guest > /mnt/guest; umount /mnt; \
        printf 'raw bytes' | dd of=/dev/xvda conv=notrunc 2>/dev/null; ls /dev/vd* /dev/loop* 2>/dev/null";
    let options = ["--rm", "--cap-add", "SYS_ADMIN", "--device", &device("")];
    let run = e.run(&[&options[..], &["alpine", "sh", "-c", script]].concat()).output();
    assert_eq!(run.text(), "from the host", "{run:?}");
    assert_eq!(disk.read("guest"), "from the guest");
    assert_eq!(&disk.start()[..9], b"raw bytes");
    let script = "head -c 9 /dev/xvda; echo; echo x > /dev/xvda || echo refused";
    let options = ["--rm", "--device", &device(":r")];
    let run = e.run(&[&options[..], &["alpine", "sh", "-c", script]].concat()).output();
    assert_eq!(run.ended_with(0).text(), "raw bytes\nrefused");
    assert_eq!(&disk.start()[..9], b"raw bytes");
    slow_disk(e, &disk);
}

/// Three megabytes at a megabyte a second. With containerd a sandbox has no cgroup that could keep it to that.
fn slow_disk(e: &Engine, disk: &Disk) {
    let script = "t() { cut -d ' ' -f 1 /proc/uptime | tr -d .; }; a=$(t); \
        dd if=/dev/xvda of=/dev/null bs=1M skip=8 count=3 2>/dev/null; echo $(($(t) - a))";
    let [device, limit] = ["/dev/xvda:r", "1mb"].map(|how| format!("{}:{how}", disk.device));
    let options = ["--rm", "--device", &device, "--device-read-bps", &limit];
    let run = e.run(&[&options[..], &["alpine", "sh", "-c", script]].concat()).output();
    if e.kind == Kind::Docker26 {
        run.ended_with(125).says(&["throttleReadBpsDevice", "no cgroup on the host"]);
        return;
    }
    let hundredths: u64 = run.ended_with(0).text().parse().unwrap();
    assert!((150..3000).contains(&hundredths), "{hundredths}");
}

/// An application of three services that call each other by name.
fn compose(e: &Engine) {
    let file = COMPOSE.replace("RUNTIME", &e.runtime_name());
    fs::write(e.inside.path("/run/test/compose.yaml"), file).unwrap();
    let compose = |args: &[&str]| {
        let file = ["compose", "--project-name", "app", "--file", "/run/test/compose.yaml"];
        e.does(&[&file[..], args].concat()).ended_with(0)
    };
    compose(&["up", "--detach", "db"]);
    compose(&["up", "--detach"]);
    let mut ask = e.inside.command("bash");
    ask.args(["-c", ASK]);
    assert_eq!(program(ask).output().ended_with(0).text(), "stored");
    let states = compose(&["ps", "--format", "{{.Service}} {{.State}}"]).text();
    let mut states: Vec<_> = states.lines().collect();
    states.sort();
    assert_eq!(states, ["api running", "db running", "web running"]);
    assert_eq!(compose(&["exec", "-T", "db", "cat", "/data/x"]).text(), "stored");
    compose(&["restart", "--timeout", "0", "db"]);
    let stored = compose(&["exec", "-T", "db", "cat", "/data/x"]).text();
    assert_eq!(stored, "stored\nstored", "its volume stays");
    compose(&["down", "--volumes", "--timeout", "0"]);
    assert_eq!(e.does(&["volume", "ls", "--quiet"]).ended_with(0).text(), "");
}

const COMPOSE: &str = r#"
x-service: &service
  image: alpine
  runtime: RUNTIME
services:
  db:
    <<: *service
    command: sh -c "echo stored >> /data/x; exec nc -lk -p 80 -e cat /data/x"
    volumes: ["data:/data"]
    healthcheck: { test: ["CMD", "test", "-s", "/data/x"], interval: 4s, timeout: 30s, retries: 20 }
  api:
    <<: *service
    command: nc -lk -p 80 -e nc db 80
    depends_on: { db: { condition: service_healthy } }
  web:
    <<: *service
    command: nc -lk -p 80 -e nc api 80
    depends_on: [api]
    ports: ["8080:80"]
volumes:
  data: {}
"#;

const ASK: &str = "for try in {1..100}; do \
    exec 3<>/dev/tcp/127.0.0.1/8080 && read -t 10 line <&3 && break; sleep 0.2; \
    done 2>/dev/null; echo $line";

/// What a VM does not have (yet).
fn refusals(e: &Engine) {
    let refused = |network: &str, options: &[&str], words: &[&str]| {
        let out = e.run_with_network(
            network,
            &[&["--name", "one"], options, &["alpine", "true"]].concat(),
        );
        let out = out.output().says(words);
        assert!([125, 126].contains(&out.code), "{out:?}");
        e.does(&["rm", "one"]).ended_with(0);
    };
    // Docker's client knows its exit codes by runc's words.
    let cannot_start = [("nosuch", 127, "not found"), ("/etc/passwd", 126, "permission denied")];
    for (command, code, why) in cannot_start {
        let out = e.run(&["--rm", "alpine", command]).output().says(&[command, why]);
        assert_eq!(out.code, if e.kind == Kind::Podman { 126 } else { code }, "{out:?}");
    }
    refused("host", &[], &["linux.namespaces (network)", "`none`"]);
    refused(
        "none",
        &["--device", "/dev/kvm"],
        &["linux.devices", "(/dev/kvm)", "a VM has its own"],
    );
    let script =
        "mount -t tmpfs none /mnt && echo mounted; ls /dev/fuse /dev/kvm /dev/vda 2>/dev/null";
    let all = e.run(&["--rm", "--privileged", "alpine", "sh", "-c", script]).output();
    assert_eq!(all.text(), "mounted\n/dev/fuse", "those of the VM, none of the host: {all:?}");
    refused("none", &["--volume", "/dev/null:/x"], &["/dev/null: a device cannot be shared"]);
    // Docker has a hint for these words.
    refused("none", &["--volume", "/run/test/ready:/etc"], &["mount: /etc", "not a directory"]);
    // What the host lacks is named with the way out, too.
    let in_place = |mount: &[&str], words: &[&str]| {
        let mut command = e.inside.command("mount");
        command.args(mount);
        program(command).output().ended_with(0);
        refused("none", &[], words);
        let mut command = e.inside.command("umount");
        command.args(["--lazy", mount[mount.len() - 1]]);
        program(command).output().ended_with(0);
    };
    in_place(&["--bind", "/dev/null", "/dev/kvm"], &["/dev/kvm: not a KVM device", "kvm_intel"]);
    // conmon does not pass AMPOULE_ROOT on.
    let store = if e.kind == Kind::Podman { "/var/lib/ampoule" } else { "/run/test/ampoule" };
    let full = ["-t", "tmpfs", "-o", "size=400k", "none", store];
    in_place(&full, &["image store", &format!("{store}/tmp"), "No space left", "make room"]);
    let alone = ["-d", "--name", "alone", "alpine", "sleep", "1000"];
    e.run(&alone).output().ended_with(0);
    refused("container:alone", &[], &["its VM was made for it alone", "pod"]);
    e.does(&["rm", "-f", "alone"]).ended_with(0);
}
