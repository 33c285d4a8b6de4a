//! The user's terminal: raw while a workload has it, and given back on every way out.
//!
//! The settings to go back to are in one place, [`SAVED`]: dropping a [`RawTerminal`] restores them, and so
//! does the panic hook, because a panic ends this program without unwinding. Signals that would end it are
//! caught while a workload runs, so they take the first way; for SIGKILL there is none.

use std::{
    io,
    sync::{Mutex, Once, PoisonError},
};

use rustix::{
    stdio::{stdin, stdout},
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr},
};

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// Our standard input in raw mode, until dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// # Errors
    /// If standard input is no terminal.
    pub fn enter() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        HOOK.call_once(|| {
            let print = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                print(panic);
            }));
        });
        let terminal = Self(());
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(terminal)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // Not waiting for the lock: a panic may have come while it was held, and then nothing is changed yet.
    if let Some(before) = SAVED.try_lock().ok().and_then(|mut saved| saved.take()) {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

/// Whether our standard input is a terminal.
pub fn is_terminal() -> bool {
    isatty(stdin())
}

/// Width and height in characters, of the terminal on standard output or else on standard input.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdout()).or_else(|_| tcgetwinsize(stdin())).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}
