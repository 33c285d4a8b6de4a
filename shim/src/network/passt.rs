//! passt(1), which speaks for a guest with sockets of the host: its process, and the frames between it and a tap. They are
//! passed on as they are, as a length of 4 bytes and a frame each, but for those to the host's own loopback: passt would
//! connect to it for a guest that sends such (as Debian 12's does).
//!
//! It drops its privileges and puts itself into a sandbox. It ends when its stream does: also when we are killed.

use std::{
    env,
    io::{self, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::{Errno, fcntl_dupfd_cloexec, retry_on_intr},
    net::{
        RecvFlags, recv,
        sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force},
    },
    pipe::{PipeFlags, pipe_with},
};

use super::{
    NetworkError, Result,
    egress::{self, Cgroup},
    user::{
        ADDRESS, ADDRESS_6, DNS, DNS_6, GATEWAY, GATEWAY_6, GATEWAY_MAC, MAC, MTU, PREFIX_LENGTH,
        Reach,
    },
};
use crate::{cli::Publish, pace::Pace, text::one_line};

const PROGRAM: &str = "passt";
/// Its end of the stream.
const STREAM: RawFd = 3;
/// What of frames may be on its way: of what does not fit passt drops some, which costs their senders seconds.
const BUFFER: usize = 4 << 20;
/// How long it usually may take to be ready.
const READY: Duration = Duration::from_secs(10);
/// An Ethernet header, a VLAN's tag, and an IP packet.
const MAX_FRAME: usize = 18 + MTU as usize;
/// Most of what it says of its end, in bytes.
const MAX_WORDS: usize = 4 << 10;
/// What it says where there is no syslog.
const NOISE: [&str; 2] = ["Failed to send", "Don't run as root"];

/// Dropping it ends the process, and waits for that.
#[derive(Debug)]
pub struct Passt {
    stream: UnixStream,
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Passt {
    /// Starts it behind a tap that hands over whole frames, and waits until it is ready.
    /// In a cgroup, if one is given: there it reaches what that says, and is not asked for names.
    pub fn start(
        tap: OwnedFd,
        ports: &[Publish],
        reach: Reach,
        cgroup: Option<Cgroup>,
        pace: Pace,
    ) -> Result<Self> {
        let failed = |what| move |source| NetworkError::Host(what, source);
        let setup = failed("prepare passt's stream");
        let (stream, theirs) = UnixStream::pair().map_err(setup)?;
        for end in [&stream, &theirs] {
            // An ordinary user's is as large as the host permits it (net.core.wmem_max).
            set_socket_send_buffer_size_force(end, BUFFER)
                .or_else(|_| set_socket_send_buffer_size(end, BUFFER))
                .map_err(|e| setup(e.into()))?;
        }
        let mut process =
            Process::spawn(theirs.into(), arguments(ports, reach, cgroup.is_some()), cgroup)?;
        process.ready(&stream, &question(reach), pace.limit(READY))?;
        let blocking = || -> io::Result<_> {
            fcntl_setfl(&tap, fcntl_getfl(&tap)? | OFlags::NONBLOCK)?;
            Ok((tap.try_clone()?, stream.try_clone()?, stream.try_clone()?))
        };
        let (out, to_passt, from_passt) = blocking().map_err(setup)?;
        let ending = Arc::new(AtomicBool::new(false));
        let mut passt = Self { stream, ending: ending.clone(), threads: Vec::new() };
        let thread = |name: &str, work: Box<dyn FnOnce() + Send>| {
            Builder::new().name(name.into()).spawn(work).map_err(failed("start a thread"))
        };
        let from = thread(
            "from passt",
            Box::new(move || {
                // It ends with the stream.
                let _: io::Result<()> = from_passt_to(&tap, from_passt);
                process.end(ending.load(Ordering::Relaxed));
            }),
        )?;
        passt.threads.push(from);
        let to = thread(
            "to passt",
            Box::new(move || {
                let _: io::Result<()> = to_passt_from(&out, to_passt);
            }),
        )?;
        passt.threads.push(to);
        Ok(passt)
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        let _ = self.stream.shutdown(Shutdown::Both);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Dropping it kills it.
struct Process {
    child: Child,
    /// What it says, as far as there is room in a pipe: it never waits for that.
    words: OwnedFd,
    /// To be dropped after it has ended.
    _cgroup: Option<Cgroup>,
}

impl Process {
    fn spawn(stream: OwnedFd, arguments: Vec<String>, cgroup: Option<Cgroup>) -> Result<Self> {
        let failed = |what| move |source| NetworkError::Host(what, source);
        let pipe = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK);
        let (words, words_end) = pipe.map_err(|e| failed("make a pipe for passt")(e.into()))?;
        // Out of the way of the number it is going to have.
        let stream = fcntl_dupfd_cloexec(&stream, STREAM + 1);
        let stream = stream.map_err(|e| failed("prepare passt's stream")(e.into()))?;
        let number = stream.as_raw_fd();
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(words_end)
            // The terminal's signals are for the container.
            .process_group(0);
        let entrance = cgroup.as_ref().map(Cgroup::entrance);
        // SAFETY: system calls on numbers that are open until the child has been started. The cgroup comes first: its
        // entrance may have the number of passt's stream.
        unsafe {
            command.pre_exec(move || {
                entrance.map_or(Ok(()), |entrance| egress::enter(entrance))?;
                match libc::dup2(number, STREAM) {
                    -1 => Err(io::Error::last_os_error()),
                    _ => Ok(()),
                }
            });
        }
        let child = command.spawn().map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT) => NetworkError::NoPasst,
            Some(egress::NOT_IN_FORCE) if cgroup.is_some() => NetworkError::Egress(
                "a connection of a process in the cgroup of passt was not refused",
                source,
            ),
            _ => NetworkError::Host("start passt", source),
        })?;
        Ok(Self { child, words, _cgroup: cgroup })
    }

    /// Asks for the gateway's address and waits for anything to come.
    fn ready(&mut self, stream: &UnixStream, question: &[u8], limit: Duration) -> Result<()> {
        let mut asking = stream;
        let asked = asking
            .write_all(&(question.len() as u32).to_be_bytes())
            .and_then(|()| asking.write_all(question))
            .and_then(|()| stream.set_read_timeout(Some(limit)));
        let peek = || retry_on_intr(|| recv(stream, &mut [0_u8; 1], RecvFlags::PEEK));
        let came = asked.and_then(|()| Ok(peek()?));
        match came {
            Ok((1.., _)) => {
                let all = stream.set_read_timeout(None);
                return all.map_err(|e| NetworkError::Host("prepare passt's stream", e));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(NetworkError::Passt("it was not ready in time".into()));
            }
            _ => {}
        }
        // It is ending: its words are there when it has.
        self.kill();
        Err(NetworkError::Passt(self.words()))
    }

    /// When its stream has ended.
    fn end(&mut self, wanted: bool) {
        let status = self.kill();
        if !wanted {
            let (status, words) = (status.unwrap_or_default(), self.words());
            tracing::warn!(status, words, "passt has ended: the sandbox has no network any more");
        }
    }

    fn kill(&mut self) -> Option<String> {
        // One that has ended has its own status.
        let _ = self.child.kill();
        self.child.wait().ok().map(|status| status.to_string())
    }

    /// The last of what it said.
    fn words(&self) -> String {
        let mut bytes = vec![0; MAX_WORDS];
        let len = rustix::io::read(&self.words, &mut bytes).unwrap_or(0);
        let text = String::from_utf8_lossy(&bytes[..len]).into_owned();
        let mut lines =
            text.lines().filter(|line| !NOISE.iter().any(|noise| line.starts_with(noise)));
        one_line(lines.next_back().unwrap_or("it ended without a word"), 300)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The guest's configuration is ours to say, and passt's to know. With a list of destinations it is not to ask for names.
fn arguments(ports: &[Publish], reach: Reach, listed: bool) -> Vec<String> {
    let mut arguments =
        ["--foreground", "--quiet", "--no-dhcp", "--no-dhcpv6", "--no-ra", "--no-map-gw"]
            .map(String::from)
            .to_vec();
    for (option, value) in [
        ("--fd", STREAM.to_string()),
        ("--mac-addr", GATEWAY_MAC.into()),
        ("--mtu", MTU.to_string()),
    ] {
        arguments.extend([option.into(), value]);
    }
    if reach.ipv4 {
        arguments.extend(["--netmask".into(), PREFIX_LENGTH.to_string()]);
    }
    for (reached, other, [address, gateway, dns]) in [
        (reach.ipv4, "--ipv6-only", [ADDRESS, GATEWAY, DNS].map(IpAddr::from)),
        (reach.ipv6, "--ipv4-only", [ADDRESS_6, GATEWAY_6, DNS_6].map(IpAddr::from)),
    ] {
        if !reached {
            arguments.push(other.into());
            continue;
        }
        let own = [("--address", address), ("--gateway", gateway)].into_iter();
        let own = own.chain((!listed).then_some(("--dns-forward", dns)));
        own.for_each(|(option, it)| arguments.extend([option.into(), it.to_string()]));
    }
    if listed {
        // Not --no-icmp, which would take the neighbours of IPv6 too: it cannot make the sockets for pings.
        arguments.extend(["--dns", "none"].map(String::from));
    }
    for (option, udp) in [("--tcp-ports", false), ("--udp-ports", true)] {
        let chosen: Vec<_> = ports.iter().filter(|port| port.udp == udp).map(spec).collect();
        // Without a word UDP's would be those of TCP.
        let chosen = if chosen.is_empty() { vec!["none".into()] } else { chosen };
        chosen.into_iter().for_each(|spec| arguments.extend([option.into(), spec]));
    }
    arguments
}

fn spec(port: &Publish) -> String {
    let Publish { host, container, .. } = port;
    match port.address {
        Some(address) => format!("{address}/{host}:{container}"),
        None => format!("{host}:{container}"),
    }
}

/// Who has the gateway's address?
pub(super) fn question(reach: Reach) -> Vec<u8> {
    if reach.ipv4 { arp() } else { solicitation() }
}

/// By IPv4 (RFC 826).
fn arp() -> Vec<u8> {
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let (own, gateway) = (ADDRESS.octets(), GATEWAY.octets());
    [&[0xff; 6][..], &MAC, &[8, 6], &REQUEST, &MAC, &own, &[0; 6], &gateway].concat()
}

/// By IPv6 (RFC 4861, 4.3), of the multicast group of the address (RFC 4291, 2.7.1).
fn solicitation() -> Vec<u8> {
    const GROUP: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 2);
    const LEN: u16 = 32;
    const ICMPV6: u8 = 58;
    // A solicitation, its checksum to come, and the address of who asks as an option.
    let mut body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &GATEWAY_6.octets(), &[1, 1], &MAC].concat();
    let addresses = [ADDRESS_6.octets(), GROUP.octets()].concat();
    let summed = [&addresses[..], &[0, 0], &LEN.to_be_bytes(), &[0, 0, 0, ICMPV6], &body].concat();
    let sum: u32 =
        summed.chunks_exact(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !((sum + (sum >> 16)) as u16);
    body[2..4].copy_from_slice(&checksum.to_be_bytes());
    let header = [&[0x60, 0, 0, 0][..], &LEN.to_be_bytes(), &[ICMPV6, 255], &addresses].concat();
    [&[0x33, 0x33, 0xff, 0, 0, 2][..], &MAC, &[0x86, 0xdd], &header, &body].concat()
}

/// Until the stream ends.
fn from_passt_to(tap: &OwnedFd, stream: UnixStream) -> io::Result<()> {
    let mut stream = BufReader::with_capacity(4 * MAX_FRAME, stream);
    let mut frame = vec![0; MAX_FRAME];
    loop {
        let mut len = [0; 4];
        stream.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len) as usize;
        let frame = frame.get_mut(..len).ok_or(io::ErrorKind::InvalidData)?;
        stream.read_exact(frame)?;
        // One that the kernel will not have is lost, as on any wire.
        let _ = rustix::io::write(tap, frame);
    }
}

/// Whether a frame's destination is, as a socket of the host has it, the host itself by loopback (RFC 1122, 3.2.1.3).
fn is_to_loopback(frame: &[u8]) -> bool {
    const IPV4: [u8; 2] = [0x08, 0x00];
    const IPV6: [u8; 2] = [0x86, 0xdd];
    let own = |address: Ipv4Addr| address.is_loopback() || address.octets()[0] == 0;
    match frame.get(12..14) {
        Some(kind) if kind == IPV4 => {
            let octets = frame.get(30..34).and_then(|octets| <[u8; 4]>::try_from(octets).ok());
            octets.is_some_and(|octets| own(octets.into()))
        }
        Some(kind) if kind == IPV6 => {
            let octets = frame.get(38..54).and_then(|octets| <[u8; 16]>::try_from(octets).ok());
            let address = octets.map(Ipv6Addr::from);
            address.is_some_and(|address| match address.to_ipv4() {
                // `::` and `::1` are among them.
                Some(address) => own(address),
                None => false,
            })
        }
        _ => false,
    }
}

/// Until the stream ends.
fn to_passt_from(tap: &OwnedFd, mut stream: UnixStream) -> io::Result<()> {
    let mut message = vec![0; 4 + MAX_FRAME];
    loop {
        let ended = {
            let mut ready = [
                PollFd::new(tap, PollFlags::IN),
                PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty()),
            ];
            retry_on_intr(|| poll(&mut ready, None))?;
            !ready[1].revents().is_empty()
        };
        if ended {
            return Ok(());
        }
        match rustix::io::read(tap, &mut message[4..]) {
            Ok(len) if is_to_loopback(&message[4..4 + len]) => {}
            Ok(len) => {
                message[..4].copy_from_slice(&(len as u32).to_be_bytes());
                stream.write_all(&message[..4 + len])?;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_to_the_hosts_loopback_are_told_apart() {
        let v4 = |to: [u8; 4]| [&[0; 12][..], &[8, 0, 0x45], &[0; 15], &to, b"data"].concat();
        let v6 = |to: &str| {
            let to: Ipv6Addr = to.parse().unwrap();
            [&[0; 12][..], &[0x86, 0xdd, 0x60], &[0; 23], &to.octets()].concat()
        };
        for to in [[127, 0, 0, 1], [127, 255, 255, 255], [0, 0, 0, 0], [0, 1, 2, 3]] {
            assert!(is_to_loopback(&v4(to)), "{to:?}");
        }
        for to in [[10, 0, 2, 2], [128, 0, 0, 1], [126, 127, 127, 127], [1, 0, 0, 0]] {
            assert!(!is_to_loopback(&v4(to)), "{to:?}");
        }
        for to in ["::", "::1", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "::127.1.2.3"] {
            assert!(is_to_loopback(&v6(to)), "{to}");
        }
        for to in ["2001:db8::1", "fe80::1", "::ffff:192.0.2.1", "7f00::1"] {
            assert!(!is_to_loopback(&v6(to)), "{to}");
        }
        // What is cut short has no address that passt could read.
        let whole = v4([127, 0, 0, 1]);
        (0..34).for_each(|len| assert!(!is_to_loopback(&whole[..len])));
        assert!(!is_to_loopback(&arp()) && !is_to_loopback(&solicitation()));
    }

    #[test]
    fn a_question_by_ipv6_has_its_checksum() {
        let frame = solicitation();
        assert_eq!(frame.len(), 14 + 40 + 32);
        let words = |bytes: &[u8]| -> u32 {
            bytes.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum()
        };
        // Of addresses and what is behind them, with the pseudo-header's length and kind.
        let sum = words(&frame[22..]) + 32 + 58;
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
