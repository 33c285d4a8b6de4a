//! vCPUs: one thread each, behind a handle. The thread alone touches its `VcpuFd`; others talk to it by
//! [`Command`] and kick it out of the guest; it answers through the [`StopLatch`].
//!
//! ```text
//! Parked --Run--> Running --guest or KVM ends the VM--> Parked
//!    \------Exit-----+--------> thread ends (Drop of the handle sends Exit, kicks and joins)
//! ```

use std::{
    io,
    os::unix::thread::JoinHandleExt,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{Builder, JoinHandle},
};

use ampoule_vmm_api::{Event, Stamps, StopCause, seccomp::Filter};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::{
    errno,
    signal::{SIGRTMIN, register_signal_handler},
};

use crate::{
    bus::Bus,
    counters::{ExitCounters, count},
    events::{Events, now_ns},
    stop::StopLatch,
};

const STACK_SIZE: usize = 256 << 10;

/// What every vCPU thread works with.
#[derive(Clone)]
pub struct Surroundings {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub counters: Arc<ExitCounters>,
    pub events: Events,
    pub latch: StopLatch,
    pub filter: Arc<Filter>,
}

/// What a vCPU thread is told.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    /// Run the guest. The boot vCPU gets the stamps so far and reports [`Event::Started`].
    Run(Option<Stamps>),
    Exit,
}

/// A vCPU thread. Dropping it takes the thread out of the guest, whatever the guest does, and joins it.
#[derive(Debug)]
pub struct VcpuHandle {
    commands: Sender<Command>,
    /// `immediate_exit` of the thread's `kvm_run`.
    immediate_exit: *const AtomicU8,
    /// Gives the descriptor back, so that `immediate_exit` stays mapped until the join.
    thread: Option<JoinHandle<VcpuFd>>,
}

/// Lets [`VcpuHandle`] interrupt KVM_RUN: a signal whose handler does nothing. Once, before any vCPU runs.
pub fn prepare_kicks() -> Result<(), errno::Error> {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)
}

impl VcpuHandle {
    /// Starts the thread of vCPU `id`, parked.
    pub fn spawn(id: u8, mut fd: VcpuFd, surroundings: Surroundings) -> io::Result<Self> {
        let immediate_exit = (&raw mut fd.get_kvm_run().immediate_exit).cast();
        let (commands, receiver) = channel();
        let vcpu = Vcpu { fd, surroundings, unreported: None };
        let thread = Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK_SIZE)
            .spawn(move || vcpu.main(&receiver))?;
        Ok(Self { commands, immediate_exit, thread: Some(thread) })
    }

    /// Lets the guest run.
    pub fn run(&self, stamps: Option<Stamps>) {
        let _ = self.commands.send(Command::Run(stamps));
    }

    /// Asks the thread to end and does not wait. The flag covers the moment before KVM_RUN, the signal the
    /// time in it.
    pub fn ask_to_exit(&self) {
        let _ = self.commands.send(Command::Exit);
        if let Some(thread) = &self.thread {
            // SAFETY: the thread gives its VcpuFd, and with it this mapping, to the join, which is still to
            // come. It is one byte that KVM only reads.
            unsafe { &*self.immediate_exit }.store(1, Ordering::SeqCst);
            // SAFETY: the id of a thread that is not yet joined.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.ask_to_exit();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread's side.
struct Vcpu {
    fd: VcpuFd,
    surroundings: Surroundings,
    /// The boot vCPU's stamps until its first exit completes them.
    unreported: Option<Stamps>,
}

/// What came out of one KVM_RUN.
enum Exit {
    /// A device answered; the guest goes on.
    Answered,
    /// A signal, or KVM wants to be called again.
    Again,
    /// The VM has to end.
    Ends(StopCause, String),
    /// KVM could not emulate the guest: [`Vcpu::describe_internal_error`].
    InternalError,
}

impl Vcpu {
    fn main(mut self, commands: &Receiver<Command>) -> VcpuFd {
        if let Err(e) = self.surroundings.filter.install() {
            self.surroundings.latch.raise(StopCause::Internal, format!("vCPU thread: {e}"));
        }
        let mut command = commands.recv();
        while let Ok(Command::Run(stamps)) = command {
            self.unreported = stamps.map(|s| Stamps { first_run_ns: now_ns(), ..s });
            command = self.run(commands);
        }
        self.fd
    }

    /// Runs the guest until a command comes. If the guest ends the VM before, waits for that command.
    fn run(&mut self, commands: &Receiver<Command>) -> Result<Command, std::sync::mpsc::RecvError> {
        loop {
            match self.run_once() {
                Exit::Answered => {}
                Exit::Again => {
                    if let Ok(command) = commands.try_recv() {
                        return Ok(command);
                    }
                }
                Exit::Ends(cause, detail) => {
                    self.surroundings.latch.raise(cause, detail);
                    return commands.recv();
                }
                Exit::InternalError => {
                    let detail = self.describe_internal_error();
                    self.surroundings.latch.raise(StopCause::KvmError, detail);
                    return commands.recv();
                }
            }
        }
    }

    fn run_once(&mut self) -> Exit {
        let Surroundings { pio, mmio, counters, events, .. } = &self.surroundings;
        let exit = self.fd.run();
        if exit.is_ok()
            && let Some(stamps) = self.unreported.take()
        {
            events.send(&Event::Started(Stamps { first_exit_ns: now_ns(), ..stamps }));
        }
        match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&counters.pio_out);
                pio.write(port.into(), data);
                Exit::Answered
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&counters.pio_in);
                pio.read(port.into(), data);
                Exit::Answered
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&counters.mmio_read);
                mmio.read(address, data);
                Exit::Answered
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&counters.mmio_write);
                mmio.write(address, data);
                Exit::Answered
            }
            other => {
                count(&counters.other);
                rare_exit(other)
            }
        }
    }

    /// What KVM says, and where the guest was.
    fn describe_internal_error(&mut self) -> String {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of the union.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let kind = match suberror {
            1 => "an instruction it cannot emulate",
            2 => "a fault while it delivered an interrupt",
            3 => "a failed interrupt delivery",
            _ => "an unexpected exit",
        };
        format!("KVM met {kind} (suberror {suberror}) at guest address {rip:#x}")
    }
}

/// All that is neither port nor memory access.
fn rare_exit(exit: Result<VcpuExit<'_>, errno::Error>) -> Exit {
    let kvm_error = |detail| Exit::Ends(StopCause::KvmError, detail);
    match exit {
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Exit::Again,
        Ok(VcpuExit::Shutdown) => Exit::Ends(StopCause::TripleFault, String::new()),
        Ok(VcpuExit::InternalError) => Exit::InternalError,
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            kvm_error(format!("the processor refused to enter the guest: {reason:#x} on CPU {cpu}"))
        }
        Ok(other) => kvm_error(format!("KVM ended the guest with {other:?}")),
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Exit::Again,
        Err(e) => kvm_error(format!("KVM_RUN: {e}")),
    }
}
