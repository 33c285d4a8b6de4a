//! The VMM from first to last: confine, take the boot request, build, run, stop. There is one way out,
//! [`finish`], and it is taken whatever happens.

use std::{
    io::{self, Write},
    os::fd::OwnedFd,
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
    seccomp::Filter,
    stop::{Stop, StopLatch},
};

/// How long the last message may wait for room in the control socket.
const FAREWELL: Duration = Duration::from_secs(1);

/// Runs one VM, told over `control`. Returns the exit code of the process.
pub fn run(control: OwnedFd, process_ns: u64) -> u8 {
    let channel = Arc::new(Channel::from_fd(control));
    let latch = match StopLatch::new() {
        Ok(latch) => latch,
        Err(_) => return StopCause::Internal.exit_code(),
    };
    let reports = Reports {
        events: Events::new(channel.clone()),
        channel,
        latch,
        counters: Arc::new(ExitCounters::default()),
    };
    let stop = match start(&reports, process_ns) {
        Ok(vm) => serve(vm, &reports.latch),
        Err(stop) => stop,
    };
    finish(&stop, &reports)
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
fn serve(vm: Vm, latch: &StopLatch) -> Stop {
    let Vm { mut event_loop, vcpus, stamps, .. } = vm;
    if let Err(e) = Filter::main().and_then(|filter| filter.install()) {
        latch.raise(StopCause::Internal, describe(&e));
    }
    let mut stamps = Some(stamps);
    for vcpu in &vcpus {
        vcpu.run(stamps.take());
    }
    let stop = loop {
        if let Some(stop) = latch.raised() {
            break stop;
        }
        if let Err(e) = event_loop.run() {
            latch.raise(StopCause::Internal, describe(&e));
        }
    };
    for vcpu in &vcpus {
        vcpu.ask_to_exit();
    }
    drop(vcpus);
    stop
}

/// Says why the VM ended. What the process holds goes with it.
fn finish(stop: &Stop, reports: &Reports) -> u8 {
    let event = Event::Stopped {
        cause: stop.cause,
        detail: stop.detail.clone(),
        exits: reports.counters.snapshot(),
    };
    // Nobody may be there to hear it: the exit code says the same.
    let _ = reports.events.send_last(&event, FAREWELL);
    stop.cause.exit_code()
}
