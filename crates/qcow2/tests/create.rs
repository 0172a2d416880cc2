//! Created images, judged by QEMU over the matrix of options.

mod common;

use common::{arg, assert_clean, file, memory, run_json};
use infill_base::{CreateError, Ctx, ErrorKind};
use infill_node::BackingRef;
use infill_qcow2::{Compression, CreateOptions, Header, Preallocation, Purpose, create};
use infill_sim::{DiskOp, SimDisk, block_on};
use infill_storage::StorageHandle;

fn image(options: &CreateOptions) -> Vec<u8> {
    let (memory, storage) = memory(Vec::new());
    block_on(create(&Ctx::GUEST, &storage, options)).unwrap_or_else(|error| panic!("{options:?}: {error}"));
    memory.to_bytes()
}

fn matrix() -> Vec<CreateOptions> {
    let mut all = Vec::new();
    for cluster_bytes in (9..=21).map(|bits| 1u64 << bits) {
        let plain = CreateOptions { cluster_bytes, size: 100 << 20, ..CreateOptions::default() };
        all.push(CreateOptions { version: 2, ..plain.clone() });
        all.push(CreateOptions { size: 0, ..plain.clone() });
        all.push(CreateOptions { size: 512, lazy_refcounts: true, ..plain.clone() });
        all.push(CreateOptions { compression: Compression::Zstd, ..plain.clone() });
        all.push(CreateOptions { extended_l2: cluster_bytes >= 16 << 10, size: 3 << 30, ..plain.clone() });
        let preallocation = Preallocation::Metadata;
        all.push(CreateOptions { preallocation, size: (5 << 20) + 512, ..plain.clone() });
        let order = cluster_bytes.trailing_zeros() % 7;
        all.push(CreateOptions { refcount_bits: 1 << order, ..plain });
    }
    for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
        all.push(CreateOptions {
            refcount_bits,
            size: 1 << 30,
            cluster_bytes: 512,
            ..CreateOptions::default()
        });
    }
    all.push(CreateOptions { size: 1 << 40, cluster_bytes: 4096, ..CreateOptions::default() });
    all
}

#[test]
fn qemu_finds_every_created_image_clean_and_as_it_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for options in matrix() {
        let what = format!("{options:?}");
        let path = file(&dir, "image.qcow2", &image(&options));
        assert_clean(&path, &what);
        let info = run_json("qemu-img", &["info", "-f", "qcow2", "--output=json", arg(&path)]);
        assert_eq!(info["virtual-size"], options.size, "{what}");
        assert_eq!(info["cluster-size"], options.cluster_bytes, "{what}");
        let data = &info["format-specific"]["data"];
        assert_eq!(data["compat"], if options.version == 2 { "0.10" } else { "1.1" }, "{what}");
        assert_eq!(data["refcount-bits"], options.refcount_bits, "{what}");
        assert_eq!(data["compression-type"], options.compression.name(), "{what}");
        if options.version == 3 {
            assert_eq!(data["extended-l2"], options.extended_l2, "{what}");
            assert_eq!(data["lazy-refcounts"], options.lazy_refcounts, "{what}");
            assert_eq!(data["corrupt"], false, "{what}");
        }
    }
}

#[test]
fn a_preallocated_image_has_every_cluster_and_shows_nothing_of_what_the_storage_held() {
    let dir = tempfile::tempdir().unwrap();
    let size = (3 << 20) + 512;
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for extended_l2 in [false, true] {
            let (memory, storage) = memory(vec![0xa5; 8 << 20]);
            let options = CreateOptions { size, preallocation, extended_l2, ..CreateOptions::default() };
            block_on(create(&Ctx::GUEST, &storage, &options)).unwrap();
            let path = file(&dir, "image.qcow2", &memory.to_bytes());
            let what = format!("{options:?}");
            assert_clean(&path, &what);
            let map = run_json("qemu-img", &["map", "-f", "qcow2", "--output=json", arg(&path)]);
            let present = map.as_array().unwrap().iter().all(|extent| extent["present"] == true);
            assert_eq!(present, !extended_l2, "{what}: {map}");
            let zero = format!("read -P 0 0 {size}");
            let out = std::process::Command::new("qemu-io")
                .args(["-r", "-f", "qcow2", "-c", &zero, arg(&path)])
                .output()
                .unwrap();
            assert!(!String::from_utf8_lossy(&out.stdout).contains("failed"), "{what}");
        }
    }
}

#[test]
fn a_preallocated_overlay_lets_its_backing_show_through_or_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    file(&dir, "base.raw", &[7; 1 << 20]);
    let backing = Some(BackingRef { filename: "base.raw".into(), format: Some("raw".into()) });
    let preallocation = Preallocation::Metadata;
    let options = CreateOptions { size: 1 << 20, backing, preallocation, ..CreateOptions::default() };
    let (_, storage) = memory(Vec::new());
    assert!(block_on(create(&Ctx::GUEST, &storage, &options)).is_err());
    let path = file(&dir, "overlay.qcow2", &image(&CreateOptions { extended_l2: true, ..options }));
    assert_clean(&path, "an overlay");
    let out = std::process::Command::new("qemu-io")
        .args([
            "-f",
            "qcow2",
            "-c",
            "read -P 7 0 1M",
            "-c",
            "write -P 1 64k 4k",
            "-c",
            "read -P 7 68k 60k",
            arg(&path),
        ])
        .output()
        .unwrap();
    assert!(!String::from_utf8_lossy(&out.stdout).contains("failed"), "{out:?}");
    assert_clean(&path, "an overlay that was written to");
}

#[test]
fn qemu_and_we_find_the_backing_file_in_every_cluster_size() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}base.raw", "./".repeat(170));
    file(&dir, "base.raw", &[0; 4096]);
    file(&dir, "a name with spaces in it, and one that is rather long.img", &[0; 4096]);
    for (version, bits) in [(2, 9), (3, 9), (3, 10), (2, 16), (3, 16), (3, 21)] {
        for name in ["base.raw", "a name with spaces in it, and one that is rather long.img", &long] {
            for format in [None, Some("raw".to_owned())] {
                let backing = BackingRef { filename: name.to_owned(), format };
                let options = CreateOptions {
                    version,
                    size: 1 << 20,
                    cluster_bytes: 1 << bits,
                    backing: Some(backing.clone()),
                    ..CreateOptions::default()
                };
                let bytes = image(&options);
                let header = Header::parse(&bytes, bytes.len() as u64, Purpose::Use).unwrap();
                assert_eq!(header.backing(), Some(backing), "{options:?}");
                let path = file(&dir, "overlay.qcow2", &bytes);
                assert_clean(&path, &format!("{options:?}"));
                let info = run_json("qemu-img", &["info", "-f", "qcow2", "--output=json", arg(&path)]);
                assert_eq!(info["backing-filename"], name, "{options:?}");
                if options.backing.as_ref().is_some_and(|backing| backing.format.is_some()) {
                    assert_eq!(info["backing-filename-format"], "raw", "{options:?}");
                }
            }
        }
    }
}

#[test]
fn options_that_do_not_fit_are_refused_with_what_is_possible() {
    let good = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
    let v2 = CreateOptions { version: 2, ..good.clone() };
    let backing = |filename: &str, format: Option<&str>| {
        Some(BackingRef { filename: filename.into(), format: format.map(Into::into) })
    };
    let cases = [
        ("version", "2 and 3", CreateOptions { version: 4, ..good.clone() }),
        ("cluster_size", "512 to 2097152", CreateOptions { cluster_bytes: 256, ..good.clone() }),
        ("cluster_size", "512 to 2097152", CreateOptions { cluster_bytes: 4 << 20, ..good.clone() }),
        ("cluster_size", "powers of two", CreateOptions { cluster_bytes: 65537, ..good.clone() }),
        ("refcount_bits", "powers of two from 1 to 64", CreateOptions { refcount_bits: 0, ..good.clone() }),
        ("refcount_bits", "powers of two from 1 to 64", CreateOptions { refcount_bits: 24, ..good.clone() }),
        ("refcount_bits", "powers of two from 1 to 64", CreateOptions { refcount_bits: 128, ..good.clone() }),
        ("refcount_bits", "version 3", CreateOptions { refcount_bits: 8, ..v2.clone() }),
        ("extended_l2", "version 3", CreateOptions { extended_l2: true, ..v2.clone() }),
        ("extended_l2", "16384", CreateOptions { extended_l2: true, cluster_bytes: 8192, ..good.clone() }),
        ("compression_type", "version 3", CreateOptions { compression: Compression::Zstd, ..v2.clone() }),
        ("lazy_refcounts", "version 3", CreateOptions { lazy_refcounts: true, ..v2 }),
        ("size", "multiples of 512", CreateOptions { size: 1000, ..good.clone() }),
        ("size", "larger clusters", CreateOptions { size: 1 << 50, cluster_bytes: 512, ..good.clone() }),
        ("size", "more than", CreateOptions { size: u64::MAX - 511, cluster_bytes: 2 << 20, ..good.clone() }),
        ("backing_file", "1 to 1023", CreateOptions { backing: backing("", None), ..good.clone() }),
        (
            "backing_file",
            "1 to 1023",
            CreateOptions { backing: backing(&"x".repeat(1024), None), ..good.clone() },
        ),
        (
            "backing_file",
            "larger clusters",
            CreateOptions { backing: backing(&"x".repeat(500), None), cluster_bytes: 512, ..good.clone() },
        ),
        ("backing_fmt", "qcow2", CreateOptions { backing: backing("x", Some("")), ..good }),
    ];
    for (expected, words, options) in cases {
        let (memory, storage) = memory(vec![7; 100]);
        match block_on(create(&Ctx::GUEST, &storage, &options)) {
            Err(CreateError::BadOption { option, why }) => {
                assert_eq!(option, expected, "{options:?}: {why}");
                assert!(why.contains(words), "{options:?}: {why}");
            }
            other => panic!("{options:?}: {other:?}"),
        }
        assert_eq!(memory.to_bytes(), [7; 100], "a refused creation has written");
    }
}

#[test]
fn an_image_exists_only_once_all_of_it_is_stable() {
    let disk = SimDisk::new(0);
    let storage = StorageHandle::new(disk.clone());
    disk.fail(DiskOp::Sync, 0, 1, ErrorKind::Io);
    let options = CreateOptions { size: 1 << 30, ..CreateOptions::default() };
    assert!(block_on(create(&Ctx::GUEST, &storage, &options)).is_err());
    let mut first = [0; 4];
    disk.media().read(0, &mut first);
    assert_eq!(first, [0; 4], "the header was written before what it points to was stable");
}

#[test]
fn a_device_that_is_too_small_is_told_from_one_that_fails() {
    let disk = SimDisk::new(0);
    disk.set_capacity(100 << 10);
    let options = CreateOptions { size: 1 << 30, ..CreateOptions::default() };
    match block_on(create(&Ctx::GUEST, &StorageHandle::new(disk), &options)) {
        Err(CreateError::Io(error)) => assert_eq!(error.kind(), ErrorKind::NoSpace),
        other => panic!("{other:?}"),
    }
}

#[test]
fn old_bytes_of_a_device_do_not_show_through() {
    let (memory, storage) = memory(vec![0xff; 1 << 20]);
    let options = CreateOptions { size: 1 << 30, ..CreateOptions::default() };
    block_on(create(&Ctx::GUEST, &storage, &options)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    assert_clean(&file(&dir, "image.qcow2", &memory.to_bytes()), "over old bytes");
}
