//! Text that came from a guest, made safe for a terminal, and short; and text for the user, or for a program.

use std::{
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
};

/// Whether the command line has `--json`.
static JSON: AtomicBool = AtomicBool::new(false);

/// From now on this program speaks to a machine.
pub fn speak_json() {
    JSON.store(true, Ordering::Relaxed);
}

pub fn is_json() -> bool {
    JSON.load(Ordering::Relaxed)
}

/// Tells people on standard error what goes on.
pub fn remark(text: &str) {
    if !is_json() {
        complain(&format!("ampoule: {text}\n"));
    }
}

/// Prints to standard output. A reader that has gone is no error of ours.
pub fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints to standard error, likewise.
pub fn complain(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Makes bytes of a guest printable: control characters (but for tab) and characters that reorder text become
/// `\x1b`-like escapes, bytes that are no UTF-8 become U+FFFD. Line ends stay.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for c in String::from_utf8_lossy(bytes).chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if c.is_control() || reorders(c) => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// The same on one line of at most `most` characters.
pub fn one_line(text: &str, most: usize) -> String {
    let line = escape(text.trim().as_bytes()).replace('\n', "; ");
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// The last lines of a console, escaped, without empty ones and carriage returns.
pub fn last_lines(console: &[u8], most: usize) -> Vec<String> {
    let text = String::from_utf8_lossy(console);
    let lines = text.split(['\n', '\r']).map(str::trim_end).filter(|l| !l.is_empty());
    let lines: Vec<String> = lines.map(|l| one_line(l, 200)).collect();
    lines[lines.len().saturating_sub(most)..].to_vec()
}

/// Bidirectional controls, which can make a message read differently from what it says (Unicode TR 36).
fn reorders(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_cannot_drive_the_terminal() {
        for (bytes, shown) in [
            (&b"plain \xc3\xa9\ttext\n"[..], "plain é\ttext\n"),
            (b"\x1b[2J\x07", "\\u{1b}[2J\\u{7}"),
            (b"\xff\xfe", "\u{fffd}\u{fffd}"),
            ("\u{202e}evil\u{9b}1m".as_bytes(), "\\u{202e}evil\\u{9b}1m"),
        ] {
            assert_eq!(escape(bytes), shown);
        }
    }

    #[test]
    fn one_line_is_one_line_and_short() {
        assert_eq!(one_line(" a\nb\r ", 10), "a; b");
        assert_eq!(one_line("ééééé", 3), "ééé…");
        assert_eq!(one_line("abc", 3), "abc");
    }

    #[test]
    fn the_last_lines_are_whole_and_without_blanks() {
        let console = b"one\r\n\r\ntwo  \r\nthree\r\n\n";
        assert_eq!(last_lines(console, 2), ["two", "three"]);
        assert_eq!(last_lines(console, 9), ["one", "two", "three"]);
        assert!(last_lines(b"", 9).is_empty());
    }
}
