use std::fs;

use serde_json::json;

use super::*;
use crate::image::testing::{LAYER, Tar, TestLayout};

fn tar() -> Vec<u8> {
    Tar::default().file("hello", b"world").end()
}

fn manifest(layout: &TestLayout, tag: Option<&str>) -> Result<Manifest, ImageError> {
    Layout::open(layout.path())?.manifest(tag)
}

fn error(layout: &TestLayout, tag: Option<&str>) -> ImageError {
    manifest(layout, tag).unwrap_err()
}

#[test]
fn a_tag_leads_to_config_and_layers() {
    let layout = TestLayout::new();
    let image = layout.image(&[tar()]);
    let layout = layout.tag(image.clone(), "1.0");
    let found = manifest(&layout, Some("1.0")).unwrap();
    assert_eq!(found.digest.to_string(), image["digest"]);
    assert_eq!(found.config.cmd, ["/hello"]);
    assert_eq!(found.config.env, ["A=b"]);
    assert_eq!(found.diff_ids().collect::<Vec<_>>(), [&Digest::of(&tar())]);
    let layers: Vec<Layer> =
        Layout::open(layout.path()).unwrap().layers(&found).map(Result::unwrap).collect();
    assert_eq!(layers[0].digest, Digest::of(&tar()));
}

#[test]
fn all_of_the_config_that_a_run_obeys_is_read() {
    let layout = TestLayout::new();
    let config = json!({
        "User": "app:grp", "WorkingDir": "/w", "StopSignal": "SIGQUIT", "Entrypoint": ["/e"],
        "Cmd": null, "Env": ["A=b"], "Volumes": {"/v": {}}, "Labels": {"x": "y"}, "ExposedPorts": {"80/tcp": {}},
    });
    let config = layout.config("amd64", &[Digest::of(&tar())], config);
    let image = layout.manifest(&config, &[layout.blob(LAYER, &tar())]);
    let layout = layout.tag(image, "x");
    let config = manifest(&layout, None).unwrap().config;
    let expected = ImageConfig {
        entrypoint: vec!["/e".into()],
        cmd: vec![],
        env: vec!["A=b".into()],
        user: "app:grp".into(),
        working_dir: "/w".into(),
        stop_signal: Some("SIGQUIT".into()),
        volumes: vec!["/v".into()],
    };
    assert_eq!(config, expected);
}

#[test]
fn without_a_tag_the_choice_must_be_clear() {
    let layout = TestLayout::new();
    let (one, two) = (layout.image(&[tar()]), layout.image(&[tar(), tar()]));
    let layout = layout.tag(one.clone(), "a");
    assert_eq!(manifest(&layout, None).unwrap().digest.to_string(), one["digest"]);
    let layout = layout.tag(two.clone(), "b");
    let text = error(&layout, None).to_string();
    assert!(text.contains("several images") && text.contains("a, b"), "{text}");
    let layout = layout.tag(two.clone(), "latest");
    assert_eq!(manifest(&layout, None).unwrap().digest.to_string(), two["digest"]);
    let text = error(&layout, Some("c")).to_string();
    assert!(text.contains("`c`") && text.contains("a, b, latest"), "{text}");
}

#[test]
fn an_index_leads_to_our_platform() {
    let layout = TestLayout::new();
    let on = |mut descriptor: serde_json::Value, os: &str, architecture: &str| {
        descriptor["platform"] = json!({ "os": os, "architecture": architecture });
        descriptor
    };
    let ours = layout.image(&[tar()]);
    let other = layout.image(&[tar(), tar()]);
    let index = layout.index(&[
        on(other.clone(), "unknown", "unknown"),
        on(other.clone(), "linux", "arm64"),
        on(ours.clone(), "linux", "amd64"),
    ]);
    let nested = layout.index(&[index]);
    let arm = layout.index(&[on(other, "linux", "arm64")]);
    let layout = layout.tag(nested, "multi").tag(arm, "arm");
    assert_eq!(manifest(&layout, Some("multi")).unwrap().digest.to_string(), ours["digest"]);
    let text = error(&layout, Some("arm")).to_string();
    assert!(text.contains(":arm") && text.contains("linux/arm64"), "{text}");
}

#[test]
fn the_config_has_the_last_word_on_the_platform() {
    let layout = TestLayout::new();
    let config = layout.config("arm64", &[Digest::of(&tar())], json!({}));
    let image = layout.manifest(&config, &[layout.blob(LAYER, &tar())]);
    let text = error(&layout.tag(image, "x"), None).to_string();
    assert!(text.contains("linux/arm64"), "{text}");
}

#[test]
fn an_index_inside_itself_ends() {
    let layout = TestLayout::new();
    let mut index = layout.index(&[layout.image(&[tar()])]);
    for _ in 0..10 {
        index = layout.index(&[index]);
    }
    assert!(matches!(error(&layout.tag(index, "x"), None), ImageError::MediaType { .. }));
}

#[test]
fn every_blob_is_verified() {
    let layout = TestLayout::new();
    let image = layout.image(&[tar()]);
    let path = layout.blob_path(&image);
    let bytes = fs::read(&path).unwrap();
    let layout = layout.tag(image, "x");
    let mut flipped = bytes.clone();
    flipped[20] ^= 1;
    fs::write(&path, &flipped).unwrap();
    assert!(matches!(error(&layout, None), ImageError::BlobDigest { .. }));
    fs::write(&path, &bytes[..50]).unwrap();
    assert!(matches!(error(&layout, None), ImageError::BlobSize { actual: 50, .. }));
    fs::remove_file(&path).unwrap();
    assert!(matches!(error(&layout, None), ImageError::Blob { .. }));
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
    assert!(matches!(error(&layout, None), ImageError::Blob { .. }), "a fifo is not waited for");
}

#[test]
fn descriptors_that_lie_are_refused() {
    let descriptor = |change: fn(&mut serde_json::Value)| {
        let layout = TestLayout::new();
        let mut image = layout.image(&[tar()]);
        change(&mut image);
        error(&layout.tag(image, "x"), None)
    };
    let large = descriptor(|image| image["size"] = json!(1_u64 << 40));
    assert!(matches!(large, ImageError::BlobSize { .. }), "{large}");
    let path = descriptor(|image| image["digest"] = json!("sha256:../../../etc/passwd"));
    assert!(matches!(path, ImageError::Json { .. } | ImageError::BadDigest { .. }), "{path}");
    let other = descriptor(|image| image["digest"] = json!(format!("sha512:{}", "0".repeat(128))));
    assert!(matches!(other, ImageError::BadDigest { .. }), "{other}");
    let kind = descriptor(|image| image["mediaType"] = json!("text/plain"));
    assert!(matches!(kind, ImageError::MediaType { .. }), "{kind}");
}

#[test]
fn manifests_that_cannot_be_run_say_why() {
    let with = |layers: fn(&TestLayout) -> Vec<serde_json::Value>, diff_ids: &[Digest]| {
        let layout = TestLayout::new();
        let config = layout.config("amd64", diff_ids, json!({}));
        let image = layout.manifest(&config, &layers(&layout));
        error(&layout.tag(image, "x"), None)
    };
    let id = Digest::of(&tar());
    let empty = with(|_| Vec::new(), &[]);
    assert!(matches!(empty, ImageError::NoLayers { .. }), "{empty}");
    let count = with(|layout| vec![layout.blob(LAYER, &tar())], &[id, id]);
    assert!(matches!(count, ImageError::LayerCount { layers: 1, diff_ids: 2, .. }), "{count}");
    let kind = with(|layout| vec![layout.blob("application/wasm", &tar())], &[id]);
    assert!(matches!(kind, ImageError::MediaType { .. }), "{kind}");
}

#[test]
fn documents_are_bounded_and_layouts_recognised() {
    let layout = TestLayout::new();
    let text = format!("{{\"a\":\"{}\"}}", "x".repeat(MAX_JSON as usize));
    let manifest = layout.blob(MANIFESTS[0], text.as_bytes());
    let layout = layout.tag(manifest, "x");
    assert!(matches!(error(&layout, None), ImageError::LargeJson { .. }));
    fs::write(layout.path().join("index.json"), "{").unwrap();
    assert!(matches!(error(&layout, None), ImageError::Json { .. }));
    fs::remove_file(layout.path().join("index.json")).unwrap();
    assert!(matches!(error(&layout, None), ImageError::NotALayout { .. }));
    fs::remove_file(layout.path().join("oci-layout")).unwrap();
    assert!(matches!(error(&layout, None), ImageError::NotALayout { .. }));
}
