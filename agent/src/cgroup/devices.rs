//! Device access as a BPF program on the cgroup (`BPF_PROG_TYPE_CGROUP_DEVICE`; struct
//! bpf_cgroup_dev_ctx in include/uapi/linux/bpf.h).
//!
//! The program keeps a set of permissions for the device in question: none at first, then rule by rule
//! in the order of the spec, an "allow" adds what it names, a "deny" takes it away. At the end
//! everything asked for must be in the set.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use crate::{
    oci::DeviceRule,
    plan::{StepError, at, refuse},
};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

/// What every container may use, unless a rule denies the very device: runc's list. (type, major, minor, permissions)
const ALWAYS: [(u32, Option<u32>, Option<u32>, u32); 11] = [
    // mknod of anything: access is another matter, and images with device nodes can be unpacked.
    (CHAR, None, None, MKNOD),
    (BLOCK, None, None, MKNOD),
    (CHAR, Some(1), Some(3), MKNOD | READ | WRITE), // null
    (CHAR, Some(1), Some(5), MKNOD | READ | WRITE), // zero
    (CHAR, Some(1), Some(7), MKNOD | READ | WRITE), // full
    (CHAR, Some(1), Some(8), MKNOD | READ | WRITE), // random
    (CHAR, Some(1), Some(9), MKNOD | READ | WRITE), // urandom
    (CHAR, Some(5), Some(0), MKNOD | READ | WRITE), // tty
    (CHAR, Some(5), Some(1), MKNOD | READ | WRITE), // console
    (CHAR, Some(5), Some(2), MKNOD | READ | WRITE), // ptmx
    (CHAR, Some(136), None, MKNOD | READ | WRITE),  // pts/*
];

/// Puts the program for these rules on a cgroup. It goes when the cgroup goes.
pub fn attach(cgroup: BorrowedFd<'_>, rules: &[DeviceRule]) -> Result<(), StepError> {
    let rules = rules.iter().map(Rule::try_from).collect::<Result<Vec<_>, _>>()?;
    let program = load(&compile(&rules)).map_err(at("cgroup", "device program"))?;
    attach_program(cgroup, &program).map_err(at("cgroup", "device program"))
}

#[derive(Clone, Copy, Debug)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    permissions: u32,
}

impl TryFrom<&DeviceRule> for Rule {
    type Error = StepError;

    fn try_from(rule: &DeviceRule) -> Result<Self, StepError> {
        let bad = |value: &dyn std::fmt::Debug| {
            refuse("spec", "linux.resources.devices", format_args!("{value:?} is not known"))
        };
        let kind = match rule.kind.as_str() {
            "" | "a" => None,
            "b" => Some(BLOCK),
            "c" | "u" => Some(CHAR),
            other => return Err(bad(&other)),
        };
        let number = |n: Option<i64>| match n {
            None | Some(i64::MIN..=-1) => Ok(None),
            Some(n) => i32::try_from(n).map(|n| Some(n as u32)).map_err(|_| bad(&n)),
        };
        let access = if rule.access.is_empty() { "rwm" } else { &rule.access };
        let mut permissions = 0;
        for letter in access.chars() {
            permissions |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return Err(bad(&access)),
            };
        }
        let (major, minor) = (number(rule.major)?, number(rule.minor)?);
        Ok(Self { allow: rule.allow, kind, major, minor, permissions })
    }
}

/// struct bpf_insn
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Opcodes: class | operation | source (include/uapi/linux/bpf_common.h).
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND: u8 = 0x57;
const AND_REGISTER: u8 = 0x5f;
const OR: u8 = 0x47;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d;
const EXIT: u8 = 0x95;

// What the registers hold.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ASKED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const GRANTED: u8 = 6;

fn op(code: u8, destination: u8, source: u8, offset: usize, immediate: u32) -> Instruction {
    Instruction {
        code,
        registers: destination | source << 4,
        offset: offset as i16,
        immediate: immediate as i32,
    }
}

fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        // access_type: permissions in the high half, type in the low.
        op(LOAD_WORD, KIND, CONTEXT, 0, 0),
        op(MOVE_REGISTER, ASKED, KIND, 0, 0),
        op(AND, KIND, 0, 0, 0xffff),
        op(SHIFT_RIGHT, ASKED, 0, 0, 16),
        op(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        op(LOAD_WORD, MINOR, CONTEXT, 8, 0),
        op(MOVE, GRANTED, 0, 0, 0),
    ];
    let always = ALWAYS.map(|(kind, major, minor, permissions)| Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        permissions,
    });
    // One device that is denied by its numbers stays so.
    let denied = rules.iter().filter(|r| !r.allow && r.major.is_some() && r.minor.is_some());
    for rule in rules.iter().chain(&always).chain(denied) {
        compile_rule(rule, &mut program);
    }
    program.extend([
        op(MOVE, RESULT, 0, 0, 0),
        op(AND_REGISTER, GRANTED, ASKED, 0, 0),
        op(JUMP_NOT_EQUAL_REGISTER, GRANTED, ASKED, 1, 0),
        op(MOVE, RESULT, 0, 0, 1),
        op(EXIT, 0, 0, 0, 0),
    ]);
    program
}

fn compile_rule(rule: &Rule, program: &mut Vec<Instruction>) {
    let tests: Vec<_> = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
        .into_iter()
        .filter_map(|(register, value)| Some((register, value?)))
        .collect();
    for (i, (register, value)) in tests.iter().enumerate() {
        // Past the remaining tests and the verdict.
        program.push(op(JUMP_NOT_EQUAL, *register, 0, tests.len() - i, *value));
    }
    program.push(match rule.allow {
        true => op(OR, GRANTED, 0, 0, rule.permissions),
        false => op(AND, GRANTED, 0, 0, !rule.permissions),
    });
}

const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
/// Programs of nested cgroups all have a say.
const ALLOW_MULTI: u32 = 2;

/// union bpf_attr for BPF_PROG_LOAD, as far as it is used.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    length: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// union bpf_attr for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: RawFd,
    program: RawFd,
    kind: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: TYPE_CGROUP_DEVICE,
        length: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let fd = bpf(PROG_LOAD, &attributes)?;
    // SAFETY: bpf(2) has just made this descriptor for us; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn attach_program(cgroup: BorrowedFd<'_>, program: &OwnedFd) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    bpf(PROG_ATTACH, &attributes).map(drop)
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes outlive the call, and so does what they point to; the kernel only reads.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attributes, mem::size_of::<T>()) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

#[cfg(test)]
mod tests;
