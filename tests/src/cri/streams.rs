//! Streams of a pod as a kubelet's clients have them: WebSocket connections to the server whose address CRI gives out.
//!
//! Each message is one of a channel, whose number is its first byte (`v4.channel.k8s.io`): stdin, stdout, stderr, how it
//! ended, the terminal's size. Of a forwarded port they are its data and its errors.

use std::{
    io::ErrorKind,
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tungstenite::{
    Error, Message, WebSocket,
    client::{IntoClientRequest, client},
};

use super::Pod;
use crate::containerd::LIMIT;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const END: u8 = 3;
const SIZE: u8 = 4;
const CHANNELS: usize = 5;

/// How long a read waits at most before its caller looks at the time.
const PAUSE: Duration = Duration::from_millis(200);

/// A connection, and what has come by it.
pub struct Streams {
    socket: WebSocket<TcpStream>,
    seen: [Vec<u8>; CHANNELS],
    closed: bool,
}

/// Of a process of which all has been read.
#[derive(Debug, PartialEq)]
pub struct Ended {
    pub stdout: String,
    pub stderr: String,
    /// What is said of its end: an exit status, if it is one of a process.
    pub status: String,
}

impl Streams {
    pub(super) fn dial(pod: &Pod<'_>, url: &str, protocol: &'static str) -> Self {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.into_client_request().expect("an address");
        let address = request.uri().authority().expect("an address").to_string();
        let protocol = protocol.parse().expect("a word");
        request.headers_mut().insert("Sec-WebSocket-Protocol", protocol);
        let stream = pod.containerd.inside.connect(&address);
        stream.set_read_timeout(Some(LIMIT)).expect("a socket");
        let (socket, _) = client(request, stream).unwrap_or_else(|e| panic!("{address}: {e}"));
        socket.get_ref().set_read_timeout(Some(PAUSE)).expect("a socket");
        Self { socket, seen: Default::default(), closed: false }
    }

    /// Writes to stdin, or to a port.
    pub fn sends(&mut self, text: &str) {
        self.send(STDIN, text.as_bytes());
    }

    pub fn resizes(&mut self, columns: u16, rows: u16) {
        let size = json!({ "Width": columns, "Height": rows });
        self.send(SIZE, size.to_string().as_bytes());
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        self.socket.send(Message::binary(message)).expect("a connection");
    }

    /// Waits until stdout has said `word`; whether it has, before `limit` is over.
    pub fn says_within(&mut self, limit: Duration, word: &str) -> bool {
        self.has_within(limit, STDOUT, word)
    }

    #[track_caller]
    pub fn says(&mut self, word: &str) {
        assert!(self.says_within(LIMIT, word), "no {word:?} in {:?}", self.text(STDOUT));
    }

    /// Waits until a forwarded port has answered so.
    #[track_caller]
    pub fn answers(&mut self, word: &str) {
        assert!(self.has_within(LIMIT, STDIN, word), "no {word:?} in {:?}", self.texts());
    }

    /// Waits until something is said of what went wrong with a forwarded port.
    #[track_caller]
    pub fn fails(&mut self) -> String {
        // The first message of either channel is the number of the port.
        assert!(self.until(LIMIT, |seen| seen[1].len() > 2), "no error: {:?}", self.texts());
        self.text(1)
    }

    /// Reads to the end.
    #[track_caller]
    pub fn end(mut self) -> Ended {
        let closed = self.until(LIMIT, |_| false);
        assert!(closed, "it does not end: {:?}", self.texts());
        let said = self.text(END);
        // Before `v4` it is a sentence, and nothing of a success.
        let status = match serde_json::from_str::<Value>(&said) {
            Ok(status) if status["status"] == "Success" => "0".into(),
            Ok(status) => match status["details"]["causes"][0]["message"].as_str() {
                Some(code) => code.into(),
                None => said,
            },
            Err(_) => said,
        };
        Ended { stdout: self.text(STDOUT), stderr: self.text(STDERR), status }
    }

    fn has_within(&mut self, limit: Duration, channel: u8, word: &str) -> bool {
        let has = |seen: &[Vec<u8>; CHANNELS]| {
            String::from_utf8_lossy(&seen[usize::from(channel)]).contains(word)
        };
        self.until(limit, has) && has(&self.seen)
    }

    /// Reads until what has come `is` enough, or the connection is closed; says whether one of them came in time.
    fn until(&mut self, limit: Duration, is: impl Fn(&[Vec<u8>; CHANNELS]) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        while !is(&self.seen) && !self.closed {
            if Instant::now() > deadline {
                return false;
            }
            match self.socket.read() {
                Ok(Message::Binary(bytes)) => self.take(&bytes),
                Ok(Message::Close(_)) => {}
                Ok(other) => panic!("no message of a channel: {other:?}"),
                Err(Error::Io(e)) if e.kind() == ErrorKind::WouldBlock => {}
                // containerd does not always say goodbye.
                Err(_) => self.closed = true,
            }
        }
        true
    }

    fn take(&mut self, message: &[u8]) {
        let Some((channel, bytes)) = message.split_first() else { return };
        let channel = self.seen.get_mut(usize::from(*channel)).expect("a channel that there is");
        channel.extend(bytes);
    }

    fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(&self.seen[usize::from(channel)]).into_owned()
    }

    fn texts(&self) -> Vec<String> {
        self.seen.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }
}
