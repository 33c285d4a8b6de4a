//! Signals as users and images write them: `TERM`, `SIGTERM`, `15`, `RTMIN+3`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The guest's numbers: those of Linux on x86-64 (signal(7)).
const NAMES: [(&str, u32); 33] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];
/// The first and the last real-time signal a C library leaves to programs.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// A signal's number, 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Signal(u32);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be a signal's name as TERM or SIGTERM, or a number from 1 to {RTMAX}")]
pub struct BadSignal;

impl Signal {
    pub const TERM: Self = Self(15);
    pub const KILL: Self = Self(9);

    pub fn number(self) -> u32 {
        self.0
    }
}

impl FromStr for Signal {
    type Err = BadSignal;

    fn from_str(text: &str) -> Result<Self, BadSignal> {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let named = NAMES.iter().find(|(n, _)| *n == name).map(|(_, number)| *number);
        let number = named.or_else(|| real_time(name)).or_else(|| name.parse().ok());
        match number {
            Some(number @ 1..=RTMAX) => Ok(Self(number)),
            _ => Err(BadSignal),
        }
    }
}

fn real_time(name: &str) -> Option<u32> {
    match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(""), _) => Some(RTMIN),
        (_, Some("")) => Some(RTMAX),
        (Some(more), _) => Some(RTMIN + more.strip_prefix('+')?.parse::<u8>().map(u32::from).ok()?),
        (_, Some(less)) => {
            let less = less.strip_prefix('-')?.parse::<u32>().ok()?;
            RTMAX.checked_sub(less).filter(|number| *number >= RTMIN)
        }
        _ => None,
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None => write!(f, "{}", self.0),
        }
    }
}

impl TryFrom<String> for Signal {
    type Error = BadSignal;

    fn try_from(text: String) -> Result<Self, BadSignal> {
        text.parse()
    }
}

impl From<Signal> for String {
    fn from(signal: Signal) -> Self {
        signal.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_read_as_images_write_them() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigquit", 3),
            ("9", 9),
            ("64", 64),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            let signal: Signal = text.parse().unwrap();
            assert_eq!(signal.number(), number, "{text}");
            assert_eq!(signal.to_string().parse(), Ok(signal));
        }
        for text in ["", "0", "65", "SIG", "TERMINATE", "-9", "RTMIN+31", "RTMAX-99"] {
            assert!(text.parse::<Signal>().is_err(), "{text}");
        }
    }
}
