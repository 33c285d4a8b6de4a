use proptest::prelude::*;

use super::*;

/// Runs a program as the kernel would, for the opcodes used here.
fn run(program: &[Instruction], context: [u32; 3]) -> bool {
    let mut registers = [0u64; 8];
    let mut at = 0;
    for _ in 0..100_000 {
        let Instruction { code, registers: operands, offset, immediate } = program[at];
        let (to, from) = ((operands & 15) as usize, (operands >> 4) as usize);
        let immediate = immediate as i64 as u64;
        at += 1;
        match code {
            LOAD_WORD => registers[to] = context[offset as usize / 4].into(),
            MOVE => registers[to] = immediate,
            MOVE_REGISTER => registers[to] = registers[from],
            AND => registers[to] &= immediate,
            AND_REGISTER => registers[to] &= registers[from],
            OR => registers[to] |= immediate,
            SHIFT_RIGHT => registers[to] >>= immediate,
            JUMP_NOT_EQUAL if registers[to] != immediate => at += offset as usize,
            JUMP_NOT_EQUAL_REGISTER if registers[to] != registers[from] => at += offset as usize,
            JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER => {}
            EXIT => return registers[0] == 1,
            other => panic!("opcode {other:#x}"),
        }
    }
    panic!("does not end");
}

fn allows(rules: &[Rule], kind: u32, major: u32, minor: u32, asked: u32) -> bool {
    run(&compile(rules), [asked << 16 | kind, major, minor])
}

fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> Rule {
    let (major, minor) = (Some(major), Some(minor));
    Rule::try_from(&DeviceRule { allow, kind: kind.into(), major, minor, access: access.into() })
        .unwrap()
}

const ALL: u32 = READ | WRITE | MKNOD;

#[test]
fn without_rules_only_the_usual_devices_work() {
    assert!(allows(&[], CHAR, 1, 3, READ | WRITE));
    assert!(allows(&[], CHAR, 136, 77, READ));
    assert!(allows(&[], BLOCK, 254, 0, MKNOD));
    assert!(!allows(&[], BLOCK, 254, 0, READ));
    assert!(!allows(&[], CHAR, 1, 1, READ));
    assert!(!allows(&[], CHAR, 10, 200, WRITE));
    let denied = [rule(false, "c", 1, 9, "rw"), rule(false, "c", 1, -1, "rwm")];
    assert!(!allows(&denied, CHAR, 1, 9, READ));
    assert!(allows(&denied, CHAR, 1, 9, MKNOD) && allows(&denied, CHAR, 1, 8, READ));
}

#[test]
fn a_privileged_container_reaches_everything() {
    let rules = [rule(true, "a", -1, -1, "rwm")];
    assert!(allows(&rules, BLOCK, 254, 16, ALL));
    assert!(allows(&rules, CHAR, 10, 229, ALL));
}

#[test]
fn rules_are_applied_in_order() {
    let rules = [
        rule(false, "a", -1, -1, "rwm"),
        rule(true, "b", 8, -1, "r"),
        rule(true, "b", 8, 1, "w"),
        rule(false, "b", 8, 2, "r"),
    ];
    assert!(allows(&rules, BLOCK, 8, 0, READ));
    assert!(!allows(&rules, BLOCK, 8, 0, WRITE));
    assert!(allows(&rules, BLOCK, 8, 1, READ | WRITE));
    assert!(!allows(&rules, BLOCK, 8, 2, READ));
    assert!(!allows(&rules, CHAR, 8, 1, READ));
}

/// As Docker has them: its own list, which denies one device, then what is asked for.
#[test]
fn what_is_denied_by_its_numbers_may_be_allowed_later() {
    let docker = [rule(false, "a", -1, -1, "rwm"), rule(false, "c", 10, 229, "rwm")];
    assert!(!allows(&docker, CHAR, 10, 229, MKNOD));
    for asked_for in [rule(true, "c", 10, 229, "rwm"), rule(true, "a", -1, -1, "rwm")] {
        assert!(allows(&[docker[0], docker[1], asked_for], CHAR, 10, 229, ALL));
    }
    let read = [docker[0], docker[1], rule(true, "c", 10, -1, "r")];
    assert!(allows(&read, CHAR, 10, 229, READ) && !allows(&read, CHAR, 10, 229, MKNOD));
    let again = [docker[0], rule(true, "c", 10, 229, "rwm"), docker[1]];
    assert!(!allows(&again, CHAR, 10, 229, MKNOD));
}

#[test]
fn unknown_words_are_refused() {
    let bad = [("x", "r", None), ("c", "rx", None), ("c", "r", Some(1 << 40))];
    for (kind, access, major) in bad {
        let rule = DeviceRule {
            allow: true,
            kind: kind.into(),
            major,
            minor: None,
            access: access.into(),
        };
        assert!(Rule::try_from(&rule).unwrap_err().to_string().contains("devices"));
    }
}

/// The same by the definition, without a program.
fn model(rules: &[Rule], kind: u32, major: u32, minor: u32, asked: u32) -> bool {
    let mut granted = 0;
    for rule in rules {
        let is = |wanted: Option<u32>, value| wanted.is_none_or(|w| w == value);
        if is(rule.kind, kind) && is(rule.major, major) && is(rule.minor, minor) {
            match rule.allow {
                true => granted |= rule.permissions,
                false => granted &= !rule.permissions,
            }
        }
    }
    granted & asked == asked
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let small = || proptest::option::of(200u32..203);
    (any::<bool>(), proptest::option::of(1u32..3), small(), small(), 1u32..8).prop_map(
        |(allow, kind, major, minor, permissions)| Rule { allow, kind, major, minor, permissions },
    )
}

proptest! {
    #[test]
    fn the_program_does_what_the_rules_say(
        rules in proptest::collection::vec(any_rule(), 0..12),
        kind in 1u32..3, major in 200u32..203, minor in 200u32..203, asked in 1u32..8,
    ) {
        // Outside of what is always allowed, but for mknod.
        let asked = asked & !MKNOD;
        let expected = model(&rules, kind, major, minor, asked);
        prop_assert_eq!(allows(&rules, kind, major, minor, asked), expected);
    }
}

#[test]
fn the_kernel_accepts_the_program() {
    let rules: Vec<_> = (0..200).map(|n| rule(n % 2 == 0, "c", n, -1, "rw")).collect();
    match Program::load(Kind::Device, &compile(&rules)) {
        // Not every test machine lets us.
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
        result => drop(result.unwrap()),
    }
}
