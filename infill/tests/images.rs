//! `create`, `info`, `map` and `check` of images at rest say what qemu-img says.

mod common;

use std::path::{Path, PathBuf};

use common::{INFILL, Process, fails, output, run, text, wait_for_socket};
use serde_json::Value;

fn json(program: &str, args: &[&str]) -> Value {
    let out = run(program, args);
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{program} {args:?}: {error}\n{out}"))
}

/// Runs the same arguments with both programs and compares what they print.
fn same(args: &[&str]) {
    if args.contains(&"--output=json") {
        assert_eq!(json(INFILL, args), json("qemu-img", args), "{args:?}");
    } else {
        assert_eq!(run(INFILL, args), run("qemu-img", args), "{args:?}");
    }
}

fn qemu_io(image: &str, format: &str, commands: &[&str]) {
    let mut args = vec!["-f", format];
    commands.iter().for_each(|command| args.extend(["-c", *command]));
    args.push(image);
    run("qemu-io", &args);
}

/// A chain with every kind of allocation: raw below, QED, qcow2 with subclusters, qcow2 of another cluster size.
fn chain(dir: &Path) -> Vec<PathBuf> {
    let path = |name: &str| dir.join(name);
    let (base, qed, sub, top) = (path("base.raw"), path("mid.qed"), path("sub.qcow2"), path("top.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "raw", text(&base), "4M"]);
    qemu_io(text(&base), "raw", &["write -P 1 1M 64k", "write -P 2 3M 300k"]);
    run("qemu-img", &["create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", text(&qed), "5M"]);
    qemu_io(text(&qed), "qed", &["write -P 4 512k 64k"]);
    let sub_args = ["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", "mid.qed", "-F", "qed"];
    run("qemu-img", &[&sub_args[..], &[text(&sub), "6M"]].concat());
    qemu_io(text(&sub), "qcow2", &["write -P 3 2M 4k", "write -z 1088k 6k", "write -P 3 3M 128k"]);
    let top_args = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "sub.qcow2", "-F", "qcow2"];
    run("qemu-img", &[&top_args[..], &[text(&top), "8M"]].concat());
    qemu_io(
        text(&top),
        "qcow2",
        &["write -P 5 0 4k", "write -z 64k 64k", "write -P 6 7M 8k", "write -c -P 7 6M 4k"],
    );
    vec![base, qed, sub, top]
}

#[test]
fn info_and_map_of_every_layer_say_what_qemu_img_says() {
    let dir = tempfile::tempdir().unwrap();
    for image in chain(dir.path()) {
        let image = text(&image);
        for command in ["info", "map"] {
            same(&[command, "--output=json", image]);
        }
        same(&["info", image]);
        same(&["info", "--backing-chain", image]);
        same(&["info", "--backing-chain", "--output=json", image]);
        if !image.ends_with("top.qcow2") {
            same(&["map", image]);
        }
        same(&["map", "--output=json", "--start-offset=1M", "--max-length=2M", image]);
    }
    let top = dir.path().join("top.qcow2");
    let why = fails(INFILL, &["map", text(&top)]);
    assert!(why.contains("compressed") && why.contains("--output=json"), "{why}");
}

#[test]
fn an_image_is_told_of_although_its_backing_file_is_gone_and_only_the_chain_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let layers = chain(dir.path());
    std::fs::remove_file(&layers[0]).unwrap();
    same(&["info", "--output=json", text(&layers[3])]);
    let why = fails(INFILL, &["info", "--backing-chain", text(&layers[3])]);
    assert!(why.contains("base.raw") && why.contains("No such file"), "{why}");
    assert_eq!(why.lines().count(), 1, "{why}");
}

#[test]
fn check_says_what_qemu_img_says_and_ends_with_its_code() {
    let dir = tempfile::tempdir().unwrap();
    let layers = chain(dir.path());
    for image in &layers[1..] {
        let image = text(image);
        for args in [&["check", image][..], &["check", "--output=json", image]] {
            let (ours, theirs) = (output(INFILL, args), output("qemu-img", args));
            assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}");
            if args.len() == 3 {
                let ours: Value = serde_json::from_slice(&ours.stdout).unwrap();
                let theirs: Value = serde_json::from_slice(&theirs.stdout).unwrap();
                for (key, value) in theirs.as_object().unwrap() {
                    assert_eq!(&ours[key], value, "{key} of {image}");
                }
            }
        }
    }
    let raw = output(INFILL, &["check", text(&layers[0])]);
    assert_eq!(raw.status.code(), Some(63));
    let missing = output(INFILL, &["check", text(&dir.path().join("missing"))]);
    assert_eq!(missing.status.code(), Some(1));
}

#[test]
fn leaks_are_told_by_code_3_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("leaky.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "1M"]);
    qemu_io(text(&image), "qcow2", &["write -P 1 0 64k"]);
    // The first L2 table is forgotten: it and its cluster leak. QEMU's layout has the L1 table in cluster 3.
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[3 << 16..][..8].fill(0);
    std::fs::write(&image, bytes).unwrap();
    let found = output(INFILL, &["check", "--output=json", text(&image)]);
    assert_eq!(found.status.code(), Some(3));
    assert_eq!(serde_json::from_slice::<Value>(&found.stdout).unwrap()["leaks"], 2);
    assert_eq!(output("qemu-img", &["check", text(&image)]).status.code(), Some(3));
    let fixed = output(INFILL, &["check", "-r", "leaks", "--output=json", text(&image)]);
    assert_eq!(fixed.status.code(), Some(0));
    let fixed: Value = serde_json::from_slice(&fixed.stdout).unwrap();
    assert_eq!((&fixed["leaks-fixed"], fixed.get("leaks")), (&Value::from(2), None));
    run("qemu-img", &["check", "-q", text(&image)]);
}

#[test]
fn what_we_create_is_what_qemu_img_would_have_created() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    run(INFILL, &["create", "-q", text(&base), "3M"]);
    let long = "-o";
    let cases: &[(&str, &[&str])] = &[
        ("raw", &["1.5M"]),
        ("raw", &[long, "preallocation=falloc", "1M"]),
        ("raw", &[long, "preallocation=full", "1M"]),
        ("qcow2", &[long, "extended_l2=off", "10G"]),
        ("qcow2", &[long, "extended_l2=on", "10G"]),
        ("qcow2", &[long, "compat=0.10", "1M"]),
        ("qcow2", &[long, "compat=v3,extended_l2=off,cluster_size=512,refcount_bits=1", "100M"]),
        ("qcow2", &[long, "cluster_size=2M,refcount_bits=64,extended_l2=off", "1T"]),
        ("qcow2", &[long, "compression_type=zstd,lazy_refcounts=on,extended_l2=off", "777k"]),
        ("qcow2", &["-b", "base.raw", "-F", "raw", long, "extended_l2=off"]),
        ("qcow2", &["-b", "base.raw", "-F", "raw", long, "extended_l2=on", "5M"]),
        ("qcow2", &["-u", "-b", "missing.qcow2", "-F", "qcow2", long, "extended_l2=off", "1M"]),
        ("qed", &["1G"]),
        ("qed", &["-b", "base.raw", "-F", "raw"]),
        ("qed", &[long, "cluster_size=1M,table_size=16", "1G"]),
    ];
    for (format, args) in cases {
        let image = dir.path().join(format!("image.{format}"));
        let create = |program: &str| {
            let split = args.len()
                - usize::from(args.last().is_some_and(|last| last.ends_with(['M', 'G', 'T', 'k'])));
            let all =
                [&["create", "-f", format][..], &args[..split], &[text(&image)], &args[split..]].concat();
            run(program, &all);
            let info = json("qemu-img", &["info", "--output=json", text(&image)]);
            if *format != "raw" && !args.contains(&"-u") {
                run("qemu-img", &["check", "-q", text(&image)]);
            }
            // Where metadata lies, and how long the file is therefore, is each program's own choice.
            let mut info = info.as_object().unwrap().clone();
            info.remove("children");
            info.remove("actual-size");
            info
        };
        let ours = create(INFILL);
        std::fs::remove_file(&image).unwrap();
        assert_eq!(ours, create("qemu-img"), "{format} {args:?}");
    }
}

#[test]
fn our_overlays_have_subclusters_and_read_like_their_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.qcow2"));
    run(INFILL, &["create", "-q", text(&base), "1M"]);
    qemu_io(text(&base), "raw", &["write -P 9 0 1M"]);
    run(INFILL, &["create", "-q", "-b", "base.raw", "-F", "raw", text(&top)]);
    let info = json("qemu-img", &["info", "--output=json", text(&top)]);
    assert_eq!(info["format"], "qcow2");
    assert_eq!(info["format-specific"]["data"]["extended-l2"], true);
    run("qemu-img", &["compare", "-q", text(&base), text(&top)]);
}

#[test]
fn a_refused_creation_leaves_the_old_file_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old");
    std::fs::write(&old, "precious").unwrap();
    let old = text(&old);
    for (args, why) in [
        (&["-f", "qcow2", old][..], "size"),
        (&["-f", "qcow2", "-o", "cluster_size=3k", old, "1M"], "cluster_size"),
        (&["-f", "qcow2", "-o", "encryption=on", old, "1M"], "'encryption'"),
        (&["-f", "qcow2", "-o", "data_file=x", old, "1M"], "'data_file'"),
        (&["-f", "qcow2", old, "1Q"], "1Q"),
        (&["-f", "qcow2", "-b", "missing", "-F", "raw", old], "No such file"),
        (&["-f", "qcow2", "-b", old, "-F", "raw", old], "its own backing file"),
        (&["-f", "raw", "-b", "x", old], "raw cannot have a backing file"),
        (&["-f", "raw", "-F", "qcow2", old, "1M"], "-b is missing"),
        (&["-f", "vmdk", old, "1M"], "vmdk"),
    ] {
        let said = fails(INFILL, &[&["create"][..], args].concat());
        assert!(said.contains(why), "{args:?}: {said}");
        assert_eq!(std::fs::read_to_string(old).unwrap(), "precious", "{args:?}");
    }
}

#[test]
fn an_image_that_somebody_writes_to_is_not_touched_and_only_shared_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("busy.qcow2"), dir.path().join("socket"));
    run(INFILL, &["create", "-q", "-f", "qcow2", text(&image), "1M"]);
    let mut server = std::process::Command::new("qemu-nbd");
    server.args(["-t", "-f", "qcow2", "-k", text(&socket), text(&image)]);
    let _server = Process::start(&mut server);
    wait_for_socket(&socket);
    for args in [
        &["info", text(&image)][..],
        &["map", text(&image)],
        &["check", text(&image)],
        &["check", "-r", "all", text(&image)],
        &["create", "-f", "raw", text(&image), "2M"],
    ] {
        let why = fails(INFILL, args);
        assert!(why.contains("another process"), "{args:?}: {why}");
    }
    run(INFILL, &["info", "-U", text(&image)]);
    run(INFILL, &["map", "-U", text(&image)]);
}

#[test]
fn a_command_line_that_is_not_understood_is_no_corrupt_image() {
    for args in [&["check"][..], &["check", "--bogus", "x"], &["bogus"], &[]] {
        assert_eq!(output(INFILL, args).status.code(), Some(1), "{args:?}");
    }
    for args in [
        &["--help"][..],
        &["--version"],
        &["check", "--help"],
        &["man"],
        &["man", "serve"],
        &["completions", "bash"],
    ] {
        let told = output(INFILL, args);
        assert!(told.status.success() && !told.stdout.is_empty(), "{args:?}");
    }
    assert!(run(INFILL, &["check", "--help"]).contains("63"));
    assert!(run(INFILL, &["create", "-f", "qed", "-o", "help"]).contains("table_size"));
}

#[test]
fn an_image_that_moved_is_told_of_and_not_started() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    run(INFILL, &["create", "-f", "qcow2", text(&image), "1M"]);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[72] |= 0x40;
    std::fs::write(&image, bytes).unwrap();
    let told = json(INFILL, &["info", "--output=json", text(&image)]);
    assert_eq!(told["format-specific"]["data"]["moved-to-another-host"], true, "{told}");
    assert!(run(INFILL, &["info", text(&image)]).contains("moved to another host: true"));
    let checked = output(INFILL, &["check", text(&image)]);
    assert!(checked.status.success());
    assert!(String::from_utf8_lossy(&checked.stderr).contains("moved to another host"));
    let socket = dir.path().join("s");
    for args in [
        vec!["check", "-r", "all", text(&image)],
        vec!["map", text(&image)],
        vec!["serve", "--read-only", text(&image), "--socket", text(&socket)],
    ] {
        let said = fails(INFILL, &args);
        assert!(said.contains("moved to another host") && said.contains("`infill reclaim`"), "{said}");
    }
}

#[test]
fn snapshots_are_listed_made_deleted_and_gone_back_to_as_qemu_img_does() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    let image = text(&image);
    run("qemu-img", &["create", "-q", "-f", "qcow2", image, "1M"]);
    let snapshot = |args: &[&str]| run(INFILL, &[&["snapshot"], args, &[image]].concat());
    assert_eq!(snapshot(&[]), "");
    qemu_io(image, "qcow2", &["write -P 1 0 128k"]);
    snapshot(&["-c", "first"]);
    qemu_io(image, "qcow2", &["write -P 2 64k 128k"]);
    run("qemu-img", &["snapshot", "-c", "second", image]);
    assert_eq!(snapshot(&["-l"]), run("qemu-img", &["snapshot", "-l", image]));
    same(&["info", image]);
    same(&["info", "--output=json", image]);
    let content = || {
        let raw = dir.path().join("raw");
        run("qemu-img", &["convert", "-O", "raw", image, text(&raw)]);
        std::fs::read(raw).unwrap()
    };
    snapshot(&["-a", "first"]);
    assert!(content()[..128 << 10].iter().all(|byte| *byte == 1));
    snapshot(&["-d", "first"]);
    snapshot(&["-a", "2"]);
    assert!(content()[64 << 10..192 << 10].iter().all(|byte| *byte == 2));
    run("qemu-img", &["check", "-q", image]);
    for (args, why) in [
        (["-d", "first"], "Could not delete snapshot 'first': snapshot not found"),
        (["-a", "first"], "Could not apply snapshot 'first'"),
    ] {
        let said = fails(INFILL, &[&["snapshot"], &args[..], &[image]].concat());
        assert!(said.contains(why), "{said}");
    }
}
