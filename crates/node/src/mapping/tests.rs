use std::cell::Cell;
use std::future::{pending, ready};

use futures_util::FutureExt;

use super::*;

const PLAIN: SliceLayout = SliceLayout { slice_bytes: 64, entry_words: 1, order: ByteOrder::Big };

fn key(table: u64, index: u32) -> SliceKey {
    SliceKey { table, index }
}

fn get(cache: &SliceCache, key: SliceKey, first: u8) -> Arc<Slice> {
    let load = || ready(Ok(BytesMut::from(&[first; 64][..])));
    cache.get(key, load).now_or_never().unwrap().unwrap()
}

#[test]
fn words_lie_in_the_file_as_their_format_wants_them() {
    for (order, expected) in [(ByteOrder::Big, 0x0102), (ByteOrder::Little, 0x0201_0000_0000_0000_u64)] {
        let cache = SliceCache::new(SliceLayout { order, ..PLAIN }, 1 << 20);
        let mut bytes = BytesMut::zeroed(64);
        bytes[14..16].copy_from_slice(&[1, 2]);
        let slice = cache.get(key(0, 0), || ready(Ok(bytes.clone()))).now_or_never().unwrap().unwrap();
        assert_eq!(slice.load(1), [expected, 0]);
        cache.set(&slice, 0, [0, 0]);
        assert_eq!(cache.freeze()[0].bytes(), &bytes);
    }
}

#[test]
fn a_miss_delays_no_hit_and_no_other_miss_and_is_loaded_once() {
    let cache = SliceCache::new(PLAIN, 1 << 20);
    get(&cache, key(0, 1), 1);
    let loads = Cell::new(0);
    let load = || {
        loads.set(loads.get() + 1);
        pending()
    };
    let mut slow = Box::pin(cache.get(key(0, 0), load));
    assert!(slow.as_mut().now_or_never().is_none());
    let mut waiter = Box::pin(cache.get(key(0, 0), || ready(Ok(BytesMut::zeroed(64)))));
    assert!(waiter.as_mut().now_or_never().is_none());
    assert!(cache.cached(key(0, 1)).is_some());
    get(&cache, key(0, 2), 2);
    // Whoever waited takes over.
    drop(slow);
    assert_eq!(waiter.now_or_never().unwrap().unwrap().load(0), [0, 0]);
    assert_eq!(loads.get(), 1);
}

#[test]
fn a_failed_load_is_told_and_tried_again_by_the_next() {
    let cache = SliceCache::new(PLAIN, 1 << 20);
    let failed = || ready(Err(IoError::new(ErrorKind::Io, "no")));
    assert!(cache.get(key(0, 0), failed).now_or_never().unwrap().is_err());
    assert!(cache.get(key(0, 0), || ready(Ok(BytesMut::new()))).now_or_never().unwrap().is_err());
    get(&cache, key(0, 0), 1);
}

#[test]
fn a_changed_slice_stays_until_its_round_is_over_and_a_held_one_while_it_is_held() {
    // One slice a shard.
    let cache = SliceCache::new(PLAIN, 0);
    let changed = get(&cache, key(0, 0), 0);
    cache.set(&changed, 3, [7, 0]);
    drop(changed);
    let crowd = || (1..200).for_each(|index| drop(get(&cache, key(0, index), 0)));
    crowd();
    assert_eq!(cache.cached(key(0, 0)).unwrap().load(3), [7, 0]);
    let frozen = cache.freeze();
    assert!(!cache.is_dirty());
    crowd();
    assert!(cache.cached(key(0, 0)).is_some());
    cache.written(frozen, false);
    assert!(cache.is_dirty());
    crowd();
    assert!(cache.cached(key(0, 0)).is_some());
    cache.written(cache.freeze(), true);
    let held = cache.cached(key(0, 0)).unwrap();
    crowd();
    assert!(cache.cached(key(0, 0)).is_some());
    drop(held);
    crowd();
    assert!(cache.cached(key(0, 0)).is_none());
    assert!(cache.used_bytes() <= 17 * 64);
}

#[test]
fn a_change_after_the_copy_is_in_the_next_copy_and_not_in_this() {
    let cache = SliceCache::new(PLAIN, 1 << 20);
    let slice = get(&cache, key(4096, 2), 0);
    cache.set(&slice, 0, [1, 0]);
    let frozen = cache.freeze();
    cache.set(&slice, 0, [2, 0]);
    assert_eq!((frozen.len(), frozen[0].host(), frozen[0].bytes()[7]), (1, 4096 + 128, 1));
    cache.written(frozen, true);
    let next = cache.freeze();
    assert_eq!(next[0].bytes()[7], 2);
    cache.written(next, true);
    assert!(cache.freeze().is_empty());
}

#[test]
fn a_new_table_in_the_place_of_an_old_one_is_not_seen_through_old_slices() {
    let cache = SliceCache::new(PLAIN, 1 << 20);
    get(&cache, key(4096, 0), 1);
    get(&cache, key(4096, 1), 1);
    cache.forget_table(4096, 2);
    assert!(cache.cached(key(4096, 0)).is_none());
    assert_eq!(cache.insert_zeroed(key(4096, 1)).load(0), [0, 0]);
    assert_eq!(cache.used_bytes(), 64);
}
