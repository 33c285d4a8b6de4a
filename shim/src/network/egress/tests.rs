//! The programs in force, where the test may load them: in a cgroup of its own.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::process::CommandExt,
    process::Command,
};

use super::*;

/// What a process in the cgroup that `list` holds can do, by a shell's words.
fn inside(cgroup: &Cgroup, script: &str) -> io::Result<String> {
    let entrance = cgroup.entrance();
    let mut command = Command::new("bash");
    command.args(["-c", script]);
    // SAFETY: the cgroup is there until the process has ended.
    unsafe { command.pre_exec(move || enter(entrance)) };
    Ok(String::from_utf8_lossy(&command.output()?.stdout).into_owned())
}

#[test]
fn a_process_in_the_cgroup_reaches_what_is_allowed_and_nothing_else() {
    // The list itself takes no loopback, and the test has no other address for sure.
    let (cgroup, names) = match enforce(&Egress(Vec::new())) {
        Ok(enforced) => enforced,
        Err(error) => return eprintln!("skipped: {}", crate::error::chain_text(&error)),
    };
    let listeners = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let [one, other] = listeners.each_ref().map(|at| at.local_addr().unwrap().port());
    let tries = |protocol: &str| {
        [("127.0.0.1", one), ("127.0.0.1", other), ("::ffff:127.0.0.1", one), ("::1", one)]
            .map(|(host, port)| {
                format!("(exec 3<>/dev/{protocol}/{host}/{port}) 2>&1 | grep -q 'not permitted' && printf 1 || printf 0; ")
            })
            .concat()
    };
    let refusals = |script: &str| inside(&cgroup, script).unwrap();
    assert_eq!((refusals(&tries("tcp")), refusals(&tries("udp"))), ("1111".into(), "1111".into()));
    let (allowed, local) = (&names.allowed, IpAddr::V4(Ipv4Addr::LOCALHOST));
    allowed.open(local, Some(one)).unwrap();
    allowed.open(local, Some(one)).unwrap();
    allowed.close(local, Some(one)).unwrap();
    assert_eq!((refusals(&tries("tcp")), refusals(&tries("udp"))), ("0101".into(), "0101".into()));
    allowed.close(local, Some(one)).unwrap();
    assert_eq!(refusals(&tries("tcp")), "1111");
    allowed.open(local, None).unwrap();
    assert_eq!(refusals(&tries("tcp")), "0001");
    // Others are not affected.
    TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, other))).unwrap();
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().send_to(b"x", ("127.0.0.1", other)).unwrap();
}

#[tokio::test]
async fn names_of_the_list_are_answered_and_open_what_they_stand_for() {
    let list = "ampoule.invalid:80,localhost:80".parse().unwrap();
    let (_cgroup, names) = match enforce(&list) {
        Ok(enforced) => enforced,
        Err(error) => return eprintln!("skipped: {}", crate::error::chain_text(&error)),
    };
    let ask = async |labels: &[&str]| {
        let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        labels.iter().for_each(|label| {
            query.push(label.len() as u8);
            query.extend(label.bytes());
        });
        let answer = names.answer(&[&query, &[0, 0, 1, 0, 1][..]].concat()).await.unwrap();
        (answer[3] & 15, answer[7])
    };
    // No such name; found, but the host's own; not found.
    assert_eq!(ask(&["example", "org"]).await, (3, 0));
    assert_eq!(ask(&["localhost"]).await, (0, 0));
    assert_eq!(ask(&["ampoule", "invalid"]).await, (2, 0));
    assert!(names.answer(b"no question").await.is_none());
}
