//! `ampoule inspect`.

use serde_json::Value;

use super::{ps::as_json, verb};
use crate::{cli::NamesArgs, paths::Paths, registry::Registry, text::print};

/// Prints the records as one JSON array, as docker does.
pub fn inspect(args: &NamesArgs, paths: &Paths) -> u8 {
    verb::run("inspect", async {
        let registry = Registry::new(&paths.state);
        let mut all = Vec::new();
        for name in &args.names {
            all.push(as_json(&registry.find(name)?));
        }
        print(&format!("{:#}\n", Value::from(all)));
        Ok(0)
    })
}
