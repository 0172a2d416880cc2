//! The README's first command tells the whole story, and every byte of it is right.

mod common;

use common::{INFILL, run};

#[test]
fn the_story_is_told_to_its_end_and_no_byte_is_wrong() {
    // It fails by itself where the guest reads a wrong byte.
    let told = run(INFILL, &["demo"]);
    assert!(told.contains(" 0 flushed sectors lost, 0 third values;"), "{told}");
    assert!(told.contains("512 MiB, without the source"), "{told}");
    for figure in ["time to first byte", "guest reads", "guest flushes", "fill rate", "bytes fetched"] {
        assert!(told.contains(figure), "{figure} is missing:\n{told}");
    }
}
