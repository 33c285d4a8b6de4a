//! A tap with several queues and everything at once: the VMM's threads, a driver that does at random what drivers do, a host
//! that sends.

use std::{
    os::fd::FromRawFd,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, sleep},
};

use event_manager::{EventManager, SubscriberOps};

use super::*;
use crate::stop::StopLatch;

const PAIRS: usize = 3;
/// Of what the driver does.
const ROUNDS: u32 = 2000;
/// Nothing takes longer.
const LONG: Duration = Duration::from_secs(20);

/// Nothing that the driver waits for is left out, until the tap is deleted; and commands are answered then too.
#[test]
fn a_driver_never_waits_for_ever_for_a_tap_with_several_queues() {
    let outcome = thread::spawn(|| {
        // SAFETY: CLONE_FILES, the flag that is not safe, is not given; this thread ends with the test.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.ok()?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        let queues = (0..PAIRS).map(|_| make_named("several", flags));
        let queues = queues.collect::<Option<Vec<_>>>()?;
        set_up("several");
        Busy::new(queues).run();
        Some(())
    });
    if outcome.join().unwrap().is_none() {
        eprintln!("skipped: no tap can be made here (root and /dev/net/tun are needed)");
    }
}

/// See its test.
struct Busy {
    guest: Guest,
    latch: StopLatch,
    random: u64,
    /// Of each queue, in flight.
    sent: [u32; PAIRS],
    received: [u64; PAIRS],
}

impl Busy {
    fn new(queues: Vec<OwnedFd>) -> Self {
        let mut net = Net::new(&config(RateLimit::default()), queues).unwrap();
        net.control = Control::new(PAIRS as u16, Rate { per_second: 10_000, burst: 100 });
        let net = Arc::new(Mutex::new(net));
        let guest = Guest::cold(net.clone());
        let latch = StopLatch::new().unwrap();
        let mut threads = threads::Threads::default();
        let further: Vec<_> = lock(&net).further().collect();
        let workers = further.into_iter().map(|(pair, of)| guest.transport.worker_of(pair, of));
        threads.add(workers).unwrap();
        threads.start(&Arc::new(crate::seccomp::pairs().unwrap()), &latch).unwrap();
        Self { guest, latch, random: 88_172_645_463_325_252, sent: [0; _], received: [0; _] }
    }

    fn run(mut self) {
        let stop = AtomicBool::new(false);
        let stopped = || stop.load(Ordering::Relaxed);
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(self.guest.transport.worker());
        let host = packets();
        thread::scope(|scope| {
            let loops = scope.spawn(move || {
                while !stopped() {
                    events.run_with_timeout(20).unwrap();
                }
            });
            let sends = scope.spawn(move || {
                for n in (0..=u16::MAX).cycle() {
                    if stopped() {
                        break;
                    }
                    send_datagram(&host, n);
                    sleep(Duration::from_micros(200));
                }
            });
            let driven = catch_unwind(AssertUnwindSafe(|| self.drive()));
            stop.store(true, Ordering::Relaxed);
            loops.join().unwrap();
            sends.join().unwrap();
            driven.unwrap_or_else(|panic| resume_unwind(panic));
        });
    }

    fn drive(&mut self) {
        self.start();
        for _ in 0..ROUNDS {
            match self.next(16) {
                0 => self.start(),
                1..5 => {
                    let pairs = 1 + self.next(PAIRS as u64);
                    assert_eq!(self.set_pairs(pairs as u16), OK);
                }
                5 => drop(self.guest.config::<12>(0)),
                6 => sleep(Duration::from_micros(self.next(2000))),
                _ => self.pass(),
            }
        }
        assert!(self.received.iter().all(|count| *count > 0), "{:?}", self.received);
        assert!(self.guest.faults.lock().unwrap().is_empty());
        delete("several");
        let end = Instant::now() + LONG;
        while self.guest.status() & NEEDS_RESET == 0 {
            assert!(Instant::now() < end, "nobody sees that the tap is gone");
            // It is seen when the tap is read, for which there must be a buffer.
            self.take();
            sleep(Duration::from_millis(1));
        }
        assert_eq!(self.set_pairs(2), ERR);
        self.start();
        self.set_pairs(1);
        assert!(self.latch.raised().is_none());
    }

    /// A reset in the middle of everything, and a driver that begins anew.
    fn start(&mut self) {
        self.guest.reset();
        self.guest.start(MERGED);
        self.sent = [0; _];
        assert_eq!(self.guest.status() & DRIVER_OK, DRIVER_OK);
        for pair in 0..PAIRS {
            for head in 0..32 {
                let at = RX_AT + (pair as u64) * (1 << 20) + u64::from(head) * 0x1000;
                self.guest.chain(self.guest.queues[2 * pair].descriptors, head, &[into(at, 1526)]);
                self.guest.publish(2 * pair, head);
            }
            self.guest.kick(2 * pair);
        }
    }

    fn set_pairs(&mut self, pairs: u16) -> Option<u8> {
        let queue = 2 * PAIRS;
        self.guest.put_bytes(CONTROL_AT, &[&SET[..], &pairs.to_le_bytes()].concat());
        self.guest.put_bytes(CONTROL_AT + 0x1000, &[0xee]);
        self.guest.submit(queue, 0, &[out(CONTROL_AT, 4), into(CONTROL_AT + 0x1000, 1)]);
        let end = Instant::now() + LONG;
        while self.guest.used(queue).is_none() {
            assert!(Instant::now() < end, "no answer to a command");
            thread::yield_now();
        }
        Some(self.guest.get_bytes(CONTROL_AT + 0x1000, 1)[0])
    }

    /// Frames by a pair, in use or not, and whatever has come.
    fn pass(&mut self) {
        let pair = self.next(PAIRS as u64) as usize;
        let queue = 2 * pair + 1;
        self.guest.put_bytes(TX_AT, &packet(100));
        let end = Instant::now() + LONG;
        let first = self.sent[pair];
        for n in 0..1 + self.next(32) as u32 {
            let head = ((first + n) % 256) as u16;
            self.guest.chain(self.guest.queues[queue].descriptors, head, &[out(TX_AT, 112)]);
            self.guest.publish(queue, head);
            if self.guest.wants_kick(queue) {
                self.guest.kick(queue);
            }
            self.sent[pair] += 1;
        }
        let mut left = self.sent[pair] - first;
        while left > 0 {
            assert!(Instant::now() < end, "pair {pair}: {left} frames are not used");
            left -= std::iter::from_fn(|| self.guest.used(queue)).count() as u32;
        }
        self.take();
    }

    /// What has come; its buffers are given again.
    fn take(&mut self) {
        for pair in 0..PAIRS {
            while let Some((head, _)) = self.guest.used(2 * pair) {
                self.received[pair] += 1;
                self.guest.publish(2 * pair, head as u16);
                if self.guest.wants_kick(2 * pair) {
                    self.guest.kick(2 * pair);
                }
            }
        }
    }

    /// xorshift64
    fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }
}

fn index_of(name: &str) -> i32 {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a string with its end.
    unsafe { libc::if_nametoindex(name.as_ptr()) as i32 }
}

/// A socket of packets on all that this network namespace has.
fn packets() -> (OwnedFd, i32) {
    // SAFETY: takes numbers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0);
    // SAFETY: nobody else has it.
    (unsafe { OwnedFd::from_raw_fd(fd) }, index_of("several"))
}

/// Has the host send a datagram of UDP, each from another port: for another queue.
fn send_datagram((socket, index): &(OwnedFd, i32), port: u16) {
    let mut frame = [0; 60];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17]);
    frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    frame[34..36].copy_from_slice(&port.to_be_bytes());
    frame[36..42].copy_from_slice(&[0, 9, 0, 26, 0, 0]);
    // SAFETY: plain data.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = 0x0800_u16.to_be();
    to.sll_ifindex = *index;
    // A tap that is gone or full is nobody's fault.
    // SAFETY: reads the frame and the address, which outlive the call.
    unsafe {
        let (at, size) = ((&raw const to).cast(), size_of_val(&to) as u32);
        libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, at, size);
    }
}

/// `ip link delete NAME`
fn delete(name: &str) {
    let socket = rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None).unwrap();
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut message = [0; 32];
    message[..4].copy_from_slice(&32_u32.to_ne_bytes());
    message[4..6].copy_from_slice(&libc::RTM_DELLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    message[20..24].copy_from_slice(&index_of(name).to_ne_bytes());
    send(&socket, &message, SendFlags::empty()).unwrap();
    let mut answer = [0; 64];
    recv(&socket, &mut answer, RecvFlags::empty()).unwrap();
    assert_eq!(answer[16..20], [0; 4], "RTM_DELLINK");
}
