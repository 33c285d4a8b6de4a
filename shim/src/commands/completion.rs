//! `ampoule completion`.

use clap::CommandFactory;

use crate::{
    cli::{Cli, CompletionArgs},
    text::print,
};

pub fn completion(args: &CompletionArgs) -> u8 {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ampoule", &mut script);
    print(&String::from_utf8_lossy(&script));
    0
}
