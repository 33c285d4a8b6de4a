//! `ampoule image …` against a real registry, and against one that cuts and lies.

#![allow(clippy::unwrap_used)]

mod registry;
mod user;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use registry::{Layout, Proxy, Registry, Setup, body, digest, free_port, skopeo, tar, tar_of};
use user::{User, stderr, with_descriptors};

const PLAIN: Setup = Setup { password: false, tls: false };

/// A registry with this image as `test/image:1`.
fn registry_with(image: &Layout) -> Option<Registry> {
    let registry = Registry::start(PLAIN)?;
    registry.push(image, "test/image:1");
    Some(registry)
}

fn is_blob(head: &str, digest: &str) -> bool {
    head.starts_with("GET ") && head.contains(&format!("/blobs/{digest}"))
}

#[test]
fn an_image_is_pulled_listed_inspected_and_removed() {
    let image = Layout::new(&[5000, 200_000]);
    let Some(registry) = registry_with(&image) else { return };
    let proxy = Proxy::start(&registry, |_, _, answer| answer);
    let (user, name) = (User::new(), format!("{}/test/image:1", proxy.host()));
    assert_eq!(user.ok(&["image", "pull", &name]), format!("{}\n", image.manifest));
    assert_eq!(user.ok(&["images", "-q"]), format!("{name}\n"));
    let inspected: serde_json::Value =
        serde_json::from_str(&user.ok(&["image", "inspect", &name])).unwrap();
    assert_eq!(inspected[0]["digest"], image.manifest);
    assert_eq!(inspected[0]["config"]["cmd"][0], "/file-0");
    let before = proxy.blob_requests().len();
    assert_eq!(before, 3, "the config and two layers");
    user.ok(&["image", "pull", &name]);
    assert_eq!(proxy.blob_requests().len(), before, "nothing is fetched twice");
    let by_digest = format!("{}/test/image@{}", proxy.host(), image.manifest);
    user.ok(&["image", "pull", &by_digest]);
    assert_eq!(proxy.blob_requests().len(), before);
    user.ok(&["image", "rm", &name, &by_digest]);
    assert!(user.ok(&["image", "prune"]).ends_with("MB freed\n"));
    assert_eq!(["rootfs", "blobs/sha256", "partial", "tmp"].map(|part| user.count(part)), [0; 4]);
    assert!(user.error(&["image", "inspect", &name]).contains("no image"));
}

#[test]
fn an_index_leads_to_this_machine() {
    let image = Layout::new(&[5000]).in_index();
    let Some(registry) = registry_with(&image) else { return };
    let user = User::new();
    let name = format!("{}/test/image:1", registry.host());
    assert_eq!(user.ok(&["image", "pull", &name]), format!("{}\n", image.manifest));
}

#[test]
fn a_cut_layer_goes_on_where_it_was() {
    let image = Layout::new(&[900_000]);
    let Some(registry) = registry_with(&image) else { return };
    let layer = image.layers[0].clone();
    let proxy = Proxy::start(&registry, move |head, before, mut answer| {
        if is_blob(head, &layer) && before < 2 {
            answer.truncate(body(&answer) + 300_000);
        }
        answer
    });
    let user = User::new();
    let name = format!("{}/test/image:1", proxy.host());
    let output = user.command(&["image", "pull", &name]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("trying again"), "{}", stderr(&output));
    let asked = |from: usize| {
        proxy.blob_requests().iter().any(|head| head.contains(&format!("range: bytes={from}-")))
    };
    assert!(asked(300_000) && asked(600_000), "{:?}", proxy.blob_requests());
}

#[test]
fn a_pull_that_failed_is_gone_on_with_by_the_next() {
    let image = Layout::new(&[900_000]);
    let Some(registry) = registry_with(&image) else { return };
    let layer = image.layers[0].clone();
    let proxy = Proxy::start(&registry, move |head, _, mut answer| {
        if is_blob(head, &layer) && answer.len() > 100_000 {
            answer.truncate(body(&answer) + 50_000);
        }
        answer
    });
    let user = User::new();
    let began = Instant::now();
    let text = user.error(&["image", "pull", &format!("{}/test/image:1", proxy.host())]);
    assert!(text.contains("test/image:1` cannot be pulled"), "{text}");
    assert!(text.contains("cut"), "{text}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!((user.count("partial"), user.count("rootfs")), (1, 0));
    // Blobs have no registry: what the one gave serves the other.
    let honest = Proxy::start(&registry, |_, _, answer| answer);
    user.ok(&["image", "pull", &format!("{}/test/image:1", honest.host())]);
    let ranges = honest.blob_requests();
    assert!(ranges.iter().any(|head| head.contains("range: bytes=250000-")), "{ranges:?}");
}

#[test]
fn what_an_earlier_pull_left_is_not_believed() {
    let image = Layout::new(&[100_000, 100_000, 100_000]);
    let Some(registry) = registry_with(&image) else { return };
    let user = User::new();
    user.ok(&["images"]);
    for (layer, noise) in image.layers.iter().zip([50_000, 100_500, 300_000]) {
        let path = user.path("store/partial").join(layer.replace("sha256:", ""));
        fs::write(path, vec![7; noise]).unwrap();
    }
    user.ok(&["image", "pull", &format!("{}/test/image:1", registry.host())]);
    assert_eq!(["rootfs", "partial"].map(|part| user.count(part)), [1, 0]);
}

#[test]
fn a_lie_is_found_out_and_not_kept() {
    let image = Layout::new(&[100_000]);
    let Some(registry) = registry_with(&image) else { return };
    let layer = image.layers[0].clone();
    let proxy = Proxy::start(&registry, move |head, _, mut answer| {
        if is_blob(head, &layer) {
            let last = answer.len() - 1;
            answer[last] ^= 1;
        }
        answer
    });
    let user = User::new();
    let text = user.error(&["image", "pull", &format!("{}/test/image:1", proxy.host())]);
    assert!(text.contains(&image.layers[0]) && text.contains("corrupt"), "{text}");
    assert!(text.contains(&format!("what {} gives as", proxy.host())), "{text}");
    assert_eq!((user.count("partial"), user.count("rootfs")), (0, 0));
    user.ok(&["image", "pull", &format!("{}/test/image:1", registry.host())]);
}

#[test]
fn a_manifest_that_is_another_is_refused() {
    let image = Layout::new(&[5000]);
    let Some(registry) = registry_with(&image) else { return };
    let proxy = Proxy::start(&registry, |head, _, answer| match head.contains("/manifests/") {
        // Without the digest that the library would compare with; the body is one byte longer.
        true => {
            let text = String::from_utf8(answer).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            let kept = head.lines().filter(|line| {
                let line = line.to_ascii_lowercase();
                !line.starts_with("docker-content-digest") && !line.starts_with("content-length")
            });
            format!("{}\r\n\r\n{body} ", kept.collect::<Vec<_>>().join("\r\n")).into_bytes()
        }
        false => answer,
    });
    let name = format!("{}/test/image@{}", proxy.host(), image.manifest);
    let text = User::new().error(&["image", "pull", &name]);
    assert!(text.contains(&image.manifest) && text.contains("digest"), "{text}");
}

#[test]
fn an_answer_without_end_is_not_taken_into_memory() {
    let Some(registry) = Registry::start(PLAIN) else { return };
    let proxy = Proxy::start(&registry, |head, _, answer| match head.contains("/manifests/") {
        true => {
            let mut endless = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
            endless.resize(400 << 20, b' ');
            endless
        }
        false => answer,
    });
    let text = User::new().error(&["image", "pull", &format!("{}/test/image:1", proxy.host())]);
    assert!(text.contains("without end"), "{text}");
}

#[test]
fn a_truncated_layer_is_told() {
    let image = Layout::new(&[100_000]);
    let Some(registry) = registry_with(&image) else { return };
    let layer = image.layers[0].clone();
    // The answer is whole by itself, but shorter than the manifest says.
    let proxy = Proxy::start(&registry, move |head, _, answer| match is_blob(head, &layer) {
        true => b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n0123456789".to_vec(),
        false => answer,
    });
    let text = User::new().error(&["image", "pull", &format!("{}/test/image:1", proxy.host())]);
    let cut = format!("{} was cut off by {} at byte 10 of", image.layers[0], proxy.host());
    assert!(text.contains(&cut), "{text}");
}

#[test]
fn what_is_not_there_is_told_at_once() {
    let image = Layout::new(&[5000]);
    let Some(registry) = registry_with(&image) else { return };
    let user = User::new();
    let nowhere = format!("127.0.0.1:{}", free_port());
    for (name, part) in [
        (format!("{}/test/image:2", registry.host()), "no such image"),
        (format!("{}/other", registry.host()), "no such image"),
        (format!("{nowhere}/test/image:1"), "cannot be reached"),
    ] {
        for args in [&["image", "pull", &name][..], &["run", &name, "true"]] {
            let began = Instant::now();
            let text = user.error(args);
            assert!(text.contains(&name) && text.contains(part), "{text}");
            assert!(began.elapsed() < Duration::from_secs(2), "{:?}: {text}", began.elapsed());
        }
    }
    let text = user.error(&["run", "--pull", "never", &format!("{nowhere}/x"), "true"]);
    assert!(text.contains("ampoule image pull") && text.contains("ampoule image import"), "{text}");
    let text = user.error(&["run", &format!("{nowhere}/x"), "true"]);
    assert!(text.contains("ampoule image import"), "{text}");
}

#[test]
fn credentials_are_dockers() {
    let Some(registry) = Registry::start(Setup { password: true, ..PLAIN }) else { return };
    registry.push(&Layout::new(&[5000]), "test/image:1");
    let (user, host) = (User::new(), registry.host());
    let name = format!("{host}/test/image:1");
    let text = user.error(&["image", "pull", &name]);
    assert!(text.contains(&format!("docker login {host}")), "{text}");
    // base64 of user:secret, and of user:wrong.
    let auths = |auth: &str| format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#);
    user.write(".docker/config.json", &auths("dXNlcjp3cm9uZw=="));
    user.error(&["image", "pull", &name]);
    user.write(".docker/config.json", &auths("dXNlcjpzZWNyZXQ="));
    user.ok(&["image", "pull", &name]);

    let mut other = User::new();
    let script = "#!/bin/sh\nread host\necho '{\"Username\":\"user\",\"Secret\":\"secret\"}'\n";
    let helper = other.write("bin/docker-credential-test", script);
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let helpers = format!(r#"{{"credHelpers":{{"{host}":"test"}}}}"#);
    let file = other.write("auth.json", &helpers);
    let path = format!("{}:/usr/bin:/bin", other.path("bin").display());
    other.environment = vec![("REGISTRY_AUTH_FILE", file), ("PATH", path.into())];
    other.ok(&["image", "pull", &name]);

    let helpers = format!(r#"{{"credHelpers":{{"{host}":"missing"}}}}"#);
    other.write("auth.json", &helpers);
    let text = other.error(&["image", "pull", &name]);
    assert!(text.contains("auth.json") && text.contains("helper"), "{text}");
}

/// A registry that wants a token, which `token` gives for a request: its status and its body.
fn with_token(
    registry: &Registry,
    token: impl Fn(&str) -> (&'static str, &'static str) + Send + Sync + 'static,
) -> Proxy {
    Proxy::start(registry, move |request, _, answer| {
        let lower = request.to_ascii_lowercase();
        let host = lower.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
        let asks = request.lines().next().unwrap().contains(" /token");
        let (headers, (status, body)) = if asks {
            (String::new(), token(request))
        } else if !lower.contains("authorization: bearer t0k") {
            let realm = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
            (format!("www-authenticate: {realm}\r\n"), ("401 Unauthorized", ""))
        } else {
            return answer;
        };
        let length = body.len();
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\n\r\n{body}").into()
    })
}

/// As Azure's registry: what `docker login` has left is exchanged for the right to pull.
#[test]
fn an_identity_token_is_exchanged() {
    let image = Layout::new(&[5000]);
    let Some(registry) = registry_with(&image) else { return };
    let proxy = with_token(&registry, |request| {
        let form =
            ["grant_type=refresh_token", "refresh_token=1d", "service=s", "test%2Fimage%3Apull"];
        match request.starts_with("POST ") && form.iter().all(|part| request.contains(part)) {
            true => ("200 OK", r#"{"access_token":"t0k"}"#),
            false => ("401 Unauthorized", "expired"),
        }
    });
    let (user, host) = (User::new(), proxy.host());
    let name = format!("{host}/test/image:1");
    let auths = |token: &str| {
        let auth = "MDAwOg==";
        format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}","identitytoken":"{token}"}}}}}}"#)
    };
    user.write(".docker/config.json", &auths("old"));
    let text = user.error(&["image", "pull", &name]);
    assert!(text.contains("docker login") && text.contains("expired"), "{text}");
    user.write(".docker/config.json", &auths("1d"));
    assert_eq!(user.ok(&["image", "pull", &name]), format!("{}\n", image.manifest));
}

/// As the registry of docker.io: it wants a token, which another server gives for a name and a password.
#[test]
fn a_token_is_asked_for_and_shown() {
    let image = Layout::new(&[5000]);
    let Some(registry) = registry_with(&image) else { return };
    let proxy = with_token(&registry, |request| {
        let scoped = request.contains("scope=repository%3Atest%2Fimage%3Apull");
        match request.contains("Basic dXNlcjpzZWNyZXQ=") && scoped {
            true => ("200 OK", r#"{"token":"t0k"}"#),
            false => ("401 Unauthorized", "who are you?"),
        }
    });
    let (user, host) = (User::new(), proxy.host());
    let name = format!("{host}/test/image:1");
    let text = user.error(&["image", "pull", &name]);
    assert!(text.contains("docker login") && text.contains("who are you?"), "{text}");
    let auths = format!(r#"{{"auths":{{"{host}":{{"auth":"dXNlcjpzZWNyZXQ="}}}}}}"#);
    user.write(".docker/config.json", &auths);
    assert_eq!(user.ok(&["image", "pull", &name]), format!("{}\n", image.manifest));
}

#[test]
fn mirrors_are_asked_first_and_passed_over() {
    let image = Layout::new(&[5000]);
    let Some(registry) = registry_with(&image) else { return };
    let user = User::new();
    let dead = format!("127.0.0.1:{}", free_port());
    let mirrors = format!("mirrors = ['{dead}', '{}']", registry.host());
    user.write(".config/ampoule/config.toml", &format!("[registries.'docker.io']\n{mirrors}\n"));
    let output = user.command(&["image", "pull", "test/image:1"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let said = format!("the mirror {dead} is passed over");
    assert!(stderr(&output).contains(&said), "{}", stderr(&output));
    assert_eq!(user.ok(&["images", "-q"]), "docker.io/test/image:1\n");
    user.write(".config/ampoule/config.toml", "[registries.'docker.io']\nmirror = []\n");
    let text = user.error(&["image", "pull", "test/image:1"]);
    assert!(text.contains("config.toml is wrong in line 2") && text.contains("mirror"), "{text}");
}

#[test]
fn tls_is_the_rule_and_certificates_are_checked() {
    let Some(registry) = Registry::start(Setup { tls: true, ..PLAIN }) else { return };
    registry.push(&Layout::new(&[5000]), "test/image:1");
    let (mut user, host) = (User::new(), registry.host());
    let name = format!("{host}/test/image:1");
    user.write(".config/ampoule/config.toml", &format!("[registries.'{host}']\nhttp = false\n"));
    let text = user.error(&["image", "pull", &name]);
    assert!(text.contains("ertificate"), "{text}");
    user.environment = vec![("SSL_CERT_FILE", registry.authority())];
    user.ok(&["image", "pull", &name]);
}

#[test]
fn pulls_at_the_same_time_fetch_each_layer_once() {
    let image = Layout::new(&[300_000, 400_000]);
    let Some(registry) = registry_with(&image) else { return };
    let proxy = Proxy::start(&registry, |head, _, answer| {
        if head.contains("/blobs/") {
            std::thread::sleep(Duration::from_millis(200));
        }
        answer
    });
    let (user, name) = (User::new(), format!("{}/test/image:1", proxy.host()));
    let children: Vec<_> = (0..4)
        .map(|_| user.command(&["image", "pull", &name]).stdout(Stdio::null()).spawn().unwrap())
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    for layer in &image.layers {
        let count = proxy.blob_requests().iter().filter(|head| is_blob(head, layer)).count();
        assert_eq!(count, 1, "{layer}");
    }
}

#[test]
fn a_pull_killed_at_any_moment_is_gone_on_with() {
    let image = Layout::new(&[300_000, 2_000_000]);
    let Some(registry) = registry_with(&image) else { return };
    let (user, name) = (User::new(), format!("{}/test/image:1", registry.host()));
    for round in 0..8 {
        let mut child =
            user.command(&["image", "pull", &name]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(10 + 15 * round));
        let _ = child.kill();
        child.wait().unwrap();
    }
    assert_eq!(user.ok(&["image", "pull", &name]), format!("{}\n", image.manifest));
    assert_eq!(["rootfs", "tmp", "partial"].map(|part| user.count(part)), [1, 0, 0]);
}

#[test]
fn a_full_disk_is_named_and_hurts_nothing() {
    // One does not fit as it comes, the other not as a root file system.
    let images = [Layout::new(&[3_000_000]), Layout::of(vec![tar_of("file", &vec![7; 9_000_000])])];
    let Some(registry) = Registry::start(PLAIN) else { return };
    let user = User::new();
    let store = user.path("store");
    fs::create_dir(&store).unwrap();
    let mount = |options: &str| {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "none"]).arg(&store).status().unwrap().success()
    };
    if !mount("size=1m") {
        return eprintln!("SKIPPED: mounting a small file system needs root");
    }
    let error = |name: &str, image: &Layout| {
        registry.push(image, name);
        user.error(&["image", "pull", &format!("{}/{name}", registry.host())])
    };
    let downloading = error("test/large:1", &images[0]);
    user.ok(&["image", "prune"]);
    let converting = error("test/small:1", &images[1]);
    let grown = mount("remount,size=50m");
    user.ok(&["image", "pull", &format!("{}/test/large:1", registry.host())]);
    user.ok(&["image", "pull", &format!("{}/test/small:1", registry.host())]);
    Command::new("umount").arg("-l").arg(&store).status().unwrap();
    assert!(grown);
    assert!(
        downloading.contains("No space left") && downloading.contains("prune"),
        "{downloading}"
    );
    assert!(converting.contains("No space left") && converting.contains("layer"), "{converting}");
}

#[test]
fn whichever_descriptor_is_refused_a_pull_works_or_says_so() {
    let Some(registry) = registry_with(&Layout::new(&[5000, 5000])) else { return };
    let (user, name) = (User::new(), format!("{}/test/image:1", registry.host()));
    user.ok(&["images"]);
    for limit in 6.. {
        let output = with_descriptors(limit, user.command(&["image", "pull", &name]));
        if output.status.success() {
            break;
        }
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(125), "{limit}: {text}");
        assert!(
            text.contains("Too many open files") && text.contains("ulimit -n"),
            "{limit}: {text}"
        );
        assert_eq!(["rootfs", "tmp", "locks"].map(|part| user.count(part)), [0; 3], "{limit}");
    }
}

#[test]
fn archives_and_streams_are_imported() {
    if Registry::start(PLAIN).is_none() {
        return;
    }
    let (user, image) = (User::new(), Layout::new(&[5000, 70_000]));
    let archive = user.path("saved.tar");
    let from = format!("oci:{}:x", image.path().display());
    let to = format!("docker-archive:{}:saved:1", archive.display());
    skopeo(["--insecure-policy", "copy", "--quiet", &from, &to]);
    let source = format!("docker-archive:{}", archive.display());
    user.ok(&["image", "import", &source, "saved"]);
    let rootfs = |name: &str| {
        let list: serde_json::Value =
            serde_json::from_str(&user.ok(&["image", "inspect", name])).unwrap();
        list[0]["rootfs"].as_str().unwrap().to_string()
    };
    user.ok(&["image", "import", &format!("oci:{}", image.path().display()), "layout"]);
    assert_eq!(rootfs("saved"), rootfs("layout"), "the same layers");
    let bytes = fs::read(&archive).unwrap();
    fs::write(&archive, &bytes[..bytes.len() / 2]).unwrap();
    let text = user.error(&["image", "import", &source]);
    assert!(text.contains("saved.tar") && text.contains("end"), "{text}");

    let root = user.path("root.tar");
    fs::write(&root, tar(7, 1000)).unwrap();
    let mut import = user.command(&["image", "import", "-", "stream"]);
    let output = import.stdin(fs::File::open(&root).unwrap()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n", digest(&tar(7, 1000))));
    assert_eq!(user.ok(&["images", "-q"]).lines().count(), 3);
}

#[test]
fn a_store_is_no_larger_than_asked_for() {
    let user = User::new();
    for number in 0..3 {
        let path = user.path("root.tar");
        fs::write(&path, tar(number, 1_000_000)).unwrap();
        let name = format!("image-{number}");
        user.ok(&["image", "import", path.to_str().unwrap(), &name]);
        std::thread::sleep(Duration::from_millis(20));
    }
    user.ok(&["image", "inspect", "image-0"]);
    user.ok(&["image", "prune", "--keep-size", "2200k"]);
    let left = user.ok(&["images", "-q"]);
    assert_eq!(left, "docker.io/library/image-0:latest\ndocker.io/library/image-2:latest\n");
    user.ok(&["image", "prune", "--keep-size", "1"]);
    assert_eq!((user.count("rootfs"), user.count("images")), (0, 0));
}
