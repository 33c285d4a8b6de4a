use std::{fs, os::unix::fs::symlink, path::Path};

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;

const PASSWD_FILE: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
broken line
:x:5:5::/:
web:x:33:33:web:/var/www:/bin/sh
7:x:1007:1007:a number for a name:/home/7:/bin/sh
short:x:50:51
";
const GROUP_FILE: &str = "\
root:x:0:
www:x:33:web
adm:x:4:daemon,web
audio:x:29:web2
nonsense
";

fn found(wanted: &str) -> Result<(u32, u32, Vec<u32>), &'static str> {
    look_up(wanted, PASSWD_FILE, GROUP_FILE)
}

#[test]
fn names_and_numbers_as_docker_reads_them() {
    let table = [
        ("root", (0, 0, vec![])),
        ("web", (33, 33, vec![33, 4])),
        ("33", (33, 33, vec![33, 4])),
        ("1234", (1234, 0, vec![])),
        ("web:adm", (33, 4, vec![])),
        ("web:4242", (33, 4242, vec![])),
        ("1234:5678", (1234, 5678, vec![])),
        ("7", (1007, 1007, vec![])),
        ("short", (50, 51, vec![])),
        ("web:", (33, 33, vec![33, 4])),
        (":adm", (0, 4, vec![])),
    ];
    for (wanted, expected) in table {
        assert_eq!(found(wanted).unwrap(), expected, "{wanted}");
    }
    for unknown in ["nobody", "web:nogroup", "-1", "4294967295", "99999999999", "broken line"] {
        assert!(found(unknown).is_err(), "{unknown}");
    }
}

fn image(passwd: impl FnOnce(&Path)) -> (tempfile::TempDir, Root) {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("etc")).unwrap();
    passwd(&directory.path().join("etc/passwd"));
    let root = Root::open(directory.path()).unwrap();
    (directory, root)
}

fn named(name: &str) -> oci::User {
    oci::User { username: name.into(), ..Default::default() }
}

#[test]
fn a_plain_file_is_read() {
    let (_keep, root) = image(|path| fs::write(path, PASSWD_FILE).unwrap());
    let web = resolve(&root, &named("web")).unwrap();
    assert_eq!((web.uid, web.gid, web.home.as_str()), (33, 33, "/var/www"));
    let plain = oci::User { uid: 1, gid: 9, additional_gids: vec![7, 3, 7], ..Default::default() };
    let plain = resolve(&root, &plain).unwrap();
    let expected = User { uid: 1, gid: 9, groups: vec![3, 7], home: "/usr/sbin".into() };
    assert_eq!(plain, expected);
}

#[test]
fn without_a_file_numbers_still_work() {
    let (_keep, root) = image(|_| {});
    let user = resolve(&root, &named("12:34")).unwrap();
    assert_eq!(user, User { uid: 12, gid: 34, groups: vec![], home: "/".into() });
    assert!(resolve(&root, &named("web")).unwrap_err().to_string().contains("no such user"));
}

#[test]
fn traps_are_refused_and_do_not_hang() {
    let link = |path: &Path| symlink("/etc/shadow", path).unwrap();
    let fifo = |path: &Path| {
        mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    };
    let huge = |path: &Path| fs::File::create(path).unwrap().set_len(10 << 30).unwrap();
    let directory = |path: &Path| fs::create_dir(path).unwrap();
    let traps: [&dyn Fn(&Path); 4] = [&link, &fifo, &huge, &directory];
    for trap in traps {
        let (_keep, root) = image(trap);
        let error = resolve(&root, &named("web")).unwrap_err().to_string();
        assert!(
            error.starts_with("user: web: /etc/passwd of the image cannot be read: "),
            "{error}"
        );
        // By number the file is only asked for the home directory.
        let numeric = oci::User { uid: 33, ..Default::default() };
        assert_eq!(resolve(&root, &numeric).unwrap().home, "/");
    }
}

proptest! {
    #[test]
    fn any_text_is_survived(passwd in ".{0,200}", group in ".{0,200}", name in ".{1,20}") {
        if let Ok((uid, gid, groups)) = look_up(&name, &passwd, &group) {
            prop_assert!(uid != u32::MAX && gid != u32::MAX && !groups.contains(&u32::MAX));
        }
    }

    #[test]
    fn whoever_is_in_the_file_is_found(
        name in "[a-z_][a-z0-9_-]{0,15}", uid in 0u32..u32::MAX, gid in 0u32..u32::MAX,
    ) {
        let passwd = format!("other:x:1:1::/:\n{name}:x:{uid}:{gid}:,,,:/home/{name}:/bin/sh\n");
        prop_assume!(name != "other");
        let (found_uid, found_gid, _) = look_up(&name, &passwd, "").unwrap();
        prop_assert_eq!((found_uid, found_gid), (uid, gid));
    }
}
