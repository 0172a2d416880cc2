//! Dependencies of the workspace's crates run one way.

use std::collections::BTreeMap;
use std::path::Path;

/// The layers, lowest first. A crate depends on crates of lower layers only.
const LAYERS: &[&[&str]] = &[
    &["infill-base"],
    &["infill-storage"],
    &["infill-io", "infill-node"],
    &["infill-sim"],
    &["infill-qcow2", "infill-qed", "infill-nbd", "infill-remote"],
    &["infill-job", "infill-migrate", "infill-qmp", "infill-vhost-user-blk", "infill-fuse"],
    &["infill", "infill-conformance"],
];

/// Crates of a layer below others that no crate but tests and the binary may use.
const DEV_ONLY: &[&str] = &["infill-sim", "infill-conformance"];

/// Format crates and those that are shared by them know no reactor, no file and no job.
const NO_IO: &[&str] = &["infill-base", "infill-storage", "infill-node", "infill-qcow2", "infill-qed"];

/// Crates with `unsafe` of their own; every other one forbids it.
const MAY_BE_UNSAFE: &[&str] = &["infill-io", "infill-vhost-user-blk", "infill-fuse"];

struct Crate {
    directory: std::path::PathBuf,
    /// Names of normal and build dependencies.
    needs: Vec<String>,
}

/// Sections of a manifest that hold what a crate needs when it is used; `dev-dependencies` may point anywhere.
fn is_needs(section: &str) -> bool {
    let last = section.rsplit('.').next().unwrap_or(section);
    matches!(last, "dependencies" | "build-dependencies")
}

fn parse(manifest: &Path) -> Option<(String, Crate)> {
    let text = std::fs::read_to_string(manifest).ok()?;
    let (mut section, mut name, mut needs) = (String::new(), None, Vec::new());
    for line in text.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_end_matches(']').to_owned();
            // `[dependencies.name]` as well as a line in `[dependencies]`.
            if let Some((of, which)) = section.rsplit_once('.')
                && is_needs(of)
            {
                needs.push(which.to_owned());
            }
        } else if let Some((key, value)) = line.split_once('=') {
            let key = key.trim().trim_end_matches(".workspace").to_owned();
            match section.as_str() {
                "package" if key == "name" => name = Some(value.trim().trim_matches('"').to_owned()),
                of if is_needs(of) => needs.push(key),
                _ => {}
            }
        }
    }
    let directory = manifest.parent()?.to_owned();
    Some((name?, Crate { directory, needs }))
}

fn workspace() -> BTreeMap<String, Crate> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let crates = std::fs::read_dir(root.join("crates")).expect("the workspace has crates");
    let mut manifests: Vec<_> = crates.map(|entry| entry.expect("is listed").path()).collect();
    manifests.push(root.join("infill"));
    manifests.iter().filter_map(|directory| parse(&directory.join("Cargo.toml"))).collect()
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

#[test]
fn every_crate_has_a_layer_and_needs_only_lower_ones() {
    let crates = workspace();
    assert!(crates.len() >= 11, "crates are found: {:?}", crates.keys());
    for (name, found) in &crates {
        let own = layer(name).unwrap_or_else(|| panic!("{name} has no layer: give it one in this test"));
        for needed in found.needs.iter().filter(|needed| needed.starts_with("infill")) {
            let below = layer(needed).unwrap_or_else(|| panic!("{needed}, which {name} needs, has no layer"));
            assert!(below < own, "{name} (layer {own}) must not need {needed} (layer {below})");
        }
    }
}

#[test]
fn what_is_for_tests_is_needed_by_tests_only() {
    for (name, found) in workspace().iter().filter(|(name, _)| !DEV_ONLY.contains(&name.as_str())) {
        for dev in DEV_ONLY {
            // The demo of the binary simulates nothing; whoever wants the simulation in it, moves it here with a reason.
            assert!(!found.needs.iter().any(|needed| needed == dev), "{name} needs {dev} outside tests");
        }
    }
}

#[test]
fn formats_know_no_kernel_no_runtime_and_no_job() {
    let crates = workspace();
    for name in NO_IO {
        let needs = &crates[*name].needs;
        for foreign in ["infill-io", "infill-job", "compio", "rustix", "libc", "tokio", "io-uring"] {
            assert!(!needs.iter().any(|needed| needed == foreign), "{name} must not need {foreign}");
        }
    }
}

#[test]
fn unsafe_code_is_forbidden_but_where_the_kernel_and_guest_memory_are_met() {
    for (name, found) in workspace().iter().filter(|(name, _)| !MAY_BE_UNSAFE.contains(&name.as_str())) {
        let roots = ["src/lib.rs", "src/main.rs"].map(|root| found.directory.join(root));
        let root = roots.iter().find_map(|root| std::fs::read_to_string(root).ok()).expect("has a root");
        let has_modules = root.lines().any(|line| line.contains("mod "));
        let forbids = root.contains("#![forbid(unsafe_code)]");
        assert!(!has_modules || forbids, "{name} does not forbid unsafe code");
    }
}
