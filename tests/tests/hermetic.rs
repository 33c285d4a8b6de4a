//! Runs that can be repeated: hermetic ones, a given clock, a given seed.

use std::fs;

use ampoule_tests::{ampoule, detached, run};
use tempfile::TempDir;

/// 2001-02-03T04:05:06Z
const THEN: u64 = 981_173_106;

/// Draws in every way there is, also from processes beside each other, and prints what it got.
const DRAW: &str = r#"
    draw() { perl -e '$b = "\0" x $ARGV[0]; $n = syscall(318, $b, $ARGV[0], 0); print "$n ", unpack("H*", $b), "\n"' $1; }
    draw 16; draw 100; draw 100000 > /tmp/0; sha256sum < /tmp/0
    perl -e 'print rand(), "\n"'
    mktemp -u
    head -c 40 /dev/urandom | od -An -tx1; head -c 8 /dev/random | od -An -tx1
    head -c 1000000 /dev/urandom | sha256sum
    echo seed > /dev/urandom && echo written
    for n in 1 2 3 4; do
        perl -e '$b = "\0" x 9; open F, "/dev/urandom"; for (1..200) {
            syscall(318, $b, 9, 0); sysread(F, $c, 99); $s .= $b . $c } print unpack("%63C*", $s), "\n"' > /tmp/$n &
    done; wait; cat /tmp/1 /tmp/2 /tmp/3 /tmp/4
    grep stack /proc/self/maps | sed 's/^/at /'; hostname"#;
/// What must not be there, and what must not work.
const NOT: &str = r#"
    grep -ow -e rdrand -e rdseed /proc/cpuinfo; grep vdso /proc/self/maps
    mknod /tmp/random c 1 9 && head -c 1 /tmp/random 2>/dev/null
    perl -e '$b = ""; print syscall(318, 1, 16, 0), " ", $! + 0, " ", syscall(318, $b, 0, 64), " ", $! + 0, "\n"'"#;

#[test]
fn equal_seeds_give_equal_runs_and_the_clock_starts_where_it_is_told() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("receipt");
    let options = ["--hermetic", "--clock", "2001-02-03T05:05:06+01:00", "--receipt"];
    let options = [&options[..], &[path.to_str().unwrap(), "--seed"]].concat();
    let script = format!("date +%s; echo; {DRAW}; echo; {NOT}");
    let words = |seed| [&options[..], &[seed, "debian", "sh", "-c", &script]].concat();
    let first = run(words("7")).output().ended_with(0).text();
    let receipt: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let second = run(words("0x07")).output().ended_with(0).text();
    let parts = |text: &str| -> Vec<String> { text.split("\n\n").map(String::from).collect() };
    let (first, second) = (parts(&first), parts(&second));
    assert_eq!(first[1], second[1]);
    assert!(first[1].ends_with("\nampoule") && first[1].starts_with("16 "), "{}", first[1]);
    assert_eq!(first[2], "-1 14 -1 22");
    for run in [&first, &second] {
        let clock: u64 = run[0].parse().unwrap();
        assert!((THEN..THEN + 30).contains(&clock), "{clock}");
    }
    assert_eq!(receipt["hermetic"], true);
    assert_eq!(receipt["clock"], "2001-02-03T04:05:06.000000000Z");
    assert_eq!(receipt["seed"], "0x7");

    let script = format!("{DRAW}; echo end; sleep 600");
    let other = detached(["--hermetic", "--seed", "8", "debian", "sh", "-c", &script]);
    other.logged("end");
    let (other_lines, lines) = (other.verb("logs").text(), first[1].clone());
    let same: Vec<&str> = lines.lines().filter(|l| other_lines.lines().any(|o| o == *l)).collect();
    assert!(same.iter().all(|l| !l.starts_with(|c: char| c.is_ascii_digit())), "{same:?}");
    other.sh("true").ended_with(125).says(&["hermetic"]);
    ampoule(["console", &other.0]).output().ended_with(125).says(&["hermetic"]);
}

#[test]
fn what_contradicts_is_refused_before_anything_is_done() {
    for (options, words) in [
        (&["--hermetic", "--privileged"][..], &["--hermetic", "--privileged"][..]),
        (&["--hermetic", "-e", "HOME"], &["--hermetic", "HOME=VALUE"]),
        (&["--seed", "7", "--privileged"], &["--seed", "--privileged"]),
        (&["--seed", "x"], &["--seed", "0x"]),
        (&["--clock", "0"], &["--clock", "1970-01-02"]),
    ] {
        run([options, &["alpine", "true"]].concat()).output().ended_with(125).says(words);
    }
}
