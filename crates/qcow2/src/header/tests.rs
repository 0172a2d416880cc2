//! Headers made by hand, damaged by hand, changed, and torn.

use infill_sim::block_on;
use infill_storage::MemoryStorage;
use proptest::prelude::*;

use super::*;
use crate::features::MOVED;

/// Length of the file that the headers here claim to belong to.
const FILE_LEN: u64 = 1 << 20;

/// A version 3 header with 64 KiB clusters and a disk of 1 GiB.
fn sample() -> Vec<u8> {
    let mut bytes = vec![0; 65536];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &MAGIC.to_be_bytes());
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 30).to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &0x30000u64.to_be_bytes());
    put(48, &0x10000u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    bytes
}

fn with(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = sample();
    for (at, value) in changes {
        bytes[*at..*at + value.len()].copy_from_slice(value);
    }
    bytes
}

fn with_extensions(extensions: &[Extension]) -> Vec<u8> {
    with(&[(112, &serialize_extensions(extensions))])
}

fn parse(bytes: &[u8]) -> Result<Header, OpenError> {
    Header::parse(bytes, FILE_LEN, Purpose::Use)
}

fn refusal(bytes: &[u8]) -> String {
    parse(bytes).expect_err("a damaged header was accepted").to_string()
}

fn backing(filename: &str, format: Option<&str>) -> BackingRef {
    BackingRef { filename: filename.into(), format: format.map(Into::into) }
}

fn u32b(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn u64b(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

#[test]
fn fields_come_out_as_they_are_in_the_file() {
    let header = parse(&sample()).unwrap();
    assert_eq!((header.version(), header.size()), (3, 1 << 30));
    assert_eq!(header.l1(), TableRef { at: HostOffset(0x30000), count: 2 });
    assert_eq!(header.refcount_table_entries(), 8192);
    assert_eq!(header.writable().unwrap(), WriteGate::Ready);
    assert!(header.backing().is_none() && header.extensions().is_empty());
}

#[test]
fn every_damaged_field_is_refused_with_its_name() {
    let backing_at = |at: u64, len: u32| with(&[(8, &u64b(at)), (16, &u32b(len))]);
    let long = Extension { kind: 7, data: vec![0; 8] };
    let mut escaping = with_extensions(std::slice::from_ref(&long));
    escaping[116..120].copy_from_slice(&u32b(u32::MAX));
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (with(&[(0, b"QED\0")]), "not a qcow2 image"),
        (Vec::new(), "not a qcow2 image"),
        (sample()[..20].to_vec(), "the file ends after 20 bytes"),
        (sample()[..103].to_vec(), "the file ends after 103 bytes"),
        (with(&[(4, &u32b(0))]), "format version 0"),
        (with(&[(4, &u32b(1))]), "version 1"),
        (with(&[(4, &u32b(4))]), "format version 4"),
        (with(&[(20, &u32b(8))]), "cluster_bits is 8"),
        (with(&[(20, &u32b(22))]), "cluster_bits is 22"),
        (with(&[(20, &u32b(u32::MAX))]), "cluster_bits"),
        (with(&[(24, &u64b(u64::MAX))]), "size is"),
        (with(&[(24, &u64b(1 << 53))]), "size is"),
        (with(&[(24, &u64b(1 << 31))]), "4 are needed"),
        (with(&[(32, &u32b(1))]), "AES encryption"),
        (with(&[(32, &u32b(2))]), "LUKS encryption"),
        (with(&[(32, &u32b(3))]), "crypt_method is 3"),
        (with(&[(36, &u32b(0))]), "the L1 table has 0 entries"),
        (with(&[(36, &u32b(u32::MAX))]), "the L1 table has 34359738360 bytes"),
        (with(&[(36, &u32b(1 << 20))]), "ends behind the file"),
        (with(&[(40, &u64b(0))]), "the L1 table lies at byte 0"),
        (with(&[(40, &u64b(0x30200))]), "must be a multiple of the cluster size"),
        (with(&[(40, &u64b(FILE_LEN))]), "ends behind the file"),
        (with(&[(40, &u64b(0xffff_ffff_ffff_0000))]), "ends behind the file"),
        (with(&[(48, &u64b(0))]), "the refcount table lies at byte 0"),
        (with(&[(48, &u64b(0x10001))]), "must be a multiple of the cluster size"),
        (with(&[(48, &u64b(FILE_LEN))]), "ends behind the file"),
        (with(&[(56, &u32b(0))]), "no refcount table"),
        (with(&[(56, &u32b(u32::MAX))]), "the refcount table has"),
        (with(&[(60, &u32b(65537))]), "65537 internal snapshots"),
        (with(&[(60, &u32b(1)), (64, &u64b(0x10200))]), "the snapshot table lies at byte"),
        (with(&[(60, &u32b(1)), (64, &u64b(FILE_LEN))]), "the snapshot table at byte"),
        (with(&[(60, &u32b(1)), (64, &u64b(0))]), "the snapshot table lies at byte 0"),
        (with(&[(72, &u64b(1 << 2))]), "an external data file"),
        (with(&[(72, &u64b(1 << 5))]), "incompatible feature 5"),
        (with(&[(72, &u64b(1 << 63))]), "incompatible feature 63"),
        (with(&[(72, &u64b(1 << MOVED))]), "moved to another host"),
        (with(&[(72, &u64b(1 << 3))]), "compression_type is 0"),
        (with(&[(104, &[1])]), "compression_type is 1"),
        (with(&[(72, &u64b(1 << 3)), (104, &[2])]), "compression type 2"),
        (with(&[(72, &u64b(1 << 4)), (20, &u32b(13))]), "at least 14"),
        (with(&[(88, &u64b(1))]), "no bitmaps extension"),
        (with(&[(96, &u32b(7))]), "refcount_order is 7"),
        (with(&[(100, &u32b(96))]), "header_length is 96"),
        (with(&[(100, &u32b(113))]), "header_length is 113"),
        (with(&[(100, &u32b(65544))]), "header_length is 65544"),
        (with(&[(100, &u32b(u32::MAX - 7))]), "header_length"),
        (backing_at(0x200, 0), "has 0 bytes"),
        (backing_at(0x200, 1024), "has 1024 bytes"),
        (backing_at(16, 8), "outside of the header"),
        (backing_at(65530, 8), "outside of the header"),
        (backing_at(u64::MAX, 8), "outside of the header"),
        (backing_at(0x200, 8), "zero byte"),
        (with(&[(8, &u64b(0x200)), (16, &u32b(2)), (0x200, &[0xff, 0xfe])]), "not UTF-8"),
        (escaping, "leaves the header's area"),
        (with_extensions(&[long.clone(), long]), "appears twice"),
        (
            with_extensions(&[Extension { kind: extension::ENCRYPTION, data: vec![0; 16] }]),
            "crypt_method is 0",
        ),
        (
            with_extensions(&[Extension { kind: extension::DATA_FILE, data: vec![b'x'; 3] }]),
            "external data file",
        ),
    ];
    assert!(cases.len() >= 50);
    for (bytes, expected) in cases {
        let found = refusal(&bytes);
        assert!(found.contains(expected), "expected \"{expected}\", found \"{found}\"");
    }
}

#[test]
fn an_unknown_incompatible_feature_is_refused_by_the_name_in_the_image() {
    let mut name = vec![0, 9];
    name.extend_from_slice(b"time\x1b travel");
    name.resize(48, 0);
    let mut bytes = with_extensions(&[Extension { kind: extension::FEATURE_NAMES, data: name }]);
    bytes[72..80].copy_from_slice(&u64b(1 << 9));
    assert!(refusal(&bytes).contains("incompatible feature 9 (\"time travel\")"), "{}", refusal(&bytes));
}

#[test]
fn a_check_opens_what_has_no_refcount_table() {
    for change in [(56, u32b(0).to_vec()), (48, u64b(0x10200).to_vec()), (56, u32b(1 << 20).to_vec())] {
        let bytes = with(&[(change.0, &change.1)]);
        assert!(parse(&bytes).is_err());
        assert!(Header::parse(&bytes, FILE_LEN, Purpose::Check).is_ok());
    }
}

#[test]
fn a_corrupt_image_is_readable_only_and_a_dirty_one_repaired_before_it_is_written() {
    let corrupt = parse(&with(&[(72, &u64b(2))])).unwrap();
    assert!(corrupt.writable().unwrap_err().to_string().contains("marked corrupt"));
    let dirty = parse(&with(&[(72, &u64b(1))])).unwrap();
    assert_eq!(dirty.writable().unwrap(), WriteGate::RepairFirst);
}

#[test]
fn version_2_ignores_what_lies_where_version_3_has_features() {
    let mut bytes = with(&[(4, &u32b(2)), (72, &[0; 40])]);
    bytes[72..92].copy_from_slice(&serialize_extensions(&[Extension { kind: 9, data: vec![7; 4] }])[..20]);
    let header = parse(&bytes).unwrap();
    assert_eq!(header.incompatible(), Incompatible::empty());
    assert_eq!(header.extensions(), [Extension { kind: 9, data: vec![7; 4] }]);
    assert!(header.changed(&[HeaderChange::Autoclear(Autoclear::VOLATILE_JOURNAL)]).is_err());
}

#[test]
fn a_change_touches_the_bytes_of_its_own_fields_only() {
    let mut bytes = with(&[(80, &u64b(0xf0)), (104, &[0, 1, 2, 3])]);
    bytes[200..512].fill(0xa5);
    bytes[112..120].fill(0);
    let header = parse(&bytes).unwrap();
    let l1 = TableRef { at: HostOffset(0x50000), count: 7 };
    let changed = header
        .changed(&[
            HeaderChange::Incompatible(Incompatible::DIRTY),
            HeaderChange::Autoclear(Autoclear::VOLATILE_JOURNAL),
            HeaderChange::Size(2 << 30),
            HeaderChange::L1(l1),
            HeaderChange::RefcountTable(TableRef { at: HostOffset(0x70000), count: 2 }),
            HeaderChange::Snapshots(TableRef { at: HostOffset(0x90000), count: 1 }),
            HeaderChange::DropBacking,
        ])
        .unwrap();
    bytes[..512].copy_from_slice(changed.sector());
    let read = parse(&bytes).unwrap();
    assert_eq!(read.l1(), l1);
    assert_eq!(read.refcount_table(), TableRef { at: HostOffset(0x70000), count: 2 });
    assert_eq!(read.snapshots(), TableRef { at: HostOffset(0x90000), count: 1 });
    assert_eq!((read.size(), read.incompatible()), (2 << 30, Incompatible::DIRTY));
    assert_eq!(read.autoclear(), Autoclear::VOLATILE_JOURNAL);
    assert_eq!(read.compatible().bits(), 0xf0);
    assert_eq!(&read.sector()[104..108], [0, 1, 2, 3]);
    assert!(read.sector()[200..].iter().all(|byte| *byte == 0xa5));
    assert!(
        header.changed(&[HeaderChange::Size(1 << 40)]).is_err(),
        "a size that the L1 table does not cover"
    );
    assert!(header.changed(&[HeaderChange::Incompatible(Incompatible::EXTENDED_L2)]).is_err());
}

#[test]
fn dropping_the_backing_file_zeroes_bytes_8_to_19_only() {
    let bytes = with(&[(8, &u64b(0x210)), (16, &u32b(4)), (0x210, b"base")]);
    let header = parse(&bytes).unwrap();
    assert_eq!(header.backing(), Some(backing("base", None)));
    let dropped = header.changed(&[HeaderChange::DropBacking]).unwrap();
    assert!(dropped.backing().is_none());
    let differs: Vec<usize> = (0..512).filter(|at| dropped.sector()[*at] != bytes[*at]).collect();
    assert!(!differs.is_empty() && differs.iter().all(|at| (8..20).contains(at)), "{differs:?}");
}

/// Extensions as QEMU's images have them, with a feature table that leaves the first sector.
fn qemu_extensions(names: usize) -> Vec<Extension> {
    let table = (0..names * 48).map(|at| at as u8 | 1).collect();
    vec![
        Extension { kind: extension::BACKING_FORMAT, data: b"raw".to_vec() },
        Extension { kind: extension::FEATURE_NAMES, data: table },
        Extension { kind: 0x1234, data: b"kept".to_vec() },
    ]
}

/// Every subset of the first write, which is not synced when the power goes, leaves the old header readable; after the
/// sync, the second write is one sector.
fn assert_never_torn(bytes: &[u8], new: &BackingRef) {
    let header = parse(bytes).unwrap();
    let rewrite = header.with_backing(new).unwrap();
    for lost in 0..bytes.len() / 512 {
        let mut torn = bytes.to_vec();
        for (at, byte) in rewrite.tail.iter().enumerate() {
            if (at + 512) / 512 % (lost + 2) != 0 {
                torn[at + 512] = *byte;
            }
        }
        let found = parse(&torn).unwrap();
        assert_eq!((found.backing(), found.extensions()), (header.backing(), header.extensions()));
    }
    let storage = std::sync::Arc::new(MemoryStorage::from_bytes(bytes.to_vec()));
    let handle = StorageHandle::from_arc(storage.clone());
    block_on(async move { rewrite.store(&Ctx::GUEST, &handle).await }).unwrap();
    let found = parse(&storage.to_bytes()).unwrap();
    assert_eq!(found.backing().as_ref(), Some(new));
    let others = |header: &Header| {
        let kept = |found: &&Extension| {
            found.kind != extension::BACKING_FORMAT && found.kind != extension::FEATURE_NAMES
        };
        header.extensions().iter().filter(kept).cloned().collect::<Vec<_>>()
    };
    assert_eq!(others(&found), others(&header));
}

#[test]
fn a_new_backing_name_is_never_torn() {
    for names in [0, 2, 7, 8, 12] {
        let mut bytes = with_extensions(&qemu_extensions(names));
        let at = 112 + serialize_extensions(&qemu_extensions(names)).len();
        bytes[at..at + 4].copy_from_slice(b"base");
        bytes[8..16].copy_from_slice(&u64b(at as u64));
        bytes[16..20].copy_from_slice(&u32b(4));
        assert_never_torn(&bytes, &backing("a-name-that-is-longer.qcow2", Some("qcow2")));
        assert_never_torn(&bytes, &backing("x", Some("raw")));
        assert_never_torn(&bytes, &backing(&"y".repeat(1023), None));
        if names <= 7 {
            assert_never_torn(&bytes, &backing("z", Some("a-format-of-sixteen")));
        }
    }
    assert_never_torn(&sample(), &backing("base", Some("raw")));
    assert_never_torn(&sample(), &backing("base", None));
}

#[test]
fn a_header_without_room_for_a_name_says_so() {
    let mut bytes = with_extensions(&[Extension { kind: 5, data: vec![1; 65536 - 112 - 24] }]);
    let error = parse(&bytes).unwrap().with_backing(&backing("base", Some("raw"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    bytes = sample();
    let error = parse(&bytes).unwrap().with_backing(&backing(&"n".repeat(1024), None)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
        let _ = Header::parse(&bytes, bytes.len() as u64, Purpose::Check);
    }

    #[test]
    fn damaged_headers_never_make_the_parser_panic(
        damage in proptest::collection::vec((0usize..700, any::<u8>()), 1..12), len: u64, v2: bool,
    ) {
        let mut bytes = with_extensions(&qemu_extensions(8));
        if v2 {
            bytes[7] = 2;
        }
        for (at, byte) in damage {
            bytes[at] = byte;
        }
        if let Ok(header) = Header::parse(&bytes, len, Purpose::Use) {
            let _ = (header.writable(), header.bitmaps(), header.with_backing(&backing("b", Some("raw"))));
        }
    }
}

#[test]
fn the_mark_of_a_disk_that_moved_is_set_also_where_its_name_has_no_room() {
    for (len, named) in [(8, true), (380, false)] {
        let mut bytes = with_extensions(&[Extension { kind: 7, data: vec![1; len] }]);
        bytes[20..24].copy_from_slice(&u32b(9));
        bytes[24..32].copy_from_slice(&u64b(0));
        let header = parse(&bytes[..512]).unwrap();
        let rewrite = header.with_fence(true).unwrap();
        assert!(rewrite.header.is_fenced() && !header.is_fenced());
        assert_eq!(rewrite.header.extensions()[0], header.extensions()[0]);
        assert_eq!(rewrite.header.extensions().len() == 2, named, "{len}");
        assert!(rewrite.tail.is_empty(), "a cluster of one sector has no tail");
        let back = rewrite.header.with_fence(false).unwrap();
        assert!(!back.header.is_fenced());
        if !named {
            assert_eq!(back.header.sector(), header.sector());
        }
    }
}
