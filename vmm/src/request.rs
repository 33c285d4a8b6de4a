//! The first message: what the VM is made of, with its descriptors in their places.

use std::{fs::File, io, os::fd::OwnedFd};

use ampoule_vmm_api::{
    Channel, ChannelError, NetConfig, Request, VmConfig,
    config::{
        MAX_BOOT_STREAMS, MAX_DISKS, MAX_QUEUE_PAIRS, MAX_SLOTS, MAX_VCPUS, MIN_MEMORY_MIB, MIN_MTU,
    },
};
use rustix::event::{PollFd, PollFlags, poll};

/// Context ids below this are the hypervisor's, the host's, or reserved (virtio 1.2, 5.10.4).
const FIRST_GUEST_CID: u32 = 3;

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("the control socket")]
    Channel(#[from] ChannelError),
    #[error("waiting on the control socket")]
    Wait(#[from] io::Error),
    #[error("the first request is not Boot")]
    NotBoot,
    #[error("{given} descriptors came with the boot request instead of {needed}")]
    Descriptors { given: usize, needed: usize },
    #[error("{what} is {value}, which is not between {min} and {max}")]
    Range { what: &'static str, value: u64, min: u64, max: u64 },
    #[error("the MAC address {0:02x?} of a network device is not of one station")]
    Mac([u8; 6]),
}

/// A boot request that makes sense.
#[derive(Debug)]
pub struct BootRequest {
    pub config: VmConfig,
    pub kvm: OwnedFd,
    pub kernel: File,
    pub console: OwnedFd,
    /// One for each of `config.disks`.
    pub disks: Vec<OwnedFd>,
    /// One for each of `config.listen`.
    pub streams: Vec<OwnedFd>,
    /// Of each of `config.nets`, one for each pair of its queues.
    pub taps: Vec<Vec<OwnedFd>>,
    /// If `config.share`.
    pub share: Option<OwnedFd>,
}

/// Waits for the boot request; the end of the shim ends the wait.
pub fn receive(channel: &Channel) -> Result<BootRequest, RequestError> {
    loop {
        match channel.recv() {
            Ok((Request::Boot(config), fds)) => return BootRequest::new(config, fds),
            Ok(_) => return Err(RequestError::NotBoot),
            Err(e) if e.would_block() => {
                poll(&mut [PollFd::new(channel, PollFlags::IN)], None).map_err(io::Error::from)?;
            }
            Err(e) => return Err(e.into()),
        }
    }
}

impl BootRequest {
    fn new(config: VmConfig, fds: Vec<OwnedFd>) -> Result<Self, RequestError> {
        check(&config)?;
        let taps: usize = config.nets.iter().map(|net| usize::from(net.pairs)).sum();
        let lists = config.disks.len() + config.listen.len() + taps;
        let (given, needed) = (fds.len(), 3 + lists + usize::from(config.share));
        let mut fds = fds.into_iter();
        let (Some(kvm), Some(kernel), Some(console), true) =
            (fds.next(), fds.next(), fds.next(), given == needed)
        else {
            return Err(RequestError::Descriptors { given, needed });
        };
        let disks = fds.by_ref().take(config.disks.len()).collect();
        let streams = fds.by_ref().take(config.listen.len()).collect();
        let tap = |net: &NetConfig| fds.by_ref().take(net.pairs.into()).collect();
        let taps = config.nets.iter().map(tap).collect();
        let share = fds.next();
        Ok(Self { kvm, kernel: kernel.into(), console, disks, streams, taps, share, config })
    }
}

fn check(config: &VmConfig) -> Result<(), RequestError> {
    let disks = config.disks.len() as u64 + u64::from(config.spare_disks);
    for (what, value, min, max) in [
        ("the number of vCPUs", config.vcpus.into(), 1, MAX_VCPUS.into()),
        (
            "guest memory in MiB",
            config.memory_mib.into(),
            MIN_MEMORY_MIB.into(),
            u64::from(u32::MAX),
        ),
        ("the number of disks", disks, 1, MAX_DISKS as u64),
        (
            "the number of disks, network devices and shares",
            disks + config.nets.len() as u64 + u64::from(config.share),
            1,
            MAX_SLOTS as u64,
        ),
        ("the number of streams", config.listen.len() as u64, 0, MAX_BOOT_STREAMS as u64),
        (
            "the guest's context id",
            config.guest_cid.into(),
            FIRST_GUEST_CID.into(),
            u64::from(u32::MAX - 1),
        ),
    ] {
        if !(min..=max).contains(&value) {
            return Err(RequestError::Range { what, value, min, max });
        }
    }
    for net in &config.nets {
        let (what, value) = ("the number of a network device's pairs of queues", net.pairs.into());
        let (min, max) = (1, MAX_QUEUE_PAIRS.into());
        if !(min..=max).contains(&value) {
            return Err(RequestError::Range { what, value, min, max });
        }
    }
    let mut plugged = config.nets.iter().filter(|net| net.plugged);
    plugged.try_for_each(|net| check_net(net.mac, net.mtu))
}

/// Whether a network device can have this address and MTU.
pub fn check_net(mac: [u8; 6], mtu: u16) -> Result<(), RequestError> {
    let (what, value) = ("the MTU of a network device", mtu.into());
    if mtu < MIN_MTU {
        let (min, max) = (MIN_MTU.into(), u16::MAX.into());
        return Err(RequestError::Range { what, value, min, max });
    }
    let multicast = mac[0] & 1 != 0;
    if multicast || mac == [0; 6] { Err(RequestError::Mac(mac)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use ampoule_vmm_api::{DiskConfig, RateLimit};

    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            vcpus: 1,
            memory_mib: 128,
            cmdline: String::new(),
            disks: vec![DiskConfig { id: "root".into(), read_only: true }],
            spare_disks: 0,
            guest_cid: 3,
            listen: vec![1024],
            hide_random: false,
            nets: vec![],
            share: false,
        }
    }

    fn send(config: VmConfig, descriptors: usize) -> Result<BootRequest, RequestError> {
        let (shim, vmm) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        shim.send(&Request::Boot(config), &vec![file.as_fd(); descriptors]).unwrap();
        receive(&vmm)
    }

    #[test]
    fn descriptors_find_their_places() {
        let request = send(config(), 5).unwrap();
        assert_eq!((request.disks.len(), request.streams.len()), (1, 1));
        for wrong in [0, 2, 3, 4, 6] {
            let error = send(config(), wrong).unwrap_err();
            assert!(matches!(error, RequestError::Descriptors { needed: 5, .. }), "{error}");
        }
    }

    #[test]
    fn impossible_machines_are_refused() {
        let bad = |change: fn(&mut VmConfig)| {
            let mut config = config();
            change(&mut config);
            send(config, 5).unwrap_err().to_string()
        };
        assert!(bad(|c| c.vcpus = 0).contains("vCPUs is 0"));
        assert!(bad(|c| c.vcpus = 17).contains("vCPUs is 17"));
        assert!(bad(|c| c.memory_mib = 1).contains("memory"));
        assert!(bad(|c| c.disks.clear()).contains("disks"));
        assert!(bad(|c| c.spare_disks = 16).contains("disks is 17"));
        assert!(bad(|c| c.guest_cid = 2).contains("context id"));
        assert!(bad(|c| c.listen = vec![1; 17]).contains("streams"));
        let net = NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            plugged: true,
            pairs: 1,
            from_guest: RateLimit::default(),
            to_guest: RateLimit::default(),
        };
        let with = |net: NetConfig, nets, spare_disks| {
            let taps = nets * usize::from(net.pairs);
            send(VmConfig { nets: vec![net; nets], spare_disks, ..config() }, 5 + taps)
        };
        let taps = |pairs| {
            let request = with(NetConfig { pairs, ..net.clone() }, 2, 14).unwrap();
            request.taps.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!((taps(1), taps(4)), (vec![1, 1], vec![4, 4]));
        with(NetConfig { pairs: MAX_QUEUE_PAIRS, ..net.clone() }, 16, 0).unwrap();
        let refused = |net, nets, spare| with(net, nets, spare).unwrap_err().to_string();
        assert!(refused(net.clone(), 3, 14).contains("network devices and shares is 18"));
        assert!(refused(NetConfig { pairs: 0, ..net.clone() }, 1, 0).contains("queues is 0"));
        assert!(refused(NetConfig { pairs: 5, ..net.clone() }, 1, 0).contains("queues is 5"));
        assert!(refused(NetConfig { mtu: 67, ..net.clone() }, 1, 0).contains("MTU"));
        for mac in [[0; 6], [1, 0, 0, 0, 0, 1], [0xff; 6]] {
            assert!(refused(NetConfig { mac, ..net.clone() }, 1, 0).contains("MAC"));
            with(NetConfig { mac, plugged: false, ..net.clone() }, 1, 0).unwrap();
        }
    }

    #[test]
    fn only_boot_comes_first() {
        let (shim, vmm) = Channel::pair().unwrap();
        shim.send(&Request::Stop, &[]).unwrap();
        assert!(matches!(receive(&vmm), Err(RequestError::NotBoot)));
        drop(shim);
        assert!(matches!(receive(&vmm), Err(RequestError::Channel(ChannelError::Closed))));
    }
}
