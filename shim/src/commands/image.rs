//! `ampoule image …` and `ampoule images`.

use std::io;
use std::path::Path;

use crate::{
    cli::{ImageNamesArgs, ImagesArgs, ImportArgs, PruneArgs, Pull, PullArgs},
    config::Config,
    image::{Image, ImageError, Name, Reference, Registries, Store},
    paths::Paths,
    text::{complain, print},
};

/// Pulls an image and prints its digest.
pub fn pull(args: &PullArgs, paths: &Paths) -> Result<(), ImageError> {
    let image = fetch(&open(paths)?, &args.name.parse()?, paths)?;
    print(&format!("{}\n", image.digest));
    Ok(())
}

/// The image that a reference means, pulled first if it must be.
pub(super) fn obtain(text: &str, pull: Pull, paths: &Paths) -> Result<Image, ImageError> {
    let (store, reference) = (open(paths)?, text.parse()?);
    match (&reference, pull) {
        (Reference::Name(name), Pull::Always) => fetch(&store, name, paths),
        (Reference::Name(name), Pull::Missing) => match store.resolve(&reference) {
            Err(ImageError::Unknown { .. }) => fetch(&store, name, paths),
            resolved => resolved,
        },
        _ => store.resolve(&reference),
    }
}

fn fetch(store: &Store, name: &Name, paths: &Paths) -> Result<Image, ImageError> {
    let config = Config::load(&paths.config)?;
    store.pull(name, &Registries { config, credentials: paths.credentials.clone() })
}

/// Puts an image into the store and prints its digest.
pub fn import(args: &ImportArgs, paths: &Paths) -> Result<(), ImageError> {
    let store = open(paths)?;
    let names = parse(&args.names)?;
    let image = match args.source.as_str() {
        "-" => store.import_stream(&mut io::stdin().lock(), &names)?,
        source => store.import(&find(source)?, &names)?,
    };
    print(&format!("{}\n", image.digest));
    Ok(())
}

/// Prints images as a JSON list.
pub fn inspect(args: &ImageNamesArgs, paths: &Paths) -> Result<(), ImageError> {
    let store = open(paths)?;
    let load = |name: Name| store.resolve(&Reference::Name(name));
    let images = parse(&args.names)?.into_iter().map(load).collect::<Result<Vec<_>, _>>()?;
    let object = || args.names.join(" ");
    let text = serde_json::to_string_pretty(&images)
        .map_err(|source| ImageError::Json { object: object(), source })?;
    print(&format!("{text}\n"));
    Ok(())
}

/// Forgets names.
pub fn remove(args: &ImageNamesArgs, paths: &Paths) -> Result<(), ImageError> {
    let store = open(paths)?;
    parse(&args.names)?.iter().try_for_each(|name| store.remove(name))
}

/// Removes what is not needed, and says how much that was.
pub fn prune(args: &PruneArgs, paths: &Paths) -> Result<(), ImageError> {
    let store = open(paths)?;
    let freed = store.shrink_snapshots(0)?;
    let freed = freed
        + match args.keep_size {
            Some(size) => store.shrink(size.0)?,
            None => store.prune(std::time::Duration::ZERO)?,
        };
    print(&format!("{:.1} MB freed\n", freed as f64 / 1e6));
    Ok(())
}

fn open(paths: &Paths) -> Result<Store, ImageError> {
    Ok(Store::open(&paths.store)?.with_progress(progress))
}

fn parse(names: &[String]) -> Result<Vec<Name>, ImageError> {
    Ok(names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?)
}

/// Says what takes long.
fn progress(line: &str) {
    complain(&format!("ampoule: {line}\n"));
}

/// A path is taken for what lies there; anything else is a reference as `run` takes it.
fn find(text: &str) -> Result<Reference, ImageError> {
    let path = Path::new(text);
    let has_prefix =
        ["oci:", "dir:", "tar:", "docker-archive:"].iter().any(|prefix| text.starts_with(prefix));
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
