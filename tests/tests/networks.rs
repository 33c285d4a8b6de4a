//! `ampoule run --network`: what a sandbox without an engine reaches, and who reaches it.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use ampoule_tests::{
    Detached, Outcome, ampoule, detached, host_address, no_passt, program, root, run, skip, stage,
};
use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{UnshareFlags, unshare_unsafe},
};
use serde_json::{Value, json};

/// How long an answer may take, even in the bed.
const LIMIT: Duration = Duration::from_secs(30);
const LARGE: usize = 1 << 20;

/// Answers each request of wget's with the same bytes, at any address of the host.
fn server(answer: Vec<u8>) -> u16 {
    server_at(Ipv4Addr::UNSPECIFIED.into(), answer)
}

fn server_at(address: IpAddr, answer: Vec<u8>) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 2000]);
            let _ = stream.write_all(&[b"HTTP/1.0 200 OK\r\n\r\n", &*answer].concat());
        }
    });
    port
}

/// One that nobody has.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port()
}

/// What comes back.
fn tcp(to: SocketAddr, text: &str) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    stream.write_all(text.as_bytes()).ok()?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).ok()?;
    String::from_utf8(answer).ok()
}

/// Repeats it until it gives what is expected.
#[track_caller]
fn eventually(expected: &str, mut what: impl FnMut() -> Option<String>) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let got = what();
        if got.as_deref() == Some(expected) {
            return;
        }
        assert!(Instant::now() < deadline, "{got:?} and not {expected:?}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// The PID of the passt that a process has started.
fn passt_of(parent: u64) -> Option<i32> {
    child_of(parent, "passt")
}

/// Of a child by the beginning of its name.
fn child_of(parent: u64, program: &str) -> Option<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut words = stat.split(['(', ')', ' ']).filter(|word| !word.is_empty());
        let named = words.nth(1).is_some_and(|name| name.starts_with(program));
        named && words.next() != Some("Z") && words.next() == Some(&parent.to_string())
    })
}

#[test]
fn a_guest_reaches_the_host_and_the_host_its_ports_until_passt_is_killed() {
    if let Some(why) = no_passt() {
        return skip("a_guest_reaches_the_host_and_the_host_its_ports", why);
    }
    let host = host_address().unwrap();
    let bytes: Vec<u8> = (0..LARGE).map(|n| (n * 7 / 3) as u8).collect();
    let (large, hello) = (server(bytes.clone()), server(b"hello\n".to_vec()));
    let (local, open, datagrams) = (free_port(), free_port(), free_port());
    let ports =
        [format!("127.0.0.1:{local}:80"), format!("{open}:80"), format!("{datagrams}:81/udp")];
    let ports_given = ports.iter().flat_map(|port| ["-p", port]);
    let server = "nc -lk -p 80 -e cat & nc -u -l -p 81 > /datagrams & exec sleep 600";
    let words = ["--network", "user"].into_iter().chain(ports_given);
    let sandbox = detached(words.chain(["alpine", "sh", "-c", server]));
    let record = sandbox.record();
    assert_eq!(
        (&record["network"], &record["ports"][0]),
        (&"user".into(), &format!("{}/tcp", ports[0]).into())
    );
    let passt = passt_of(record["pid"].as_u64().unwrap()).expect("a passt");
    let status = fs::read_to_string(format!("/proc/{passt}/status")).unwrap();
    for confined in ["CapPrm:\t0000000000000000", "Uid:\t65534", "Seccomp:\t2"] {
        assert!(status.contains(confined), "{confined}: {status}");
    }
    let environment = fs::read_to_string(format!("/proc/{passt}/environ")).unwrap();
    assert!(!environment.contains("TMPDIR"), "{environment}");

    // Out of the guest; and not to what is for the host alone.
    let script = format!(
        "wget -qO- {host}:{hello}; wget -qO- {host}:{large} | md5sum; cat /etc/resolv.conf; ip -o link show eth0"
    );
    let out = sandbox.sh(&script).ended_with(0).text();
    let mut md5 = Command::new("sh");
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &bytes).unwrap();
    md5.args(["-c", "md5sum < $0"]).arg(file.path());
    let sum = program(md5).output().ended_with(0).text();
    for words in ["hello\n", &sum, "nameserver 10.0.2.3", "mtu 65520"] {
        assert!(out.contains(words), "{words:?}: {out}");
    }
    let loopback = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let script = format!(
        "for to in 10.0.2.2 {host}; do nc -w 2 $to {} && exit 9; done; true",
        loopback.port()
    );
    sandbox.sh(&script).ended_with(0);

    // Into it, from the host's loopback and from elsewhere.
    let at = |address: Ipv4Addr, port| SocketAddr::new(IpAddr::V4(address), port);
    eventually("ping", || tcp(at(Ipv4Addr::LOCALHOST, local), "ping"));
    eventually("pong", || tcp(at(Ipv4Addr::LOCALHOST, open), "pong"));
    eventually("here", || tcp(at(host, open), "here"));
    assert_eq!(
        TcpStream::connect(at(host, local)).map(drop).unwrap_err().kind(),
        std::io::ErrorKind::ConnectionRefused
    );
    let socket = UdpSocket::bind((host, 0)).unwrap();
    eventually("gram", || {
        socket.send_to(b"gram\n", (host, datagrams)).unwrap();
        Some(sandbox.sh("head -n 1 /datagrams").text())
    });

    // Without passt there is no network, and all else goes on.
    kill_process(Pid::from_raw(passt).unwrap(), Signal::KILL).unwrap();
    eventually("gone", || (!fs::exists(format!("/proc/{passt}")).unwrap()).then(|| "gone".into()));
    let out =
        sandbox.sh(&format!("nc -w 2 {host} {hello} || echo alive; ip -o link show eth0 | wc -l"));
    assert_eq!(out.ended_with(0).text(), "alive\n1");
    sandbox.verb("stop").ended_with(0);
}

#[test]
fn a_guest_that_calls_the_hosts_loopback_its_gateways_reaches_nothing_there() {
    if let Some(why) = no_passt() {
        return skip("a_guest_that_calls_the_hosts_loopback_its_gateways", why);
    }
    let host = host_address().unwrap();
    let port = server(b"hello\n".to_vec());
    // Root in the guest makes an address of its loopback one of the network.
    let script = format!(
        "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; ip address flush dev lo
         while ip route del table local 127.0.0.0/8 2>&-; do :; done; ip route add 127.0.0.0/8 via 10.0.2.2
         ip route get 127.0.0.1; wget -qO- {host}:{port}; nc -w 3 127.0.0.1 {port} < /dev/null && echo reached"
    );
    let words = ["--network", "user", "--privileged", "alpine", "sh", "-c", &script];
    let out = run(words).output();
    let text = out.text();
    assert!(text.contains("127.0.0.1 via 10.0.2.2 dev eth0") && text.contains("hello"), "{text}");
    assert!(!text.contains("reached"), "{text}");
}

#[test]
fn a_guest_has_ipv6_where_its_host_has_and_pings_by_either() {
    const NAME: &str = "a_guest_has_ipv6_where_its_host_has_and_pings_by_either";
    if let Some(why) = no_passt() {
        return skip(NAME, why);
    }
    in_a_thread(NAME, |resolv_conf| {
        on_another_host(resolv_conf)?;
        let ping = |host: &str| format!("ping -c 1 -w 20 {host} > /dev/null && echo {host}; ");
        let without = "ip -6 route show dev eth0; ".to_string() + &ping("192.0.2.2");
        let words = |script| ["--network", "user", "alpine", "sh", "-c", script].map(String::from);
        // passt's sockets for pings are those of a group, as nobody's is.
        fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").ok()?;
        let out = run(words(&without)).output().ended_with(0);
        assert_eq!(out.text(), "192.0.2.2", "{}", out.error());

        let ip = |words: &str| drop(Command::new("ip").args(words.split(' ')).status());
        ip("address add 2001:db8:1::2/64 dev outside nodad");
        ip("address add 2001:db8:1::3/64 dev outside nodad");
        ip("-6 route add default via 2001:db8:1::1 dev outside");
        let (port, published) =
            (server_at(Ipv6Addr::UNSPECIFIED.into(), b"by six\n".to_vec()), free_port());
        let datagrams = UdpSocket::bind(("2001:db8:1::2", 0)).unwrap();
        let datagram_port = datagrams.local_addr().unwrap().port();
        thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((len, peer)) = datagrams.recv_from(&mut buffer) {
                let _ = datagrams.send_to(&buffer[..len], peer);
            }
        });
        let script = format!(
            "ip -6 route show default; wget -qO- 'http://[2001:db8:1::2]:{port}'
             echo datagram | nc -u -w 5 2001:db8:1::2 {datagram_port}; {} {}",
            ping("2001:db8:1::2"),
            ping("192.0.2.2")
        );
        let out = run(words(&script)).output().ended_with(0);
        let route = "default via fd00:a00:200::2 dev eth0";
        let rest = "by six\ndatagram\n2001:db8:1::2\n192.0.2.2";
        assert!(
            out.text().starts_with(route) && out.text().ends_with(rest),
            "{} {}",
            out.text(),
            out.error()
        );

        let list = format!("[2001:db8:1::2]:{port}");
        let script = format!(
            "wget -qO- 'http://[2001:db8:1::2]:{port}'; nc -w 2 2001:db8:1::3 {port} < /dev/null && echo CONNECTED
             nc -w 2 2001:db8:1::2 53 < /dev/null && echo CONNECTED; true"
        );
        let [network, user, rest @ ..] = words(&script);
        let listed = [network, user, "--egress".into(), list].into_iter().chain(rest);
        let out = run(listed).output().ended_with(0);
        assert_eq!(out.text(), "by six", "{}", out.error());

        let listening = [
            "--network",
            "user",
            "-p",
            &format!("{published}:80"),
            "alpine",
            "nc",
            "-lk",
            "-p",
            "80",
            "-e",
            "cat",
        ];
        let sandbox = detached(listening);
        for host in ["2001:db8:1::2", "192.0.2.2", "::1", "127.0.0.1"] {
            let to = SocketAddr::new(host.parse().unwrap(), published);
            eventually("here", || tcp(to, "here"));
        }
        sandbox.verb("kill").ended_with(0);
        Some(())
    });
}

#[test]
fn a_guest_of_a_host_with_ipv6_alone_has_that() {
    const NAME: &str = "a_guest_of_a_host_with_ipv6_alone_has_that";
    const HOST: &str = "2001:db8:1::2";
    if let Some(why) = no_passt() {
        return skip(NAME, why);
    }
    in_a_thread(NAME, |resolv_conf| {
        on_another_host(resolv_conf)?;
        let ip = |words: &str| drop(Command::new("ip").args(words.split(' ')).status());
        ip("-4 address flush dev outside");
        ip("address add 2001:db8:1::2/64 dev outside nodad");
        ip("address add 2001:db8:1::3/64 dev outside nodad");
        ip("-6 route add default via 2001:db8:1::1 dev outside");
        fs::write(resolv_conf, format!("nameserver {HOST}\n")).ok()?;
        let host: IpAddr = HOST.parse().unwrap();
        let asked = names(host, &[("listed.test", [192, 0, 2, 2])]);
        let bytes: Vec<u8> = (0..LARGE).map(|n| (n * 7 / 3) as u8).collect();
        let (port, published) = (server_at(host, bytes.clone()), free_port());
        let to_publish = format!("{published}:80");
        let serve = ["alpine", "nc", "-lk", "-p", "80", "-e", "cat"];
        let sandbox = detached(["--network", "user", "-p", &to_publish].into_iter().chain(serve));
        let script = format!(
            "ip -4 -o address show eth0; cat /etc/resolv.conf; wget -qO- 'http://[{HOST}]:{port}' | sha256sum
             nslookup -type=a listed.test | tail -n 2"
        );
        let out = sandbox.sh(&script);
        let (text, error) = (out.text(), out.error());
        assert!(text.starts_with("nameserver fd00:a00:200::3\n"), "{text} {error}");
        assert!(
            text.contains(&sha256(&bytes)) && text.ends_with("Address: 192.0.2.2"),
            "{text} {error}"
        );
        assert_eq!(asked.recv_timeout(LIMIT).as_deref(), Ok("listed.test"));
        for host in [HOST, "::1"] {
            let to = SocketAddr::new(host.parse().unwrap(), published);
            eventually("here", || tcp(to, "here"));
        }
        sandbox.verb("kill").ended_with(0);

        let script = format!(
            "wget -qO- 'http://[{HOST}]:{port}' | sha256sum; nc -w 2 2001:db8:1::3 {port} < /dev/null && echo CONNECTED
             nc -w 2 {HOST} 53 < /dev/null && echo CONNECTED; true"
        );
        let list = format!("[{HOST}]:{port}");
        let words = ["--network", "user", "--egress", &list, "alpine", "sh", "-c", &script];
        let text = run(words).output().ended_with(0).text();
        assert!(text.contains(&sha256(&bytes)) && !text.contains("CONNECTED"), "{text}");
        let words = ["--network", "user", "-p", "127.0.0.1:80:80", "alpine", "true"];
        run(words).output().ended_with(125).says(&["--publish 127.0.0.1", "leave out the address"]);
        Some(())
    });
}

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Puts this thread, and what it starts, on a host of its own: 192.0.2.2 and 192.0.2.3, and a DNS server at the former.
fn on_another_host(resolv_conf: &Path) -> Option<()> {
    // SAFETY: CLONE_FILES, the flag that is not safe, is not given; this thread ends with the test.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.ok()?;
    let done = |words: &str| {
        let mut words = words.split(' ');
        let status = Command::new(words.next()?).args(words).status();
        status.is_ok_and(|status| status.success()).then_some(())
    };
    done("mount --make-rprivate /")?;
    fs::write(resolv_conf, "nameserver 192.0.2.2\noptions timeout:1 attempts:1\n").ok()?;
    done(&format!("mount --bind {} {RESOLV_CONF}", resolv_conf.display()))?;
    done("ip link set lo up")?;
    done("ip link add outside type dummy")?;
    done("ip address add 192.0.2.2/24 dev outside")?;
    done("ip address add 192.0.2.3/24 dev outside")?;
    done("ip link set outside up")?;
    done("ip route add default via 192.0.2.1")
}

/// A DNS server that has an address for every name it knows. Tells of what it is asked.
fn names(address: IpAddr, known: &'static [(&str, [u8; 4])]) -> mpsc::Receiver<String> {
    let socket = UdpSocket::bind((address, 53)).unwrap();
    let (asked, names) = mpsc::channel();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((len, peer)) = socket.recv_from(&mut query) {
            let end = 12 + query[12..len].iter().position(|&byte| byte == 0).unwrap();
            let mut name = Vec::new();
            let mut at = 12;
            while at < end {
                let len = usize::from(query[at]);
                name.push(String::from_utf8_lossy(&query[at + 1..at + 1 + len]).into_owned());
                at += 1 + len;
            }
            let name = name.join(".");
            let found = known.iter().find(|(known, _)| *known == name);
            // AAAA has no answers.
            let records = u8::from(found.is_some() && query[end + 2] == 1);
            let code = if found.is_some() { 0 } else { 3 };
            let head = [query[0], query[1], 0x81, 0x80 | code, 0, 1, 0, records, 0, 0, 0, 0];
            let mut answer = [&head[..], &query[12..end + 5]].concat();
            if let Some((_, octets)) = found.filter(|_| records == 1) {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4]);
                answer.extend(octets);
            }
            let _ = socket.send_to(&answer, peer);
            let _ = asked.send(name);
        }
    });
    names
}

/// Sends datagrams back, and tells of them.
fn echo(address: Ipv4Addr, port: u16) -> (u16, mpsc::Receiver<String>) {
    let socket = UdpSocket::bind((address, port)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let (came, datagrams) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, peer)) = socket.recv_from(&mut buffer) {
            let _ = came.send(String::from_utf8_lossy(&buffer[..len]).trim().into());
            let _ = socket.send_to(&buffer[..len], peer);
        }
    });
    (port, datagrams)
}

/// Runs a test in a thread that may have its own namespaces.
#[track_caller]
fn in_a_thread(name: &str, test: fn(&Path) -> Option<()>) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    let done = thread::spawn(move || test(&file)).join();
    if done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).is_none() {
        skip(name, "no network namespace can be made here");
    }
}

#[test]
fn nothing_leaves_but_to_the_destinations_of_a_list() {
    const NAME: &str = "nothing_leaves_but_to_the_destinations_of_a_list";
    if let Some(why) = no_passt() {
        return skip(NAME, why);
    }
    in_a_thread(NAME, |resolv_conf| {
        on_another_host(resolv_conf)?;
        let [one, other] = [Ipv4Addr::new(192, 0, 2, 2), Ipv4Addr::new(192, 0, 2, 3)];
        let known = &[
            ("listed.test", [192, 0, 2, 2]),
            ("other.test", [192, 0, 2, 3]),
            ("near.test", [127, 0, 0, 1]),
        ];
        let asked = names(one.into(), known);
        let (by_name, by_address) =
            (server(b"by name\n".to_vec()), server(b"by address\n".to_vec()));
        let (datagrams, came) = echo(one, 0);
        let (_, strayed) = echo(other, datagrams);
        let list = format!(
            "Listed.test:{by_name},near.test:*,{one}:{by_address},{one}:{datagrams},missing.test:1"
        );
        // Each line tells what came back, which where it is not listed is nothing.
        let script = format!(
            "wget -qO- listed.test:{by_name}; wget -qO- {one}:{by_address}
             echo datagram | nc -u -w 5 {one} {datagrams}
             cat /etc/resolv.conf; nslookup -type=a near.test | grep -c 127.0.0.1$
             for name in other.test example.org listed.test.example.org; do nslookup $name | grep -q NXDOMAIN && echo no $name; done
             nslookup missing.test | grep -q SERVFAIL && echo failed
             nslookup other.test {one} > /dev/null && echo ANSWERED
             for to in '{other} {by_name}' '{one} 53' '10.0.2.2 {by_name}' '10.0.2.3 53'; do
               nc -w 2 $to < /dev/null && echo CONNECTED $to
             done
             echo stray | nc -u -w 2 {other} {datagrams}
             ping -c 1 -w 2 {one} > /dev/null && echo PINGED
             echo done"
        );
        let out =
            run(["--network", "user", "--egress", &list, "alpine", "sh", "-c", &script]).output();
        let out = out.ended_with(0);
        let expected = "by name\nby address\ndatagram\nnameserver 127.0.0.11\n0\nno other.test\nno example.org\n\
                        no listed.test.example.org\nfailed\ndone";
        assert_eq!(out.text(), expected, "{}", out.error());
        assert_eq!(came.try_iter().collect::<Vec<_>>(), ["datagram"]);
        assert_eq!(strayed.try_iter().count(), 0);
        let asked: Vec<_> = asked.try_iter().collect();
        let listed =
            |name: &String| ["listed.test", "near.test", "missing.test"].contains(&name.as_str());
        assert!(asked.iter().all(listed) && !asked.is_empty(), "{asked:?}");

        let script = format!(
            "nc -w 2 {one} {by_name} < /dev/null && echo CONNECTED; nslookup listed.test; true"
        );
        let out =
            run(["--network", "user", "--egress", "none", "alpine", "sh", "-c", &script]).output();
        let text = out.ended_with(0).text();
        assert!(text.contains("NXDOMAIN") && !text.contains("CONNECTED"), "{text}");

        // Without the rights it is refused, and nothing is left of the cgroups.
        let mut unable = Command::new("setpriv");
        unable.arg("--bounding-set=-sys_admin,-bpf").arg(stage().join("bin/ampoule"));
        unable
            .args(["run", "--network", "user", "--egress", "none", "alpine", "true"])
            .env("AMPOULE_ROOT", root());
        program(unable)
            .output()
            .ended_with(125)
            .says(&["--egress cannot be enforced", "takes root"]);
        let groups =
            Command::new("find").args(["/sys/fs/cgroup", "-name", "ampoule-egress-*"]).output();
        assert_eq!(String::from_utf8_lossy(&groups.unwrap().stdout), "");
        Some(())
    });
}

#[test]
fn the_configuration_has_a_network_for_who_asks_for_none() {
    if let Some(why) = no_passt() {
        return skip("the_configuration_has_a_network_for_who_asks_for_none", why);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ampoule/config.toml");
    fs::create_dir(file.parent().unwrap()).unwrap();
    fs::write(&file, "sandbox.network = 'user'\nsandbox.egress = []\n").unwrap();
    let script = "cat /etc/resolv.conf 2>&-; ip -o link show eth0 2>&- | wc -l";
    for (options, said) in [
        (&[][..], "nameserver 127.0.0.11\n1"),
        (&["--egress", "192.0.2.7:1"], "nameserver 127.0.0.11\n1"),
        (&["--network", "none"], "0"),
        (&["--hermetic"], "0"),
    ] {
        let out = run([options, &["alpine", "sh", "-c", script]].concat());
        let out = out.env("XDG_CONFIG_HOME", folder.path()).output().ended_with(0);
        assert_eq!(out.text().lines().collect::<Vec<_>>().join("\n"), said, "{options:?}");
    }
    let effective =
        ampoule(["config", "--effective"]).env("XDG_CONFIG_HOME", folder.path()).output();
    for line in ["sandbox.network = \"user\"", "sandbox.egress = []"] {
        assert!(effective.text().contains(line), "{line}: {}", effective.text());
    }
}

#[test]
fn passt_ends_with_its_sandbox_however_that_ends() {
    if let Some(why) = no_passt() {
        return skip("passt_ends_with_its_sandbox_however_that_ends", why);
    }
    for (signal, code) in [(Signal::TERM, 137), (Signal::KILL, 137)] {
        let script = "echo ready; exec sleep 600";
        let mut running = run(["--network", "user", "alpine", "sh", "-c", script]).spawn();
        running.wait_for("ready");
        let passt = passt_of(running.child.id().into()).expect("a passt");
        while running.child.try_wait().unwrap().is_none() {
            running.signal(signal);
            thread::sleep(Duration::from_millis(100));
        }
        eventually("gone", || passt_is_gone(passt));
        // What a killed one leaves, whoever lists sandboxes clears away.
        ampoule(["ps"]).output().ended_with(0);
        running.finish().ended_with(code);
    }
}

fn passt_is_gone(pid: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    (!name.starts_with("passt")).then(|| "gone".into())
}

#[test]
fn a_network_namespace_is_the_guests() {
    let name = format!("ampoule-{}", std::process::id());
    let ip = |words: &str| {
        let mut ip = Command::new("ip");
        ip.args(words.replace("NAME", &name).split(' '));
        program(ip).output()
    };
    if ip("netns add NAME").code != 0 {
        return skip("a_network_namespace_is_the_guests", "no network namespace can be made here");
    }
    let path = format!("netns:/run/netns/{name}");
    let words = [
        "--network",
        &path,
        "alpine",
        "sh",
        "-c",
        "ip -o -4 address show net7; ping -c 1 -w 20 10.77.0.1",
    ];
    run(words).output().ended_with(125).says(&[&name, "no interface but loopback"]);
    ip("link add v77 type veth peer name net7 netns NAME").ended_with(0);
    ip("address add 10.77.0.1/24 dev v77").ended_with(0);
    ip("link set v77 up").ended_with(0);
    ip("-n NAME address add 10.77.0.2/24 dev net7").ended_with(0);
    ip("-n NAME link set net7 up").ended_with(0);
    let out = run(words).output();
    assert!(out.ended_with(0).text().contains("10.77.0.2/24"));
    follows(ip, &path);
    ip("netns delete NAME").ended_with(0);
}

/// A running guest gets what comes, and loses what goes. Its `net7` is there.
fn follows(ip: impl Fn(&str) -> Outcome, path: &str) {
    let serve = "while :; do nc -l -p 80 -e sha256sum; done";
    let sandbox = detached(["--network", path, "alpine", "sh", "-c", serve]);
    let guest = |script: &str| Some(sandbox.sh(script).text());
    ip("-n NAME address add 10.77.1.2/24 dev net7").ended_with(0);
    ip("-n NAME route add 10.98.0.0/16 via 10.77.0.1").ended_with(0);
    let address = "ip -o -4 address show net7 | grep -o '10[^ ]*/24'; ip route | grep -c 10.98";
    eventually("10.77.0.2/24\n10.77.1.2/24\n1", || guest(address));
    ip("-n NAME address delete 10.77.1.2/24 dev net7").ended_with(0);
    ip("-n NAME route delete 10.98.0.0/16").ended_with(0);
    eventually("10.77.0.2/24\n0", || guest(address));

    let come = || {
        ip("link add v78 mtu 9000 type veth peer name late8 mtu 9000 netns NAME").ended_with(0);
        ip("address add 10.78.0.1/24 dev v78").ended_with(0);
        ip("link set v78 up").ended_with(0);
        ip("-n NAME address add 10.78.0.2/24 dev late8").ended_with(0);
        ip("-n NAME link set late8 up").ended_with(0);
        let both = "nexthop via 10.77.0.1 dev net7 nexthop via 10.78.0.1 dev late8";
        ip(&format!("-n NAME route add 10.99.0.0/16 {both}")).ended_with(0);
    };
    let there = "ip link show late8 2>&1 | grep -o 'mtu 9000'; ip -4 address show late8 2>&1 | grep -o 10.78.0.2/24";
    let spread =
        "for n in $(seq 40); do ip route get 10.99.0.$n; done | grep -o 'dev [a-z0-9]*' | sort -u";
    let gone = "ip link show late8 2>&1 | grep -c 'mtu'";
    come();
    eventually("mtu 9000\n10.78.0.2/24", || guest(there));
    eventually("dev late8\ndev net7", || guest(spread));
    // By either, with frames of either size, both ways.
    let bytes: Vec<u8> = (0..8 * LARGE).map(|n| (n * 7 / 3) as u8).collect();
    let port = server(bytes.clone());
    let sum = sha256(&bytes);
    for (host, own) in [([10, 77, 0, 1], [10, 77, 0, 2]), ([10, 78, 0, 1], [10, 78, 0, 2])] {
        let host = Ipv4Addr::from(host);
        let out = sandbox.sh(&format!(
            "wget -qO- {host}:{port} | sha256sum; ping -c 1 -w 20 -s 8000 {host} >&2"
        ));
        assert!(out.ended_with(0).text().starts_with(&sum));
        let mut stream =
            TcpStream::connect_timeout(&(Ipv4Addr::from(own), 80).into(), LIMIT).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(&sum), "{answer}");
    }
    ip("link delete v78").ended_with(0);
    eventually("0", || guest(gone));
    // Its device can be another one's, as often as that comes.
    come();
    eventually("mtu 9000\n10.78.0.2/24", || guest(there));
    ip("-n NAME link delete late8").ended_with(0);
    eventually("0", || guest(gone));
    // What it was booted with goes likewise, and all else goes on.
    ip("link delete v77").ended_with(0);
    eventually("lo", || guest("ls /sys/class/net | xargs"));
    sandbox.verb("kill").ended_with(0);
    let left = ip("-n NAME -o link").ended_with(0).text();
    assert!(!left.contains("ampoule") && !left.contains("net7"), "{left}");
}

/// A guest with two processors has two pairs of queues, and uses either.
#[test]
fn a_network_device_has_as_many_pairs_of_queues_as_there_are_processors() {
    let name = format!("ampoule-queues-{}", std::process::id());
    let ip = |words: &str| {
        let mut ip = Command::new("ip");
        ip.args(words.replace("NAME", &name).split(' '));
        program(ip).output()
    };
    if ip("netns add NAME").code != 0 {
        return skip("pairs of queues", "no network namespace can be made here");
    }
    ip("link add v76 type veth peer name net6 netns NAME").ended_with(0);
    ip("address add 10.76.0.1/24 dev v76").ended_with(0);
    ip("link set v76 up").ended_with(0);
    ip("-n NAME address add 10.76.0.2/24 dev net6").ended_with(0);
    ip("-n NAME link set net6 up").ended_with(0);
    let path = format!("netns:/run/netns/{name}");
    let serve = "for port in 80 81; do while :; do nc -l -p $port -e sha256sum; done & done; wait";
    let words = ["--privileged", "--cpus", "2", "--network", &path, "alpine", "sh", "-c", serve];
    let sandbox = detached(words);
    let two = "rx-0 rx-1 tx-0 tx-1";
    let queues = sandbox.sh("ls /sys/class/net/net6/queues | xargs");
    assert_eq!(queues.ended_with(0).text(), two);
    for pair in 0..2 {
        flows_by(pair, &sandbox);
    }
    // A driver may let go of the device, and take it again.
    let again = "cd /sys/bus/virtio/drivers/virtio_net; for device in virtio*; do echo $device > unbind; echo $device > bind; done
        ls /sys/class/net/eth0/queues | xargs";
    assert_eq!(sandbox.sh(again).ended_with(0).text(), two);
    ip("link delete v76").ended_with(0);
    eventually("lo", || Some(sandbox.sh("ls /sys/class/net | xargs").text()));
    sandbox.verb("kill").ended_with(0);
    ip("netns delete NAME").ended_with(0);
}

/// Both ways at once: by the threads of the VMM's that serve the pairs.
fn flows_by(pair: usize, sandbox: &Detached) {
    const BYTES: usize = LARGE / 4;
    let vmm = child_of(sandbox.record()["pid"].as_u64().unwrap(), "ampoule-vmm").unwrap();
    let thread = ["ampoule-vmm", "queues1"][pair];
    let mut tasks = fs::read_dir(format!("/proc/{vmm}/task")).unwrap().flatten();
    let task = tasks.find(|task| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == thread)
    });
    let task = task.expect("the thread of a pair").path();
    let passed = || {
        let io = fs::read_to_string(task.join("io")).unwrap();
        let count = |key| io.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
        ["rchar:", "wchar:"].map(|key| -> u64 { count(key).unwrap() })
    };
    let bytes: Vec<u8> = (0..BYTES).map(|n| (n * 7 / 3) as u8).collect();
    let (sum, before) = (sha256(&bytes), passed());
    let ports = [(); 2].map(|()| server(bytes.clone()).to_string()).join(" ");
    thread::scope(|scope| {
        for port in [80, 81] {
            let (bytes, sum) = (&bytes, &sum);
            scope.spawn(move || {
                let to = SocketAddr::from(([10, 76, 0, 2], port));
                let mut stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                stream.write_all(bytes).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert!(answer.starts_with(sum), "{answer}");
            });
        }
        // What a guest sends by one queue is answered by the same.
        let other = 1 - pair;
        let script = format!(
            "cd /sys/class/net/net6/queues; echo 3 > tx-{pair}/xps_cpus; echo 0 > tx-{other}/xps_cpus
            for port in {ports}; do wget -qO- 10.76.0.1:$port | sha256sum & done; wait"
        );
        let sums = sandbox.sh(&script).ended_with(0).text();
        assert_eq!(sums.matches(&sum).count(), 2, "{sums}");
    });
    let [read, written] = [0, 1].map(|way| passed()[way] - before[way]);
    assert!(read > BYTES as u64 && written > 200, "{read} and {written} bytes by pair {pair}");
}

/// What Debian's CNI plugins make of a namespace, one after the other as of a list: a bridge with a published port and a
/// limited bandwidth, a macvlan, a point-to-point link.
struct Cni {
    namespace: String,
    folder: tempfile::TempDir,
    made: Vec<(String, &'static str, Value)>,
}

const PLUGINS: &str = "/usr/lib/cni";

impl Cni {
    fn call(&self, verb: &str, plugin: &str, interface: &str, config: &Value) -> Outcome {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), config.to_string()).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec $0 < $1"])
            .arg(Path::new(PLUGINS).join(plugin))
            .arg(file.path())
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.namespace)
            .env("CNI_NETNS", format!("/run/netns/{}", self.namespace))
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", PLUGINS);
        program(command).output()
    }

    /// Adds an interface by these plugins.
    fn add(&mut self, interface: &'static str, plugins: Vec<Value>) {
        let mut result = Value::Null;
        for mut config in plugins {
            let plugin = config["type"].as_str().unwrap().to_string();
            config["cniVersion"] = "0.4.0".into();
            config["name"] = format!("net-{interface}").into();
            if !result.is_null() {
                config["prevResult"] = result;
            }
            let said = self.call("ADD", &plugin, interface, &config).ended_with(0).text();
            result = serde_json::from_str(&said).unwrap();
            self.made.push((plugin, interface, config));
        }
    }

    fn ipam(&self, subnet: &str) -> Value {
        json!({
            "type": "host-local", "dataDir": self.folder.path(), "ranges": [[{ "subnet": subnet }]],
        })
    }
}

impl Drop for Cni {
    fn drop(&mut self) {
        for (plugin, interface, config) in self.made.iter().rev() {
            self.call("DEL", plugin, interface, config);
        }
        let mut ip = Command::new("ip");
        ip.args(["netns", "delete", &self.namespace]);
        program(ip).output();
    }
}

#[test]
fn what_cni_plugins_make_is_the_guests() {
    const NAME: &str = "what_cni_plugins_make_is_the_guests";
    const MEGABYTES: usize = 4;
    // Bits in a second: that takes 2 s.
    const RATE: u32 = 16_000_000;
    if !Path::new(PLUGINS).join("portmap").exists() {
        return skip(NAME, "Debian's containernetworking-plugins are not installed");
    }
    let namespace = format!("ampoule-cni-{}", std::process::id());
    let ip = |words: &str| {
        let mut ip = Command::new("ip");
        ip.args(words.split(' '));
        program(ip).output()
    };
    if ip(&format!("netns add {namespace}")).code != 0 {
        return skip(NAME, "no network namespace can be made here");
    }
    let path = format!("netns:/run/netns/{namespace}");
    let mut cni = Cni { namespace, folder: tempfile::tempdir().unwrap(), made: Vec::new() };
    ip("link add cni-up type veth peer name cni-lower").ended_with(0);
    ip("address add 10.86.0.1/24 dev cni-up").ended_with(0);
    ip("link set cni-up up").ended_with(0);
    ip("link set cni-lower up").ended_with(0);
    let published = free_port();
    cni.add(
        "eth0",
        vec![
            json!({ "type": "bridge", "bridge": "cni-bridge", "isGateway": true, "ipam": cni.ipam("10.87.0.0/24") }),
            json!({ "type": "portmap", "snat": true, "runtimeConfig": { "portMappings": [
                { "hostPort": published, "containerPort": 80, "protocol": "tcp" },
            ] } }),
            json!({
                "type": "bandwidth", "ingressRate": RATE, "ingressBurst": RATE / 8,
                "egressRate": RATE, "egressBurst": RATE / 8,
            }),
        ],
    );
    let lower = json!({ "type": "macvlan", "master": "cni-lower", "ipam": {
        "type": "static", "addresses": [{ "address": "10.86.0.2/24" }],
    } });
    cni.add("net1", vec![lower]);
    let pair = json!({ "type": "ptp", "mtu": 1400, "ipam": cni.ipam("10.85.0.0/24") });
    cni.add("net2", vec![pair]);

    let serve = "while :; do nc -l -p 80 -e sha256sum; done";
    let sandbox = detached(["--network", &path, "alpine", "sh", "-c", serve]);
    let script = "for to in 10.87.0.1 10.86.0.1 10.85.0.1; do ping -c 1 -w 20 $to > /dev/null && echo $to; done; \
        ip -o link show net2 | grep -o 'mtu 1400'";
    let reached = sandbox.sh(script).ended_with(0).text();
    assert_eq!(reached, "10.87.0.1\n10.86.0.1\n10.85.0.1\nmtu 1400");

    let bytes: Vec<u8> = (0..MEGABYTES << 20).map(|n| (n * 7 / 3) as u8).collect();
    let (port, sum) = (server(bytes.clone()), sha256(&bytes));
    // Less the burst, which may pass at once.
    let least = Duration::from_secs_f64((MEGABYTES << 23) as f64 / f64::from(RATE) - 1.0 / 8.0);
    let limited = |what: &str, began: Instant| {
        let took = began.elapsed();
        assert!(took > least.mul_f32(0.8) && took < least * 10, "{what}: {took:?}, not {least:?}");
    };
    let began = Instant::now();
    let to = SocketAddr::from((Ipv4Addr::new(10, 87, 0, 1), published));
    let mut stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(&bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    limited("to the guest", began);
    assert!(answer.starts_with(&sum), "{answer}");
    let began = Instant::now();
    let got = sandbox.sh(&format!("wget -qO- 10.87.0.1:{port} | sha256sum")).ended_with(0).text();
    limited("to the guest, which asked", began);
    assert!(got.starts_with(&sum), "{got}");
    let (listener, began) =
        (TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap(), Instant::now());
    let port = listener.local_addr().unwrap().port();
    let receiving = thread::spawn(move || {
        let mut all = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut all).unwrap();
        all.len()
    });
    let send = format!("dd if=/dev/zero bs=1M count={MEGABYTES} 2>&- | nc 10.87.0.1 {port}");
    sandbox.sh(&send).ended_with(0);
    assert_eq!(receiving.join().unwrap(), MEGABYTES << 20);
    limited("from the guest", began);
    sandbox.verb("kill").ended_with(0);
    drop(cni);
    ip("link delete cni-up");
    ip("link delete cni-bridge");
}

fn sha256(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let mut sum = Command::new("sha256sum");
    sum.arg(file.path());
    program(sum).output().ended_with(0).text()[..64].into()
}

#[test]
fn networks_that_cannot_be_are_refused_with_the_way_out() {
    for (words, said) in [
        (&["-p", "8080:80"][..], &["--publish", "add --network user"][..]),
        (&["--network", "host"], &["none, user, or netns:PATH"]),
        (&["--network", "user", "-p", "80"], &["127.0.0.1:8080:80"]),
        (&["--network", "netns:/run/netns/missing"], &["/run/netns/missing", "No such file"]),
        (&["--network", "netns:/dev/null"], &["/dev/null", "network namespace"]),
        (&["--network", "netns:/proc/self/ns/net"], &["host's network"]),
        (&["--hermetic", "--network", "user"], &["--hermetic: --network user"]),
        (
            &["--egress", "example.org:443"],
            &["--egress takes --network user", "leave out --egress"],
        ),
        (&["--network", "user", "--egress", "example.org"], &["HOST:PORT"]),
        (&["--network", "user", "--egress", "127.0.0.1:80"], &["loopback"]),
        (
            &["--network", "user", "--egress", "none", "-p", "53:53/udp"],
            &["53:53/udp", "publish a TCP port"],
        ),
    ] {
        ampoule([&["run"], words, &["alpine", "true"]].concat())
            .output()
            .ended_with(125)
            .says(said);
    }
    let out = run(["--network", "user", "alpine", "true"]).env("PATH", "/nowhere").output();
    out.ended_with(125).says(&["passt is missing", "Debian's package `passt`"]);
    if let Some(why) = no_passt() {
        return skip("networks_that_cannot_be_are_refused: a port in use", why);
    }
    let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = format!("{}:80", taken.local_addr().unwrap().port());
    let out = run(["--network", "user", "-p", &port, "alpine", "true"]).output();
    out.ended_with(125).says(&["passt", "port"]);
}
