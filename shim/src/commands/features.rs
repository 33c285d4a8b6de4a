//! `ampoule features`.

use crate::{cli::FeaturesArgs, features, spec, text::print};

/// Prints what of the OCI runtime specification is enforced.
pub fn features(args: &FeaturesArgs) -> u8 {
    match args.table {
        true => print(&spec::page()),
        false => print(&format!("{:#}\n", features::features())),
    }
    0
}
