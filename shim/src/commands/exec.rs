//! `ampoule exec`, `console` and `attach`: a process of a running sandbox, with our streams, terminal and signals.

use tokio::sync::oneshot;

use super::{
    env,
    verb::{self, Result, VerbError, connect},
};
use crate::{
    cli::{AttachArgs, ConsoleArgs, ExecArgs},
    control::{Connection, ControlError, ExecRequest, Request},
    paths::Paths,
    registry::{Ended, Found, Registry},
    sandbox::Streams,
    signal_name::Signal,
    signals::{Signals, Wish},
    stdio::{self, FirstByte, Leave},
    terminal::{self, RawTerminal},
};

/// SIGINTs and SIGTERMs after which a process that ignores them is killed, as with `ampoule run`.
const ENOUGH: u32 = 3;
/// Signals are what they are, however many.
pub(crate) const NEVER_ENOUGH: u32 = u32::MAX;

pub fn exec(args: &ExecArgs, paths: &Paths) -> u8 {
    verb::run("exec", async {
        let found = Registry::new(&paths.state).find(&args.name)?;
        if args.tty && args.interactive && !terminal::is_terminal() {
            let (why, hint) = ("the input is not a terminal", "leave out -t, or -i");
            return Err(VerbError::Refused { name: found.name, why, hint });
        }
        let connection = connect(&found)?;
        let failed = |e| VerbError::Control(found.name.clone(), e);
        let mut signals = listen()?;
        let streams = connection.exec(request(args)).await.map_err(failed)?;
        if args.detach {
            connection.ask(&Request::Start).await.map_err(failed)?;
            return Ok(0);
        }
        let terminal = raw(args.tty && args.interactive)?;
        see_through(&found, &connection, &mut signals, streams, terminal).await
    })
}

pub fn console(args: &ConsoleArgs, paths: &Paths) -> u8 {
    verb::run("console", async {
        let found = Registry::new(&paths.state).find(&args.name)?;
        let connection = connect(&found)?;
        let mut signals = listen()?;
        let size = terminal::is_terminal().then(|| terminal::size().unwrap_or((0, 0)));
        let streams = connection.console(size).await;
        let streams = streams.map_err(|e| VerbError::Control(found.name.clone(), e))?;
        let terminal = raw(size.is_some())?;
        see_through(&found, &connection, &mut signals, streams, terminal).await
    })
}

/// Starts a prepared process and sees it to its end.
async fn see_through(
    found: &Found,
    connection: &Connection,
    signals: &mut Signals,
    streams: Streams,
    terminal: Option<RawTerminal>,
) -> Result<u8> {
    let failed = |e| VerbError::Control(found.name.clone(), e);
    let outputs = connect_streams(streams, None)?;
    connection.ask(&Request::Start).await.map_err(failed)?;
    let ended = attend(connection, signals, ENOUGH).await.map_err(failed)?;
    drained(outputs, signals).await;
    drop(terminal);
    Ok(ended.code)
}

fn request(args: &ExecArgs) -> ExecRequest {
    ExecRequest {
        args: args.command.clone(),
        env: env::given(&args.env),
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty.then(|| terminal::size().unwrap_or((0, 0))),
        stdin: args.interactive,
        output: !args.detach,
    }
}

pub fn attach_to(args: &AttachArgs, paths: &Paths) -> u8 {
    verb::run("attach", async {
        let found = Registry::new(&paths.state).find(&args.name)?;
        let connection = connect(&found)?;
        let failed = |e| VerbError::Control(found.name.clone(), e);
        let mut signals = listen()?;
        let mut streams = connection.attach().await.map_err(failed)?;
        let with_stdin = streams.stdin.is_some() && !args.no_stdin;
        if !with_stdin {
            streams.stdin = None;
        }
        let terminal = raw(found.record.terminal && with_stdin && terminal::is_terminal())?;
        resize(&connection, &found).await;
        let (leave, left) = oneshot::channel();
        let outputs = connect_streams(streams, terminal.is_some().then_some(leave))?;
        let ended = tokio::select! {
            ended = attend(&connection, &mut signals, ENOUGH) => ended.map_err(failed)?,
            // Without the keys, its input may end before it does.
            Ok(()) = left => return Ok(0),
        };
        drained(outputs, &mut signals).await;
        drop(terminal);
        Ok(ended.code)
    })
}

/// Gives the container's terminal the size of ours.
async fn resize(connection: &Connection, found: &Found) {
    if let (true, Some((width, height))) = (found.record.terminal, terminal::size()) {
        let _ = connection.ask(&Request::Resize { width, height }).await;
    }
}

fn listen() -> Result<Signals> {
    Signals::listen().map_err(|e| VerbError::Host("listen for signals", e))
}

fn raw(wanted: bool) -> Result<Option<RawTerminal>> {
    let terminal = wanted.then(RawTerminal::enter).transpose();
    terminal.map_err(|e| VerbError::Host("make the terminal raw", e))
}

fn connect_streams(streams: Streams, leave: Option<Leave>) -> Result<Vec<oneshot::Receiver<()>>> {
    let connected = stdio::connect(streams, &FirstByte::default(), None, leave);
    connected.map_err(|e| VerbError::Host("attach the standard streams", e))
}

/// Passes the user's wishes on until the process has ended; who asks for the end `enough` times gets it.
pub(crate) async fn attend(
    connection: &Connection,
    signals: &mut Signals,
    enough: u32,
) -> std::result::Result<Ended, ControlError> {
    connection.send(&Request::Wait)?;
    let mut asked_to_end = 0;
    loop {
        tokio::select! {
            ended = connection.ended() => return ended,
            wish = signals.next() => {
                asked_to_end += u32::from(wish.asks_to_end());
                let request = match wish {
                    Wish::Forward(_) if asked_to_end == enough => {
                        Some(Request::Signal { signal: Signal::KILL.number(), all: false })
                    }
                    Wish::Forward(number) => {
                        Some(Request::Signal { signal: number.unsigned_abs(), all: false })
                    }
                    Wish::Resize => terminal::size()
                        .map(|(width, height)| Request::Resize { width, height }),
                };
                // One that fails does so because the process has just ended, which the wait sees.
                let _ = request.map(|request| connection.send(&request));
            }
        }
    }
}

/// Waits until both outputs have met the end of their streams. The user may cut it short.
pub(crate) async fn drained(outputs: Vec<oneshot::Receiver<()>>, signals: &mut Signals) {
    let all = async {
        for output in outputs {
            let _ = output.await;
        }
    };
    tokio::select! {
        () = all => {}
        _ = signals.end() => {}
    }
}
