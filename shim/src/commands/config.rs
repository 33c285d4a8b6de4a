//! `ampoule config`: the configuration, as TOML with the origin of each setting beside it.

use crate::{
    cli::ConfigArgs,
    config::{ConfigError, Layers},
    paths::Paths,
    text::print,
};

pub fn config(args: &ConfigArgs, paths: &Paths) -> Result<(), ConfigError> {
    let layers = Layers::read(&paths.config)?;
    if args.effective {
        print(&layers.effective());
        return Ok(());
    }
    for path in &paths.config {
        let there = if path.exists() { "" } else { ", which is not there" };
        print(&format!("# {}{there}\n", path.display()));
    }
    print(&layers.said());
    Ok(())
}
