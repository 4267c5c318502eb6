//! docs/architecture.md says which rooms may import a foreign API. This reads every source file and
//! holds the tree to it.

use std::fs;
use std::path::{Path, PathBuf};

/// A crate, and the files (or folders) that may name it.
const IMPORTERS: [(&str, &[&str]); 5] = [
    (
        "virt",
        &[
            "runtime-handler/machine/src/libvirt.rs",
            "runtime-handler/machine/src/libvirt/",
        ],
    ),
    (
        "rtnetlink",
        &[
            "runtime-handler/linux/src/netlink",
            "runtime-handler/machine/src/network/apply",
            "runtime-handler/machine/tests/network.rs",
            "runtime-handler/agent/src/net",
        ],
    ),
    (
        "containerd_shim_protos",
        &[
            "runtime-handler/agent-api/",
            "runtime-handler/agent/",
            "runtime-handler/machine/src/guest/",
            "shim/src/bootstrap/",
            "shim/src/events",
            "shim/src/rpc/",
            "test/e2e/src/bin/dyad-bench/",
        ],
    ),
    ("libcontainer", &["runtime-handler/agent/"]),
    ("quick_xml", &["runtime-handler/machine/src/"]),
];

#[test]
fn a_foreign_api_is_imported_only_where_the_architecture_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut read = 0;
    for file in sources(&root) {
        let text = fs::read_to_string(&file).unwrap();
        let name = file.strip_prefix(&root).unwrap().to_str().unwrap();
        read += 1;
        for (crate_name, rooms) in IMPORTERS {
            let allowed = rooms.iter().any(|room| name.starts_with(room));
            assert!(
                allowed || !names_crate(&text, crate_name),
                "{name} imports {crate_name}, which only {rooms:?} may: go through one of those, or \
                 change docs/architecture.md and this list together"
            );
        }
    }
    assert!(
        read > 200,
        "only {read} source files were found below {root:?}"
    );
}

#[test]
fn the_backends_do_not_know_each_other_and_the_contract_knows_neither() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime-handler");
    for (manifest, strangers) in [
        (
            "Cargo.toml",
            &["dyad-linux", "dyad-container", "dyad-machine", "dyad-shim"][..],
        ),
        (
            "linux/Cargo.toml",
            &["dyad-container", "dyad-machine", "dyad-shim"],
        ),
        ("container/Cargo.toml", &["dyad-machine", "dyad-shim"]),
        ("machine/Cargo.toml", &["dyad-container", "dyad-shim"]),
        (
            "agent/Cargo.toml",
            &["dyad-container", "dyad-machine", "dyad-shim"],
        ),
    ] {
        let text = fs::read_to_string(root.join(manifest)).unwrap();
        for stranger in strangers {
            assert!(
                !text.contains(stranger),
                "runtime-handler/{manifest} depends on {stranger}"
            );
        }
    }
}

/// Every Rust source file of the workspace, without what cargo built.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(sources(&path));
            }
        } else if name.ends_with(".rs") && !path.ends_with("shim/tests/importers.rs") {
            found.push(path);
        }
    }
    found
}

/// Whether `text` uses that crate by a path or an import; `libvirt::` is no `virt::`.
fn names_crate(text: &str, crate_name: &str) -> bool {
    text.match_indices(crate_name).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = &text[at + crate_name.len()..];
        let is_whole =
            !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '/');
        is_whole && after.starts_with("::")
    })
}

#[test]
fn a_crate_is_told_from_a_module_whose_name_ends_like_it() {
    assert!(names_crate("use virt::connect::Connect;", "virt"));
    assert!(names_crate("let c = virt::sys::X;", "virt"));
    assert!(!names_crate("use crate::libvirt::Libvirt;", "virt"));
    assert!(!names_crate("crate::virt::x()", "virt"));
    assert!(!names_crate("the word virt: alone", "virt"));
}
