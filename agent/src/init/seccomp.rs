//! The OCI seccomp profile as a BPF program: compiled by libseccomp before the process parks, loaded
//! with seccomp(2) just before the exec.
//!
//! Like runc, it answers system calls newer than all of the profile with ENOSYS instead of the default
//! action, so that C libraries fall back to older calls: a short program in front of libseccomp's.

use std::{
    fs::File,
    io::{self, Read, Seek},
    mem,
    os::fd::AsFd,
    str::FromStr,
};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
    error::SeccompError,
};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{
    oci::{Seccomp, SyscallArg, SyscallRule},
    plan::{StepError, at, refuse},
};

const STEP: &str = "seccomp";
/// AUDIT_ARCH_X86_64 (include/uapi/linux/audit.h).
const AUDIT_X86_64: u32 = 0xc000_003e;
/// Numbers from here on are x32's.
const X32_BIT: u32 = 0x4000_0000;

/// A compiled program.
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

/// Compiles a profile.
///
/// # Errors
/// On every word that is not understood. Only system calls that libseccomp does not know are left out,
/// as runc does: profiles are written for newer kernels too.
pub fn compile(profile: &Seccomp) -> Result<Filter, StepError> {
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let flags = flags(&profile.flags)?;
    let mut context = ScmpFilterContext::new(default).map_err(failed("default action"))?;
    check_architectures(&profile.architectures)?;
    // A binary tree instead of a list, where the library can.
    let _ = context.set_ctl_optimize(2);
    for rule in &profile.syscalls {
        add(&mut context, rule, default)?;
    }
    let mut program = Vec::new();
    if !matches!(default, ScmpAction::Allow | ScmpAction::Log) {
        program = answer_newer(profile).to_vec();
    }
    program.extend(export(&context)?);
    match program.len() {
        0..=4096 => Ok(Filter { program, flags }),
        length => Err(refuse(STEP, "profile", format_args!("{length} instructions are too many"))),
    }
}

impl Filter {
    /// From here on, this process and what it becomes are confined.
    pub fn load(&self) -> Result<(), StepError> {
        let program = libc::sock_fprog {
            len: self.program.len() as libc::c_ushort,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel copies a program that outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER as libc::c_long,
                self.flags,
                &raw const program,
            )
        };
        if result == 0 { Ok(()) } else { Err(at(STEP, "load")(io::Error::last_os_error())) }
    }
}

fn failed(object: impl std::fmt::Display) -> impl FnOnce(SeccompError) -> StepError {
    move |error| refuse(STEP, object, error)
}

fn action(name: &str, errno: Option<u32>) -> Result<ScmpAction, StepError> {
    let value = i32::try_from(errno.unwrap_or(libc::EPERM as u32)).ok().filter(|v| *v <= 0xffff);
    let value = value.ok_or_else(|| refuse(STEP, "errnoRet", "out of range"))?;
    match ScmpAction::from_str(name, Some(value)) {
        Ok(ScmpAction::Notify) => {
            Err(refuse(STEP, name, "no listener is reached from a guest; use another action"))
        }
        Err(_) => Err(refuse(STEP, name, "action not supported")),
        Ok(action) => Ok(action),
    }
}

/// seccomp(2)'s flags. One thread makes TSYNC moot, no listener WAIT_KILLABLE_RECV.
fn flags(names: &[String]) -> Result<libc::c_ulong, StepError> {
    if names.is_empty() {
        return Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    }
    names.iter().try_fold(0, |flags, name| match name.as_str() {
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | libc::SECCOMP_FILTER_FLAG_LOG),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
        "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => Ok(flags),
        other => Err(refuse(STEP, other, "flag not supported")),
    })
}

/// The guest's kernel runs x86-64 programs and no others (kernel-config), so the native architecture is
/// all there is to filter; each further one would make compiling ten times as long. Should a call of
/// another one come nevertheless, libseccomp's filter kills it.
fn check_architectures(names: &[String]) -> Result<(), StepError> {
    let unknown = names.iter().find(|name| ScmpArch::from_str(name).is_err());
    unknown.map_or(Ok(()), |name| Err(refuse(STEP, name, "architecture not known")))
}

fn add(
    context: &mut ScmpFilterContext,
    rule: &SyscallRule,
    default: ScmpAction,
) -> Result<(), StepError> {
    let action = action(&rule.action, rule.errno_ret)?;
    let comparisons = rule.args.iter().map(comparison).collect::<Result<Vec<_>, _>>()?;
    if action == default {
        return Ok(());
    }
    // libseccomp takes each argument once; runc makes such rules alternatives.
    let mut indices: Vec<u32> = rule.args.iter().map(|a| a.index).collect();
    indices.sort_unstable();
    let repeated = indices.windows(2).any(|pair| pair[0] == pair[1]);
    let alternatives: Vec<&[ScmpArgCompare]> = match repeated {
        true => comparisons.chunks(1).collect(),
        false => vec![&comparisons],
    };
    for name in &rule.names {
        let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
        for comparisons in &alternatives {
            context
                .add_rule_conditional(action, syscall, comparisons)
                .map_err(failed(format_args!("rule for {name}")))?;
        }
    }
    Ok(())
}

fn comparison(argument: &SyscallArg) -> Result<ScmpArgCompare, StepError> {
    if argument.index > 5 {
        return Err(refuse(STEP, "argument", format_args!("{} is no index", argument.index)));
    }
    let (op, value) = match argument.op.as_str() {
        "SCMP_CMP_NE" => (ScmpCompareOp::NotEqual, argument.value),
        "SCMP_CMP_LT" => (ScmpCompareOp::Less, argument.value),
        "SCMP_CMP_LE" => (ScmpCompareOp::LessOrEqual, argument.value),
        "SCMP_CMP_EQ" => (ScmpCompareOp::Equal, argument.value),
        "SCMP_CMP_GE" => (ScmpCompareOp::GreaterEqual, argument.value),
        "SCMP_CMP_GT" => (ScmpCompareOp::Greater, argument.value),
        "SCMP_CMP_MASKED_EQ" => (ScmpCompareOp::MaskedEqual(argument.value), argument.value_two),
        other => return Err(refuse(STEP, other, "comparison not supported")),
    };
    Ok(ScmpArgCompare::new(argument.index, op, value))
}

fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>, StepError> {
    let read = || {
        let mut file = File::from(memfd_create("filter", MemfdFlags::CLOEXEC)?);
        context.export_bpf(file.as_fd()).map_err(io::Error::other)?;
        file.rewind()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes: Vec<u8> = read().map_err(at::<io::Error>(STEP, "compile"))?;
    // struct sock_filter: u16 code, u8 jt, u8 jf, u32 k, in the machine's byte order.
    let instruction = |b: &[u8]| libc::sock_filter {
        code: u16::from_ne_bytes([b[0], b[1]]),
        jt: b[2],
        jf: b[3],
        k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
    };
    Ok(bytes.chunks_exact(mem::size_of::<libc::sock_filter>()).map(instruction).collect())
}

/// ENOSYS for numbers above all that the profile names; falls through to what follows otherwise.
fn answer_newer(profile: &Seccomp) -> [libc::sock_filter; 6] {
    let names = profile.syscalls.iter().flat_map(|rule| &rule.names);
    let numbers = names
        .filter_map(|name| ScmpSyscall::from_name(name).ok())
        .filter_map(|syscall| u32::try_from(syscall.as_raw_syscall()).ok());
    let newest = numbers.max().unwrap_or(0);
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    [
        load_word(mem::offset_of!(libc::seccomp_data, arch)),
        jump(libc::BPF_JEQ, AUDIT_X86_64, 0, 4),
        load_word(mem::offset_of!(libc::seccomp_data, nr)),
        jump(libc::BPF_JGE, X32_BIT, 2, 0),
        jump(libc::BPF_JGT, newest, 0, 1),
        libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: enosys },
    ]
}

fn load_word(offset: usize) -> libc::sock_filter {
    let code = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    libc::sock_filter { code, jt: 0, jf: 0, k: offset as u32 }
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt, jf, k }
}

#[cfg(test)]
mod tests;
