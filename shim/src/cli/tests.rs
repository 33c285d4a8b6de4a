use super::*;

fn run(args: &[&str]) -> Result<RunArgs, clap::Error> {
    let words = ["ampoule", "run"].iter().chain(args);
    match Cli::try_parse_from(words)?.command {
        Command::Run(run) => Ok(*run),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_definition_is_sound() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}

#[test]
fn everything_after_the_image_is_the_command() {
    for (args, image, command) in [
        (&["alpine"][..], "alpine", &[][..]),
        (&["alpine", "true"], "alpine", &["true"]),
        (&["alpine", "--", "sh", "-c", "x"], "alpine", &["sh", "-c", "x"]),
        (&["alpine", "sh", "-c", "x"], "alpine", &["sh", "-c", "x"]),
        (&["alpine", "sh", "--", "x"], "alpine", &["sh", "--", "x"]),
        (&["alpine", "--", "--", "x"], "alpine", &["--", "x"]),
        (&["alpine", "ls", "-e", "--name", "x"], "alpine", &["ls", "-e", "--name", "x"]),
        (&["alpine", "-e", "X"], "alpine", &["-e", "X"]),
        (&["--", "alpine", "ls"], "alpine", &["ls"]),
        (&["-it", "dir:/x", "--", "sh"], "dir:/x", &["sh"]),
        (&["--timings", "alpine", "echo"], "alpine", &["echo"]),
    ] {
        let run = run(args).unwrap();
        assert_eq!(
            (run.image(), run.command()),
            (image, &command.iter().map(|s| s.to_string()).collect::<Vec<_>>()[..]),
            "{args:?}"
        );
    }
}

#[test]
fn options_are_read_and_have_defaults() {
    let plain = run(&["alpine"]).unwrap();
    assert_eq!((plain.memory, plain.cpus, plain.pids_limit), (Memory(512 << 20), Cpus(1000), 4096));
    assert_eq!((plain.scratch_size, plain.pull), (Memory(8 << 30), Pull::Missing));
    assert!(!plain.interactive && !plain.tty && !plain.read_only && plain.timings.is_none());
    let full = run(&[
        "-i",
        "-t",
        "-e",
        "A=1",
        "--env",
        "B",
        "-w",
        "/tmp",
        "-u",
        "7:8",
        "--name",
        "web",
        "--memory",
        "64m",
        "--cpus",
        "0.5",
        "--read-only",
        "--pull",
        "never",
        "--timings=json",
        "--kernel",
        "/k",
        "x",
    ])
    .unwrap();
    assert!(full.interactive && full.tty && full.read_only);
    assert_eq!((full.env, full.pull), (vec!["A=1".into(), "B".into()], Pull::Never));
    assert_eq!(full.timings, Some(Format::Json));
    assert_eq!(full.name.unwrap().as_str(), "web");
}

#[test]
fn what_concerns_the_background_has_dockers_letters_and_defaults() {
    let plain = run(&["alpine"]).unwrap();
    assert_eq!(
        (plain.detach, plain.rm, plain.stop_signal, plain.stop_timeout),
        (false, false, None, 10)
    );
    let words =
        ["-d", "--rm", "-l", "a=b", "--label", "c", "--stop-signal", "QUIT", "--stop-timeout", "3"];
    let full = run(&[&words[..], &["alpine"]].concat()).unwrap();
    assert!(full.detach && full.rm);
    assert_eq!((full.label, full.stop_timeout), (vec!["a=b".to_string(), "c".to_string()], 3));
    assert_eq!(full.stop_signal.map(|signal| signal.number()), Some(3));
    assert!(run(&["-d", "--timings", "alpine"]).is_err());
}

#[test]
fn the_options_of_exec_end_with_the_sandboxs_name() {
    let words = ["ampoule", "exec", "-it", "web", "ls", "-l", "--all"];
    let Command::Exec(exec) = Cli::try_parse_from(words).unwrap().command else { panic!() };
    assert!(exec.interactive && exec.tty);
    assert_eq!(
        (exec.name.as_str(), &exec.command[..]),
        ("web", &["ls", "-l", "--all"].map(String::from)[..])
    );
    let words = ["ampoule", "exec", "web", "--", "ls"];
    let Command::Exec(exec) = Cli::try_parse_from(words).unwrap().command else { panic!() };
    assert_eq!(exec.command, ["ls"]);
}

#[test]
fn mistakes_are_refused() {
    for args in [
        &[][..],
        &["--memory", "lots", "alpine"],
        &["--cpus", "99", "alpine"],
        &["--name", "../x", "alpine"],
        &["--no-such", "alpine"],
        &["--boot-timeout", "0", "alpine"],
    ] {
        assert!(run(args).is_err(), "{args:?}");
    }
}

#[test]
fn flags_win_over_the_environment() {
    let cli = Cli::try_parse_from(["ampoule", "version", "--kernel", "/k"]).unwrap();
    let env = crate::paths::Environment {
        kernel: Some("/env".into()),
        guest: Some("/guest".into()),
        ..Default::default()
    };
    let paths = cli.global.over(Paths::new(&env));
    assert_eq!((paths.kernel, paths.guest), ("/k".into(), "/guest".into()));
}
