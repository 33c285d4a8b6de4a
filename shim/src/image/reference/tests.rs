use proptest::prelude::*;

use super::*;

fn full(text: &str) -> String {
    match text.parse::<Reference>() {
        Ok(Reference::Name(name)) => name.to_string(),
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn names_are_completed_as_docker_does() {
    for (short, long) in [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.23", "docker.io/library/alpine:3.23"),
        ("docker.io/library/alpine:latest", "docker.io/library/alpine:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("local/mini", "docker.io/local/mini:latest"),
        ("ghcr.io/a/b:v1", "ghcr.io/a/b:v1"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x:1", "localhost:5000/x:1"),
        ("host:5000/x", "host:5000/x:latest"),
        ("a--b__c.d_e", "docker.io/library/a--b__c.d_e:latest"),
    ] {
        assert_eq!(full(short), long);
    }
}

#[test]
fn a_digest_says_all_that_a_tag_could() {
    let digest = Digest::of(b"x").to_string();
    for text in [format!("alpine@{digest}"), format!("alpine:3.23@{digest}")] {
        let name: Name = text.parse().unwrap();
        assert_eq!(name.to_string(), format!("docker.io/library/alpine@{digest}"));
        assert_eq!(name.version(), &Version::Digest(Digest::of(b"x")));
        assert_eq!((name.domain(), name.repository()), ("docker.io", "library/alpine"));
        assert_eq!(name.familiar(), format!("alpine@{digest}"));
    }
}

#[test]
fn familiar_is_the_shortest_form() {
    for (long, short) in [
        ("docker.io/library/alpine:3.23", "alpine:3.23"),
        ("docker.io/local/mini", "local/mini:latest"),
        ("ghcr.io/library/x", "ghcr.io/library/x:latest"),
    ] {
        assert_eq!(long.parse::<Name>().unwrap().familiar(), short);
    }
}

#[test]
fn files_keep_their_paths() {
    let oci = |layout: &str, tag: Option<&str>| Reference::Oci {
        layout: layout.into(),
        tag: tag.map(String::from),
    };
    for (text, expected) in [
        ("oci:/a/b", oci("/a/b", None)),
        ("oci:b:3.23", oci("b", Some("3.23"))),
        ("oci:/a:x/b", oci("/a:x/b", None)),
        ("oci:/a:x/b:t", oci("/a:x/b", Some("t"))),
        ("dir:/a:b", Reference::Directory("/a:b".into())),
        ("tar:x.tar.gz", Reference::Tar("x.tar.gz".into())),
        ("docker-archive:x.tar", Reference::DockerArchive("x.tar".into())),
    ] {
        assert_eq!(text.parse::<Reference>().unwrap(), expected);
    }
}

#[test]
fn what_is_no_reference_says_why() {
    let long = format!("a/{}", "b".repeat(300));
    let tag = format!("a:{}", "t".repeat(129));
    for text in [
        "",
        "oci:",
        "dir:",
        "tar:",
        "docker-archive:",
        "./rootfs",
        "/abs",
        "../x",
        "Alpine",
        "a//b",
        "a/",
        "/a",
        "a:",
        "a:-x",
        "a:b:c",
        "a b",
        "a\0",
        "-a",
        "a_",
        "a___b",
        "a..b",
        "é",
        "host:port/x",
        "a@sha256:00",
        "a@b@c",
        "@",
        "host:/x",
        &long,
        &tag,
    ] {
        assert!(text.parse::<Reference>().is_err(), "{text:?} was accepted");
    }
}

proptest! {
    #[test]
    fn any_text_parses_or_is_refused(text in "\\PC*") {
        let _ = text.parse::<Reference>();
    }

    #[test]
    fn a_full_name_is_a_fixed_point(text in "[a-z0-9.:/_-]{1,24}") {
        if let Ok(name) = text.parse::<Name>() {
            prop_assert_eq!(&name.to_string().parse::<Name>().unwrap(), &name);
            prop_assert_eq!(&name.familiar().parse::<Name>().unwrap(), &name);
        }
    }

    #[test]
    fn no_name_can_leave_a_directory(text in "[a-z./:]{1,12}") {
        if let Ok(name) = text.parse::<Name>() {
            prop_assert!(!name.to_string().split('/').any(|part| part.is_empty() || part == ".."));
        }
    }
}
