//! What the tests of this module share: archives, layouts, and a look at what a kernel makes of an image.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::{Value, json};
use tar::{EntryType, Header};
use tempfile::TempDir;

use super::{Store, digest::Digest};

/// A store in a folder of its own; what else a test needs is put beside it.
pub struct Bench {
    pub directory: TempDir,
    pub store: Store,
}

impl Bench {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        Self { directory, store }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Kills a dozen processes, each a little later than the one before. After each, every file of `folder` is looked at.
pub fn killed_at_any_moment(
    folder: &Path,
    mut spawn: impl FnMut() -> Child,
    whole: impl Fn(&Path),
) {
    let mut killed = 0;
    for round in 0..12 {
        let mut child = spawn();
        std::thread::sleep(Duration::from_millis(5 + round * 15));
        killed += u32::from(child.try_wait().unwrap().is_none());
        let _ = child.kill();
        child.wait().unwrap();
        for file in fs::read_dir(folder).into_iter().flatten() {
            whole(&file.unwrap().path());
        }
    }
    assert!(killed > 0, "each was done before it could be killed");
}

/// A tar under construction, entry by entry and unchecked.
#[derive(Default, Clone)]
pub struct Tar(Vec<u8>);

impl Tar {
    pub fn entry(mut self, kind: EntryType, path: &str, link: &str, body: &[u8]) -> Self {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..][..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(body.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(body);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, path: &str, body: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Regular, path, "", body.as_ref())
    }

    pub fn directory(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, "", b"")
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, target, b"")
    }

    pub fn link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, target, b"")
    }

    /// A pax header for the entry that follows.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (rest + 1..).find(|length| *length == rest + length.to_string().len());
            body.extend(format!("{} {key}=", length.unwrap()).bytes());
            body.extend(*value);
            body.push(b'\n');
        }
        self.entry(EntryType::XHeader, "pax", "", &body)
    }

    /// Without an end mark.
    pub fn cut(self) -> Vec<u8> {
        self.0
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// An OCI layout under construction in a directory of its own.
pub struct TestLayout {
    directory: TempDir,
    pub manifests: Vec<Value>,
}

pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

impl TestLayout {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        fs::write(directory.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .unwrap();
        Self { directory, manifests: Vec::new() }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn blob_path(&self, descriptor: &Value) -> PathBuf {
        let digest: Digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
        self.path().join("blobs/sha256").join(digest.hex())
    }

    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.path().join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() })
    }

    pub fn config(&self, architecture: &str, diff_ids: &[Digest], config: Value) -> Value {
        let ids: Vec<String> = diff_ids.iter().map(Digest::to_string).collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": ids },
        });
        self.blob(CONFIG, config.to_string().as_bytes())
    }

    pub fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
        });
        self.blob(MANIFEST, manifest.to_string().as_bytes())
    }

    pub fn index(&self, manifests: &[Value]) -> Value {
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
        self.blob(INDEX, index.to_string().as_bytes())
    }

    /// An amd64 image of these tars, as they are.
    pub fn image(&self, layers: &[Vec<u8>]) -> Value {
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let layers: Vec<Value> = layers.iter().map(|layer| self.blob(LAYER, layer)).collect();
        let config = self.config("amd64", &diff_ids, json!({ "Cmd": ["/hello"], "Env": ["A=b"] }));
        self.manifest(&config, &layers)
    }

    pub fn tag(mut self, mut descriptor: Value, tag: &str) -> Self {
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        self.manifests.push(descriptor);
        self.write();
        self
    }

    pub fn write(&self) {
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }
}

/// An image as the kernel shows it.
pub struct Mounted(TempDir);

impl Mounted {
    /// `None`, said aloud, where tests may not mount.
    pub fn new(image: &Path) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "erofs", "-o", "loop,ro"]).arg(image).arg(directory.path());
        let output = mount.output();
        match output {
            Ok(output) if output.status.success() => Some(Self(directory)),
            Ok(output)
                if rustix::process::geteuid().is_root() && Path::new("/dev/loop0").exists() =>
            {
                panic!("{}", String::from_utf8_lossy(&output.stderr));
            }
            _ => {
                eprintln!("SKIPPED: mounting an image needs root and loop devices");
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Another test may have forked while a file here was open.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// All that is to be seen of one file.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    links: u64,
    device: u64,
    /// The first path, in order, of the same inode.
    first: PathBuf,
    pub content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Seen {
    /// Leaves out which names share an inode.
    pub fn forget_links(&mut self) {
        (self.links, self.first) = (0, PathBuf::new());
    }
}

/// All files below `root` by their paths. A directory's link count is left out: file systems differ.
pub fn look(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    look_into(root, Path::new(""), &mut inodes, &mut seen);
    seen
}

fn look_into(
    root: &Path,
    path: &Path,
    inodes: &mut BTreeMap<u64, PathBuf>,
    seen: &mut BTreeMap<PathBuf, Seen>,
) {
    let full = root.join(path);
    let meta = fs::symlink_metadata(&full).unwrap();
    let content = match meta.file_type() {
        kind if kind.is_file() => fs::read(&full).unwrap(),
        kind if kind.is_symlink() => fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec(),
        _ => Vec::new(),
    };
    let first = inodes.entry(meta.ino()).or_insert_with(|| path.into()).clone();
    let one = Seen {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        links: if meta.is_dir() { 0 } else { meta.nlink() },
        device: meta.rdev(),
        first,
        content,
        xattrs: xattrs(&full),
    };
    seen.insert(path.into(), one);
    if meta.is_dir() {
        let mut names: Vec<_> =
            fs::read_dir(&full).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names.iter().for_each(|name| look_into(root, &path.join(name), inodes, seen));
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap_or(0);
    let names = list[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 65536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

/// Whether `fsck.erofs` accepts an image; said aloud where it is not installed.
pub fn fsck(image: &Path) {
    match Command::new("fsck.erofs").arg(image).output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
        }
        Err(_) => eprintln!("SKIPPED: fsck.erofs is not installed (package erofs-utils)"),
    }
}

/// A file that holds these bytes and has no name.
pub fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file
}
