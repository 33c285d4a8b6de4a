//! A kernel that asks, and guests that answer as they like.

use std::{
    convert::Infallible,
    sync::{Mutex, mpsc},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::*;

const TIMES: Times = Times {
    answer: Duration::from_millis(200),
    pause: Duration::from_millis(100),
    idle: Duration::from_millis(50),
};
/// More than any of these takes, on a busy machine too.
const LIMIT: Duration = Duration::from_secs(20);

/// Its end of the device, and the guests' ends of streams as they are asked for.
struct Kernel {
    device: AsyncFd<OwnedFd>,
    guests: mpsc::Receiver<(u64, UnixStream)>,
    forgets: mpsc::Receiver<()>,
}

impl Kernel {
    fn new(times: Times) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let (connected, guests) = mpsc::channel();
        let (forget, forgets) = mpsc::channel();
        let forget = Mutex::new(forget);
        let connect = move |first| {
            let (near, far) = UnixStream::pair().unwrap();
            connected.send((first, far)).unwrap();
            std::future::ready(Ok::<_, Infallible>(near))
        };
        for end in [&ours, &theirs] {
            rustix::io::ioctl_fionbio(end, true).unwrap();
        }
        let forget = move || {
            let _ = forget.lock().unwrap().send(());
            Ok(())
        };
        let relay = Relay::new(theirs, times, connect, forget).unwrap();
        tokio::spawn(relay.run());
        Self { device: watch(ours).unwrap(), guests, forgets }
    }

    fn asks(&self, opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
        let message = request(opcode, unique, 1, body);
        write(self.device.get_ref(), &message).unwrap();
        message
    }

    /// The next answer.
    async fn hears(&self) -> Vec<u8> {
        let mut answer = vec![0; MAX_MESSAGE];
        loop {
            let mut ready = timeout(LIMIT, self.device.readable()).await.unwrap().unwrap();
            match read(self.device.get_ref(), &mut answer) {
                Err(Errno::AGAIN) => ready.clear_ready(),
                length => {
                    answer.truncate(length.unwrap());
                    return answer;
                }
            }
        }
    }

    async fn hears_error(&self, unique: u64, errno: Errno) {
        assert_eq!(self.hears().await, reply(unique, -errno.raw_os_error(), &[]));
    }

    async fn guest(&self) -> (u64, UnixStream) {
        let end = Instant::now() + LIMIT;
        loop {
            if let Ok(guest) = self.guests.try_recv() {
                return guest;
            }
            assert!(Instant::now() < end, "nobody was asked");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut message = ((IN_HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(opcode.to_ne_bytes());
    message.extend(unique.to_ne_bytes());
    message.extend(node.to_ne_bytes());
    message.resize(IN_HEADER, 0);
    message.extend(body);
    message
}

fn reply(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut message = ((OUT_HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(error.to_ne_bytes());
    message.extend(unique.to_ne_bytes());
    message.extend(body);
    message
}

/// Asserts that the guest is told this next.
async fn told(guest: &mut UnixStream, message: &[u8]) {
    let mut got = vec![0; message.len()];
    timeout(LIMIT, guest.read_exact(&mut got)).await.unwrap().unwrap();
    assert_eq!(got, message);
}

async fn over(guest: &mut UnixStream) {
    assert_eq!(timeout(LIMIT, guest.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn a_guest_is_asked_when_somebody_looks_and_let_go_when_nobody_uses_a_file() {
    let kernel = Kernel::new(TIMES);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(kernel.guests.try_recv().is_err());
    // What is answered without it.
    kernel.asks(opcode::RELEASE, 2, &[0; 24]);
    assert_eq!(kernel.hears().await, reply(2, 0, &[]));
    kernel.asks(opcode::FORGET, 0, &[0; 8]);
    kernel.asks(opcode::INTERRUPT, 3, &[0; 8]);
    kernel.hears_error(3, Errno::NOSYS).await;
    assert!(kernel.guests.try_recv().is_err());

    let lookup = kernel.asks(opcode::LOOKUP, 4, b"etc\0");
    let (first, mut guest) = kernel.guest().await;
    assert_eq!(first, 1 << NUMBERS);
    told(&mut guest, &lookup).await;
    let entry = reply(4, 0, &[&first.to_ne_bytes()[..], &[0; 120]].concat());
    // In pieces, as a stream has them.
    for piece in entry.chunks(50) {
        guest.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(kernel.hears().await, entry);
    // Longer than a piece of a stream.
    let write = kernel.asks(opcode::WRITE, 6, &vec![7; 100 << 10]);
    let read = kernel.asks(opcode::READ, 8, &[0; 40]);
    told(&mut guest, &write).await;
    told(&mut guest, &read).await;
    // In another order, and at once.
    let data = reply(8, 0, &[9; 100]);
    let written = reply(6, 0, &[0; 8]);
    guest.write_all(&[data.clone(), written.clone()].concat()).await.unwrap();
    assert_eq!((kernel.hears().await, kernel.hears().await), (data, written));

    // A file is known, which a look-up of another connection's file does not change.
    tokio::time::sleep(TIMES.idle * 4).await;
    assert!(kernel.forgets.try_recv().is_ok() && kernel.forgets.try_recv().is_err());
    let forget = |node: u64| request(opcode::FORGET, 0, node, &1u64.to_ne_bytes());
    for node in [first - 1, first] {
        rustix::io::write(kernel.device.get_ref(), &forget(node)).unwrap();
        told(&mut guest, &forget(node)).await;
    }
    over(&mut guest).await;
    kernel.asks(opcode::GETATTR, 10, &[0; 16]);
    assert_eq!(kernel.guest().await.0, 2 << NUMBERS);
}

#[tokio::test]
async fn what_is_no_answer_reaches_nobody() {
    let kernel = Kernel::new(Times { answer: LIMIT, ..TIMES });
    let getattr = kernel.asks(opcode::GETATTR, 2, &[0; 16]);
    let (_, mut guest) = kernel.guest().await;
    told(&mut guest, &getattr).await;
    // Notifications, the second as long as can be; an answer to a question that nobody asked.
    for (unique, error, length) in [(0, 3, 32), (0, 4, MAX_MESSAGE - OUT_HEADER), (4, 0, 104)] {
        guest.write_all(&reply(unique, error, &vec![1; length])).await.unwrap();
    }
    // The kernel would not take these as answers.
    for (unique, error, body) in [(2, 5, &[][..]), (6, -512, &[]), (8, -2, &[1; 8])] {
        if unique > 2 {
            told(&mut guest, &kernel.asks(opcode::GETATTR, unique, &[0; 16])).await;
        }
        guest.write_all(&reply(unique, error, body)).await.unwrap();
        kernel.hears_error(unique, Errno::IO).await;
    }
    // Once only.
    told(&mut guest, &kernel.asks(opcode::GETATTR, 10, &[0; 16])).await;
    guest.write_all(&[reply(10, -2, &[]), reply(10, -2, &[])].concat()).await.unwrap();
    kernel.hears_error(10, Errno::NOENT).await;
    told(&mut guest, &kernel.asks(opcode::GETATTR, 12, &[0; 16])).await;
    guest.write_all(&reply(12, -1, &[])).await.unwrap();
    kernel.hears_error(12, Errno::PERM).await;
}

#[tokio::test]
async fn a_guest_that_does_not_speak_fuse_is_left_alone_for_a_while() {
    for length in [0u32, 15, MAX_MESSAGE as u32 + 1, u32::MAX] {
        let kernel = Kernel::new(Times { answer: LIMIT, ..TIMES });
        kernel.asks(opcode::GETATTR, 2, &[0; 16]);
        let (_, mut guest) = kernel.guest().await;
        guest.write_all(&length.to_ne_bytes()).await.unwrap();
        kernel.hears_error(2, Errno::IO).await;
        kernel.asks(opcode::GETATTR, 4, &[0; 16]);
        kernel.hears_error(4, Errno::IO).await;
        assert!(kernel.guests.try_recv().is_err(), "{length}");
        tokio::time::sleep(TIMES.pause).await;
        kernel.asks(opcode::GETATTR, 6, &[0; 16]);
        kernel.guest().await;
    }
}

#[tokio::test]
async fn who_waits_for_a_guest_that_is_silent_or_gone_is_told_so() {
    let kernel = Kernel::new(TIMES);
    kernel.asks(opcode::GETATTR, 2, &[0; 16]);
    let (_, silent) = kernel.guest().await;
    kernel.hears_error(2, Errno::IO).await;
    drop(silent);
    tokio::time::sleep(TIMES.pause).await;
    kernel.asks(opcode::GETATTR, 4, &[0; 16]);
    drop(kernel.guest().await);
    kernel.hears_error(4, Errno::IO).await;
}

#[tokio::test]
async fn a_guest_that_reads_nothing_has_few_requests_and_no_more_time() {
    let kernel = Kernel::new(TIMES);
    // More than the stream holds: what follows stays with the kernel.
    let all = (1..=10).map(|n| n * 2);
    for unique in all.clone() {
        while write(kernel.device.get_ref(), &request(opcode::WRITE, unique, 1, &[7; 128 << 10]))
            == Err(Errno::AGAIN)
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let (_, _guest) = kernel.guest().await;
    let mut refused: Vec<_> = Vec::new();
    for _ in all.clone() {
        let answer = kernel.hears().await;
        assert_eq!(answer, reply(number(&answer, 8), -libc::EIO, &[]));
        refused.push(number(&answer, 8));
    }
    refused.sort();
    assert!(refused.into_iter().eq(all));
}

#[test]
fn what_the_kernel_takes_back_is_counted_whatever_the_message_says() {
    let first = 1 << NUMBERS;
    let entry = |node: u64, count: u64| [node.to_ne_bytes(), count.to_ne_bytes()].concat();
    let entries = [entry(first, 2), entry(5, 100), entry(first + 9, 3)].concat();
    for (count, forgotten) in [(3u32, 5), (2, 2), (0, 0), (u32::MAX, 5)] {
        let body = [&count.to_ne_bytes()[..], &[0; 4], &entries].concat();
        let message = request(opcode::BATCH_FORGET, 0, 1, &body);
        assert_eq!(Request(&message).forgotten(first), forgotten);
        for cut in 0..message.len() {
            assert!(Request(&message[..cut]).forgotten(first) <= 5);
        }
    }
    let one = request(opcode::FORGET, 0, first, &7u64.to_ne_bytes());
    assert_eq!(Request(&one).forgotten(first), 7);
    assert_eq!(Request(&one).forgotten(first + 1), 0);
}
