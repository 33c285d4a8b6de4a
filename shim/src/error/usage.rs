//! Command lines that are no command, in the shape of all errors.

use clap::{Command, CommandFactory, error::ErrorKind};

use super::{Phase, Report};
use crate::{cli::Cli, commands::FAILURE};

/// Prints what is wrong with a command line, or the help or version that it asks for; returns the exit code.
pub fn answer(error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        // Help and the version are "errors" that go to standard output.
        let _ = error.print();
        return 0;
    }
    let words: Vec<String> = std::env::args_os().map(|w| w.to_string_lossy().into()).collect();
    let asked = words.iter().take_while(|word| *word != "--").any(|word| word == "--json");
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand && !asked {
        let _ = error.print();
        return FAILURE;
    }
    if asked {
        crate::text::speak_json();
    }
    report(error, &words).print();
    FAILURE
}

/// clap's text has paragraphs: what is wrong, tips, the usage, where to find help.
pub(super) fn report(error: &clap::Error, words: &[String]) -> Report {
    let command = command(words);
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n").map(line);
    let message = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is missing".into(),
        _ => paragraphs.next().unwrap_or_default().trim_start_matches("error: ").to_string(),
    };
    let help = format!("see `{} --help`", ["ampoule", &command].join(" ").trim_end());
    let tips =
        paragraphs.filter_map(|text| Some(text.strip_prefix("tip: ")?.replace(" tip: ", "; ")));
    let hints: Vec<String> = tips.chain([help]).collect();
    Report {
        phase: Phase::Options,
        object: message.split(['\'', ' ']).find(|word| word.starts_with('-')).map(String::from),
        causes: vec![message.clone()],
        message,
        hint: Some(hints.join("; ")),
        console: Vec::new(),
        exit_code: FAILURE,
        command,
    }
}

fn line(paragraph: &str) -> String {
    paragraph.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The words that name commands: "image pull".
fn command(words: &[String]) -> String {
    let mut names = Vec::new();
    let mut command: Command = Cli::command();
    for word in words.iter().skip(1) {
        if let Some(found) = command.find_subcommand(word) {
            names.push(word.as_str());
            command = found.clone();
        }
        if !command.has_subcommands() {
            break;
        }
    }
    names.join(" ")
}
