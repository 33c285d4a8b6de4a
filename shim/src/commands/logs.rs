//! `ampoule logs`.

use std::{
    collections::VecDeque,
    io::{self, Write},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{self, CreateFlags, WatchFlags},
};

use super::verb::{self, VerbError};
use crate::{
    cli::LogsArgs,
    log::{Entry, Reader, Source},
    paths::Paths,
    registry::{Found, Registry},
};

/// How often to look whether a sandbox still lives whose folder stays as it is.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

pub fn logs(args: &LogsArgs, paths: &Paths) -> u8 {
    verb::run("logs", async {
        let registry = Registry::new(&paths.state);
        let found = registry.find(&args.name)?;
        if !found.record.detached {
            let why = "it runs in the foreground: its output went to its `ampoule run`";
            let hint = "`ampoule run -d` keeps a log";
            return Err(VerbError::Refused { name: found.name, why, hint });
        }
        match copy(args, &registry, &found) {
            // Whoever read it has read enough.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
            Err(e) => Err(VerbError::Host("read the log", e)),
            Ok(()) => Ok(0),
        }
    })
}

fn copy(args: &LogsArgs, registry: &Registry, found: &Found) -> io::Result<()> {
    let changes = args.follow.then(|| watch(&found.folder)).transpose()?;
    let mut reader = Reader::new(&found.folder);
    let mut printer = Printer { timestamps: args.timestamps, in_line: false };
    let mut last = VecDeque::new();
    while let Some(entry) = reader.read()? {
        last.push_back(entry);
        match args.tail {
            Some(most) if last.len() > most => drop(last.pop_front()),
            Some(_) => {}
            None => last.drain(..).try_for_each(|entry| printer.print(&entry))?,
        }
    }
    last.drain(..).try_for_each(|entry| printer.print(&entry))?;
    let Some(changes) = changes else { return Ok(()) };
    loop {
        // Asked before the log is read: what was written last is not missed.
        let alive = registry
            .find(found.name.as_str())
            .is_ok_and(|now| now.is_alive() && now.record.created == found.record.created);
        while let Some(entry) = reader.read()? {
            printer.print(&entry)?;
        }
        if !alive {
            return Ok(());
        }
        wait(&changes)?;
    }
}

fn watch(folder: &Path) -> io::Result<OwnedFd> {
    let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let flags = WatchFlags::MODIFY | WatchFlags::MOVED_TO | WatchFlags::DELETE_SELF;
    inotify::add_watch(&changes, folder, flags)?;
    Ok(changes)
}

/// Until the folder changes; what changed is found out by looking.
fn wait(changes: &OwnedFd) -> io::Result<()> {
    poll(&mut [PollFd::new(changes, PollFlags::IN)], Some(&LOOK))?;
    let mut space = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(changes, &mut space);
    while events.next().is_ok() {}
    Ok(())
}

struct Printer {
    timestamps: bool,
    /// The last entry had no line end.
    in_line: bool,
}

impl Printer {
    fn print(&mut self, entry: &Entry) -> io::Result<()> {
        let mut out: Box<dyn Write> = match entry.source {
            Source::Stdout => Box::new(io::stdout().lock()),
            Source::Stderr => Box::new(io::stderr().lock()),
        };
        if self.timestamps && !self.in_line {
            write!(out, "{} ", entry.at)?;
        }
        self.in_line = !entry.bytes.ends_with(b"\n");
        out.write_all(&entry.bytes)?;
        out.flush()
    }
}
