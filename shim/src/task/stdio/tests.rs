use std::{
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;
use crate::task::testing::Dialled;

const OWNER: Owner<'_> = Owner { id: "c", namespace: "ns" };
const SOON: Duration = Duration::from_secs(10);

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().into()
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        path
    }

    fn program(&self, text: &str) -> String {
        let path = self.path("program");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

/// Both ends of what the guest would have.
fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

async fn try_open(wanted: &Wanted) -> Result<Opened, StdioError> {
    Opened::open(wanted, OWNER, &Arc::default(), Pace::default()).await
}

async fn opened(wanted: Wanted) -> Opened {
    try_open(&wanted).await.unwrap()
}

#[tokio::test]
async fn output_goes_on_when_a_client_leaves_and_another_comes() {
    let folder = Folder::new();
    let stdout = folder.fifo("out");
    let opened = opened(Wanted { stdout: stdout.clone(), ..Default::default() }).await;
    assert_eq!(opened.streams(), Stdio { stdout: true, ..Default::default() });
    let (ours, mut guest) = pair();
    let io = opened.connect(Streams { stdout: Some(ours), ..Default::default() });
    for words in ["first", "again"] {
        let path = stdout.clone();
        let client = tokio::task::spawn_blocking(move || {
            let mut bytes = [0; 5];
            std::fs::File::open(path).unwrap().read_exact(&mut bytes).unwrap();
            String::from_utf8(bytes.into()).unwrap()
        });
        guest.write_all(words.as_bytes()).await.unwrap();
        assert_eq!(client.await.unwrap(), words);
    }
    // Without any reader there is room in the FIFO; the end waits for nobody.
    guest.write_all(b"unread").await.unwrap();
    drop(guest);
    assert!(within(SOON, io.drained()).await);
}

#[tokio::test]
async fn a_burst_arrives_whole_and_the_reader_sees_its_end() {
    let folder = Folder::new();
    let stdout = folder.fifo("out");
    let opened = opened(Wanted { stdout: stdout.clone(), ..Default::default() }).await;
    let (ours, mut guest) = pair();
    let io = opened.connect(Streams { stdout: Some(ours), ..Default::default() });
    let client = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        std::fs::File::open(stdout).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    });
    let sent: Vec<u8> = (0..8_u32 << 20).map(|n| n.wrapping_mul(2_654_435_761) as u8).collect();
    guest.write_all(&sent).await.unwrap();
    drop(guest);
    assert!(within(SOON, io.drained()).await);
    assert!(client.await.unwrap() == sent);
}

#[tokio::test]
async fn a_fifo_that_nobody_reads_holds_nobody_up_for_ever() {
    let folder = Folder::new();
    let opened = opened(Wanted { stdout: folder.fifo("out"), ..Default::default() }).await;
    let (ours, mut guest) = pair();
    let io = opened.connect(Streams { stdout: Some(ours), ..Default::default() });
    let writer = tokio::spawn(async move { guest.write_all(&[7; 1 << 20]).await });
    assert!(!within(Duration::from_millis(100), io.drained()).await);
    drop(io);
    // The guest meets a broken pipe, and not a wall.
    let error = tokio::time::timeout(SOON, writer).await.unwrap().unwrap().unwrap_err();
    assert!(
        matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset),
        "{error}"
    );
}

#[tokio::test]
async fn input_ends_by_close_and_by_nothing_else() {
    let folder = Folder::new();
    let stdin = folder.fifo("in");
    let opened = opened(Wanted { stdin: stdin.clone(), ..Default::default() }).await;
    let (ours, mut guest) = pair();
    let mut io = opened.connect(Streams { stdin: Some(ours), ..Default::default() });
    for words in ["first", "again"] {
        let path = stdin.clone();
        let client = move || OpenOptions::new().write(true).open(path)?.write_all(words.as_bytes());
        tokio::task::spawn_blocking(client).await.unwrap().unwrap();
        let mut bytes = [0; 5];
        guest.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes, words.as_bytes());
    }
    let silent = tokio::time::timeout(Duration::from_millis(100), guest.read(&mut [0])).await;
    assert!(silent.is_err(), "ended by itself");
    io.close_stdin();
    let end = tokio::time::timeout(SOON, guest.read(&mut [0])).await.unwrap().unwrap();
    assert_eq!(end, 0);
}

#[tokio::test]
async fn files_are_made_and_added_to() {
    let folder = Folder::new();
    let path = folder.path("logs/a b.log");
    for words in ["one ", "two"] {
        let stdout = format!("file://{}", path.replace(' ', "%20"));
        let opened = opened(Wanted { stdout, ..Default::default() }).await;
        let (ours, mut guest) = pair();
        let io = opened.connect(Streams { stdout: Some(ours), ..Default::default() });
        guest.write_all(words.as_bytes()).await.unwrap();
        drop(guest);
        assert!(within(SOON, io.drained()).await);
    }
    assert_eq!(fs::read_to_string(path).unwrap(), "one two");
}

#[tokio::test]
async fn a_logger_gets_both_outputs_its_arguments_and_its_container() {
    let folder = Folder::new();
    let log = folder.path("log");
    // Ready only once it has written its first line.
    let program = folder.program(&format!(
        "exec >{log}; echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\"; exec 5>&-; cat <&3; cat <&4"
    ));
    let uri = format!("binary://{program}?key=a%20value&flag");
    let wanted = Wanted { stdout: uri.clone(), stderr: uri, ..Default::default() };
    let opened = opened(wanted).await;
    assert_eq!(fs::read_to_string(&log).unwrap(), "ns/c key a value flag\n");
    let ((ours, mut out), (ours_too, mut err)) = (pair(), pair());
    let streams = Streams { stdout: Some(ours), stderr: Some(ours_too), ..Default::default() };
    let io = opened.connect(streams);
    out.write_all(b"out\n").await.unwrap();
    err.write_all(b"err\n").await.unwrap();
    drop((out, err));
    assert!(within(SOON, io.drained()).await);
    assert_eq!(fs::read_to_string(&log).unwrap(), "ns/c key a value flag\nout\nerr\n");
}

#[tokio::test]
async fn a_logger_of_the_second_kind_says_that_it_is_ready() {
    let folder = Folder::new();
    for (script, ready) in [("echo >&5; exec cat <&3", true), ("exit 0", false)] {
        let stdout = format!("binary-v2://{}", folder.program(script));
        let wanted = Wanted { stdout, ..Default::default() };
        let opened = try_open(&wanted).await;
        assert_eq!(opened.is_ok(), ready, "{script}");
    }
}

#[tokio::test]
async fn what_cannot_be_opened_is_named() {
    let folder = Folder::new();
    let (fifo, missing) = (folder.fifo("f"), folder.path("missing"));
    let logger = format!("binary://{missing}");
    for (wanted, part) in [
        (Wanted { stdin: missing.clone(), ..Default::default() }, "stdin "),
        (Wanted { stdout: missing.clone(), ..Default::default() }, "stdout "),
        (Wanted { stderr: missing.clone(), ..Default::default() }, "stderr "),
        (Wanted { stdin: format!("file://{fifo}"), ..Default::default() }, "not a FIFO"),
        (Wanted { stdout: logger, ..Default::default() }, "logger "),
    ] {
        let error = try_open(&wanted).await.err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
    // A terminal has no stderr.
    let terminal = Wanted { stderr: missing, terminal: true, ..Default::default() };
    assert_eq!(opened(terminal).await.streams(), Stdio::default());
}

fn at_our_socket(id: &str) -> String {
    format!("ttrpc+unix:///run/containerd/s/1?streaming_id={id}")
}

#[tokio::test]
async fn a_streamed_output_is_read_as_there_is_room_and_by_one_client_after_the_other() {
    let streaming = Arc::default();
    let mut client = Dialled::open(&streaming, "c-stdout").await;
    let wanted = Wanted { stdout: at_our_socket("c-stdout"), ..Default::default() };
    let opened = Opened::open(&wanted, OWNER, &streaming, Pace::default()).await.unwrap();
    let (ours, mut guest) = pair();
    let io = opened.connect(Streams { stdout: Some(ours), ..Default::default() });
    guest.write_all(b"first, again").await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(100), client.read()).await;
    assert!(early.is_err(), "there was no room");
    client.room(5).await;
    assert_eq!(client.read().await.unwrap(), b"first");
    drop(client);
    let mut client = Dialled::open(&streaming, "c-stdout").await;
    client.room(1 << 20).await;
    assert_eq!(client.read().await.unwrap(), b", again");
    drop(guest);
    assert_eq!(client.read().await, None);
    assert!(!within(Duration::from_millis(100), io.drained()).await, "it may still be reading");
    client.close().await;
    assert!(within(SOON, io.drained()).await);
    // Of a containerd that was killed before it knew.
    assert_eq!(Dialled::open(&streaming, "c-stdout").await.read().await, None);
}

#[tokio::test]
async fn a_streamed_input_ends_when_it_was_closed_and_its_client_has_left() {
    let streaming = Arc::default();
    let mut client = Dialled::open(&streaming, "c-stdin").await;
    let wanted = Wanted { stdin: at_our_socket("c-stdin"), ..Default::default() };
    let opened = Opened::open(&wanted, OWNER, &streaming, Pace::default()).await.unwrap();
    let (ours, mut guest) = pair();
    let mut io = opened.connect(Streams { stdin: Some(ours), ..Default::default() });
    let mut bytes = [0; 5];
    for words in [b"first", b"again"] {
        assert!(client.wanted().await.unwrap() > 0);
        client.data(words).await;
        guest.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, words);
        client.close().await;
        client = Dialled::open(&streaming, "c-stdin").await;
    }
    io.close_stdin();
    client.data(b"later").await;
    guest.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"later");
    client.close().await;
    let end = tokio::time::timeout(SOON, guest.read(&mut [0])).await.unwrap().unwrap();
    assert_eq!(end, 0);
}
