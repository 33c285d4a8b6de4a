//! How the kernel schedules the process: policy, CPUs, I/O; and what it takes it for (personality(2)).

use std::{io, mem};

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::{
    oci::{IoPriority, Personality, Process, Scheduler},
    plan::{StepError, at, refuse},
};

/// sched(7)
const POLICIES: [(&str, libc::c_int); 6] = [
    ("SCHED_OTHER", libc::SCHED_OTHER),
    ("SCHED_FIFO", libc::SCHED_FIFO),
    ("SCHED_RR", libc::SCHED_RR),
    ("SCHED_BATCH", libc::SCHED_BATCH),
    ("SCHED_IDLE", libc::SCHED_IDLE),
    ("SCHED_DEADLINE", 6),
];
/// sched_setattr(2). Clamps need values that a spec does not have.
const FLAGS: [(&str, u64); 5] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
];
/// ioprio_set(2)
const CLASSES: [(&str, libc::c_int); 3] =
    [("IOPRIO_CLASS_RT", 1), ("IOPRIO_CLASS_BE", 2), ("IOPRIO_CLASS_IDLE", 3)];
const CLASS_SHIFT: u32 = 13;
const THIS_PROCESS: libc::c_int = 1;
/// personality(2)
const DOMAINS: [(&str, libc::c_ulong); 2] = [("LINUX", 0), ("LINUX32", 8)];
const DOMAIN_MASK: libc::c_ulong = 0xff;
const ASK: libc::c_ulong = 0xffff_ffff;

/// As the spec has it; needs the privileges that are given up next.
pub fn schedule(process: &Process) -> Result<(), StepError> {
    if let Some(priority) = &process.io_priority {
        set_io_priority(priority)?;
    }
    process.scheduler.as_ref().map_or(Ok(()), set_scheduler)
}

fn number<T: Copy>(names: &[(&str, T)], name: &str, field: &'static str) -> Result<T, StepError> {
    let known = names.iter().find(|(known, _)| *known == name);
    let unknown = || refuse("spec", field, format_args!("{name:?} is not supported"));
    known.map(|(_, number)| *number).ok_or_else(unknown)
}

fn set_io_priority(wanted: &IoPriority) -> Result<(), StepError> {
    let class = number(&CLASSES, &wanted.class, "process.ioPriority.class")?;
    let level = libc::c_int::try_from(wanted.priority).ok().filter(|level| (0..8).contains(level));
    let level = level.ok_or_else(|| {
        refuse(
            "spec",
            "process.ioPriority.priority",
            format_args!("{} is not 0-7", wanted.priority),
        )
    })?;
    // SAFETY: ioprio_set(2) takes numbers.
    let result = unsafe {
        libc::syscall(libc::SYS_ioprio_set, THIS_PROCESS, 0, class << CLASS_SHIFT | level)
    };
    done(result, "io priority", &wanted.class)
}

fn set_scheduler(wanted: &Scheduler) -> Result<(), StepError> {
    let policy = number(&POLICIES, &wanted.policy, "process.scheduler.policy")?;
    let mut flags = 0;
    for flag in &wanted.flags {
        flags |= number(&FLAGS, flag, "process.scheduler.flags")?;
    }
    let Ok(priority) = u32::try_from(wanted.priority) else {
        return Err(refuse("spec", "process.scheduler.priority", "less than 0"));
    };
    if !(-20..20).contains(&wanted.nice) {
        return Err(refuse("spec", "process.scheduler.nice", "not -20 to 19"));
    }
    let attributes = libc::sched_attr {
        size: mem::size_of::<libc::sched_attr>() as u32,
        sched_policy: policy as u32,
        sched_flags: flags,
        sched_nice: wanted.nice,
        sched_priority: priority,
        sched_runtime: wanted.runtime,
        sched_deadline: wanted.deadline,
        sched_period: wanted.period,
    };
    // SAFETY: a whole sched_attr that outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    done(result, "scheduler", &wanted.policy)
}

/// The CPUs of a list as "0-3,7"; nothing changes where there is none.
pub fn set_affinity(list: Option<&str>) -> Result<(), StepError> {
    let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(()) };
    let cpus = cpus(list).ok_or_else(|| {
        refuse("spec", "process.execCPUAffinity", format_args!("{list:?} is no list of CPUs"))
    })?;
    sched_setaffinity(None, &cpus).map_err(at("cpu affinity", list))
}

fn cpus(list: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    Some(set)
}

/// Only the domain; other bits stay.
pub fn set_personality(wanted: Option<&Personality>) -> Result<(), StepError> {
    let Some(Personality { domain }) = wanted else { return Ok(()) };
    let number = number(&DOMAINS, domain, "linux.personality.domain")?;
    // SAFETY: personality(2) takes a number; this one changes nothing.
    let now = unsafe { libc::personality(ASK) } as libc::c_ulong;
    // SAFETY: likewise.
    let result = unsafe { libc::personality(now & !DOMAIN_MASK | number) };
    done(result.into(), "personality", domain)
}

fn done(result: libc::c_long, step: &'static str, object: &str) -> Result<(), StepError> {
    match result {
        ..0 => Err(at(step, object)(io::Error::last_os_error())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        let listed = |list| {
            let set = cpus(list)?;
            Some((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>())
        };
        assert_eq!(listed("0-2,7"), Some(vec![0, 1, 2, 7]));
        assert_eq!(listed("3"), Some(vec![3]));
        for bad in ["", "a", "3-1", "1,", "-1", "99999", "0-99999999999"] {
            assert_eq!(listed(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_no_schedule_is_refused() {
        let scheduler = |policy: &str, nice, priority, flags: &[&str]| Scheduler {
            policy: policy.into(),
            nice,
            priority,
            flags: flags.iter().map(|flag| flag.to_string()).collect(),
            ..Default::default()
        };
        for (wanted, field) in [
            (scheduler("SCHED_LUCK", 0, 0, &[]), "policy"),
            (scheduler("SCHED_OTHER", 20, 0, &[]), "nice"),
            (scheduler("SCHED_FIFO", 0, -1, &[]), "priority"),
            (scheduler("SCHED_OTHER", 0, 0, &["SCHED_FLAG_UTIL_CLAMP_MIN"]), "flags"),
        ] {
            let refused = set_scheduler(&wanted).unwrap_err().to_string();
            assert!(refused.contains(&format!("process.scheduler.{field}")), "{refused}");
        }
        for (class, priority, field) in
            [("IOPRIO_CLASS_X", 0, "class"), ("IOPRIO_CLASS_BE", 8, "priority")]
        {
            let refused = set_io_priority(&IoPriority { class: class.into(), priority });
            assert!(refused.unwrap_err().to_string().contains(field));
        }
        let domain = Personality { domain: "SOLARIS".into() };
        assert!(set_personality(Some(&domain)).unwrap_err().to_string().contains("domain"));
    }
}
