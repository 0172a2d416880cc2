//! Check and repair, against QEMU's judgement.

mod common;

use common::{
    arg, assert_clean, content, file, memory, metadata, qemu_check, run, run_json, run_ok, set_word, word,
};
use infill_base::{Ctx, OpenError};
use infill_node::{CheckReport, NodeHandle, Repair};
use infill_qcow2::{CreateOptions, OpenOptions, Qcow2, check, create};
use infill_sim::{CrashPoint, DiskOptions, Media, Rng, SimDisk, block_on};
use infill_storage::StorageHandle;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const CX: Ctx = Ctx::GUEST;
const COPIED: u64 = 1 << 63;

/// Checks (and mends) an image in memory; gives the report and the image afterwards.
fn checked(image: &[u8], repair: Repair) -> (Result<CheckReport, OpenError>, Vec<u8>) {
    let (memory, storage) = memory(image.to_vec());
    let report = block_on(check(&CX, &storage, repair));
    (report, memory.to_bytes())
}

fn report(image: &[u8], repair: Repair) -> CheckReport {
    checked(image, repair).0.unwrap()
}

fn number(report: &Value, key: &str) -> u64 {
    report.get(key).and_then(Value::as_u64).unwrap_or(0)
}

/// Asserts that both find the same in an image.
fn assert_same(image: &[u8], path: &Path, what: &str) {
    let (ours, theirs) = (report(image, Repair::Nothing), qemu_check(path));
    let pairs = [
        ("corruptions", ours.corruptions),
        ("leaks", ours.leaks),
        ("check-errors", ours.check_errors),
        ("total-clusters", ours.total_clusters),
        ("allocated-clusters", ours.allocated_clusters),
        ("compressed-clusters", ours.compressed_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("image-end-offset", ours.image_end_offset),
    ];
    for (key, found) in pairs {
        assert_eq!(found, number(&theirs, key), "{what}: {key}: {ours:?}\n{theirs}");
    }
}

/// An image that QEMU wrote data to.
fn written(dir: &tempfile::TempDir, options: &str, commands: &[&str]) -> Vec<u8> {
    let path = dir.path().join("written.qcow2");
    run_ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, arg(&path), "8M"]);
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(arg(&path));
    run_ok("qemu-io", &args);
    std::fs::read(&path).unwrap()
}

const WRITES: [&str; 6] = [
    "write -P 1 0 600k",
    "write -P 2 1M 4k",
    "write -P 3 3M 200k",
    "write -z 5M 128k",
    "discard 3100k 64k",
    "write -P 4 7M 1M",
];

/// Everything that the guest sees, as QEMU reads it.
fn guest(dir: &tempfile::TempDir, image: &[u8]) -> Vec<u8> {
    let (path, raw) = (file(dir, "guest.qcow2", image), dir.path().join("guest.raw"));
    run_ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", arg(&path), arg(&raw)]);
    std::fs::read(raw).unwrap()
}

#[test]
fn both_find_the_same_in_sound_images_of_every_kind() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4096,refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=8",
        "cluster_size=2M,refcount_bits=32",
        "extended_l2=on",
        "cluster_size=16k,extended_l2=on",
        "lazy_refcounts=on",
        "preallocation=metadata",
    ];
    for options in kinds {
        let image = written(&dir, options, &WRITES);
        let path = dir.path().join("written.qcow2");
        assert_same(&image, &path, options);
        if options.contains("refcount_bits=1") {
            continue;
        }
        run_ok("qemu-img", &["snapshot", "-c", "one", arg(&path)]);
        run_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 200k", "-c", "write -P 8 4M 1M", arg(&path)]);
        run_ok("qemu-img", &["snapshot", "-c", "two, with a longer name", arg(&path)]);
        if options != "compat=0.10" {
            run_ok("qemu-img", &["bitmap", "--add", arg(&path), "b0"]);
            run_ok("qemu-img", &["bitmap", "--add", "--enable", arg(&path), "b1"]);
            run_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 7 2M 300k", arg(&path)]);
        }
        assert_same(&std::fs::read(&path).unwrap(), &path, &format!("{options}, snapshots and bitmaps"));
    }
}

#[test]
fn both_find_the_same_in_compressed_images() {
    let dir = tempfile::tempdir().unwrap();
    let mut raw = content(3 << 20, 1);
    raw[..2 << 20].iter_mut().enumerate().for_each(|(nth, byte)| *byte = (nth / 300) as u8);
    let raw = file(&dir, "source.raw", &raw);
    let path = dir.path().join("image.qcow2");
    for options in
        ["cluster_size=64k", "cluster_size=512", "compression_type=zstd", "extended_l2=on", "cluster_size=2M"]
    {
        run_ok(
            "qemu-img",
            &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, arg(&raw), arg(&path)],
        );
        assert_same(&std::fs::read(&path).unwrap(), &path, options);
    }
}

#[test]
fn leaks_are_given_back_and_nothing_else_changes() {
    let dir = tempfile::tempdir().unwrap();
    let image = written(&dir, "cluster_size=64k", &WRITES);
    let before = guest(&dir, &image);
    let block = word(&image, word(&image, 48) as usize) as usize;
    let mut leaky = image.clone();
    // A data cluster that counts twice, and free clusters in the file that count.
    let clusters = leaky.len() / 65536;
    leaky.resize((clusters + 3) * 65536, 0);
    for nth in clusters..clusters + 3 {
        leaky[block + nth * 2 + 1] = 1;
    }
    leaky[block + 7 * 2 + 1] = 2;
    let path = file(&dir, "leaky.qcow2", &leaky);
    let found = report(&leaky, Repair::Nothing);
    assert_eq!((found.leaks, number(&qemu_check(&path), "leaks")), (4, 4), "{found:?}");
    let (found, mended) = checked(&leaky, Repair::Leaks);
    let found = found.unwrap();
    assert_eq!((found.leaks, found.leaks_fixed, found.corruptions), (0, 4, 0), "{found:?}");
    assert_clean(&file(&dir, "mended.qcow2", &mended), "after the repair");
    assert_eq!(guest(&dir, &mended), before);
}

#[test]
fn nothing_is_given_back_while_metadata_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let mut image = written(&dir, "cluster_size=64k", &WRITES);
    let l1 = word(&image, 40) as usize;
    let l2 = (word(&image, l1) & !COPIED) as usize;
    // The entry is unreadable, its cluster looks leaked.
    let entry = word(&image, l2 + 8) | 0x200;
    set_word(&mut image, l2 + 8, entry);
    let (found, after) = checked(&image, Repair::Leaks);
    let found = found.unwrap();
    assert!(found.corruptions > 0 && found.leaks == 1 && found.leaks_fixed == 0, "{found:?}");
    assert_eq!(after, image);
}

#[test]
fn each_kind_of_damage_is_mended_and_keeps_what_can_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let image = written(&dir, "cluster_size=64k", &WRITES);
    let before = guest(&dir, &image);
    let l1 = word(&image, 40) as usize;
    let table = word(&image, 48) as usize;
    let block = word(&image, table) as usize;
    let l2 = (word(&image, l1) & !COPIED) as usize;
    let entry = |nth: usize| word(&image, l2 + nth * 8);
    // What is damaged, which word becomes what, and which guest clusters may be lost (zero) by it.
    let cases: [(&str, usize, u64, &[usize]); 14] = [
        ("reserved bit of an L2 entry", l2 + 8, entry(1) | 1 << 57, &[]),
        ("unaligned L2 entry", l2 + 8, entry(1) | 0x800, &[1]),
        ("L2 entry behind the end", l2 + 8, 1 << 45 | COPIED, &[1]),
        ("copied without a host", l2 + 70 * 8, COPIED, &[]),
        ("copied flag missing", l2 + 8, entry(1) & !COPIED, &[]),
        ("two entries name one cluster", l2 + 8, entry(2), &[1]),
        ("data in the header's cluster", l2 + 8, COPIED, &[1]),
        ("reserved bit of the L1 entry", l1, word(&image, l1) | 1 << 60, &[]),
        ("copied flag of the L1 entry missing", l1, word(&image, l1) & !COPIED, &[]),
        ("a refcount too low", block + 8, 0, &[]),
        ("refcounts too high", block + 8, 0x0007_0007_0007_0007, &[]),
        ("the refcount block lost", table, 0, &[]),
        ("the refcount block behind the end", table, 1 << 40, &[]),
        ("the refcount block is a data cluster", table, entry(2) & !COPIED, &[]),
    ];
    for (what, at, value, lost) in cases {
        let mut bad = image.clone();
        set_word(&mut bad, at, value);
        let found = report(&bad, Repair::Nothing);
        assert!(found.corruptions + found.leaks > 0, "{what}: not found");
        let (found, mended) = checked(&bad, Repair::All);
        let found = found.unwrap();
        assert_eq!((found.corruptions, found.leaks), (0, 0), "{what}: {found:?}");
        assert!(found.corruptions_fixed + found.leaks_fixed > 0, "{what}");
        assert_clean(&file(&dir, "mended.qcow2", &mended), what);
        let after = guest(&dir, &mended);
        for (nth, (old, new)) in before.chunks(65536).zip(after.chunks(65536)).enumerate() {
            assert!(old == new || lost.contains(&nth), "{what}: guest cluster {nth} is lost");
        }
    }
}

#[test]
fn data_that_a_damaged_l1_entry_calls_a_table_is_not_mended_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let source = file(&dir, "source.raw", &content(8 << 20, 3));
    let path = dir.path().join("image.qcow2");
    let options = "cluster_size=4k";
    run_ok("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-o", options, arg(&source), arg(&path)]);
    let image = std::fs::read(&path).unwrap();
    let before = guest(&dir, &image);
    let l1 = word(&image, 40) as usize;
    let l2 = (word(&image, l1) & !COPIED) as usize;
    let data = word(&image, l2 + 5 * 8);
    let mut bad = image.clone();
    set_word(&mut bad, l1 + 8, data);
    let (found, mended) = checked(&bad, Repair::All);
    let found = found.unwrap();
    assert_eq!(found.corruptions, 0, "{found:?}");
    assert_clean(&file(&dir, "mended.qcow2", &mended), "after the repair");
    let after = guest(&dir, &mended);
    // All but what the lost L2 table described.
    let lost = 512 * 4096;
    assert!(after[..lost] == before[..lost] && after[2 * lost..] == before[2 * lost..]);

    // As if L1 table and header were such a table, too.
    for target in [0u64, l1 as u64] {
        let mut bad = image.clone();
        set_word(&mut bad, l1 + 8, target | COPIED);
        let (found, mended) = checked(&bad, Repair::All);
        assert_eq!(found.unwrap().corruptions, 0);
        assert_clean(&file(&dir, "mended.qcow2", &mended), "metadata as L2 table");
        assert!(guest(&dir, &mended)[..lost] == before[..lost]);
    }
}

#[test]
fn a_dirty_image_is_usable_after_a_repair_and_keeps_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dirty.qcow2");
    run_ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", arg(&path), "8M"]);
    // Ends without closing the image.
    let output =
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "flush", "-c", "abort", arg(&path)]);
    assert!(!output.status.success());
    let image = std::fs::read(&path).unwrap();
    assert_eq!(image[79] & 1, 1, "the image is not dirty");
    let (found, mended) = checked(&image, Repair::All);
    assert_eq!(found.unwrap().corruptions, 0);
    assert_eq!(mended[79] & 1, 0, "the mark is still there");
    assert_clean(&file(&dir, "mended.qcow2", &mended), "after the repair");
    let after = guest(&dir, &mended);
    assert!(after[..1 << 20].iter().all(|byte| *byte == 5));
}

#[test]
fn an_image_without_any_refcounts_gets_new_ones_in_every_geometry() {
    let dir = tempfile::tempdir().unwrap();
    for options in [
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "refcount_bits=2",
        "extended_l2=on",
        "cluster_size=2M",
    ] {
        let image = written(&dir, options, &WRITES);
        let before = guest(&dir, &image);
        let mut bad = image.clone();
        // No table at all, and one that is elsewhere.
        for (at, count) in [(0, 0), (word(&image, 40), 1)] {
            set_word(&mut bad, 48, at);
            bad[56..60].copy_from_slice(&u32::to_be_bytes(count));
            let (found, mended) = checked(&bad, Repair::All);
            let found = found.unwrap_or_else(|error| panic!("{options}: {error}"));
            assert_eq!((found.corruptions, found.leaks), (0, 0), "{options}: {found:?}");
            assert_clean(&file(&dir, "mended.qcow2", &mended), options);
            assert!(guest(&dir, &mended) == before, "{options}");
        }
    }
}

#[test]
fn snapshots_keep_their_data_through_a_repair() {
    let dir = tempfile::tempdir().unwrap();
    written(&dir, "cluster_size=64k", &WRITES);
    let path = dir.path().join("written.qcow2");
    run_ok("qemu-img", &["snapshot", "-c", "one", arg(&path)]);
    run_ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 200k", arg(&path)]);
    let image = std::fs::read(&path).unwrap();
    let snapshot = |image: &[u8]| {
        let (path, raw) = (file(&dir, "snap.qcow2", image), dir.path().join("snap.raw"));
        let args = ["convert", "-f", "qcow2", "-l", "one", "-O", "raw", arg(&path), arg(&raw)];
        run_ok("qemu-img", &args);
        std::fs::read(raw).unwrap()
    };
    let (active, old) = (guest(&dir, &image), snapshot(&image));
    assert!(active != old);
    let mut bad = image.clone();
    let table = word(&image, 48) as usize;
    set_word(&mut bad, table, 0);
    let (found, mended) = checked(&bad, Repair::All);
    assert_eq!(found.unwrap().corruptions, 0);
    assert_clean(&file(&dir, "mended.qcow2", &mended), "with a snapshot");
    assert!(guest(&dir, &mended) == active && snapshot(&mended) == old);

    // The snapshot's own entry is damaged: what it uses is not given back.
    let mut bad = image.clone();
    let at = word(&image, 64) as usize;
    set_word(&mut bad, at, 0x1234);
    let (found, mended) = checked(&bad, Repair::All);
    let found = found.unwrap();
    assert!(found.corruptions > 0 && found.leaks_fixed == 0, "{found:?}");
    assert!(guest(&dir, &mended) == active);
}

#[test]
fn damaged_bitmaps_are_given_up_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let image = written(&dir, "cluster_size=64k", &WRITES);
    let path = dir.path().join("written.qcow2");
    run_ok("qemu-img", &["bitmap", "--add", arg(&path), "b0"]);
    let before = guest(&dir, &image);
    let mut bad = std::fs::read(&path).unwrap();
    let extension = bad.windows(4).position(|window| window == 0x2385_2875u32.to_be_bytes()).unwrap();
    let directory = word(&bad, extension + 8 + 16) as usize;
    set_word(&mut bad, directory, 0x1_0001);
    assert!(report(&bad, Repair::Nothing).corruptions > 0);
    let (found, mended) = checked(&bad, Repair::All);
    assert_eq!(found.unwrap().corruptions, 0);
    assert_clean(&file(&dir, "mended.qcow2", &mended), "bitmaps");
    assert!(guest(&dir, &mended) == before);
}

#[test]
fn one_table_named_a_million_times_is_read_once() {
    let (memory, storage) = memory(Vec::new());
    let options = CreateOptions { size: 1 << 40, cluster_bytes: 512, ..CreateOptions::default() };
    let refused = block_on(create(&CX, &storage, &options));
    assert!(refused.is_err(), "512 bytes allow 128 GiB");
    let options = CreateOptions { size: 128 << 30, cluster_bytes: 512, ..CreateOptions::default() };
    block_on(create(&CX, &storage, &options)).unwrap();
    let mut image = memory.to_bytes();
    let l1 = word(&image, 40) as usize;
    let end = image.len() as u64;
    image.resize(image.len() + 1024, 0);
    for nth in 0..4 << 20 {
        set_word(&mut image, l1 + nth * 8, end);
    }
    for nth in 0..64 {
        set_word(&mut image, end as usize + nth * 8, end + 512);
    }
    let found = report(&image, Repair::Nothing);
    assert_eq!(found.allocated_clusters, (4 << 20) * 64);
    // 256 million references, more than 16 bits count.
    let (found, _) = checked(&image, Repair::All);
    assert!(found.unwrap().corruptions > 0);
}

/// Overwrites a word of metadata by chance.
fn damage(image: &mut [u8], places: &[(&'static str, usize, usize)], rng: &mut Rng) -> String {
    let (what, start, len) = places[rng.index(places.len())];
    let used: Vec<usize> = (0..len / 8).filter(|nth| word(image, start + nth * 8) != 0).collect();
    let nth =
        if used.is_empty() || rng.per_mille(150) { rng.index(len / 8) } else { used[rng.index(used.len())] };
    let at = start + nth * 8;
    let old = word(image, at);
    let value = match rng.below(6) {
        0 => rng.below(u64::MAX),
        1 => 0,
        2 | 3 => old ^ (1 << rng.below(64)),
        4 => (rng.below(image.len() as u64 / 512 + 20) * 512) | (old & COPIED),
        _ => word(image, places[rng.index(places.len())].1) ^ (rng.below(2) << 63),
    };
    set_word(image, at, value);
    format!("{what} at {at}: {old:#x} → {value:#x}")
}

/// How many seeds: more in a soak.
fn seeds(default: u64) -> u64 {
    std::env::var("SEEDS").map_or(default, |seeds| seeds.parse().unwrap())
}

#[test]
fn images_damaged_by_chance_are_clean_for_both_after_a_repair() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on",
        "compat=0.10,cluster_size=4k",
        "refcount_bits=32,cluster_size=1k",
    ];
    let mut found_by_both = 0;
    for (nth, kind) in kinds.iter().enumerate() {
        let image = written(&dir, kind, &WRITES);
        for seed in 0..seeds(25) {
            let mut rng = Rng::new(nth as u64 * 1000 + seed);
            let mut bad = image.clone();
            let mut what = format!("{kind}, seed {seed}");
            for _ in 0..1 + rng.below(4) {
                what += &format!("; {}", damage(&mut bad, &metadata(&image), &mut rng));
            }
            let path = file(&dir, "bad.qcow2", &bad);
            let ours = report(&bad, Repair::Nothing);
            let theirs = run_json_or_none(&path);
            if let Some(theirs) = theirs {
                let wrong = number(&theirs, "corruptions") + number(&theirs, "leaks") > 0;
                assert!(!wrong || ours.corruptions + ours.leaks > 0, "{what}: only QEMU finds it: {theirs}");
                found_by_both += u64::from(wrong);
            }
            let (found, mended) = checked(&bad, Repair::All);
            let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!((found.corruptions, found.leaks), (0, 0), "{what}: {found:?}");
            assert_clean(&file(&dir, "mended.qcow2", &mended), &what);
            let again = report(&mended, Repair::Nothing);
            assert_eq!((again.corruptions, again.leaks), (0, 0), "{what}");
        }
    }
    assert!(found_by_both > 75, "only {found_by_both} damages were found");
}

/// `qemu-img check`, where it opens the image.
fn run_json_or_none(path: &Path) -> Option<Value> {
    let output = run("qemu-img", &["check", "-f", "qcow2", "--output=json", arg(path)]);
    serde_json::from_slice(&output.stdout).ok()
}

/// Everything that the guest sees, as we read it.
async fn guest_of(storage: StorageHandle) -> Vec<u8> {
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let node = NodeHandle::new(Qcow2::open(&CX, storage, options).await.unwrap());
    node.read_vec(&CX, 0, node.len() as usize).await.unwrap().to_vec()
}

/// What a power cut leaves of a repair is repaired by the next one, to the same content.
fn cut(point: &CrashPoint, rng: &mut Rng, what: &str, expected: &[u8]) {
    for _ in 0..2 {
        let disk = SimDisk::with(point.random_power_cut(rng), DiskOptions::default());
        let storage = StorageHandle::new(disk);
        block_on(async {
            let found = check(&CX, &storage, Repair::All).await.unwrap();
            assert_eq!((found.corruptions, found.leaks), (0, 0), "{what}: {found:?}");
            assert!(guest_of(storage).await == expected, "{what}: content has changed");
        });
    }
}

#[test]
fn a_repair_that_is_cut_off_anywhere_is_done_by_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let image = written(&dir, "cluster_size=4k", &WRITES);
    let l1 = word(&image, 40) as usize;
    let l2 = (word(&image, l1) & !COPIED) as usize;
    let table = word(&image, 48) as usize;
    let block = word(&image, table) as usize;
    let entry = |nth: usize| word(&image, l2 + nth * 8);
    let cases: [(&str, Vec<(usize, u64)>); 5] = [
        ("refcounts wrong in both directions", vec![(block + 8, 0), (block + 64, 0x0003_0001_0000_0001)]),
        ("no refcount block", vec![(table, 0)]),
        (
            "entries and flags",
            vec![(l2 + 8, entry(1) | 0x200), (l2 + 32, entry(4) & !COPIED), (l2 + 48, entry(3))],
        ),
        ("an entry that names the block", vec![(l2 + 8, block as u64 | COPIED), (block + 8, 0)]),
        ("a dirty image without a table", vec![(48, 0), (56, 0), (72, 1)]),
    ];
    for (what, damage) in cases {
        let mut bad = image.clone();
        damage.iter().for_each(|(at, value)| set_word(&mut bad, *at, *value));
        let (found, mended) = checked(&bad, Repair::All);
        assert_eq!(found.unwrap().corruptions, 0, "{what}");
        let expected = block_on(guest_of(memory(mended).1));
        let disk = SimDisk::with(Media::from_bytes(&bad), DiskOptions::default());
        let (mut rng, again, points) = (Rng::new(1), expected.clone(), Arc::new(AtomicU64::new(0)));
        let seen = points.clone();
        disk.observe(move |point| {
            seen.fetch_add(1, Ordering::Relaxed);
            cut(point, &mut rng, what, &again);
        });
        block_on(check(&CX, &StorageHandle::new(disk.clone()), Repair::All)).unwrap();
        disk.stop_observing();
        assert!(points.load(Ordering::Relaxed) >= 4, "{what}: nothing was written");
        assert!(block_on(guest_of(StorageHandle::new(disk))) == expected, "{what}");
    }
}

#[test]
fn a_header_that_names_the_wrong_l1_table_costs_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let source = file(&dir, "source.raw", &content(2 << 20, 3));
    let path = dir.path().join("image.qcow2");
    let options = "cluster_size=512";
    run_ok("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-o", options, arg(&source), arg(&path)]);
    let mut image = std::fs::read(&path).unwrap();
    let info = run_json("qemu-img", &["map", "-f", "qcow2", "--output=json", arg(&path)]);
    let data = info[0]["offset"].as_u64().unwrap();
    set_word(&mut image, 40, data);
    let (found, after) = checked(&image, Repair::All);
    assert!(matches!(found, Err(OpenError::Refused { .. })), "{found:?}");
    assert_eq!(after, image);
}
