//! The VMM from first to last: confine, take the boot request, build, run, stop. There is one way out,
//! [`finish`], and it is taken whatever happens.

use std::{
    io::{self, Write},
    os::fd::OwnedFd,
    process::exit,
    sync::Arc,
    time::Duration,
};

use ampoule_vmm_api::{Channel, ChannelError, Event, StopCause};

use crate::{
    builder::{self, Reports, Vm},
    confine,
    counters::ExitCounters,
    error::describe,
    events::Events,
    request::{self, RequestError},
    seccomp,
    stop::{Stop, StopLatch},
};

/// How long the last message may wait for room in the control socket.
const FAREWELL: Duration = Duration::from_secs(1);

/// Runs one VM, told over `control`, and ends the process.
pub fn run(control: OwnedFd, process_ns: u64) -> ! {
    // One heap for all threads: vCPUs hardly allocate, and each heap costs a mapping and its pages.
    // SAFETY: sets a number, before there are other threads.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let channel = Arc::new(Channel::from_fd(control));
    let Ok(latch) = StopLatch::new() else { exit(StopCause::Internal.exit_code().into()) };
    let reports = Reports {
        events: Events::new(channel.clone()),
        channel,
        latch,
        counters: Arc::new(ExitCounters::default()),
    };
    match start(&reports, process_ns) {
        Ok(mut vm) => {
            let stop = serve(&mut vm, &reports.latch);
            finish(&stop, &reports)
        }
        Err(stop) => finish(&stop, &reports),
    }
}

/// Confines the process, takes the boot request, builds the VM.
fn start(reports: &Reports, process_ns: u64) -> Result<Vm, Stop> {
    let failed = |detail| Stop { cause: StopCause::BootFailed, detail };
    let missing = confine::enter().map_err(|e| failed(describe(&e)))?;
    if !missing.is_empty() {
        // Standard error may be closed; that must not be the end.
        let _ = writeln!(io::stderr(), "ampoule-vmm: not permitted here: {}", missing.join(", "));
    }
    let request = request::receive(&reports.channel).map_err(|e| match e {
        RequestError::Channel(ChannelError::Closed) => {
            Stop { cause: StopCause::ShimGone, detail: String::new() }
        }
        e => failed(describe(&e)),
    })?;
    builder::build(request, reports, process_ns).map_err(|e| failed(describe(&e)))
}

/// Lets the guest run until something raises the latch; the vCPU threads have ended on return.
fn serve(vm: &mut Vm, latch: &StopLatch) -> Stop {
    let mut stamps = Some(vm.stamps);
    for vcpu in &vm.vcpus {
        vcpu.run(stamps.take());
    }
    // The guest runs meanwhile; nothing of it reaches this thread before the event loop does.
    if let Err(e) = seccomp::main().and_then(|filter| filter.install()) {
        latch.raise(StopCause::Internal, describe(&e));
    }
    let stop = loop {
        if let Some(stop) = latch.raised() {
            break stop;
        }
        if let Err(e) = vm.event_loop.run() {
            latch.raise(StopCause::Internal, describe(&e));
        }
    };
    for vcpu in &vm.vcpus {
        vcpu.ask_to_exit();
    }
    vm.vcpus.clear();
    stop
}

/// Says why the VM ended, and ends the process. Nothing is dropped before: closing the VM takes KVM some 20 ms,
/// which the shim need not wait for.
fn finish(stop: &Stop, reports: &Reports) -> ! {
    let event = Event::Stopped {
        cause: stop.cause,
        detail: stop.detail.clone(),
        exits: reports.counters.snapshot(),
    };
    // Nobody may be there to hear it: the exit code says the same.
    let _ = reports.events.send_last(&event, FAREWELL);
    exit(stop.cause.exit_code().into())
}
