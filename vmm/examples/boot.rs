//! Boots one VM by hand, without a shim: prints its events, then its console.
//!
//! `boot VMM KERNEL GUEST_IMAGE [VCPUS [MEMORY_MIB [WORDS FOR THE COMMAND LINE]]]`
//!
//! Ends when the VM does, or asks it to stop 5 s after it said hello or 30 s after the start.

use std::{
    error::Error,
    fs::{File, OpenOptions},
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use ampoule_vmm_api::{
    Channel, ChannelError, DiskConfig, Event, Request, VmConfig, VmmProcess,
    console::ConsoleReader, guest::Mark,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [vmm, kernel, image, rest @ ..] = &arguments[..] else {
        return Err("usage: boot VMM KERNEL GUEST_IMAGE [VCPUS [MEMORY_MIB [WORDS...]]]".into());
    };
    let (console, console_fd) = ConsoleReader::new()?;
    let (ours, theirs) = Channel::pair()?;
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let (kernel, image) = (File::open(kernel)?, File::open(image)?);
    let began = Instant::now();
    let mut process = VmmProcess::spawn(Path::new(vmm), "boot", theirs)?;
    let config = VmConfig {
        vcpus: rest.first().map_or(Ok(1), |n| n.parse())?,
        memory_mib: rest.get(1).map_or(Ok(128), |n| n.parse())?,
        cmdline: rest.get(2..).unwrap_or_default().join(" "),
        disks: vec![DiskConfig { id: "guest".into(), read_only: true }],
        spare_disks: 2,
        guest_cid: 3,
        listen: vec![],
        hide_random: false,
        nets: vec![],
        share: false,
    };
    let fds = [kvm.as_fd(), kernel.as_fd(), console_fd.as_fd(), image.as_fd()];
    ours.send(&Request::Boot(config), &fds)?;
    watch(&ours, began)?;
    println!("process {}: {}", process.pid(), process.wait()?);
    print!("{}", String::from_utf8_lossy(&process.stderr()));
    println!("--- console\n{}", String::from_utf8_lossy(&console.tail()?));
    Ok(())
}

/// Prints events until the VMM is gone.
fn watch(channel: &Channel, began: Instant) -> Result<(), Box<dyn Error>> {
    let mut stop_at = began + Duration::from_secs(30);
    loop {
        match channel.recv::<Event>() {
            Ok((event, _)) => {
                println!("{:9.3} ms {event:?}", began.elapsed().as_secs_f64() * 1e3);
                if matches!(event, Event::Stage { mark, .. } if mark == Mark::Hello as u8) {
                    stop_at = Instant::now() + Duration::from_secs(5);
                }
            }
            Err(ChannelError::Closed) => return Ok(()),
            Err(e) if e.would_block() => {
                if Instant::now() >= stop_at {
                    channel.send(&Request::Stop, &[])?;
                    stop_at += Duration::from_secs(60);
                }
                let second = Timespec { tv_sec: 1, tv_nsec: 0 };
                poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&second))?;
            }
            Err(e) => return Err(e.into()),
        }
    }
}
