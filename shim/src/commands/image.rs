//! `ampoule image import` and `ampoule images`.

use std::path::Path;

use crate::{
    cli::{ImagesArgs, ImportArgs},
    image::{Image, ImageError, Name, Reference, Store},
    paths::Paths,
    text::{complain, print},
};

/// Puts an image into the store and prints its digest.
pub fn import(args: &ImportArgs, paths: &Paths) -> Result<(), ImageError> {
    let store = Store::open(&paths.store)?.with_progress(progress);
    let names = args.names.iter().map(|n| n.parse()).collect::<Result<Vec<Name>, _>>()?;
    let image = store.import(&source(&args.source)?, &names)?;
    print(&format!("{}\n", image.digest));
    Ok(())
}

/// Says what takes long.
pub(super) fn progress(line: &str) {
    complain(&format!("ampoule: {line}\n"));
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
    let width = images.iter().map(|i| i.reference.len()).max().unwrap_or(0).max("NAME".len());
    let mut out = String::new();
    if !args.quiet {
        out += &format!("{:width$}  {:14}  {:>10}\n", "NAME", "DIGEST", "SIZE");
    }
    for image in &images {
        out += &if args.quiet { format!("{}\n", image.reference) } else { line(image, width) };
    }
    print(&out);
    Ok(())
}

fn line(image: &Image, width: usize) -> String {
    let digest = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
    let megabytes = image.rootfs.metadata().map_or(0, |meta| meta.len()) as f64 / 1e6;
    format!("{:width$}  {digest:14.12}  {megabytes:>7.1} MB\n", image.reference)
}
