//! Backing chains: what opens, what is refused, and that neither takes stack, memory or time without a limit.

mod common;

use std::path::Path;

use common::{INFILL, fails, run, text};

fn create(dir: &Path, name: &str, args: &[&str]) -> String {
    let path = dir.join(name);
    run("qemu-img", &[&["create", "-q"], args, &[text(&path), "1M"]].concat());
    text(&path).to_owned()
}

fn overlay(dir: &Path, name: &str, backing: &str, format: &str) -> String {
    create(dir, name, &["-u", "-f", "qcow2", "-b", backing, "-F", format])
}

/// Images `l1` to `l{last}`, each over the one before, `l1` over a raw base.
fn deep(dir: &Path, last: usize) {
    create(dir, "base.raw", &["-f", "raw"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 1M", text(&dir.join("base.raw"))]);
    overlay(dir, "l0001", "base.raw", "raw");
    let template = overlay(dir, "template", "l0000", "qcow2");
    let template = std::fs::read(template).unwrap();
    let name = template.windows(5).position(|window| window == b"l0000").unwrap();
    for nth in 2..=last {
        let mut image = template.clone();
        image[name..name + 5].copy_from_slice(format!("l{:04}", nth - 1).as_bytes());
        std::fs::write(dir.join(format!("l{nth:04}")), image).unwrap();
    }
}

#[test]
fn a_loop_is_refused_however_the_files_are_called() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) =
        (overlay(dir.path(), "one", "two", "qcow2"), overlay(dir.path(), "two", "alias", "qcow2"));
    std::os::unix::fs::symlink(&one, dir.path().join("alias")).unwrap();
    let own = overlay(dir.path(), "own", "./own", "qcow2");
    for image in [&one, &two, &own] {
        for args in [&["map", image][..], &["info", "--backing-chain", image], &["serve", "-k", "x", image]] {
            let why = fails(INFILL, args);
            assert!(why.contains("loop"), "{args:?}: {why}");
        }
        run(INFILL, &["info", image]);
    }
}

#[test]
fn deep_chains_read_to_their_base_and_deeper_ones_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    deep(dir.path(), 1000);
    // With the base: 2, 65 and 256 layers.
    for layers in ["l0001", "l0064", "l0255"] {
        let map = run(INFILL, &["map", text(&dir.path().join(layers))]);
        assert!(map.contains("0x100000") && map.contains("base.raw"), "{layers}: {map}");
    }
    for layers in ["l0256", "l0999"] {
        let why = fails(INFILL, &["map", text(&dir.path().join(layers))]);
        assert!(why.contains("more than 256 layers"), "{layers}: {why}");
    }
}

#[test]
fn a_format_that_nobody_says_is_found_out_by_magic_and_never_raw() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    create(dir.path(), "raw", &["-f", "raw"]);
    create(dir.path(), "leaf", &["-f", "qcow2"]);
    overlay(dir.path(), "inner", "leaf", "qcow2");
    // QED keeps no format but raw.
    for (name, backing, format) in
        [("over-raw", "raw", "raw"), ("over-leaf", "leaf", "qcow2"), ("over-inner", "inner", "qcow2")]
    {
        create(dir.path(), name, &["-u", "-f", "qed", "-b", backing, "-F", format]);
    }
    run(INFILL, &["map", &path("over-raw")]);
    run(INFILL, &["map", &path("over-leaf")]);
    let why = fails(INFILL, &["map", &path("over-inner")]);
    assert!(why.contains("'leaf'") && why.contains("--backing-format qcow2"), "{why}");
    run(INFILL, &["map", "--backing-format", "qcow2", &path("over-inner")]);
    let why = fails(INFILL, &["map", "--untrusted", "-f", "qed", &path("over-leaf")]);
    assert!(why.contains("--backing-format"), "{why}");
    let why = fails(INFILL, &["map", "--untrusted", &path("leaf")]);
    assert!(why.contains("-f qcow2"), "{why}");
    // A guest that writes a header to its raw disk gains nothing where the header says raw.
    std::fs::copy(path("inner"), path("raw")).unwrap();
    let map = run(INFILL, &["map", "--output=json", &path("over-raw")]);
    assert!(map.contains(r#""depth": 1"#), "{map}");
}

#[test]
fn a_raw_disk_is_not_guessed_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let raw = create(dir.path(), "raw", &["-f", "raw"]);
    let why = fails(INFILL, &["serve", "-k", text(&dir.path().join("socket")), &raw]);
    assert!(why.contains("-f raw"), "{why}");
}

#[test]
fn names_that_cannot_be_followed_are_refused_with_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    for (backing, format, why) in [
        ("http://host/x", "raw", "unknown protocol 'http'"),
        ("nbds://host/x", "raw", "TLS"),
        ("json:{}", "raw", "driver"),
        ("json:nonsense", "raw", "json:"),
        ("json:{\"driver\":\"vmdk\",\"file\":\"x\"}", "raw", "vmdk"),
        ("gone", "raw", "No such file"),
        (".", "raw", "Directory"),
        ("/dev/zero", "raw", "file or block device"),
    ] {
        let image = overlay(dir.path(), "top", backing, format);
        let said = fails(INFILL, &["map", &image]);
        assert!(said.contains(why), "{backing}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        std::fs::remove_file(image).unwrap();
    }
}

#[test]
fn a_json_name_describes_nodes_as_blockdev_add_does() {
    let dir = tempfile::tempdir().unwrap();
    let raw = create(dir.path(), "raw", &["-f", "raw"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 64k 64k", &raw]);
    let window = format!(
        r#"json:{{"driver":"raw","offset":65536,"size":65536,"file":{{"driver":"file","filename":"{raw}"}}}}"#
    );
    let map = run(INFILL, &["map", "--output=json", &window]);
    assert!(map.contains(r#""start": 0, "length": 65536"#) && map.contains(r#""offset": 65536"#), "{map}");
    let image = overlay(dir.path(), "top", &window, "raw");
    run(INFILL, &["map", &image]);
    let why = fails(INFILL, &["map", "--untrusted", "-f", "qcow2", &image]);
    assert!(why.contains("json:"), "{why}");
    let why = fails(INFILL, &["info", &format!(r#"json:{{"driver":"raw","file":"{raw}"}}"#)]);
    assert!(why.contains("nor node-name"), "{why}");
    let why = fails(INFILL, &["info", r#"json:{"driver":"null-co","size":4096,"bogus":1}"#]);
    assert!(why.contains("bogus"), "{why}");
}
