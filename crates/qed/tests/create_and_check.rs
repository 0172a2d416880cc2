//! Images that are created and checked here and by QEMU.

mod common;

use common::{CX, arg, created, json_number, loaded, qemu, qemu_ok};
use infill_node::{BackingRef, CheckReport, Repair};
use infill_qed::{CreateOptions, check};
use infill_sim::{Rng, block_on};
use infill_storage::{MemoryStorage, StorageHandle};

/// Pairs of cluster size and table size: the least that QEMU opens, its default, long tables, large clusters.
/// (Tables of one cluster, which the format allows, QEMU 10.0.2 refuses, its own included; so it does clusters so
/// large that the largest disk's size does not fit 64 bits.)
const SHAPES: [(u64, u32); 5] = [(4096, 2), (65536, 4), (4096, 16), (1 << 20, 2), (4 << 20, 2)];

#[test]
fn qemu_opens_and_finds_nothing_wrong_with_what_is_created() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![0; 1 << 20]).expect("writes");
    for (cluster_bytes, table_clusters) in SHAPES {
        for name_len in [0, 1, 400, 600] {
            // Slashes make a long name of the same file.
            let name = format!("{}{}", arg(dir.path()), "/".repeat(name_len)) + "base.raw";
            let backing =
                (name_len > 0).then(|| BackingRef { filename: name.clone(), format: Some("raw".into()) });
            let options = CreateOptions { size: 3 << 20, backing, cluster_bytes, table_clusters };
            let (memory, _) = created(&options);
            let path = dir.path().join("image.qed");
            std::fs::write(&path, memory.to_bytes()).expect("writes");
            qemu_ok("qemu-img", &["check", "-f", "qed", arg(&path)]);
            let info = qemu_ok("qemu-img", &["info", "-f", "qed", "--output=json", arg(&path)]);
            assert_eq!(json_number(&info, "virtual-size"), Some(3 << 20));
            assert_eq!(json_number(&info, "cluster-size"), Some(cluster_bytes));
            assert_eq!(info.contains("backing-filename-format\": \"raw\""), name_len > 0, "{info}");
            assert_eq!(info.contains(&name), name_len > 0, "{info}");
            if cluster_bytes < 1 << 20 {
                // QEMU's own, but for where it lies in the file, has the same length.
                let theirs = dir.path().join("theirs.qed");
                let shape = format!("cluster_size={cluster_bytes},table_size={table_clusters}");
                qemu_ok("qemu-img", &["create", "-f", "qed", "-o", &shape, arg(&theirs), "3M"]);
                assert_eq!(
                    std::fs::metadata(&theirs).expect("is there").len(),
                    memory.to_bytes().len() as u64
                );
            }
        }
    }
}

#[test]
fn options_outside_the_format_are_refused_by_name() {
    let storage = StorageHandle::new(MemoryStorage::new(0));
    let cases = [
        (CreateOptions { size: 100, ..Default::default() }, "size"),
        (CreateOptions { size: !511, ..Default::default() }, "size"),
        (CreateOptions { cluster_bytes: 2048, ..Default::default() }, "cluster_size"),
        (CreateOptions { table_clusters: 32, ..Default::default() }, "table_size"),
        (
            CreateOptions {
                backing: Some(BackingRef { filename: "x".repeat(1024), format: None }),
                ..Default::default()
            },
            "backing_file",
        ),
    ];
    for (options, expected) in cases {
        let error = block_on(infill_qed::create(&CX, &storage, &options)).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(storage.len(), 0, "nothing is written before");
    }
}

/// An image that QEMU wrote `writes` clusters' worth of data into at random.
fn written_by_qemu(path: &std::path::Path, shape: (u64, u32), rng: &mut Rng, writes: u64) {
    let options = format!("cluster_size={},table_size={}", shape.0, shape.1);
    qemu_ok("qemu-img", &["create", "-f", "qed", "-o", &options, arg(path), "64M"]);
    let mut args = vec!["-f".to_owned(), "qed".to_owned()];
    for _ in 0..writes {
        let at = rng.below(64 << 20) & !511;
        let len = (512 + (rng.below(3 * shape.0) & !511)).min((64 << 20) - at);
        let zero = if rng.per_mille(300) { "-z" } else { "-P 7" };
        args.extend(["-c".into(), format!("write {zero} {at} {len}")]);
    }
    args.push(arg(path).into());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    qemu_ok("qemu-io", &args);
}

#[test]
fn a_check_counts_as_qemu_does() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut rng = Rng::new(17);
    for shape in [(4096, 2), (65536, 4), (8192, 16)] {
        let path = dir.path().join("image.qed");
        written_by_qemu(&path, shape, &mut rng, 40);
        let (memory, storage) = loaded(&path);
        let before = memory.to_bytes();
        let report = block_on(check(&CX, &storage, Repair::Nothing)).expect("checks");
        assert_eq!(memory.to_bytes(), before, "a check alone writes nothing");
        let theirs = qemu_ok("qemu-img", &["check", "-f", "qed", "--output=json", arg(&path)]);
        let number = |key| json_number(&theirs, key).unwrap_or(0);
        assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{report:?}");
        assert_eq!(report.total_clusters, number("total-clusters"));
        assert_eq!(report.allocated_clusters, number("allocated-clusters"));
        assert_eq!(report.fragmented_clusters, number("fragmented-clusters"));
        assert_eq!(report.image_end_offset, before.len() as u64);
    }
}

/// Counts of `qemu-img check`: corruptions, leaks, errors of the check.
fn qemu_check(bytes: &[u8], path: &std::path::Path) -> (u64, u64, u64) {
    std::fs::write(path, bytes).expect("writes");
    let output = qemu("qemu-img", &["check", "-f", "qed", "--output=json", arg(path)]);
    let text = String::from_utf8_lossy(&output.stdout);
    let number = |key| json_number(&text, key).unwrap_or(0);
    (number("corruptions"), number("leaks"), number("check-errors"))
}

#[test]
fn what_a_check_finds_in_a_damaged_image_qemu_finds_too_and_what_is_repaired_is_clean() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image.qed");
    let mut rng = Rng::new(5);
    written_by_qemu(&path, (4096, 2), &mut rng, 30);
    let whole = std::fs::read(&path).expect("is there");
    let (mut repaired, mut double) = (0, 0);
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let mut bytes = whole.clone();
        for _ in 0..rng.range(1, 4) {
            damage(&mut bytes, &mut rng);
        }
        let storage = StorageHandle::new(MemoryStorage::from_bytes(bytes.clone()));
        let found = block_on(check(&CX, &storage, Repair::Nothing)).expect("checks");
        let theirs = qemu_check(&bytes, &path);
        assert_eq!(found.corruptions > 0, theirs.0 > 0, "seed {seed}: {found:?}, QEMU: {theirs:?}");

        let memory = std::sync::Arc::new(MemoryStorage::from_bytes(bytes));
        let storage = StorageHandle::from_arc(memory.clone());
        let mended = block_on(check(&CX, &storage, Repair::All)).expect("repairs");
        let theirs = qemu_check(&memory.to_bytes(), &path);
        assert_eq!(mended.corruptions > 0, theirs.0 > 0, "seed {seed}: {mended:?}, QEMU: {theirs:?}");
        if mended.corruptions == 0 {
            assert_eq!(theirs, (0, mended.leaks, 0), "seed {seed}: {mended:?}");
            repaired += u64::from(mended.corruptions_fixed > 0);
            let again = block_on(check(&CX, &storage, Repair::All)).expect("checks");
            let left = CheckReport { messages: Vec::new(), ..again };
            assert_eq!((left.corruptions_fixed, left.leaks_fixed), (0, 0), "seed {seed}");
        } else {
            double += 1;
        }
    }
    assert!(repaired > 10 && double > 3, "{repaired} {double}: the test must see both");
}

/// Cuts the file, or changes an entry of a table.
fn damage(bytes: &mut Vec<u8>, rng: &mut Rng) {
    if rng.per_mille(200) {
        let keep = bytes.len() as u64 - rng.below(64 << 10);
        bytes.truncate(keep as usize);
        return;
    }
    let words = bytes.len() / 8;
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(*bytes[at * 8..].first_chunk().expect("inside"));
    // Entries are the words that are multiples of the cluster size and not data (which is 0x07 throughout).
    let l1 = 4096 / 8..3 * 4096 / 8;
    let tables: Vec<usize> = l1.filter(|at| word(bytes, *at) != 0).collect();
    let table = tables[rng.index(tables.len())];
    let entry = if rng.per_mille(300) {
        table
    } else {
        (word(bytes, table) as usize / 8 + rng.index(1024)).min(words - 1)
    };
    let value = match rng.below(5) {
        0 => 3,
        1 => bytes.len() as u64 & !4095,
        2 => word(bytes, table),
        3 => 1 << 60,
        _ => rng.below(words as u64 * 8) & !4095,
    };
    bytes[entry * 8..entry * 8 + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn leaked_clusters_at_the_end_are_cut_off_and_the_mark_goes() {
    let (memory, storage) =
        created(&CreateOptions { size: 1 << 20, cluster_bytes: 4096, ..Default::default() });
    let clean = memory.to_bytes();
    let mut bytes = clean.clone();
    bytes[16] = 2;
    bytes.resize(clean.len() + 3 * 4096 + 100, 9);
    drop(storage);
    let memory = std::sync::Arc::new(MemoryStorage::from_bytes(bytes));
    let storage = StorageHandle::from_arc(memory.clone());
    let found = block_on(check(&CX, &storage, Repair::Nothing)).expect("checks");
    assert_eq!((found.leaks, found.leaks_fixed, found.corruptions), (3, 0, 0));
    let mended = block_on(check(&CX, &storage, Repair::Leaks)).expect("repairs");
    assert_eq!((mended.leaks, mended.leaks_fixed), (0, 3));
    assert_eq!(memory.to_bytes(), clean);
}
