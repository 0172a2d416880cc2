use super::*;

const FILE: u64 = 65536 * 5;

fn header() -> Header {
    Header::new(Geometry::new(65536, 4).unwrap(), 1 << 30)
}

fn parse(sector: &[u8; SECTOR_BYTES]) -> Result<Header, OpenError> {
    Header::parse(sector, FILE).map(|(header, _)| header)
}

/// The header with a field changed.
fn with(at: usize, bytes: &[u8]) -> [u8; SECTOR_BYTES] {
    let mut header = header();
    header.put(at, bytes);
    header.sector
}

fn name(len: usize, format: Option<&str>) -> BackingRef {
    BackingRef { filename: "n".repeat(len), format: format.map(str::to_owned) }
}

#[test]
fn a_new_header_comes_back() {
    let parsed = parse(&header().sector).unwrap();
    assert_eq!(parsed.layout(), header().layout());
    assert_eq!((parsed.size(), parsed.features(), parsed.backing()), (1 << 30, Features::empty(), None));
}

#[test]
fn what_breaks_the_rules_is_refused_with_the_field() {
    let cases: [(usize, &[u8], &str); 11] = [
        (0, b"QEX", "not a qed image"),
        (4, &12345_u32.to_le_bytes(), "cluster size is 12345"),
        (8, &3_u32.to_le_bytes(), "table size is 3"),
        (12, &0_u32.to_le_bytes(), "0 clusters"),
        (12, &u32::MAX.to_le_bytes(), "4294967295 clusters"),
        (12, &2_u32.to_le_bytes(), "behind the header of 131072"),
        (40, &65537_u64.to_le_bytes(), "L1 table lies at byte 65537"),
        (40, &131072_u64.to_le_bytes(), "end before the file's end at 327680"),
        (40, &(!65535_u64).to_le_bytes(), "L1 table"),
        (48, &1000_u64.to_le_bytes(), "multiple of 512"),
        (48, &(1_u64 << 62).to_le_bytes(), "at most"),
    ];
    for (at, bytes, expected) in cases {
        let error = parse(&with(at, bytes)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} lacks {expected}");
    }
}

#[test]
fn an_unknown_incompatible_bit_is_refused_by_number_and_other_bits_are_not() {
    let error = parse(&with(16, &(1_u64 << 3 | 1 << 40).to_le_bytes())).unwrap_err().to_string();
    assert!(error.contains("bit 3, 40"), "{error}");
    let header = parse(&with(24, &[0xff; 16])).unwrap();
    assert_eq!(header.autoclear(), u64::MAX);
    let cleared = header.with_autoclear(0);
    assert_eq!(parse(&cleared.sector).unwrap().autoclear(), 0);
    // The compatible bits stay.
    assert_eq!(cleared.sector[24..32], [0xff; 8]);
}

#[test]
fn a_backing_name_outside_of_the_header_is_refused() {
    for (at, len) in [(0_u32, 4_u32), (63, 4), (65533, 4), (u32::MAX, 4), (64, 0), (64, 1024), (64, u32::MAX)]
    {
        let mut bytes = with(16, &1_u64.to_le_bytes());
        bytes[56..60].copy_from_slice(&at.to_le_bytes());
        bytes[60..64].copy_from_slice(&len.to_le_bytes());
        assert!(Header::parse(&bytes, FILE).is_err(), "{at} {len}");
    }
}

#[test]
fn a_change_touches_its_own_bytes_only() {
    let mut header = header();
    header.put(300, b"extra");
    let changed = header.with_need_check(true).with_size(4096).with_need_check(false).with_size(1 << 30);
    assert_eq!(changed.sector, header.sector);
    let (named, before) = header.with_backing(Some(&name(100, Some("raw")))).unwrap();
    assert!(before.is_none());
    assert_eq!(&named.sector[300..305], b"extra");
    let dropped = named.with_backing(None).unwrap().0;
    assert_eq!((dropped.features(), dropped.backing()), (Features::empty(), None));
    assert_eq!(parse(&dropped.sector).unwrap().backing(), None);
}

#[test]
fn only_raw_is_kept_from_probing() {
    let backing = |format| header().with_backing(Some(&name(10, format))).unwrap().0;
    assert_eq!(backing(Some("raw")).backing().unwrap().format.as_deref(), Some("raw"));
    assert!(backing(Some("raw")).features().contains(Features::BACKING_FORMAT_NO_PROBE));
    assert_eq!(backing(Some("qcow2")).backing().unwrap().format, None);
    assert!(!backing(None).features().contains(Features::BACKING_FORMAT_NO_PROBE));
}

#[test]
fn a_long_name_is_never_written_over_the_one_that_is_named_now() {
    let small = Header::new(Geometry::new(4096, 1).unwrap(), 1 << 20);
    let mut header = small.clone();
    for len in [1023, 449, 1023, 513, 600, 1, 1023, 1000, 448, 1023] {
        let (next, before) = header.with_backing(Some(&name(len, None))).unwrap();
        if let Some((at, bytes)) = before {
            let old = header.backing.as_ref().map_or(0..0, |(old, _)| old.at..old.at + old.len as u64);
            let new = at..at + bytes.len() as u64;
            assert!(new.start >= 512 && new.end <= 4096, "{new:?}");
            assert!(new.end <= old.start || old.end <= new.start, "{old:?} {new:?}");
        }
        header = next;
    }
    // Wherever the old name lies in a header of the least size.
    for at in HEADER_BYTES as u64..=4096 - 1023 {
        let mut header = small.clone();
        header.backing = Some((NamePlace { at, len: 1023 }, "x".repeat(1023)));
        header.with_backing(Some(&name(1023, None))).unwrap();
    }
    assert!(small.with_backing(Some(&name(1024, None))).is_err());
    assert!(small.with_backing(Some(&name(0, None))).is_err());
}
