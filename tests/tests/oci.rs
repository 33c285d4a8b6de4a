//! runc's command line: the same tests with runc, which proves every expectation, and with ampoule.

use std::{
    fs::{self, File, Permissions},
    io::IoSliceMut,
    mem::MaybeUninit,
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    },
    path::Path,
    time::{Duration, Instant},
};

use ampoule_tests::{Runtime, oci::Bundle, program, scaled, screen::Screen, skip};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

#[test]
fn runc_verbs() {
    with("runc_verbs", Runtime::Runc, POLITE, verbs);
}

#[test]
fn ampoule_verbs() {
    with("ampoule_verbs", Runtime::Ampoule, POLITE, verbs);
}

#[test]
fn runc_run() {
    with("runc_run", Runtime::Runc, "cat; echo err >&2; exit 7", run);
}

#[test]
fn ampoule_run() {
    with("ampoule_run", Runtime::Ampoule, "cat; echo err >&2; exit 7", run);
}

#[test]
fn runc_terminal() {
    with("runc_terminal", Runtime::Runc, "exec sh", terminal);
}

#[test]
fn ampoule_terminal() {
    with("ampoule_terminal", Runtime::Ampoule, "exec sh", terminal);
}

/// A workload that ends by TERM with 43.
const POLITE: &str = "echo up; read word; echo got $word; trap 'echo bye; exit 43' TERM; while :; do sleep 0.1; done";

fn with(name: &str, runtime: Runtime, script: &str, test: fn(&Bundle)) {
    let has_terminal = name.ends_with("terminal");
    let change = |spec: &mut Value| spec["process"]["terminal"] = json!(has_terminal);
    match Bundle::new(runtime, &["sh", "-c", script], change) {
        Ok(bundle) => test(&bundle),
        Err(why) => skip(name, &why),
    }
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

fn verbs(c: &Bundle) {
    let missing = ["--log", "log", "--log-format", "json", "state", &c.id];
    c.verb(&missing).output().ended_with(1).says(&["container does not exist"]);
    assert_eq!(json(c.text("log").as_bytes())["level"], "error");

    fs::write(c.path("in"), "word\n").unwrap();
    let create = "$R create --bundle . --pid-file pid $I <in >out 2>err";
    c.sh(create).ended_with(0);
    let keeper = c.pid("pid");
    let state = c.state();
    assert_eq!((&state["status"], &state["id"]), (&json!("created"), &json!(c.id)));
    assert_eq!(state["pid"], keeper.as_raw_nonzero().get());
    assert_eq!((c.text("out"), c.text("err")), (String::new(), String::new()));
    c.sh("$R create --bundle . $I </dev/null >out2 2>&1").ended_with(1);
    assert!(c.text("out2").contains("exists"), "{}", c.text("out2"));

    c.does("start");
    c.shows("out", "up\ngot word\n");
    assert_eq!(c.status(), "running");
    let all = c.verb(&["list", "--quiet"]).output().ended_with(0).text();
    assert!(all.lines().any(|id| id == c.id), "{all}");
    let all = json(&c.verb(&["list", "--format", "json"]).output().ended_with(0).stdout);
    let own = all.as_array().unwrap().iter().find(|state| state["id"] == *c.id).unwrap();
    assert_eq!(own["status"], "running");

    execs(c);

    c.does("pause");
    assert_eq!(c.status(), "paused");
    c.does("resume");
    assert_eq!(c.status(), "running");
    fs::write(c.path("limits"), r#"{"memory": {"limit": 67108864}, "pids": {"limit": 50}}"#)
        .unwrap();
    c.verb(&["update", "--resources", "limits", &c.id]).output().ended_with(0);
    let event = json(&c.verb(&["events", "--stats", &c.id]).output().ended_with(0).stdout);
    assert_eq!(event["data"]["memory"]["usage"]["limit"], 64 << 20, "{event}");
    assert!(event["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0, "{event}");
    assert!(event["data"]["cpu"]["usage"]["total"].as_u64().unwrap() > 0, "{event}");
    let pids = json(&c.verb(&["ps", "--format", "json", &c.id]).output().ended_with(0).stdout);
    assert!(!pids.as_array().unwrap().is_empty());

    c.verb(&["delete", &c.id]).output().ended_with(1).says(&["not stopped"]);
    c.verb(&["kill", &c.id, "TERM"]).output().ended_with(0);
    assert_eq!(c.ended(keeper), 43);
    assert_eq!((&*c.text("out"), &*c.text("err")), ("up\ngot word\nbye\n", ""));
    assert_eq!(c.status(), "stopped");
    c.verb(&["kill", &c.id, "9"]).output().ended_with(1).says(&["not running"]);
    c.verb(&["start", &c.id]).output().ended_with(1).says(&["stopped"]);
    c.verb(&["exec", &c.id, "true"]).output().ended_with(255).says(&["stopped"]);
    c.does("delete");
    c.verb(&["state", &c.id]).output().ended_with(1);
    c.verb(&["delete", &c.id]).output().ended_with(1);
    c.verb(&["delete", "--force", &c.id]).output().ended_with(0);
}

fn execs(c: &Bundle) {
    let script = "echo $A $PWD $(id -u); cat; echo err >&2; exit 7";
    let exec =
        ["exec", "--env", "A=b", "--cwd", "/tmp", "--user", "65534:65534", &c.id, "sh", "-c"];
    let out = c.verb(exec.iter().chain(&[script])).stdin("piped\n").output().ended_with(7);
    assert_eq!((&*out.text(), &*out.error()), ("b /tmp 65534\npiped", "err\n"));
    c.verb(&["exec", &c.id, "nosuch"]).output().ended_with(255).says(&["nosuch", "not found"]);

    let process = json!({
        "cwd": "/", "args": ["sh", "-c", "echo from a file; read x; exit 5"], "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0}
    });
    fs::write(c.path("process"), process.to_string()).unwrap();
    c.sh("mkfifo hold").ended_with(0);
    let exec = "$R exec --process process --pid-file pid2 --detach $I <>hold >out3 2>&1";
    c.sh(exec).ended_with(0);
    c.shows("out3", "from a file");
    fs::write(c.path("hold"), "\n").unwrap();
    assert_eq!(c.ended(c.pid("pid2")), 5);
}

fn run(c: &Bundle) {
    let out = c.verb(&["run", "--bundle", ".", &c.id]).stdin("word\n").output().ended_with(7);
    assert_eq!((&*out.text(), &*out.error()), ("word", "err\n"));
    c.verb(&["state", &c.id]).output().ended_with(1);
}

fn terminal(c: &Bundle) {
    let listener = UnixListener::bind(c.path("console")).unwrap();
    c.verb(&["run", "--detach", "--bundle", ".", &c.id]).output().ended_with(1).says(&["tty"]);
    let run = "$R run --detach --bundle . --console-socket console --pid-file pid $I </dev/null >out 2>&1";
    c.sh(run).ended_with(0);
    let mut screen = Screen::of(received(&listener));
    screen.resize(80, 24);
    screen.follows_its_window(|| ());
    screen.interrupts();
    screen.types("exit 9\n");
    assert_eq!(c.ended(c.pid("pid")), 9);
    assert_eq!(c.status(), "stopped");
}

/// The controlling end of the terminal that comes over a console socket.
fn received(listener: &UnixListener) -> File {
    let (stream, _) = listener.accept().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut received = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    recvmsg(&stream, &mut [IoSliceMut::new(&mut name)], &mut received, RecvFlags::empty()).unwrap();
    let rights = received.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    rights.unwrap().into()
}

#[test]
fn runc_follows_the_host() {
    follows("runc_follows_the_host", Runtime::Runc);
}

#[test]
fn ampoule_follows_the_host() {
    follows("ampoule_follows_the_host", Runtime::Ampoule);
}

/// Tells of all that happens to what it watches, and looks at it when it is told to.
const FOLLOWER: &str = "inotifyd - /data /data/sub /data/plain /config /config/key /etc/hosts & \
    while ! grep -qs 'inotify wd:6' /proc/$!/fdinfo/*; do sleep 0.1; done; echo watching; \
    while read script; do eval \"$script\"; done";

/// What a kubelet, or an engine, changes on the host is seen in the container, at once by who watches.
fn follows(name: &str, runtime: Runtime) {
    let host = tempfile::tempdir().unwrap();
    let at = |name: &str| host.path().join(name);
    for folder in ["data/sub", "config/..1"] {
        fs::create_dir_all(at(folder)).unwrap();
    }
    for (file, text) in
        [("data/plain", "plain"), ("config/..1/key", "old"), ("hosts", "first"), ("log", "")]
    {
        fs::write(at(file), text).unwrap();
    }
    symlink("..1", at("config/..data")).unwrap();
    symlink("..data/key", at("config/key")).unwrap();
    let mounts = [
        ("data", "/data", "rw"),
        ("config", "/config", "ro"),
        ("hosts", "/etc/hosts", "rw"),
        ("log", "/dev/termination-log", "rw"),
    ];
    let change = |spec: &mut Value| {
        let mounts = mounts.map(|(source, destination, access)| {
            json!({
                "type": "bind", "source": at(source), "destination": destination,
                "options": ["rbind", "rprivate", access],
            })
        });
        spec["mounts"].as_array_mut().unwrap().extend(mounts);
    };
    let bundle = match Bundle::new(runtime, &["sh", "-c", FOLLOWER], change) {
        Ok(bundle) => bundle,
        Err(why) => return skip(name, &why),
    };
    let c = &bundle;
    c.sh("mkfifo in; $R create --bundle . --pid-file pid $I <>in >out 2>err").ended_with(0);
    let process = c.pid("pid");
    c.does("start");
    c.shows("out", "watching\n");
    let mut slowest = Duration::ZERO;
    let mut notices = |act: &dyn Fn(), events: &[&str]| {
        let begun = Instant::now();
        act();
        for event in events {
            c.shows("out", event);
        }
        slowest = slowest.max(begun.elapsed());
    };
    let write = |name: &str, text: &str| fs::write(at(name), text).unwrap();
    let rename = |from: &str, to: &str| fs::rename(at(from), at(to)).unwrap();

    notices(&|| write("data/new", "new"), &["n\t/data\tnew\n", "w\t/data\tnew\n"]);
    notices(&|| write("data/plain", "more"), &["c\t/data\tplain\n", "c\t/data/plain\n"]);
    let readable = || fs::set_permissions(at("data/new"), Permissions::from_mode(0o604)).unwrap();
    notices(&readable, &["e\t/data\tnew\n"]);
    let moved = ["m\t/data\tnew\n", "y\t/data/sub\tmoved\n"];
    notices(&|| rename("data/new", "data/sub/moved"), &moved);
    notices(&|| fs::remove_file(at("data/sub/moved")).unwrap(), &["d\t/data/sub\tmoved\n"]);
    notices(&|| fs::create_dir(at("data/sub/d")).unwrap(), &["n\t/data/sub\td\n"]);
    notices(&|| rename("data/sub/d", "data/e"), &["m\t/data/sub\td\n", "y\t/data\te\n"]);
    notices(&|| fs::remove_dir(at("data/e")).unwrap(), &["d\t/data\te\n"]);
    notices(
        &|| fs::remove_file(at("data/plain")).unwrap(),
        &["d\t/data\tplain\n", "D\t/data/plain\n"],
    );

    // A kubelet's way to change all files of a volume at once.
    c.sh("echo 'echo $(readlink /config/..data) $(cat /config/key)' >in").ended_with(0);
    c.shows("out", "..1 old\n");
    fs::create_dir(at("config/..2")).unwrap();
    write("config/..2/key", "new");
    symlink("..2", at("config/..data_tmp")).unwrap();
    notices(&|| rename("config/..data_tmp", "config/..data"), &["y\t/config\t..data\n"]);
    c.sh("echo 'echo $(readlink /config/..data) $(cat /config/key)' >in").ended_with(0);
    c.shows("out", "..2 new\n");
    let remove = || fs::remove_dir_all(at("config/..1")).unwrap();
    notices(&remove, &["d\t/config\t..1\n", "D\t/config/key\n"]);

    // A file that is bound alone is that file, whatever has its name by now.
    notices(&|| write("hosts", "second"), &["c\t/etc/hosts\n"]);
    write("other", "replaced");
    rename("other", "hosts");
    std::thread::sleep(Duration::from_secs(1));
    c.sh("echo 'echo $(cat /etc/hosts)' >in").ended_with(0);
    c.shows("out", "second\n");
    eprintln!("{name}: the slowest change was noticed after {} ms", slowest.as_millis());

    many(c, &at("data"));
    c.sh("echo 'echo over > /dev/termination-log; exit 3' >in").ended_with(0);
    assert_eq!(c.ended(process), 3);
    assert_eq!(fs::read_to_string(at("log")).unwrap(), "over\n");
}

/// Many names at once: what cannot be told in time is told as changed instead.
fn many(c: &Bundle, data: &Path) {
    let names = scaled(100, 1000);
    let begun = Instant::now();
    for n in 0..names {
        symlink("x", data.join(format!("f{n}"))).unwrap();
    }
    let made = begun.elapsed();
    for n in 0..names {
        c.shows("out", &format!("\t/data\tf{n}\n"));
    }
    let noticed = begun.elapsed();
    eprintln!(
        "{names} new names in {} ms were noticed after {} ms",
        made.as_millis(),
        noticed.as_millis()
    );
}

#[test]
fn ampoule_refuses_by_its_name_what_a_sandbox_cannot_have() {
    let run = |change: fn(&mut Value), options: &[&str], words: &[&str]| {
        let bundle = Bundle::new(Runtime::Ampoule, &["true"], change);
        let Ok(bundle) = bundle else { return skip("oci refusals", &bundle.err().unwrap()) };
        let run = ["run", "--bundle", "."].iter().chain(options);
        bundle.verb(run.chain(&[&*bundle.id])).output().ended_with(1).says(words);
    };
    let no_network = |spec: &mut Value| {
        let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
        all.retain(|namespace| namespace["type"] != "network");
    };
    run(no_network, &[], &["linux.namespaces (network)", "`none`"]);
    run(|_| (), &["--preserve-fds", "1"], &["--preserve-fds"]);
    let bind = |spec: &mut Value| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(
            json!({"destination": "/x", "type": "bind", "source": "/dev/null", "options": ["rbind"]}),
        );
    };
    run(bind, &[], &["/dev/null: a device cannot be shared"]);
}

/// runc mounts no sysfs for users that have no power over the network namespace, nor lets them set its sysctls.
#[test]
fn ampoule_users_of_their_own_have_the_network_of_a_namespace() {
    let name = format!("n{}", std::process::id());
    let ip = |line: &str| {
        let mut command = std::process::Command::new("sh");
        command.args(["-ec", &line.replace("NAME", &name)]);
        program(command).output()
    };
    let script = "ip -4 -o addr show dev net7 | awk '{print $4}'; ls /sys/class/net; cat /proc/self/uid_map | xargs; \
        ping -c 1 -W 5 10.77.0.1 >/dev/null && echo reached; timeout 1 nc -l -p 80; [ $? = 143 ] && echo listened";
    let bundle = Bundle::new(Runtime::Ampoule, &["sh", "-c", script], |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        let path = format!("/run/netns/{name}");
        namespaces.extend([json!({"type": "user"}), json!({"type": "network", "path": path})]);
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        spec["linux"]["sysctl"] = json!({"net.ipv4.ping_group_range": "0 65535"});
    });
    let bundle = match bundle {
        Ok(bundle) => bundle,
        Err(why) => return skip("ampoule_users_of_their_own", &why),
    };
    if ip("ip netns add NAME").code != 0 {
        return skip("ampoule_users_of_their_own", "network namespaces cannot be made");
    }
    ip("ip link add v77 type veth peer name net7 netns NAME; ip addr add 10.77.0.1/24 dev v77; ip link set v77 up; \
        ip -n NAME addr add 10.77.0.2/24 dev net7; ip -n NAME link set net7 up")
    .ended_with(0);
    let out = bundle.verb(&["run", "--bundle", ".", &bundle.id]).output();
    ip("ip netns delete NAME").ended_with(0);
    let expected = "10.77.0.2/24\nlo\nnet7\n0 100000 65536\nreached\nlistened";
    assert_eq!(out.text(), expected, "{}", out.error());
}
