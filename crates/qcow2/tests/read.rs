//! Images that QEMU made read here as they read there.

mod bench;

use bench::{Bench, content, open, read_only, run, text};
use infill_base::{Ctx, ExtentKind};
use infill_node::{InfoValue, NodeHandle, RawNode};
use infill_sim::{Rng, block_on};
use infill_storage::{MemoryStorage, StorageHandle};

/// Cluster sizes, versions and entries of all kinds.
const OPTIONS: [&str; 6] = [
    "compat=1.1,cluster_size=512",
    "compat=0.10,cluster_size=4096",
    "compat=1.1,cluster_size=65536,refcount_bits=1",
    "compat=1.1,cluster_size=16384,extended_l2=on",
    "compat=1.1,cluster_size=65536,extended_l2=on",
    "compat=1.1,cluster_size=2097152",
];

const FILL: [&str; 7] = [
    "write -P 17 0 64k",
    "write -P 34 70000 4096",
    "write -P 51 1M 300k",
    "write -P 68 1500000 100",
    "write -z 1100k 32k",
    "write -zu 1M 16k",
    "write -P 85 5242000 880",
];

fn pieces(node: &NodeHandle, expected: &[u8], seed: u64) {
    let mut rng = Rng::new(seed);
    block_on(async {
        for _ in 0..200 {
            let at = rng.below(expected.len() as u64);
            let len = rng.below(200_000).min(expected.len() as u64 - at);
            let found = bench::read(node, at, len as usize).await;
            assert!(found == expected[at as usize..(at + len) as usize], "{len} bytes at {at}");
        }
    });
}

/// What `qemu-img map` says of the top layer, as (start, length, kind).
fn qemu_map(path: &std::path::Path) -> Vec<(u64, u64, ExtentKind)> {
    let json = run("qemu-img", &["map", "--output=json", text(path)]);
    let field = |line: &str, name: &str| {
        let rest = line.split_once(&format!("\"{name}\": ")).unwrap().1;
        rest.split([',', '}']).next().unwrap().to_string()
    };
    let line = |line: &str| {
        let depth = field(line, "depth") == "0" && field(line, "present") == "true";
        let kind = match (depth, field(line, "zero").as_str()) {
            (false, _) => ExtentKind::Absent,
            (true, "true") => ExtentKind::Zero,
            (true, _) => ExtentKind::Data,
        };
        (field(line, "start").parse().unwrap(), field(line, "length").parse().unwrap(), kind)
    };
    let mut runs: Vec<(u64, u64, ExtentKind)> = Vec::new();
    for (start, len, kind) in json.lines().filter(|line| line.contains("start")).map(line) {
        match runs.last_mut() {
            Some(last) if last.2 == kind => last.1 += len,
            _ => runs.push((start, len, kind)),
        }
    }
    runs
}

fn our_map(node: &NodeHandle) -> Vec<(u64, u64, ExtentKind)> {
    let mut runs: Vec<(u64, u64, ExtentKind)> = Vec::new();
    let mut next = 0;
    while next < node.len() {
        for extent in block_on(node.extents(&Ctx::GUEST, next, node.len() - next)).unwrap() {
            next = extent.end();
            match runs.last_mut() {
                Some(last) if last.2 == extent.kind => last.1 += extent.len,
                _ => runs.push((extent.start, extent.len, extent.kind)),
            }
        }
    }
    runs
}

#[test]
fn what_qemu_wrote_reads_the_same_whole_and_in_pieces() {
    for options in OPTIONS {
        let bench = Bench::new();
        // An odd size: the last cluster is not whole.
        let image = bench.image("a.qcow2", options, "5242880", &FILL);
        let expected = bench.content(&image);
        let node = block_on(open(&image, read_only()));
        assert!(block_on(content(&node, 1 << 20)) == expected, "{options}");
        pieces(&node, &expected, 1);
        assert_eq!(our_map(&node), qemu_map(&image), "{options}");
    }
}

#[test]
fn an_overlay_shows_what_lies_below_and_zeroes_behind_its_end() {
    for options in OPTIONS {
        let bench = Bench::new();
        let below: Vec<u8> = (0..3_000_000_u32).map(|at| (at / 512 % 251) as u8 + 1).collect();
        let base = bench.file("base.raw", &below);
        let with_base = format!("{options},backing_fmt=raw,backing_file={}", text(&base));
        let image = bench.image("a.qcow2", &with_base, "5M", &FILL);
        let expected = bench.content(&image);
        let node = block_on(async {
            let node = open(&image, read_only()).await;
            let raw = RawNode::new(StorageHandle::new(MemoryStorage::from_bytes(below.clone())), true);
            assert_eq!(node.info().backing.unwrap().filename, text(&base));
            node.backing().unwrap().replace(Some(NodeHandle::new(raw))).await;
            node
        });
        assert!(block_on(content(&node, 777_777)) == expected, "{options}");
        pieces(&node, &expected, 2);
        assert_eq!(our_map(&node), qemu_map(&image), "{options}");
    }
}

#[test]
fn facts_of_the_format_are_told_under_qemus_names() {
    let bench = Bench::new();
    let image = bench.image("a.qcow2", "extended_l2=on,lazy_refcounts=on,compression_type=zstd", "1M", &[]);
    let info = block_on(open(&image, read_only())).info();
    assert_eq!(
        info.format_specific,
        [
            ("compat", InfoValue::Text("1.1".into())),
            ("compression-type", InfoValue::Text("zstd".into())),
            ("lazy-refcounts", InfoValue::Bool(true)),
            ("refcount-bits", InfoValue::Int(16)),
            ("corrupt", InfoValue::Bool(false)),
            ("extended-l2", InfoValue::Bool(true)),
        ]
    );
    let qemu = run("qemu-img", &["info", "--output=json", text(&image)]);
    for (name, _) in info.format_specific {
        assert!(qemu.contains(&format!("\"{name}\"")), "{name} is not in {qemu}");
    }
}
