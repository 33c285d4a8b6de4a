//! What the tests of `pull.rs` share: Debian's `docker-registry` on a port of its own, images to push to
//! it, and a proxy that spoils its answers.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// The one user of a registry that asks for a password.
pub const USER: &str = "user:secret";
const HTPASSWD: &str = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// How a registry is set up.
#[derive(Clone, Copy, Default)]
pub struct Setup {
    pub password: bool,
    pub tls: bool,
}

/// A real registry; gone when dropped.
pub struct Registry {
    child: Child,
    port: u16,
    folder: TempDir,
}

impl Registry {
    /// `None`, said aloud, where the packages are not installed.
    pub fn start(setup: Setup) -> Option<Self> {
        for program in ["docker-registry", "skopeo"] {
            if Command::new(program).arg("--version").output().is_err() {
                eprintln!("SKIPPED: {program} is not installed (package {program})");
                return None;
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let port = free_port();
        let mut config = json!({
            "version": "0.1", "log": { "level": "error" },
            "storage": { "filesystem": { "rootdirectory": path("data") } },
            "http": { "addr": format!("127.0.0.1:{port}"), "secret": "test" },
        });
        if setup.password {
            fs::write(path("htpasswd"), HTPASSWD).unwrap();
            config["auth"] = json!({ "htpasswd": { "realm": "test", "path": path("htpasswd") } });
        }
        if setup.tls {
            certify(folder.path());
            config["http"]["tls"] = json!({ "certificate": path("cert"), "key": path("key") });
        }
        // JSON is YAML.
        fs::write(path("config.yml"), config.to_string()).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(path("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Self { child, port, folder };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(registry)
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The certificate of the authority that vouches for it.
    pub fn authority(&self) -> PathBuf {
        self.folder.path().join("ca")
    }

    /// Puts an image there; `name` is `REPOSITORY:TAG`.
    pub fn push(&self, image: &Layout, name: &str) {
        let to = format!("docker://{}/{name}", self.host());
        let from = format!("oci:{}:x", image.path().display());
        let options = ["--insecure-policy", "copy", "--all", "--quiet", "--dest-tls-verify=false"];
        skopeo(options.iter().copied().chain(["--dest-creds", USER, &from, &to]));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn skopeo<'a>(args: impl IntoIterator<Item = &'a str>) {
    let output = Command::new("skopeo").args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// An authority (`ca`) and the certificate it gives this registry (`cert`, `key`).
fn certify(folder: &Path) {
    let new = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    for args in [
        format!("req -x509 {new} -keyout ca.key -out ca -days 2 -subj /CN=authority"),
        format!(
            "req {new} -keyout key -out csr -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
        ),
        "x509 -req -in csr -CA ca -CAkey ca.key -CAcreateserial -out cert -days 2 \
         -copy_extensions copy"
            .into(),
    ] {
        let mut openssl = Command::new("openssl");
        let made = openssl.args(args.split(' ')).current_dir(folder).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
}

/// Where nothing listens.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An OCI layout with one image, tagged `x`.
pub struct Layout {
    folder: TempDir,
    pub manifest: String,
    pub layers: Vec<String>,
}

impl Layout {
    /// Each layer is one file of so many bytes that do not compress.
    pub fn new(sizes: &[usize]) -> Self {
        Self::of(sizes.iter().enumerate().map(|(i, size)| tar(i, *size)).collect())
    }

    /// An image of these layers.
    pub fn of(tars: Vec<Vec<u8>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
        let mut layout = Self { folder, manifest: String::new(), layers: Vec::new() };
        let diff_ids: Vec<_> = tars.iter().map(|tar| digest(tar)).collect();
        let layers: Vec<_> = tars
            .iter()
            .map(|tar| layout.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip(tar)))
            .collect();
        layout.layers = layers.iter().map(|l| l["digest"].as_str().unwrap().into()).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/file-0"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config =
            layout.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": layers,
        });
        let mut manifest = layout
            .blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
        layout.manifest = manifest["digest"].as_str().unwrap().into();
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "x" });
        layout.index(&manifest);
        fs::write(layout.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        layout
    }

    /// The same image in an index, behind one for another machine.
    pub fn in_index(self) -> Self {
        let size = fs::metadata(self.blob_path(&self.manifest)).unwrap().len();
        let of = |architecture: &str| {
            json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": self.manifest,
                "size": size, "platform": { "os": "linux", "architecture": architecture },
            })
        };
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [of("s390x"), of("amd64")],
        });
        let mut index =
            self.blob("application/vnd.oci.image.index.v1+json", index.to_string().as_bytes());
        index["annotations"] = json!({ "org.opencontainers.image.ref.name": "x" });
        self.index(&index);
        self
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    fn index(&self, of: &Value) {
        let index = json!({ "schemaVersion": 2, "manifests": [of] });
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.path().join("blobs").join(digest.replace(':', "/"))
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = digest(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A tar with one file that is different for each `number`.
pub fn tar(number: usize, size: usize) -> Vec<u8> {
    let mut state = number as u64 + 1;
    let noise = std::iter::repeat_with(|| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    tar_of(&format!("file-{number}"), &noise.take(size).collect::<Vec<u8>>())
}

/// A tar with one file.
pub fn tar_of(path: &str, body: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(body.len() as u64);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, path, body).unwrap();
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// What a proxy does to an answer: the request's head and how many such there were before, the answer.
type Spoil = dyn Fn(&str, usize, Vec<u8>) -> Vec<u8> + Send + Sync;

/// Stands before a registry; one request for each connection.
pub struct Proxy {
    port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    pub fn start(
        to: &Registry,
        spoil: impl Fn(&str, usize, Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (upstream, seen, spoil) = (to.host(), requests.clone(), Arc::new(spoil));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (upstream, seen, spoil) = (upstream.clone(), seen.clone(), spoil.clone());
                std::thread::spawn(move || relay(client, &upstream, &seen, &*spoil));
            }
        });
        Self { port, requests }
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The heads of the requests for blobs so far.
    pub fn blob_requests(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|head| head.contains("/blobs/")).cloned().collect()
    }
}

fn relay(mut client: TcpStream, upstream: &str, seen: &Mutex<Vec<String>>, spoil: &Spoil) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match client.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    let mut head = String::from_utf8(head).unwrap();
    // A form is as good as a head.
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    client.read_exact(&mut body).unwrap();
    head.push_str(&String::from_utf8(body).unwrap());
    let line = |head: &str| head.lines().next().unwrap_or_default().to_string();
    let before = {
        let mut seen = seen.lock().unwrap();
        seen.push(head.clone());
        seen.iter().filter(|other| line(other) == line(&head)).count() - 1
    };
    let Ok(mut server) = TcpStream::connect(upstream) else { return };
    let request = head.replacen("\r\n", "\r\nconnection: close\r\n", 1);
    let mut answer = Vec::new();
    if server.write_all(request.as_bytes()).is_ok() && server.read_to_end(&mut answer).is_ok() {
        let _ = client.write_all(&spoil(&head, before, answer));
        let _ = client.shutdown(Shutdown::Both);
    }
}

/// Where the body of an answer begins.
pub fn body(answer: &[u8]) -> usize {
    answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4
}
