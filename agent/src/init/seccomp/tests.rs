use serde_json::json;

use super::*;

fn compiled(profile: serde_json::Value) -> Result<Filter, String> {
    let profile: Seccomp = serde_json::from_value(profile).unwrap();
    compile(&profile).map_err(|e| e.to_string())
}

/// Runs a filter as the kernel would, for the opcodes that occur.
fn verdict(filter: &Filter, arch: u32, nr: u32, args: [u64; 6]) -> u32 {
    let mut data = [0u8; 64];
    data[0..4].copy_from_slice(&nr.to_ne_bytes());
    data[4..8].copy_from_slice(&arch.to_ne_bytes());
    for (i, arg) in args.iter().enumerate() {
        data[16 + 8 * i..24 + 8 * i].copy_from_slice(&arg.to_ne_bytes());
    }
    let (mut accumulator, mut at) = (0u32, 0usize);
    loop {
        let i = filter.program[at];
        at += 1;
        let k = i.k;
        let branch = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
        match i.code {
            0x20 => {
                let word = &data[k as usize..k as usize + 4];
                accumulator = u32::from_ne_bytes(word.try_into().unwrap());
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += branch(accumulator == k),
            0x25 => at += branch(accumulator > k),
            0x35 => at += branch(accumulator >= k),
            0x45 => at += branch(accumulator & k != 0),
            0x06 => return k,
            other => panic!("opcode {other:#x}"),
        }
    }
}

const AUDIT_I386: u32 = 0x4000_0003;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn native(filter: &Filter, nr: libc::c_long, args: [u64; 6]) -> u32 {
    verdict(filter, AUDIT_X86_64, nr as u32, args)
}

#[test]
fn a_list_of_what_is_allowed() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64"],
        "syscalls": [
            {"names": ["read", "write", "not_a_system_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["openat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["kill"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["personality"], "action": "SCMP_ACT_TRAP"},
            {"names": ["ptrace"], "action": "SCMP_ACT_TRACE", "errnoRet": 5},
            {"names": ["uname"], "action": "SCMP_ACT_LOG"},
        ]
    }))
    .unwrap();
    let none = [0; 6];
    assert_eq!(native(&filter, libc::SYS_read, none), ALLOW);
    assert_eq!(native(&filter, libc::SYS_mount, none), EPERM);
    assert_eq!(native(&filter, libc::SYS_openat2, none), libc::SECCOMP_RET_ERRNO | 99);
    assert_eq!(native(&filter, libc::SYS_socket, [40, 1, 0, 0, 0, 0]), EPERM);
    assert_eq!(native(&filter, libc::SYS_socket, [1, 1, 0, 0, 0, 0]), ALLOW);
    assert_eq!(native(&filter, libc::SYS_clone, [0x11, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(native(&filter, libc::SYS_clone, [0x1000_0000, 0, 0, 0, 0, 0]), EPERM);
    assert_eq!(native(&filter, libc::SYS_kill, none), libc::SECCOMP_RET_KILL_PROCESS);
    assert_eq!(native(&filter, libc::SYS_personality, none), libc::SECCOMP_RET_TRAP);
    assert_eq!(native(&filter, libc::SYS_ptrace, none), libc::SECCOMP_RET_TRACE | 5);
    assert_eq!(native(&filter, libc::SYS_uname, none), libc::SECCOMP_RET_LOG);
    // openat2 (437) is the newest that the profile names.
    assert_eq!(native(&filter, 438, none), ENOSYS);
    assert_eq!(native(&filter, 100_000, none), ENOSYS);
    // read is 3 on i386, and x32's numbers have a bit of their own.
    assert_eq!(verdict(&filter, AUDIT_I386, 3, none), libc::SECCOMP_RET_KILL_THREAD);
    assert_eq!(native(&filter, i64::from(X32_BIT), none), libc::SECCOMP_RET_KILL_THREAD);
}

#[test]
fn a_list_of_what_is_forbidden_answers_nothing_else() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]
    }))
    .unwrap();
    assert_eq!(native(&filter, libc::SYS_mkdir, [0; 6]), EPERM);
    assert_eq!(native(&filter, 100_000, [0; 6]), ALLOW);
    assert_eq!(filter.flags, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
}

#[test]
fn the_same_argument_twice_means_either() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
            {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}]
    }))
    .unwrap();
    for (family, expected) in [(1, ALLOW), (2, ALLOW), (3, EPERM)] {
        assert_eq!(native(&filter, libc::SYS_socket, [family, 0, 0, 0, 0, 0]), expected);
    }
}

#[test]
fn words_that_are_not_understood_are_refused() {
    let rule =
        |rule: serde_json::Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
    let argument = |op: &str, index: u32| {
        rule(json!({"names": ["read"], "action": "SCMP_ACT_ERRNO",
                    "args": [{"index": index, "value": 0, "op": op}]}))
    };
    let table = [
        (json!({"defaultAction": "SCMP_ACT_MAYBE"}), "SCMP_ACT_MAYBE"),
        (json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "SCMP_ACT_NOTIFY"),
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["VAX"]}), "VAX"),
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["NEW"]}), "NEW"),
        (rule(json!({"names": ["read"], "action": "SCMP_ACT_NOTIFY"})), "SCMP_ACT_NOTIFY"),
        (
            rule(json!({"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 70000})),
            "errnoRet",
        ),
        (argument("SCMP_CMP_ABOUT", 0), "SCMP_CMP_ABOUT"),
        (argument("SCMP_CMP_EQ", 6), "argument"),
    ];
    for (profile, word) in table {
        let message = compiled(profile).err().unwrap();
        assert!(message.starts_with("seccomp: ") && message.contains(word), "{message}");
    }
}
