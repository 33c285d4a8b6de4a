//! From a boot request to a VM about to run: [`build`] is the recipe, every line of it a step.

use std::{
    io, iter,
    sync::{Arc, Mutex},
};

use ampoule_vmm_api::{
    Channel, DiskConfig, Stamps, VmConfig, console::ConsoleWriter, seccomp::SeccompError,
};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryError};
use vmm_sys_util::{errno, eventfd::EventFd};

use crate::{
    boot_params::{self, BootParamsError},
    bus::{Bus, SharedBusDevice, Taken},
    control::Control,
    counters::ExitCounters,
    cpuid,
    error::describe,
    events::{Events, now_ns},
    guest_ports::{RESET_PORT, ResetPort, StagePort},
    kernel::{self, KernelError},
    kvm::{self, KvmError},
    memory::{self, GuestMemory, MemoryError},
    mptable,
    regs::{self, RegistersError},
    request::BootRequest,
    seccomp,
    serial::{self, SerialPort},
    stop::StopLatch,
    vcpu::{self, Surroundings, VcpuHandle},
    virtio::{
        SharedDevice,
        block::{Block, SlotError},
        fault::FaultSink,
        fs::Fs,
        net::{Net, NetError, threads::Threads},
        rng::Rng,
        transport::{MMIO_SIZE, MmioTransport, NOTIFY_OFFSET},
        vsock::{StreamError, Vsock},
    },
};

/// Subscribers of the main thread's event loop: devices, the control socket, the stop latch.
pub type EventLoop = EventManager<Box<dyn MutEventSubscriber>>;

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("KVM")]
    Kvm(#[from] KvmError),
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    #[error("the kernel")]
    Kernel(#[from] KernelError),
    #[error("boot parameters")]
    BootParams(#[from] BootParamsError),
    #[error("boot data structures")]
    Tables(#[from] GuestMemoryError),
    #[error("the console memory")]
    Console(#[source] io::Error),
    #[error("disk {slot}")]
    Disk { slot: usize, source: SlotError },
    #[error("the stream for vsock port {port}")]
    Stream { port: u32, source: StreamError },
    #[error("network device {number}")]
    Net { number: usize, source: NetError },
    #[error("device {device}")]
    Device { device: String, source: io::Error },
    #[error("KVM refused an event of device {device}")]
    Event { device: String, source: errno::Error },
    #[error(transparent)]
    Bus(#[from] Taken),
    #[error("the event loop")]
    EventLoop(#[from] event_manager::Error),
    #[error("KVM refused vCPU {id}")]
    Vcpu { id: u8, source: errno::Error },
    #[error("the CPUID of vCPU {id}")]
    Cpuid { id: u8, source: vmm_sys_util::fam::Error },
    #[error("vCPU {id}")]
    Registers { id: u8, source: RegistersError },
    #[error("the thread of vCPU {id}")]
    Thread { id: u8, source: io::Error },
    #[error("the threads of network devices")]
    Threads(#[source] io::Error),
    #[error("the vCPU signal")]
    Signal(#[source] errno::Error),
    #[error("confinement")]
    Seccomp(#[from] SeccompError),
}

/// What every part of the VM may report to.
#[derive(Clone)]
pub struct Reports {
    pub channel: Arc<Channel>,
    pub events: Events,
    pub latch: StopLatch,
    pub counters: Arc<ExitCounters>,
}

/// A VM with everything in place; its vCPUs are parked.
pub struct Vm {
    pub event_loop: EventLoop,
    pub vcpus: Vec<VcpuHandle>,
    pub stamps: Stamps,
    /// Keeps the VM alive beside its vCPUs.
    _vm: VmFd,
}

/// The recipe. `process_ns` is when the process began.
pub fn build(request: BootRequest, reports: &Reports, process_ns: u64) -> Result<Vm, BuildError> {
    let BootRequest { config, kvm, kernel, console, disks, streams, taps, share } = request;
    let kvm = kvm::open(kvm)?;
    let vm = kvm::create_vm(&kvm)?;
    let stamps = Stamps { process_ns, vm_created_ns: now_ns(), ..Default::default() };

    let memory = memory::map(config.memory_mib)?;
    memory::register_slots(&vm, &memory)?;
    kvm::create_irqchip(&vm)?;
    let entry = kernel::load(&memory, &kernel)?;

    let mut machine = Machine::new(&vm, &memory, reports)?;
    machine.add_legacy(ConsoleWriter::new(console).map_err(BuildError::Console)?)?;
    let disks = machine.add_disks(&config, disks)?;
    let vsock = machine.add_vsock(&config, streams)?;
    machine.add_rng()?;
    let nets = machine.add_nets(&config, taps)?;
    machine.add_share(share)?;

    let cmdline = boot_params::cmdline(&config.cmdline, machine.devices)?;
    boot_params::write(&memory, &cmdline)?;
    mptable::write(&memory, config.vcpus, &machine.irqs())?;
    regs::write_tables(&memory)?;

    let Machine { pio, mmio, mut event_loop, threads, .. } = machine;
    let surroundings = Surroundings {
        pio: Arc::new(pio),
        mmio: Arc::new(mmio),
        counters: reports.counters.clone(),
        events: reports.events.clone(),
        latch: reports.latch.clone(),
        filter: Arc::new(seccomp::vcpu()?),
    };
    start_threads(threads, &reports.latch)?;
    let vcpus = start_vcpus(&kvm, &vm, &config, entry, &surroundings)?;
    add_control(&mut event_loop, reports, disks, vsock, nets);
    Ok(Vm { event_loop, vcpus, stamps, _vm: vm })
}

/// A VM's devices while they are put together.
struct Machine<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    reports: &'a Reports,
    faults: FaultSink,
    pio: Bus,
    mmio: Bus,
    event_loop: EventLoop,
    /// Of further pairs of queues.
    threads: Threads,
    /// virtio devices so far.
    devices: usize,
}

impl<'a> Machine<'a> {
    fn new(
        vm: &'a VmFd,
        memory: &'a GuestMemory,
        reports: &'a Reports,
    ) -> Result<Self, BuildError> {
        let events = reports.events.clone();
        Ok(Self {
            vm,
            memory,
            reports,
            faults: Arc::new(move |device, error| events.device_fault(device, describe(error))),
            pio: Bus::default(),
            mmio: Bus::default(),
            event_loop: EventLoop::new()?,
            threads: Threads::default(),
            devices: 0,
        })
    }

    /// The interrupts of all devices.
    fn irqs(&self) -> Vec<u8> {
        let virtio = (0..self.devices).map(|number| boot_params::device_slot(number).1);
        iter::once(serial::IRQ).chain(virtio).map(|irq| irq as u8).collect()
    }

    /// COM1, stage marks, power-off, reset.
    fn add_legacy(&mut self, console: ConsoleWriter) -> Result<(), BuildError> {
        let Reports { events, latch, counters, .. } = self.reports.clone();
        let interrupt = Arc::new(
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|source| BuildError::Device { device: "ttyS0".into(), source })?,
        );
        self.vm
            .register_irqfd(&interrupt, serial::IRQ)
            .map_err(|source| BuildError::Event { device: "ttyS0".into(), source })?;
        let serial = SerialPort::new(interrupt, console, latch.clone());
        self.pio.insert(serial::PORT, serial::PORTS, share(serial))?;
        let stages = StagePort::new(events, counters, latch.clone());
        self.pio.insert(StagePort::START, StagePort::LEN, share(stages))?;
        Ok(self.pio.insert(RESET_PORT, 1, share(ResetPort(latch)))?)
    }

    /// The disks in slot order, then the spare slots: slot n is `/dev/vda` + n.
    fn add_disks(
        &mut self,
        config: &VmConfig,
        backing: Vec<std::os::fd::OwnedFd>,
    ) -> Result<Vec<Arc<Mutex<Block>>>, BuildError> {
        let spare = DiskConfig { id: String::new(), read_only: false };
        let attached = config.disks.iter().zip(backing.into_iter().map(Some));
        let spares = (0..config.spare_disks).map(|_| (&spare, None));
        let mut disks = Vec::new();
        for (slot, (disk, backing)) in attached.chain(spares).enumerate() {
            let block =
                Block::new(disk, backing).map_err(|source| BuildError::Disk { slot, source })?;
            let block = Arc::new(Mutex::new(block));
            self.add_virtio(format!("vd{}", char::from(b'a' + slot as u8)), block.clone())?;
            disks.push(block);
        }
        Ok(disks)
    }

    fn add_vsock(
        &mut self,
        config: &VmConfig,
        streams: Vec<std::os::fd::OwnedFd>,
    ) -> Result<Arc<Mutex<Vsock>>, BuildError> {
        let mut vsock = Vsock::new(config.guest_cid)
            .map_err(|source| BuildError::Device { device: "vsock".into(), source })?;
        for (&port, stream) in config.listen.iter().zip(streams) {
            vsock.listen(port, stream).map_err(|source| BuildError::Stream { port, source })?;
        }
        let vsock = Arc::new(Mutex::new(vsock));
        self.add_virtio("vsock".into(), vsock.clone())?;
        Ok(vsock)
    }

    fn add_rng(&mut self) -> Result<(), BuildError> {
        let rng =
            Rng::new().map_err(|source| BuildError::Device { device: "rng".into(), source })?;
        self.add_virtio("rng".into(), Arc::new(Mutex::new(rng)))
    }

    /// After those, so that machines with and without a network have their other devices in the same windows.
    fn add_nets(
        &mut self,
        config: &VmConfig,
        taps: Vec<Vec<std::os::fd::OwnedFd>>,
    ) -> Result<Vec<Arc<Mutex<Net>>>, BuildError> {
        let mut nets = Vec::new();
        for (number, (net, tap)) in config.nets.iter().zip(taps).enumerate() {
            let net = Net::new(net, tap).map_err(|source| BuildError::Net { number, source })?;
            let further: Vec<_> = net.further().collect();
            let net = Arc::new(Mutex::new(net));
            let transport = self.connect_virtio(format!("net{number}"), net.clone())?;
            let workers =
                further.into_iter().map(|(pair, queues)| transport.worker_of(pair, queues));
            self.threads.add(workers)?;
            self.place(transport)?;
            nets.push(net);
        }
        Ok(nets)
    }

    /// The directories of the host that are shared, if there are any.
    fn add_share(&mut self, socket: Option<std::os::fd::OwnedFd>) -> Result<(), BuildError> {
        let Some(socket) = socket else { return Ok(()) };
        let fs = Fs::new(socket)
            .map_err(|source| BuildError::Device { device: "share".into(), source })?;
        self.add_virtio("share".into(), Arc::new(Mutex::new(fs)))
    }

    /// Puts a virtio device into the next window.
    fn add_virtio(&mut self, name: String, device: SharedDevice) -> Result<(), BuildError> {
        let transport = self.connect_virtio(name, device)?;
        self.place(transport)
    }

    /// Kicks by ioeventfd, interrupts by irqfd, its work in the event loop.
    fn connect_virtio(
        &mut self,
        name: String,
        device: SharedDevice,
    ) -> Result<MmioTransport, BuildError> {
        let (base, irq) = boot_params::device_slot(self.devices);
        let transport = MmioTransport::new(&name, device, self.memory.clone(), self.faults.clone())
            .map_err(|source| BuildError::Device { device: name.clone(), source })?;
        let notify = IoEventAddress::Mmio(base.0 + NOTIFY_OFFSET);
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            self.vm
                .register_ioevent(kick, &notify, queue)
                .map_err(|source| BuildError::Event { device: name.clone(), source })?;
        }
        self.vm
            .register_irqfd(transport.irq(), irq)
            .map_err(|source| BuildError::Event { device: name, source })?;
        self.event_loop.add_subscriber(Box::new(transport.worker()));
        Ok(transport)
    }

    /// Into the next window.
    fn place(&mut self, transport: MmioTransport) -> Result<(), BuildError> {
        let (base, _) = boot_params::device_slot(self.devices);
        self.mmio.insert(base.0, MMIO_SIZE, share(transport))?;
        self.devices += 1;
        Ok(())
    }
}

/// Those of further pairs of queues, if there are any.
fn start_threads(threads: Threads, latch: &StopLatch) -> Result<(), BuildError> {
    if threads.is_empty() {
        return Ok(());
    }
    let filter = Arc::new(seccomp::pairs()?);
    threads.start(&filter, latch).map_err(BuildError::Threads)
}

/// Makes the vCPUs; the first one stands at the kernel's entry, the others wait for its start-up IPI.
fn start_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    config: &VmConfig,
    entry: GuestAddress,
    surroundings: &Surroundings,
) -> Result<Vec<VcpuHandle>, BuildError> {
    vcpu::prepare_kicks().map_err(BuildError::Signal)?;
    let mut supported =
        cpuid::supported(kvm).map_err(|source| KvmError::Setup { what: "CPUID", source })?;
    if config.hide_random {
        cpuid::hide_random(&mut supported);
    }
    let mut vcpus = Vec::new();
    for id in 0..config.vcpus {
        let refused = |source| BuildError::Vcpu { id, source };
        let registers = |source| BuildError::Registers { id, source };
        let fd = vm.create_vcpu(id.into()).map_err(refused)?;
        let cpuid = cpuid::for_vcpu(&supported, id, config.vcpus)
            .map_err(|source| BuildError::Cpuid { id, source })?;
        fd.set_cpuid2(&cpuid).map_err(refused)?;
        regs::set_msrs(&fd).map_err(registers)?;
        if id == 0 {
            regs::set_entry(&fd, entry).map_err(registers)?;
        }
        let handle = VcpuHandle::spawn(id, fd, surroundings.clone())
            .map_err(|source| BuildError::Thread { id, source })?;
        vcpus.push(handle);
    }
    Ok(vcpus)
}

/// The shim's requests, and the end, join the event loop.
fn add_control(
    event_loop: &mut EventLoop,
    reports: &Reports,
    disks: Vec<Arc<Mutex<Block>>>,
    vsock: Arc<Mutex<Vsock>>,
    nets: Vec<Arc<Mutex<Net>>>,
) {
    let Reports { channel, events, latch, .. } = reports.clone();
    event_loop.add_subscriber(Box::new(latch.clone()));
    event_loop.add_subscriber(Box::new(Control { channel, events, latch, disks, vsock, nets }));
}

fn share<D: crate::bus::BusDevice + 'static>(device: D) -> SharedBusDevice {
    Arc::new(Mutex::new(device))
}
