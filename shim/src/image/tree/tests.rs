use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn meta(mode: u16) -> Metadata {
    Metadata { mode, ..Metadata::default() }
}

fn file(id: u64) -> Node {
    Node::File(Extent { offset: id, length: 1 })
}

/// Every path with its mode and what is there.
fn list(tree: &Tree) -> BTreeMap<String, (u16, Node)> {
    fn descend(tree: &Tree, inode: Inode, path: &str, out: &mut BTreeMap<String, (u16, Node)>) {
        for (name, child) in tree.children(inode) {
            let path = format!("{path}{}", lossy(name));
            out.insert(path.clone(), (tree.metadata(child).mode, tree.node(child).clone()));
            descend(tree, child, &format!("{path}/"), out);
        }
    }
    let mut out = BTreeMap::new();
    descend(tree, ROOT, "", &mut out);
    out
}

fn paths(tree: &Tree) -> Vec<String> {
    list(tree).into_keys().collect()
}

#[test]
fn parents_are_implied_and_later_described() {
    let mut tree = Tree::new();
    tree.put(b"a/b/f", meta(0o600), file(1)).unwrap();
    tree.put(b"a/b", meta(0o700), Node::Directory).unwrap();
    let list = list(&tree);
    assert_eq!(list["a"], (0o755, Node::Directory));
    assert_eq!(list["a/b"], (0o700, Node::Directory));
    assert_eq!(list["a/b/f"], (0o600, file(1)));
}

#[test]
fn the_root_takes_metadata_and_nothing_else() {
    let mut tree = Tree::new();
    tree.put(b"./", meta(0o711), Node::Directory).unwrap();
    assert_eq!(tree.metadata(ROOT).mode, 0o711);
    assert_eq!(tree.put(b".", meta(0), Node::Fifo), Err(TreeError::Root));
}

#[test]
fn a_name_is_taken_over_whole() {
    let mut tree = Tree::new();
    tree.put(b"a/b", meta(0), file(1)).unwrap();
    tree.next_layer();
    tree.put(b"a", meta(0), file(2)).unwrap();
    assert_eq!(paths(&tree), ["a"]);
    tree.put(b"a", meta(0), Node::Directory).unwrap();
    assert_eq!(list(&tree)["a"].1, Node::Directory);
}

#[test]
fn symbolic_links_are_never_walked() {
    let mut tree = Tree::new();
    tree.put(b"d/f", meta(0), file(1)).unwrap();
    tree.put(b"s", meta(0), Node::Symlink(b"d".to_vec())).unwrap();
    let refused = Err(TreeError::ParentNotDirectory("s".into()));
    assert_eq!(tree.put(b"s/x", meta(0), file(2)).map(drop), refused);
    assert_eq!(tree.link(b"x", b"s/f"), Err(TreeError::NoLinkTarget("s/f".into())));
    tree.next_layer();
    tree.whiteout(b"s/f").unwrap();
    tree.opaque(b"s").unwrap();
    assert_eq!(paths(&tree), ["d", "d/f", "s"]);
}

#[test]
fn a_hard_link_outlives_the_name_it_was_made_from() {
    let mut tree = Tree::new();
    tree.put(b"a", meta(0), file(1)).unwrap();
    tree.next_layer();
    tree.link(b"b", b"./a").unwrap();
    tree.link(b"b", b"b").unwrap();
    tree.whiteout(b"a").unwrap();
    tree.put(b"a", meta(0), file(2)).unwrap();
    assert_eq!((&list(&tree)["a"].1, &list(&tree)["b"].1), (&file(2), &file(1)));
}

#[test]
fn a_hard_link_needs_a_file_inside_the_image() {
    let mut tree = Tree::new();
    tree.put(b"d", meta(0), Node::Directory).unwrap();
    for (target, error) in [
        (&b"none"[..], TreeError::NoLinkTarget("none".into())),
        (b"d", TreeError::LinkToDirectory("d".into())),
        (b"../etc/shadow", TreeError::BadLinkTarget),
        (b"/etc/shadow", TreeError::NoLinkTarget("/etc/shadow".into())),
    ] {
        assert_eq!(tree.link(b"x", target), Err(error));
    }
}

#[test]
fn link_targets_are_bounded_but_free() {
    let mut tree = Tree::new();
    tree.put(b"x", meta(0), Node::Symlink(b"../../../etc".to_vec())).unwrap();
    for target in [vec![], vec![b'x'; 4096], b"a\0b".to_vec()] {
        assert_eq!(tree.put(b"x", meta(0), Node::Symlink(target)), Err(TreeError::BadLinkTarget));
    }
}

#[test]
fn whiteouts_remove_only_what_is_below_their_layer() {
    let mut tree = Tree::new();
    for path in [&b"a/x"[..], b"a/y", b"b"] {
        tree.put(path, meta(0), file(1)).unwrap();
    }
    tree.next_layer();
    tree.put(b"a/z", meta(0), file(2)).unwrap();
    tree.whiteout(b"a").unwrap();
    tree.whiteout(b"nothing/here").unwrap();
    assert_eq!(paths(&tree), ["a", "a/z", "b"]);
    assert_eq!(tree.whiteout(b"."), Err(TreeError::BadWhiteout));
    assert_eq!(tree.whiteout(b"../x"), Err(TreeError::ParentPath));
}

#[test]
fn memory_is_bounded() {
    let mut tree = Tree { budget: 4 << 20, ..Tree::new() };
    let deep = b"d/".repeat(2000);
    let mut count = 0;
    let fill = (0..).try_for_each(|i: u32| {
        count += 1;
        let path = [i.to_string().as_bytes(), b"/", &deep].concat();
        tree.put(&path, meta(0), Node::Directory).map(drop)
    });
    assert_eq!(fill, Err(TreeError::TooLarge));
    assert!(count < 20, "{count} paths of 2000 directories in 4 MiB");
    let mut tree = Tree { budget: 4 << 20, ..Tree::new() };
    let xattrs = BTreeMap::from([(b"user.x".to_vec(), vec![0; 5 << 20])]);
    assert_eq!(tree.put(b"f", Metadata { xattrs, ..meta(0) }, file(1)), Err(TreeError::TooLarge));
}

#[derive(Debug, Clone)]
enum Op {
    Directory(String, u16),
    File(String, u64),
    Whiteout(String),
    Opaque(String),
}

impl Op {
    fn removes(&self) -> bool {
        matches!(self, Self::Whiteout(_) | Self::Opaque(_))
    }

    fn apply(&self, tree: &mut Tree) -> Result<(), TreeError> {
        match self {
            Self::Directory(path, mode) => {
                tree.put(path.as_bytes(), meta(*mode), Node::Directory).map(drop)
            }
            Self::File(path, id) => tree.put(path.as_bytes(), meta(0), file(*id)).map(drop),
            Self::Whiteout(path) => tree.whiteout(path.as_bytes()),
            Self::Opaque(path) => tree.opaque(path.as_bytes()),
        }
    }
}

fn layer() -> impl Strategy<Value = Vec<Op>> {
    let path = "[ab](/[ab]){0,3}";
    let op = prop_oneof![
        (path, 1u16..8).prop_map(|(path, mode)| Op::Directory(path, mode)),
        (path, 1u64..99).prop_map(|(path, id)| Op::File(path, id)),
        path.prop_map(Op::Whiteout),
        path.prop_map(Op::Opaque),
    ];
    prop::collection::vec(op, 0..8)
}

fn is_under(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

/// The specification's own words on a flat list of paths: first remove, then add.
fn model(layers: &[Vec<Op>]) -> Option<BTreeMap<String, (u16, Node)>> {
    let mut all: BTreeMap<String, (u16, Node)> = BTreeMap::new();
    for layer in layers {
        for op in layer {
            match op {
                Op::Whiteout(gone) => all.retain(|path, _| path != gone && !is_under(path, gone)),
                Op::Opaque(gone) => all.retain(|path, _| !is_under(path, gone)),
                _ => {}
            }
        }
        for op in layer.iter().filter(|op| !op.removes()) {
            let (path, new) = match op {
                Op::Directory(path, mode) => (path, (*mode, Node::Directory)),
                Op::File(path, id) => (path, (0, file(*id))),
                _ => unreachable!(),
            };
            for (slash, _) in path.match_indices('/') {
                let parent = all.entry(path[..slash].into()).or_insert((0o755, Node::Directory));
                if parent.1 != Node::Directory {
                    return None;
                }
            }
            if new.1 != Node::Directory {
                all.retain(|other, _| !is_under(other, path));
            }
            all.insert(path.clone(), new);
        }
    }
    Some(all)
}

fn merge(layers: &[Vec<Op>]) -> Option<BTreeMap<String, (u16, Node)>> {
    let mut tree = Tree::new();
    for layer in layers {
        tree.next_layer();
        layer.iter().try_for_each(|op| op.apply(&mut tree)).ok()?;
    }
    Some(list(&tree))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn layers_merge_as_the_specification_says(mut layers in prop::collection::vec(layer(), 1..5)) {
        for layer in &mut layers {
            layer.sort_by_key(|op| !op.removes());
        }
        prop_assert_eq!(merge(&layers), model(&layers));
    }

    #[test]
    fn where_a_whiteout_stands_in_its_layer_does_not_matter(
        layers in prop::collection::vec(layer(), 1..4),
    ) {
        let sorted = |first: bool| {
            let mut layers = layers.clone();
            layers.iter_mut().for_each(|layer| layer.sort_by_key(|op| op.removes() != first));
            merge(&layers)
        };
        if let (Some(first), Some(last)) = (sorted(true), sorted(false)) {
            prop_assert_eq!(&first, &last);
            prop_assert!(merge(&layers).is_none_or(|mixed| mixed == first));
        }
    }
}
