//! runc's command line: the same tests with runc, which proves every expectation, and with ampoule.

use std::{
    fs::{self, File},
    io::IoSliceMut,
    mem::MaybeUninit,
    os::unix::net::UnixListener,
};

use ampoule_tests::{Runtime, oci::Bundle, screen::Screen, skip};
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
