use std::{io, path::PathBuf, sync::Arc, time::Duration};

use ampoule_vmm_api::StopCause;
use clap::Parser;

use super::*;
use crate::{
    cli::Cli,
    commands::{RunError, VerbError},
    control::ControlError,
    id::Id,
    image::{ImageError, RegistryError as PullError, Store},
    kvm::KvmError,
    name::NameError,
    oci::OciError,
    registry::RegistryError,
    sandbox::{ProcessId, SandboxError},
    task::TaskError,
    vm::{Cause, KERNEL, VmError},
};

fn id(text: &str) -> Id {
    text.parse().unwrap()
}

fn refused(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn boot(error: VmError) -> RunError {
    RunError::Sandbox(SandboxError::Boot(error))
}

fn no_kernel() -> RunError {
    let source = refused(libc::ENOENT);
    boot(VmError::Open { what: KERNEL, path: PathBuf::from("/x/vmlinux"), source })
}

fn dead(cause: Cause, console: &[&str]) -> Arc<Death> {
    let console = console.iter().map(ToString::to_string).collect();
    Arc::new(Death { cause, console, ..Death::lost() })
}

fn died_in_boot(console: &[&str]) -> RunError {
    RunError::Sandbox(SandboxError::Died {
        kernel: "/k".into(),
        guest_image: "/g".into(),
        source: dead(Cause::Stopped(StopCause::Panic), console),
    })
}

fn unreachable() -> ImageError {
    let source =
        PullError::Unreachable { host: "docker.io".into(), source: refused(libc::ECONNREFUSED) };
    ImageError::Pull { name: "alpin:latest".into(), source }
}

fn unknown() -> ImageError {
    ImageError::Unknown { name: "x:1".into(), store: "/s".into(), known: "no images".into() }
}

fn start(source: StartFailure) -> RunError {
    RunError::Sandbox(SandboxError::Start { process: ProcessId::init(id("web")), source })
}

fn no_command() -> SandboxError {
    let source = StartFailure::NotFound("nosuch".into());
    SandboxError::Start { process: ProcessId::init(id("web")), source }
}

/// A command, the error it ended with, the line that tells of it, the object, a part of the hint.
type Row<'a> = (&'a str, Box<dyn Error>, &'a str, Option<&'a str>, &'a str);

fn rows() -> Vec<Row<'static>> {
    let state = |errno| RegistryError::Io { path: "/r".into(), source: refused(errno) };
    let store = |errno| ImageError::Store { path: "/s/tmp".into(), source: refused(errno) };
    let control = |error| VerbError::Control(id("web"), error);
    vec![
        (
            "run",
            Box::new(no_kernel()),
            "run: boot: guest kernel /x/vmlinux: No such file or directory (os error 2)",
            Some("/x/vmlinux"),
            "--kernel",
        ),
        (
            "run",
            Box::new(boot(VmError::Kvm(KvmError::Open(refused(libc::EACCES))))),
            "run: boot: /dev/kvm: Permission denied (os error 13)",
            Some("/dev/kvm"),
            "run as root",
        ),
        (
            "run",
            Box::new(boot(VmError::Prepare("make a stream", refused(libc::EMFILE)))),
            "run: boot: make a stream: Too many open files (os error 24)",
            None,
            "ulimit -n",
        ),
        (
            "run",
            Box::new(RunError::Image(unreachable())),
            "run: pull: `alpin:latest` cannot be pulled: the registry docker.io cannot be reached: Connection refused (os error 111)",
            Some("alpin:latest"),
            "ampoule images",
        ),
        (
            "image pull",
            Box::new(unreachable()),
            "image pull: `alpin:latest` cannot be pulled: the registry docker.io cannot be reached: Connection refused (os error 111)",
            Some("alpin:latest"),
            "ampoule images",
        ),
        (
            "run",
            Box::new(RunError::Image(unknown())),
            "run: image: there is no image `x:1` in /s (it has: no images)",
            Some("x:1"),
            "ampoule image pull x:1",
        ),
        (
            "create",
            Box::new(OciError::Sandbox(SandboxError::Boot(VmError::Kvm(KvmError::Open(refused(
                libc::ENOENT,
            )))))),
            "create: boot: /dev/kvm: No such file or directory (os error 2)",
            Some("/dev/kvm"),
            "kvm_intel",
        ),
        (
            "",
            Box::new(TaskError::Sandbox(no_command())),
            "start: start container web: executable file not found: nosuch",
            Some("web"),
            "on its PATH",
        ),
        (
            "image import",
            Box::new(store(libc::ENOSPC)),
            "image import: the image store cannot use /s/tmp: No space left on device (os error 28)",
            Some("/s/tmp"),
            "ampoule image prune",
        ),
        (
            "run",
            Box::new(RunError::Registry(state(libc::EROFS))),
            "run: state: /r: Read-only file system (os error 30)",
            Some("/r"),
            "AMPOULE_ROOT",
        ),
        (
            "run",
            Box::new(RunError::Registry(NameError::InUse(id("web")).into())),
            "run: sandbox web: the name is in use",
            Some("web"),
            "ampoule rm -f web",
        ),
        (
            "run",
            Box::new(start(StartFailure::NotFound("nope".into()))),
            "run: start container web: executable file not found: nope",
            Some("web"),
            "PATH",
        ),
        (
            "stop",
            Box::new(VerbError::Registry(RegistryError::NotFound("web".into()))),
            "stop: sandbox \"web\": there is none",
            Some("web"),
            "ampoule ps -a",
        ),
        (
            "exec",
            Box::new(control(ControlError::Silent(Duration::from_secs(65)))),
            "exec: sandbox web: control socket: it did not answer within 65 s",
            Some("web"),
            "ampoule rm -f web",
        ),
        (
            "exec",
            Box::new(control(ControlError::Failed(Failure::of(&no_command())))),
            "exec: start: sandbox web: start container web: executable file not found: nosuch",
            Some("web"),
            "on its PATH",
        ),
        (
            "logs",
            Box::new(VerbError::Host("read the log", refused(libc::EIO))),
            "logs: read the log: Input/output error (os error 5)",
            None,
            "",
        ),
        (
            "run",
            Box::new(RunError::Died {
                name: id("web"),
                source: dead(Cause::Killed(libc::SIGKILL), &[]),
            }),
            "run: sandbox web: ampoule-vmm was killed by SIGKILL",
            Some("web"),
            "",
        ),
    ]
}

#[test]
fn each_error_names_command_phase_object_and_cause_and_the_way_out() {
    for (command, error, line, object, hint) in rows() {
        let report = Report::new(command, &*error, 125);
        let text = report.to_string();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some(&*format!("ampoule: {line}")));
        assert_eq!(report.object.as_deref(), object, "{text}");
        assert_eq!(report.hint.is_some(), !hint.is_empty(), "{text}");
        assert!(report.hint.unwrap_or_default().contains(hint), "{text}");
        assert_eq!(lines.count(), usize::from(!hint.is_empty()), "{text}");
    }
}

#[test]
fn the_json_has_every_field_always_and_is_one_line() {
    for (command, error, ..) in rows() {
        let text = Report::new(command, &*error, 125).json();
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let error = json["error"].as_object().unwrap();
        let names: Vec<&str> = error.keys().map(String::as_str).collect();
        let expected =
            ["causes", "command", "console", "exit_code", "hint", "message", "object", "phase"];
        assert_eq!(names, expected);
        assert_eq!((&error["command"], &error["exit_code"]), (&command.into(), &125.into()));
    }
    let json: serde_json::Value =
        serde_json::from_str(&Report::new("run", &no_kernel(), 125).json()).unwrap();
    let causes = ["boot", "guest kernel /x/vmlinux", "No such file or directory (os error 2)"];
    assert_eq!(json["error"]["phase"], "boot");
    assert_eq!(json["error"]["object"], "/x/vmlinux");
    assert_eq!(json["error"]["causes"], serde_json::json!(causes));
    assert_eq!(json["error"]["message"], causes.join(": "));
}

#[test]
fn a_guests_death_comes_with_its_console() {
    let report = Report::new("run", &died_in_boot(&["one", "two"]), 125);
    assert_eq!(
        report.to_string(),
        "ampoule: run: boot of /k with /g: the guest kernel panicked\n  guest console | one\n  \
         guest console | two\n"
    );
    assert_eq!(report.console, ["one", "two"]);
    let hint = |console: &[&str]| Report::new("run", &died_in_boot(console), 125).hint;
    let panic = "Kernel panic - not syncing: System is deadlocked on memory";
    assert!(hint(&[panic]).unwrap().contains("--memory"));
    let source = dead(Cause::Stopped(StopCause::KvmError), &[]);
    let kvm = RunError::Died { name: id("web"), source };
    assert!(Report::new("run", &kvm, 137).hint.unwrap().contains("ampoule check"));
}

#[test]
fn a_cause_is_not_said_twice() {
    let kvm = VmError::Kvm(KvmError::Open(refused(libc::EACCES)));
    assert_eq!(chain_text(&boot(kvm)), "boot: /dev/kvm: Permission denied (os error 13)");
}

/// What the system says inside of an error of the store leads to its hint, however deep it is.
#[test]
fn a_store_on_a_bad_place_is_an_error_with_a_hint() {
    let Err(error) = Store::open("/proc/ampoule".as_ref()) else { panic!("a store in /proc") };
    let report = Report::new("images", &error, 125);
    assert_eq!(
        (report.phase, report.object.as_deref()),
        (Phase::Image, Some("/proc/ampoule/images"))
    );
}

#[test]
fn a_wrong_command_line_has_the_same_shape() {
    let report = |line: &str| {
        let words: Vec<String> = line.split(' ').map(String::from).collect();
        let error = Cli::try_parse_from(&words).unwrap_err();
        usage::report(&error, &words)
    };
    for (line, text, object) in [
        (
            "ampoule run --memory lots alpine",
            "ampoule: run: options: invalid value 'lots' for '--memory <SIZE>': must be a number of bytes, with k, m \
             or g for KiB, MiB or GiB, as in 512m\n  hint: see `ampoule run --help`\n",
            Some("--memory"),
        ),
        (
            "ampoule run --memry 1g alpine",
            "ampoule: run: options: unexpected argument '--memry' found\n  hint: a similar argument exists: \
             '--memory'; to pass '--memry' as a value, use '-- --memry'; see `ampoule run --help`\n",
            Some("--memry"),
        ),
        (
            "ampoule image pull",
            "ampoule: image pull: options: the following required arguments were not provided: <IMAGE>\n  hint: see \
             `ampoule image pull --help`\n",
            None,
        ),
        (
            "ampoule rn",
            "ampoule: options: unrecognized subcommand 'rn'\n  hint: see `ampoule --help`\n",
            None,
        ),
        (
            "ampoule run --name ../x alpine",
            "ampoule: run: options: invalid value '../x' for '--name <NAME>': must be 1 to 76 letters, digits, '_', \
             '.' or '-', the first a letter or digit\n  hint: see `ampoule run --help`\n",
            Some("--name"),
        ),
    ] {
        let report = report(line);
        assert_eq!((report.to_string(), report.exit_code), (text.to_string(), 125));
        assert_eq!(report.object.as_deref(), object);
    }
}
