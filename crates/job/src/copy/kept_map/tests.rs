use std::sync::atomic::AtomicU64;

use super::*;

const LEN: u64 = 10 * 1000 * 1000;

/// Memory that outlives whoever holds it.
struct Pages(Vec<AtomicU64>);

impl JournalMemory for Pages {
    fn reserve(&self) -> IoResult<()> {
        Ok(())
    }
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
    fn remove(&self) {}
    fn name(&self) -> String {
        "pages".into()
    }
}

fn pages() -> Arc<Pages> {
    Arc::new(Pages((0..owner().bytes() / WORD_BYTES).map(|_| AtomicU64::new(0)).collect()))
}

fn owner() -> MapOwner {
    MapOwner {
        generation: 7,
        boot: BootId(3 << 70 | 5),
        identity: "job 'm'".into(),
        len: LEN,
        granularity: BLOCK_BYTES,
    }
}

fn runs(map: &KeptMap) -> Vec<std::ops::Range<u64>> {
    let dirty = DirtyMap::new(LEN, BLOCK_BYTES);
    map.copy_into(&dirty);
    std::iter::successors(dirty.next_dirty(0, u64::MAX), |run| dirty.next_dirty(run.end, u64::MAX)).collect()
}

#[test]
fn a_successor_finds_what_is_marked_and_how_far_it_was() {
    let pages = pages();
    let map = KeptMap::begin(pages.clone(), owner(), false).unwrap();
    map.mark(5000, 1);
    assert!(KeptMap::find(pages.clone(), owner()).unwrap_err().contains("valid"), "not live yet");
    map.go_live();
    map.mark(100 * BLOCK_BYTES, 70 * BLOCK_BYTES);
    map.clear(101 * BLOCK_BYTES, BLOCK_BYTES);
    map.mark(LEN - 1, 1);
    map.mark(LEN, 1 << 20);
    map.set_walked(6_000_000);
    map.set_copied(42);
    map.set_alive(77);
    let found = KeptMap::find(pages.clone(), owner()).unwrap();
    let blocks = |first: u64, end: u64| first * BLOCK_BYTES..(end * BLOCK_BYTES).min(LEN);
    let last = LEN / BLOCK_BYTES;
    assert_eq!(runs(&found), [blocks(1, 2), blocks(100, 101), blocks(102, 170), blocks(last, last + 1)]);
    assert_eq!((found.walked(), found.copied()), (6_000_000 / BLOCK_BYTES * BLOCK_BYTES, 42));
    assert_eq!(found.alive(), 77);
    assert!(found.is_found() && !map.is_found());
    assert!(found.has_marked(LEN - 10, 100) && !found.has_marked(101 * BLOCK_BYTES, BLOCK_BYTES));
    found.set_walked(LEN);
    assert_eq!(found.walked(), LEN);
    found.void();
    assert!(KeptMap::find(pages, owner()).is_err());
}

#[test]
fn one_of_another_owner_is_not_believed() {
    let pages = pages();
    KeptMap::begin(pages.clone(), owner(), false).unwrap().go_live();
    let others = [
        MapOwner { generation: 8, ..owner() },
        MapOwner { boot: BootId(1), ..owner() },
        MapOwner { identity: "job 'n'".into(), ..owner() },
        MapOwner { len: LEN - 1, ..owner() },
        MapOwner { granularity: 2 * BLOCK_BYTES, ..owner() },
        MapOwner { len: LEN * 2, ..owner() },
    ];
    for other in others {
        assert!(KeptMap::find(pages.clone(), other.clone()).is_err(), "{other:?}");
    }
    KeptMap::find(pages, owner()).unwrap();
}

#[test]
fn a_word_that_was_changed_by_somebody_else_is_not_believed_anywhere() {
    let pages = pages();
    let map = KeptMap::begin(pages.clone(), owner(), false).unwrap();
    map.mark(0, LEN / 2);
    map.go_live();
    let counted = (AT_MAGIC..=AT_WALKED).chain([AT_ALIVE]).chain(HEADER_WORDS..pages.0.len());
    for at in counted {
        for value in [0, u64::MAX, pages.0[at].load(Ordering::Relaxed) ^ 1] {
            let before = pages.0[at].swap(value, Ordering::Relaxed);
            let found = KeptMap::find(pages.clone(), owner());
            assert_eq!(found.is_err(), before != value, "word {at}: {value:x}");
            pages.0[at].store(before, Ordering::Relaxed);
        }
    }
    // Two words that are right in each other's place.
    let (first, last) = (HEADER_WORDS, HEADER_WORDS + 1);
    let one = pages.0[first].load(Ordering::Relaxed);
    pages.0[first].store(pages.0[last].swap(one, Ordering::Relaxed), Ordering::Relaxed);
    assert!(KeptMap::find(pages.clone(), owner()).unwrap_err().contains("damaged"));
    // Whoever changes such a word says that all is worth nothing, for good.
    map.clear(0, BLOCK_BYTES);
    assert!(!map.is_live());
    map.go_live();
    assert!(!map.is_live());
}

#[test]
fn a_map_that_was_made_void_stays_void() {
    for was_live in [false, true] {
        let pages = pages();
        let map = KeptMap::begin(pages.clone(), owner(), false).unwrap();
        if was_live {
            map.go_live();
        }
        map.void();
        // As a sync of a backup's source does that ends only now.
        map.go_live();
        assert!(!map.is_live());
        assert!(KeptMap::find(pages.clone(), owner()).is_err());
        // The next job of that memory begins anew.
        KeptMap::begin(pages.clone(), owner(), false).unwrap().go_live();
        KeptMap::find(pages, owner()).unwrap();
    }
}

#[test]
fn a_map_that_is_cut_off_is_not_there() {
    let pages = pages();
    KeptMap::begin(pages.clone(), owner(), false).unwrap().go_live();
    let mut words: Vec<_> = pages.0.iter().map(|word| AtomicU64::new(word.load(Ordering::Relaxed))).collect();
    words.pop();
    let cut = Pages(words);
    assert!(KeptMap::find(Arc::new(cut), owner()).unwrap_err().contains("a part of one"));
    let all = KeptMap::begin(pages, owner(), true).unwrap();
    assert_eq!(runs(&all).first(), Some(&(0..LEN)));
    let none = Pages(Vec::new());
    assert_eq!(KeptMap::begin(Arc::new(none), owner(), false).unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn blocks_grow_with_the_disk_and_memory_has_a_bound() {
    assert_eq!(KeptMap::granularity_for(256 << 30), BLOCK_BYTES);
    assert_eq!(KeptMap::granularity_for(1 << 40), 4 * BLOCK_BYTES);
    for len in [0, 1, 4095, 1 << 30, 1 << 40, 1 << 46, u64::MAX] {
        let owner = MapOwner { len, granularity: KeptMap::granularity_for(len), ..owner() };
        assert!(owner.bytes() <= MAP_BYTES_MAX, "{len}");
    }
}

#[test]
fn of_a_piece_whose_bits_were_taken_out_in_part_the_target_has_all() {
    const PIECE: u64 = 8 * BLOCK_BYTES;
    let map = KeptMap::begin(pages(), owner(), true).unwrap();
    map.set_piece(PIECE);
    map.clear(3 * PIECE + BLOCK_BYTES, 2 * BLOCK_BYTES);
    let old = DirtyMap::new(LEN, PIECE);
    map.copy_whole_into(&old);
    assert_eq!(map.piece(), PIECE);
    assert_eq!(old.next_dirty(0, u64::MAX), Some(0..3 * PIECE));
    assert_eq!(old.next_dirty(3 * PIECE, u64::MAX), Some(4 * PIECE..LEN));
}
