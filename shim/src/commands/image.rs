//! `ampoule image import` and `ampoule images`.

use std::path::Path;

use crate::{
    cli::{ImagesArgs, ImportArgs},
    image::{ImageError, Name, Reference, Store},
    paths::Paths,
};

/// Puts an image into the store and prints its digest.
pub fn import(args: &ImportArgs, paths: &Paths) -> Result<(), ImageError> {
    let store = Store::open(&paths.store)?.with_progress(|line| eprintln!("ampoule: {line}"));
    let names = args.names.iter().map(|n| n.parse()).collect::<Result<Vec<Name>, _>>()?;
    let image = store.import(&source(&args.source)?, &names)?;
    println!("{}", image.digest);
    Ok(())
}

/// A path is taken for what lies there; anything else is a reference as `run` takes it.
fn source(text: &str) -> Result<Reference, ImageError> {
    let path = Path::new(text);
    let has_prefix = ["oci:", "dir:", "tar:"].iter().any(|prefix| text.starts_with(prefix));
    Ok(match path {
        _ if has_prefix => text.parse()?,
        _ if path.join("index.json").is_file() => Reference::Oci { layout: path.into(), tag: None },
        _ if path.is_dir() => Reference::Directory(path.into()),
        _ if path.is_file() => Reference::Tar(path.into()),
        _ => text.parse()?,
    })
}

/// Prints the store's images, one a line.
pub fn list(args: &ImagesArgs, paths: &Paths) -> Result<(), ImageError> {
    let images = Store::open(&paths.store)?.list()?;
    if args.quiet {
        images.iter().for_each(|image| println!("{}", image.reference));
        return Ok(());
    }
    let width = images.iter().map(|i| i.reference.len()).max().unwrap_or(0).max("NAME".len());
    println!("{:width$}  {:14}  {:>10}", "NAME", "DIGEST", "SIZE");
    for image in images {
        let size = image.rootfs.metadata().map_or(0, |meta| meta.len());
        let digest = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
        let megabytes = size as f64 / 1e6;
        println!("{:width$}  {:14.12}  {megabytes:>7.1} MB", image.reference, digest);
    }
    Ok(())
}
