use std::collections::BTreeMap;

use super::*;
use crate::cli::Memory;

fn layers(texts: &[&str]) -> Result<Layers> {
    let mut layers = Layers::default();
    for (n, text) in texts.iter().enumerate() {
        layers.text(&format!("/{n}"), text)?;
    }
    Ok(layers)
}

fn annotated(text: &str, annotations: &[(&str, &str)]) -> Result<Config> {
    let mut layers = layers(&[text])?;
    let annotations = annotations.iter().map(|(k, v)| (k.to_string(), v.to_string()));
    layers.annotations(&annotations.collect::<BTreeMap<_, _>>())?;
    Ok(layers.config())
}

#[test]
fn a_later_layer_wins_setting_by_setting() {
    let low =
        "[sandbox]\nmemory = '1g'\nvcpus = 2\n[registries.a]\nhttp = true\nmirrors = ['x', 'y']\n";
    let high = "sandbox.vcpus = 3\n[registries.a]\nmirrors = []\n";
    let config = layers(&[low, high]).unwrap().config();
    assert_eq!((config.sandbox.memory, config.sandbox.vcpus), (Memory(1 << 30), 3));
    assert_eq!(config.registries["a"].http, Some(true));
    assert!(config.registries["a"].mirrors.is_empty());
    assert_eq!(config.sandbox.boot_timeout, Config::default().sandbox.boot_timeout);
}

#[test]
fn mistakes_are_named_with_their_line() {
    for (text, line, part) in [
        ("\n[registry]\n", 2, "registry"),
        ("[registries.'a']\nmirrors = []\nhtpp = true\n", 3, "htpp"),
        ("[registries.'a']\nhttp = 'yes'\n", 2, "boolean"),
        ("[sandbox]\n\nmemory = 'lots'\n", 3, "512m"),
        ("[sandbox]\nvcpus = 300\n", 2, "300"),
        ("[sandbox]\nnetwork = 'host'\n", 2, "`none` or `user`"),
        ("[sandbox]\nvcpus = 1\negress = ['example.org']\n", 3, "HOST:PORT"),
        ("[", 1, ""),
    ] {
        let error = layers(&[text]).unwrap_err().to_string();
        assert!(error.starts_with("the configuration /0 is wrong"), "{error}");
        assert!(error.contains(&format!("line {line}:")) && error.contains(part), "{error}");
    }
}

#[test]
fn files_and_drop_ins_are_read_in_order_and_missing_ones_say_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("config.d")).unwrap();
    fs::write(at("config.toml"), "sandbox.vcpus = 2\nsandbox.memory = '1g'\n").unwrap();
    fs::write(at("config.d/20.toml"), "sandbox.vcpus = 4\n").unwrap();
    fs::write(at("config.d/10.toml"), "sandbox.vcpus = 3\n").unwrap();
    fs::write(at("config.d/30.toml.bak"), "nonsense").unwrap();
    let layers = Layers::read(&[at("config.toml"), "/no/such/file".into()]).unwrap();
    assert_eq!(layers.config().sandbox.vcpus, 4);
    let origins = layers.effective();
    assert!(origins.contains(&format!("# {}:1", at("config.d/20.toml").display())), "{origins}");
    assert!(Layers::read(&[folder.path().into()]).is_err());
    assert!(Layers::default().file(Path::new("/no/such/file")).is_err());
}

#[test]
fn every_setting_is_printed_with_where_it_came_from_and_reads_back() {
    let text = "[registries.'docker.io']\nmirrors = [\n  'a',\n]\n\n[sandbox]\nmemory = '1g'\n\
                network = 'user'\negress = ['a:1', '[2001:db8::1]:*']\n";
    let layers = layers(&[text]).unwrap();
    let effective = layers.effective();
    let lines: Vec<(&str, &str)> =
        effective.lines().map(|l| l.split_once('#').unwrap()).map(|(a, b)| (a.trim(), b)).collect();
    assert!(lines.contains(&("sandbox.memory = \"1g\"", " /0:7")), "{effective}");
    assert!(
        lines.contains(&("registries.\"docker.io\".mirrors = [\"a\"]", " /0:2")),
        "{effective}"
    );
    assert!(lines.contains(&("sandbox.vcpus = 1", " built in")), "{effective}");
    assert!(lines.contains(&("sandbox.network = \"user\"", " /0:8")), "{effective}");
    let egress = ("sandbox.egress = [\"a:1\", \"[2001:db8::1]:*\"]", " /0:9");
    assert!(lines.contains(&egress), "{effective}");
    assert_eq!(toml::from_str::<Config>(&effective).unwrap(), layers.config());
}

#[test]
fn annotations_make_the_settings_that_are_listed_and_no_others() {
    let text = "annotations = ['sandbox.memory', 'sandbox.vcpus', 'annotations']\n";
    let config = annotated(
        text,
        &[
            ("io.ampoule.sandbox.memory", "2g"),
            ("io.ampoule.sandbox.vcpus", "4"),
            ("io.kubernetes.cri.container-type", "sandbox"),
        ],
    );
    let sandbox = config.unwrap().sandbox;
    assert_eq!((sandbox.memory, sandbox.vcpus), (Memory(2 << 30), 4));
    for (name, value, part) in [
        ("io.ampoule.sandbox.kernel", "/x", "not allowed"),
        ("io.ampoule.annotations", "['sandbox.kernel']", "not allowed"),
        ("io.ampoule.sandbox.memory", "lots", "512m"),
        ("io.ampoule.sandbox.vcpus", "4\n[sandbox]\nkernel = '/x'", "vcpus"),
    ] {
        let error = annotated(text, &[(name, value)]).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(part), "{error}");
    }
}

#[test]
fn sizes_may_be_annotated_unless_the_administrator_says_otherwise() {
    let memory = [("io.ampoule.sandbox.memory", "1g")];
    assert!(annotated("", &memory).is_ok());
    assert!(annotated("annotations = []", &memory).is_err());
    assert!(annotated("", &[("io.ampoule.sandbox.guest_image", "/x")]).is_err());
}
