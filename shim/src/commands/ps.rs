//! `ampoule ps`.

use std::time::Duration;

use serde_json::{Value, json};

use super::verb;
use crate::{
    cli::PsArgs,
    paths::Paths,
    registry::{Found, Registry, Status},
    text::{is_json, one_line, print},
};

const INTERVAL: Duration = Duration::from_secs(1);
/// Clears the screen and goes to its top.
const CLEAR: &str = "\x1b[H\x1b[2J";
/// Longest command that is shown whole, in characters.
const COMMAND: usize = 30;

pub fn ps(args: &PsArgs, paths: &Paths) -> u8 {
    verb::run("ps", async {
        let registry = Registry::new(&paths.state);
        loop {
            let mut all = registry.list()?;
            all.retain(|found| wanted(args, found));
            let text = show(args, &all);
            if !args.watch {
                print(&text);
                return Ok(0);
            }
            print(&format!("{}{text}", if is_json() { "" } else { CLEAR }));
            tokio::time::sleep(INTERVAL).await;
        }
    })
}

fn wanted(args: &PsArgs, found: &Found) -> bool {
    let labelled = args.label.iter().all(|label| match label.split_once('=') {
        Some((key, value)) => found.record.labels.get(key).is_some_and(|v| v == value),
        None => found.record.labels.contains_key(label),
    });
    labelled && (args.all || found.is_alive())
}

fn show(args: &PsArgs, all: &[Found]) -> String {
    if is_json() {
        return format!("{}\n", Value::from_iter(all.iter().map(as_json)));
    }
    if args.quiet {
        return all.iter().map(|found| format!("{}\n", found.name)).collect();
    }
    let mut rows = vec![["NAME", "IMAGE", "COMMAND", "CREATED", "STATUS"].map(String::from)];
    rows.extend(all.iter().map(|found| {
        [
            found.name.to_string(),
            one_line(&found.record.image, 40),
            one_line(&found.record.command.join(" "), COMMAND),
            format!("{} ago", span(found.record.created.age())),
            status(found),
        ]
    }));
    table(&rows)
}

/// A record with the status beside it.
pub(super) fn as_json(found: &Found) -> Value {
    let mut value = json!(found.record);
    value["status"] = found.status.to_string().into();
    value
}

fn status(found: &Found) -> String {
    match (found.status, &found.record.started, &found.record.ended) {
        (Status::Running, Some(started), _) => format!("up {}", span(started.age())),
        (Status::Exited, _, Some(ended)) => {
            let oom = if ended.oom { ", out of memory" } else { "" };
            format!("exited ({}{oom}) {} ago", ended.code, span(ended.at.age()))
        }
        (Status::Created, ..) => "booting".into(),
        (other, ..) => other.to_string(),
    }
}

/// A time span in its largest unit.
fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Aligned columns; the last is as wide as it is.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_given_in_its_largest_unit() {
        for (seconds, text) in
            [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_800, "2 d")]
        {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["A", "B"], ["long", "x"]].map(|row| row.map(String::from));
        assert_eq!(table(&rows), "A     B\nlong  x\n");
    }
}
