//! Device access as a BPF program on the cgroup (`BPF_PROG_TYPE_CGROUP_DEVICE`; struct
//! bpf_cgroup_dev_ctx in include/uapi/linux/bpf.h).
//!
//! The program keeps a set of permissions for the device in question: none at first, then rule by rule
//! in the order of the spec, an "allow" adds what it names, a "deny" takes it away. At the end
//! everything asked for must be in the set.

use std::os::fd::BorrowedFd;

use ampoule_agent_api::bpf::{
    AND, AND_REGISTER, EXIT, Instruction, JUMP_NOT_EQUAL, JUMP_NOT_EQUAL_REGISTER, Kind, LOAD_WORD,
    MOVE, MOVE_REGISTER, OR, Program, SHIFT_RIGHT, op,
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
    let program = Program::load(Kind::Device, &compile(&rules));
    program.and_then(|program| program.attach(cgroup)).map_err(at("cgroup", "device program"))
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

impl Rule {
    /// One device that is denied by its numbers, as far as no later rule allows it: Docker's own list denies /dev/fuse,
    /// which may be asked for.
    fn stays_denied(self, later: &[Self]) -> impl Iterator<Item = Self> {
        let one = !self.allow && self.major.is_some() && self.minor.is_some();
        let kinds = [BLOCK, CHAR].into_iter().filter(move |&kind| is(self.kind, Some(kind)));
        kinds.filter(move |_| one).filter_map(move |kind| {
            let allows = |rule: &&Self| {
                let numbers = is(rule.major, self.major) && is(rule.minor, self.minor);
                rule.allow && numbers && is(rule.kind, Some(kind))
            };
            let allowed = later.iter().filter(allows).fold(0, |all, rule| all | rule.permissions);
            let permissions = self.permissions & !allowed;
            (permissions != 0).then_some(Self { kind: Some(kind), permissions, ..self })
        })
    }
}

/// Whether a rule that says this, or nothing, means that.
fn is(said: Option<u32>, that: Option<u32>) -> bool {
    said.is_none() || said == that
}

// What the registers hold.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ASKED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const GRANTED: u8 = 6;

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
    let denied: Vec<Rule> =
        rules.iter().enumerate().flat_map(|(n, rule)| rule.stays_denied(&rules[n + 1..])).collect();
    for rule in rules.iter().chain(&always).chain(&denied) {
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
        program.push(op(JUMP_NOT_EQUAL, *register, 0, (tests.len() - i) as i16, *value));
    }
    program.push(match rule.allow {
        true => op(OR, GRANTED, 0, 0, rule.permissions),
        false => op(AND, GRANTED, 0, 0, !rule.permissions),
    });
}

#[cfg(test)]
mod tests;
