use std::sync::Arc;

use infill_base::ErrorKind;

use super::*;

/// Memory that outlives whoever holds it.
struct Pages {
    words: Vec<AtomicU64>,
    full: bool,
}

impl Pages {
    fn new() -> Arc<Pages> {
        Arc::new(Pages {
            words: (0..JOURNAL_BYTES / WORD_BYTES).map(|_| AtomicU64::new(0)).collect(),
            full: false,
        })
    }
}

impl JournalMemory for Pages {
    fn reserve(&self) -> IoResult<()> {
        if self.full { Err(infill_base::IoError::new(ErrorKind::NoSpace, "full")) } else { Ok(()) }
    }
    fn words(&self) -> &[AtomicU64] {
        &self.words
    }
    fn remove(&self) {
        store(&self.words, AT_MAGIC, 0);
    }
    fn name(&self) -> String {
        "pages".into()
    }
}

const BOOT: BootId = BootId(7 << 64 | 9);

fn attach(pages: &Arc<Pages>) -> VolatileJournal {
    VolatileJournal::attach(pages.clone(), "disk", BOOT).unwrap()
}

fn ledger(pages: &Arc<Pages>) -> Ledger {
    let ledger = Ledger::new(Journaling::Volatile(attach(pages)));
    assert!(ledger.begin(true).unwrap());
    ledger
}

fn record(place: u64, old: u64, new: u64) -> Record {
    Record { place, old: [old, !old], new: [new, !new] }
}

#[test]
fn a_successor_finds_what_no_round_has_made_stable_and_nothing_else() {
    let pages = Pages::new();
    let first = ledger(&pages);
    first.change(|| record(8, 0, 1), || ());
    let mark = first.mark();
    first.change(|| record(8, 1, 2), || ());
    first.change(|| record(16, 0, 3), || ());
    assert_eq!(attach(&pages).found().records.len(), 3);
    first.stable(mark);
    let found = attach(&pages).found().clone();
    assert_eq!(found.records, [record(8, 1, 2), record(16, 0, 3)]);
    let places = found.places();
    assert_eq!(places[&8].last([1, !1]), Some([2, !2]));
    assert_eq!(places[&8].last([2, !2]), Some([2, !2]));
    assert_eq!(places[&8].last([0, !0]), None, "a value from before the last round");
    // A second process that begins has replayed them.
    let second = ledger(&pages);
    assert!(attach(&pages).found().is_empty());
    second.change(|| record(8, 2, 5), || ());
    assert_eq!(attach(&pages).found().records, [record(8, 2, 5)]);
}

#[test]
fn other_boots_and_images_are_forgotten_and_other_versions_and_damage_refused() {
    let pages = Pages::new();
    ledger(&pages).change(|| record(8, 0, 1), || ());
    let found = |identity: &str, boot| VolatileJournal::attach(pages.clone(), identity, boot);
    assert!(found("disk", BootId(8)).unwrap().found().is_empty());
    assert!(found("dusk", BOOT).unwrap().found().is_empty());
    assert!(found("disks", BOOT).unwrap().found().is_empty());
    assert_eq!(found("disk", BOOT).unwrap().found().records.len(), 1);
    let refused = |at: usize, value: u64| {
        let before = pages.words[at].swap(value, Ordering::Relaxed);
        let error = found("disk", BOOT).unwrap_err().to_string();
        pages.words[at].store(before, Ordering::Relaxed);
        assert!(error.contains("delete it if they may be lost"), "{error}");
        error
    };
    assert!(refused(AT_VERSION, 2).contains("version 2"));
    assert!(refused(AT_CAPACITY, 1).contains("damaged header"));
    assert!(refused(AT_TAIL, 1 << 40).contains("which cannot be"));
    for word in 0..RECORD_WORDS {
        assert!(refused(HEADER_WORDS + word, 0x1234_5678).contains("number 0"));
    }
    // Records of another place in the ring.
    assert!(refused(AT_TAIL, 2).contains("number 1"));
    assert!(VolatileJournal::attach(pages.clone(), &"x".repeat(IDENTITY_BYTES_MAX + 1), BOOT).is_err());
}

#[test]
fn a_record_that_a_death_cut_off_is_not_there() {
    let pages = Pages::new();
    let ledger = ledger(&pages);
    ledger.change(|| record(8, 0, 1), || ());
    // All but the last store of the second one.
    let torn = slot(1, RECORDS_MAX);
    (0..RECORD_WORDS - 1).for_each(|nth| pages.words[torn + nth].store(77, Ordering::Relaxed));
    assert_eq!(attach(&pages).found().records, [record(8, 0, 1)]);
}

#[test]
fn the_record_is_there_before_the_entry_is_set() {
    let pages = Pages::new();
    let ledger = ledger(&pages);
    let mut seen = 0;
    ledger.change(|| record(8, 0, 1), || seen = attach(&pages).found().records.len());
    assert_eq!(seen, 1);
}

#[test]
fn the_ring_goes_round_and_what_finds_no_room_is_owed_until_a_round() {
    let pages = Pages::new();
    let ledger = ledger(&pages);
    for number in 0..RECORDS_MAX - 1 {
        ledger.change(|| record(number, 0, 1), || ());
    }
    assert!(ledger.wants_round() && !ledger.owes());
    let mark = ledger.mark();
    for number in 0..3 {
        ledger.change(|| record(number, 1, 2), || ());
    }
    assert!(ledger.owes(), "one has found room, two not");
    let found = attach(&pages).found().clone();
    assert!(found.gaps && found.places()[&0].last([99, 99]) == Some([2, !2]), "anything may be there");
    // A round that began before them pays nothing.
    ledger.stable(mark);
    assert!(ledger.owes() && attach(&pages).found().gaps);
    ledger.change(|| record(9, 1, 2), || ());
    assert_eq!(attach(&pages).found().records, [record(0, 1, 2), record(9, 1, 2)]);
    let mark = ledger.mark();
    ledger.stable(mark);
    assert!(!ledger.owes() && !ledger.wants_round());
    let found = attach(&pages).found().clone();
    assert!(found.is_empty() && !found.gaps);
}

#[test]
fn without_a_journal_everything_is_owed_and_switched_off_nothing() {
    for through in [
        Ledger::new(Journaling::WriteThrough),
        Ledger::new(Journaling::Volatile(attach(&Pages::new()))),
        Ledger::new(Journaling::Volatile(attach(&Arc::new(Pages { words: Vec::new(), full: true })))),
    ] {
        let _ = through.begin(false);
        assert!(!through.owes());
        through.change(|| unreachable!("nothing is recorded"), || ());
        assert!(through.owes());
        let mark = through.mark();
        through.stable(mark);
        assert!(!through.owes());
    }
    let full = Ledger::new(Journaling::Volatile(attach(&Arc::new(Pages { words: Vec::new(), full: true }))));
    assert_eq!(full.begin(true).unwrap_err().kind(), ErrorKind::NoSpace);
    full.change(|| unreachable!("nothing is recorded"), || ());
    assert!(full.owes());
    let off = Ledger::new(Journaling::Off);
    off.change(|| unreachable!("nothing is recorded"), || ());
    assert!(!off.owes() && !off.begin(true).unwrap() && off.end().is_none());
}

#[test]
fn a_closed_image_leaves_nothing_and_what_is_changed_afterwards_is_owed() {
    let pages = Pages::new();
    let ledger = ledger(&pages);
    ledger.change(|| record(8, 0, 1), || ());
    assert!(ledger.end().is_none(), "something is not stable yet");
    ledger.stable(ledger.mark());
    ledger.end().unwrap().remove();
    ledger.change(|| unreachable!("nothing is recorded"), || ());
    assert!(ledger.owes() && attach(&pages).found().is_empty());
}

#[test]
fn a_failed_sync_leaves_nothing_to_replay() {
    let pages = Pages::new();
    let ledger = ledger(&pages);
    ledger.change(|| record(8, 0, 1), || ());
    let mark = ledger.mark();
    ledger.void();
    ledger.stable(mark);
    assert!(attach(&pages).found().is_empty());
}

#[test]
fn pending_changes_need_the_image_s_word_and_a_writable_open() {
    let pages = Pages::new();
    ledger(&pages).change(|| record(8, 0, 1), || ());
    let journaling = Journaling::Volatile(attach(&pages));
    assert_eq!(journaling.pending("disk", false, true).unwrap().unwrap().records.len(), 1);
    let error = journaling.pending("disk", false, false).unwrap_err().to_string();
    assert!(error.contains("another program has opened the image for writing"), "{error}");
    assert!(journaling.pending("disk", true, true).unwrap_err().to_string().contains("open it for writing"));
    assert!(Journaling::WriteThrough.pending("disk", false, false).unwrap().is_none());
    assert!(Journaling::Volatile(attach(&Pages::new())).pending("disk", true, false).unwrap().is_none());
}
