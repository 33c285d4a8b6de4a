use super::*;
use crate::spec::{Counterparts, guest_spec};

fn image() -> ImageConfig {
    ImageConfig {
        entrypoint: vec!["/entry".into()],
        cmd: vec!["serve".into()],
        env: vec!["PATH=/bin".into(), "LANG=C".into()],
        user: "www".into(),
        working_dir: "/srv".into(),
        ..Default::default()
    }
}

fn json(image: &ImageConfig, options: &RunOptions) -> Value {
    serde_json::to_value(run_spec(image, options).unwrap()).unwrap()
}

#[test]
fn the_image_says_what_the_user_does_not() {
    let options = RunOptions { hostname: "box".into(), ..Default::default() };
    let spec = json(&image(), &options);
    for (pointer, value) in [
        ("/process/args", json!(["/entry", "serve"])),
        ("/process/cwd", json!("/srv")),
        ("/process/user/username", json!("www")),
        ("/process/env", json!(["PATH=/bin", "HOSTNAME=box", "LANG=C"])),
        ("/process/terminal", json!(false)),
        ("/hostname", json!("box")),
    ] {
        assert_eq!(spec.pointer(pointer), Some(&value), "{pointer}");
    }
}

#[test]
fn the_user_wins_over_the_image() {
    let options = RunOptions {
        command: vec!["ls".into(), "-l".into()],
        env: vec!["LANG=de".into(), "A=b=c".into(), "TERM=dumb".into()],
        workdir: Some("/tmp".into()),
        user: Some("7:8".into()),
        terminal: Some((80, 24)),
        milli_cpus: Some(500),
        memory: 64 << 20,
        pids_limit: 9,
        read_only: true,
        ..Default::default()
    };
    let spec = json(&image(), &options);
    for (pointer, value) in [
        ("/process/args", json!(["/entry", "ls", "-l"])),
        ("/process/cwd", json!("/tmp")),
        ("/process/user/username", json!("7:8")),
        ("/process/env", json!(["PATH=/bin", "HOSTNAME=", "TERM=dumb", "LANG=de", "A=b=c"])),
        ("/process/consoleSize", json!({ "width": 80, "height": 24 })),
        ("/linux/resources/cpu", json!({ "quota": 50_000, "period": 100_000 })),
        ("/linux/resources/memory/limit", json!(64 << 20)),
        ("/linux/resources/pids/limit", json!(9)),
        ("/root/readonly", json!(true)),
    ] {
        assert_eq!(spec.pointer(pointer), Some(&value), "{pointer}");
    }
}

#[test]
fn a_run_needs_a_command_and_an_absolute_folder() {
    let none = run_spec(&ImageConfig::default(), &RunOptions::default());
    assert!(matches!(none, Err(RunSpecError::NoCommand)));
    let relative = RunOptions { workdir: Some("tmp".into()), ..Default::default() };
    assert!(matches!(run_spec(&image(), &relative), Err(RunSpecError::Workdir(_))));
}

#[test]
fn what_is_made_here_passes_the_conversion() {
    let options = RunOptions { command: vec!["sh".into()], ..Default::default() };
    let spec = run_spec(&image(), &options).unwrap();
    let guest = guest_spec(&spec, &Counterparts::default()).unwrap();
    assert_eq!(guest.mounts().as_ref().unwrap().len(), 7);
    assert_eq!(guest.process(), spec.process());
}

fn with(options: RunOptions) -> Value {
    json(&image(), &RunOptions { command: vec!["sh".into()], ..options })
}

fn bounding(spec: &Value) -> HashSet<String> {
    let list = spec["process"]["capabilities"]["bounding"].as_array().unwrap();
    list.iter().map(|c| c.as_str().unwrap().to_string()).collect()
}

#[test]
fn capabilities_are_added_and_dropped_as_docker_does() {
    use CapabilityName::{All, One};
    let (admin, chown) = (One(Capability::NetAdmin), One(Capability::Chown));
    for (add, drop, number, has_admin, has_chown) in [
        (vec![], vec![], 14, false, true),
        (vec![admin], vec![], 15, true, true),
        (vec![], vec![chown], 13, false, false),
        (vec![admin], vec![All], 1, true, false),
        (vec![All], vec![chown], 40, true, false),
        (vec![All], vec![], 41, true, true),
        (vec![], vec![All], 0, false, false),
        (vec![chown], vec![chown], 14, false, true),
    ] {
        let spec = with(RunOptions { cap_add: add, cap_drop: drop, ..Default::default() });
        let set = bounding(&spec);
        assert_eq!(set.len(), number);
        assert_eq!(set.contains("CAP_NET_ADMIN"), has_admin);
        assert_eq!(set.contains("CAP_CHOWN"), has_chown);
    }
}

#[test]
fn a_privileged_container_has_all_that_the_guest_has() {
    let spec = with(RunOptions { privileged: true, ..Default::default() });
    assert_eq!(bounding(&spec).len(), 41);
    for pointer in ["/linux/seccomp", "/linux/maskedPaths", "/linux/readonlyPaths"] {
        assert_eq!(spec.pointer(pointer), None, "{pointer}");
    }
    assert_eq!(spec["linux"]["resources"]["devices"].as_array().unwrap().len(), 1);
    let sys = &spec["mounts"].as_array().unwrap()[3];
    assert!(sys["options"].as_array().unwrap().contains(&json!("rw")));
}

#[test]
fn an_entrypoint_replaces_the_images_and_its_command() {
    let args = |entrypoint: &str, command: &[&str]| {
        let options = RunOptions {
            entrypoint: Some(entrypoint.into()),
            command: command.iter().map(|s| s.to_string()).collect(),
            ..Default::default()
        };
        run_spec(&image(), &options).ok().map(|spec| json!(spec.process().as_ref().unwrap().args()))
    };
    assert_eq!(args("/bin/ls", &[]), Some(json!(["/bin/ls"])));
    assert_eq!(args("/bin/ls", &["-l"]), Some(json!(["/bin/ls", "-l"])));
    assert_eq!(args("", &["id"]), Some(json!(["id"])));
    assert_eq!(args("", &[]), None);
}

#[test]
fn further_options_reach_the_spec() {
    let options = RunOptions {
        seccomp: SeccompChoice::Unconfined,
        no_new_privileges: true,
        open_system_paths: true,
        ulimits: vec!["nofile=5:9".parse().unwrap()],
        sysctls: vec!["net.core.somaxconn=7".parse().unwrap()],
        tmpfs: vec!["/run:exec,size=1m".parse().unwrap()],
        volumes: vec!["/data".parse().unwrap()],
        shm_size: Some(1 << 20),
        ..Default::default()
    };
    let spec = with(options);
    for (pointer, value) in [
        ("/process/noNewPrivileges", json!(true)),
        ("/process/rlimits", json!([{ "type": "RLIMIT_NOFILE", "soft": 5, "hard": 9 }])),
        ("/linux/sysctl", json!({ "net.core.somaxconn": "7" })),
        ("/mounts/6/options/4", json!("size=1048576")),
        ("/mounts/7/destination", json!("/run")),
        ("/mounts/7/options", json!(["noexec", "nosuid", "nodev", "exec", "size=1m"])),
        ("/mounts/8/type", json!("scratch")),
    ] {
        assert_eq!(spec.pointer(pointer), Some(&value), "{pointer}");
    }
    assert!(spec.pointer("/linux/seccomp").is_none());
    assert!(spec.pointer("/linux/maskedPaths").is_none());
}

#[test]
fn a_profile_that_is_none_is_refused() {
    let options = RunOptions { seccomp: SeccompChoice::Profile(json!([])), ..Default::default() };
    assert!(matches!(run_spec(&image(), &options), Err(RunSpecError::Seccomp(_))));
}

#[test]
fn an_exec_is_as_the_first_process_but_for_what_is_said() {
    let options = RunOptions { user: Some("www".into()), ..Default::default() };
    let spec = run_spec(&image(), &options).unwrap();
    let first = spec.process().as_ref().unwrap();
    let args = vec!["ls".to_string()];
    let plain = exec_process(first, ExecRequest { args: args.clone(), ..Default::default() });
    let plain = plain.unwrap();
    assert_eq!(
        (plain.args(), plain.cwd(), plain.user()),
        (&Some(args.clone()), first.cwd(), first.user())
    );
    let full = ExecRequest {
        args,
        env: vec!["LANG=de".into(), "A=1".into()],
        workdir: Some("/tmp".into()),
        user: Some("7".into()),
        terminal: Some((80, 24)),
        stdin: true,
        output: true,
    };
    let full = serde_json::to_value(exec_process(first, full).unwrap()).unwrap();
    assert_eq!(full["env"], json!(["PATH=/bin", "HOSTNAME=", "LANG=de", "TERM=xterm", "A=1"]));
    assert_eq!((&full["cwd"], &full["user"]["username"]), (&json!("/tmp"), &json!("7")));
    assert_eq!(full["consoleSize"], json!({ "width": 80, "height": 24 }));
    let relative = ExecRequest { workdir: Some("tmp".into()), ..Default::default() };
    assert!(matches!(exec_process(first, relative), Err(RunSpecError::Workdir(_))));
}

#[test]
fn an_images_volumes_lie_on_the_scratch_disk_unless_something_else_is_there() {
    let volumes = ["/data/", "/srv/www", "/sys/fs/cgroup", "logs", "/"].map(String::from).into();
    let image = ImageConfig { volumes, ..image() };
    let options = RunOptions {
        volumes: ["/host:/srv/./www", "/host:/data/sub"].map(|v| v.parse().unwrap()).into(),
        tmpfs: vec!["/data/sub/tmp".parse().unwrap()],
        read_only: true,
        ..Default::default()
    };
    let spec = run_spec(&image, &options).unwrap();
    assert!(crate::spec::needs_scratch(&spec));
    let mounts = spec.mounts().iter().flatten().skip(7);
    let mounts: Vec<_> = mounts
        .map(|mount| (mount.destination().to_str().unwrap(), mount.typ().as_deref().unwrap()))
        .collect();
    assert_eq!(
        mounts,
        [
            ("/data", SCRATCH),
            ("/logs", SCRATCH),
            ("/srv/./www", "bind"),
            ("/data/sub", "bind"),
            ("/data/sub/tmp", "tmpfs"),
        ]
    );
}
