//! Every interleaving of a few threads, as shuttle finds them: `cargo test -p infill-node --features shuttle`.
#![cfg(feature = "shuttle")]

use std::future::ready;

use bytes::BytesMut;
use infill_node::mapping::{ByteOrder, Slice, SliceCache, SliceKey, SliceLayout};
use infill_storage::sync::Arc;

const KEY: SliceKey = SliceKey { table: 0, index: 0 };
const RUNS: usize = 3000;

/// The second word of every entry that a writer sets is the first one's complement.
fn assert_whole([first, second]: [u64; 2]) {
    assert!((first, second) == (0, 0) || second == !first, "a torn entry: {first:#x} {second:#x}");
}

fn cache() -> (Arc<SliceCache>, Arc<Slice>) {
    let layout = SliceLayout { slice_bytes: 32, entry_words: 2, order: ByteOrder::Big };
    let cache = Arc::new(SliceCache::new(layout, 1 << 20));
    let load = cache.get(KEY, || ready(Ok(BytesMut::zeroed(32))));
    let slice = shuttle::future::block_on(load).unwrap();
    (cache, slice)
}

#[test]
fn two_writers_of_one_slice_a_reader_and_a_freeze_never_see_half_an_entry() {
    shuttle::check_random(
        || {
            let (cache, slice) = cache();
            let writers: Vec<_> = [0, 1]
                .map(|index| {
                    let (cache, slice) = (cache.clone(), slice.clone());
                    shuttle::thread::spawn(move || {
                        for value in [1, 2] {
                            cache.set(&slice, index, [value, !value]);
                        }
                    })
                })
                .into();
            let reader = shuttle::thread::spawn(move || {
                for index in [0, 1] {
                    assert_whole(slice.load(index));
                }
            });
            let mut file = [0; 32];
            let mut round = || {
                let frozen = cache.freeze();
                for copy in &frozen {
                    for entry in copy.bytes().chunks_exact(16) {
                        let word = |at: usize| u64::from_be_bytes(*entry[at..].first_chunk().unwrap());
                        assert_whole([word(0), word(8)]);
                    }
                    file.copy_from_slice(copy.bytes());
                }
                cache.written(frozen, true);
            };
            round();
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            reader.join().unwrap();
            // Nothing was lost between the copies: the last one holds what was set last.
            round();
            assert_eq!((file[7], file[23]), (2, 2));
        },
        RUNS,
    );
}
