//! Signals of the user, as a stream. From [`Signals::listen`] on they no longer end this program by themselves.

use std::io;

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// Passed on to the workload. Those of job control (Ctrl-Z) stay with this program, as does SIGCHLD.
const FORWARDED: [i32; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGALRM,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// What a user wants by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The workload is to get it.
    Forward(i32),
    /// The window has a new size.
    Resize,
}

impl Wish {
    /// Whether it is one of the two by which a user asks for the end, and asks again.
    pub fn asks_to_end(self) -> bool {
        matches!(self, Self::Forward(libc::SIGINT | libc::SIGTERM))
    }
}

/// The signals of this process.
pub struct Signals(mpsc::UnboundedReceiver<Wish>);

impl Signals {
    pub fn listen() -> io::Result<Self> {
        let (wishes, queue) = mpsc::unbounded_channel();
        let resize = [(libc::SIGWINCH, Wish::Resize)];
        for (number, wish) in FORWARDED.map(|n| (n, Wish::Forward(n))).into_iter().chain(resize) {
            let mut signals = signal(SignalKind::from_raw(number))?;
            let wishes = wishes.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() && wishes.send(wish).is_ok() {}
            });
        }
        Ok(Self(queue))
    }

    /// The next one.
    pub async fn next(&mut self) -> Wish {
        match self.0.recv().await {
            Some(wish) => wish,
            None => std::future::pending().await,
        }
    }

    /// The next one by which a program that catches nothing would end; its number.
    pub async fn end(&mut self) -> i32 {
        loop {
            match self.next().await {
                Wish::Forward(libc::SIGUSR1 | libc::SIGUSR2) | Wish::Resize => {}
                Wish::Forward(number) => return number,
            }
        }
    }
}
