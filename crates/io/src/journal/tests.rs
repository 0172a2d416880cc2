use std::os::unix::fs::PermissionsExt;

use infill_storage::journal::{Ledger, Record};

use super::*;

/// A directory on a tmpfs, for which Linux has this place.
fn on_tmpfs() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm")
}

fn journal(dir: &Path, identity: &str) -> VolatileJournal {
    match JournalDir::new(dir.join("journal")).journaling("one", identity).unwrap() {
        Journaling::Volatile(journal) => journal,
        other => panic!("{other:?}"),
    }
}

fn change(ledger: &Ledger, place: u64) {
    ledger.change(|| Record { place, old: [0; 2], new: [place; 2] }, || ());
}

#[test]
fn what_was_recorded_is_found_by_the_next_and_a_clean_end_leaves_no_file() {
    let dir = on_tmpfs();
    let file = dir.path().join("journal/one");
    let first = Ledger::new(Journaling::Volatile(journal(dir.path(), "disk")));
    assert!(!file.exists(), "nothing was written yet");
    first.begin(true).unwrap();
    change(&first, 8);
    // As when its process dies: the mapping goes, the file stays.
    drop(first);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let second = journal(dir.path(), "disk");
    assert_eq!(second.found().records.len(), 1);
    let ledger = Ledger::new(Journaling::Volatile(second));
    ledger.begin(true).unwrap();
    ledger.end().unwrap().remove();
    assert!(!file.exists());
    drop(ledger);
    let other = Ledger::new(Journaling::Volatile(journal(dir.path(), "disk")));
    other.begin(true).unwrap();
    change(&other, 8);
    drop(other);
    assert!(journal(dir.path(), "another disk of that name").found().is_empty());
}

#[test]
fn a_journal_has_one_holder() {
    let dir = on_tmpfs();
    let held = Ledger::new(Journaling::Volatile(journal(dir.path(), "disk")));
    held.begin(true).unwrap();
    let error = JournalDir::new(dir.path().join("journal")).journaling("one", "disk").unwrap_err();
    assert!(error.to_string().contains("another process uses the journal"), "{error}");
}

#[test]
fn a_place_where_none_can_lie_is_told_and_everything_is_written_through() {
    let dir = on_tmpfs();
    let open = dir.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&open, &link).unwrap();
    // /proc is no tmpfs, wherever the tests run.
    for (path, why) in [(&open, "mode 0700"), (&file, ""), (&link, ""), (&PathBuf::from("/proc"), "tmpfs")] {
        let place = JournalDir::new(path);
        let error = place.check().unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert!(matches!(place.journaling("one", "disk").unwrap(), Journaling::WriteThrough));
    }
}

#[test]
fn a_short_or_foreign_file_is_made_anew() {
    let dir = on_tmpfs();
    JournalDir::new(dir.path().join("journal")).check().unwrap();
    let file = dir.path().join("journal/one");
    for content in [b"".as_slice(), b"short", &vec![0xaa; JOURNAL_BYTES]] {
        std::fs::write(&file, content).unwrap();
        let ledger = Ledger::new(Journaling::Volatile(journal(dir.path(), "disk")));
        ledger.begin(true).unwrap();
        change(&ledger, 8);
        drop(ledger);
        assert_eq!(journal(dir.path(), "disk").found().records.len(), 1);
        std::fs::remove_file(&file).unwrap();
    }
}

#[test]
fn memory_of_another_length_is_found_by_the_next_and_old_files_go() {
    let dir = on_tmpfs();
    let journals = JournalDir::new(dir.path().join("journal"));
    let bytes = 3 * 4096 + 8;
    let memory = journals.memory("copy-1", bytes).unwrap();
    assert!(memory.words().is_empty(), "nothing was there");
    memory.reserve().unwrap();
    memory.words()[bytes / 8 - 1].store(7, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(journals.memory("copy-1", bytes).err().unwrap().kind(), ErrorKind::Busy);
    // Somebody has it.
    journals.remove_unwanted("copy-", |_| false);
    drop(memory);
    let found = journals.memory("copy-1", bytes).unwrap();
    assert_eq!(found.words()[bytes / 8 - 1].load(std::sync::atomic::Ordering::Relaxed), 7);
    drop(found);
    assert!(journals.memory("copy-1", bytes + 8).unwrap().words().is_empty(), "it is too short");
    journals.memory("copy-2", 4096).unwrap().reserve().unwrap();
    journals.memory("other", 4096).unwrap().reserve().unwrap();
    journals.remove_unwanted("copy-", |name| name == "copy-1");
    let left = |name: &str| journals.path().join(name).exists();
    assert_eq!(["copy-1", "copy-2", "other"].map(left), [true, false, true]);
}
