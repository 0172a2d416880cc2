//! The bit that says that a journal belongs to an image: who sets it, who clears it, and what it decides. QEMU is the
//! other program.

use std::process::Command;

use bytes::Bytes;
use infill_base::{Ctx, WriteFlags};
use infill_conformance::Format;
use infill_sim::{DiskOp, DiskOptions, JournalPages, Media, SimDisk, World};
use infill_storage::StorageHandle;

const CX: Ctx = Ctx::GUEST;

/// Format, byte of the header's autoclear features, and the byte and value there that is our bit.
const FORMATS: [(Format, usize, u8); 3] =
    [(Format::QCOW2, 88, 0x40), (Format::QCOW2_SUBCLUSTERS, 88, 0x40), (Format::QED_64K, 39, 0x40)];

fn qemu(tool: &str, args: &[&str]) {
    let output = Command::new(tool).args(args).output();
    let output = output.unwrap_or_else(|error| {
        panic!("{tool} does not run ({error}); install it: apt-get install -y qemu-utils")
    });
    // 3: leaks are left, which a process that died may leave, and QED keeps.
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "{tool} {args:?}: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

fn disk(bytes: &[u8]) -> (SimDisk, StorageHandle) {
    let disk = SimDisk::with(Media::from_bytes(bytes), DiskOptions::default());
    (disk.clone(), StorageHandle::new(disk))
}

/// An image that a process leaves which wrote to it and died, and its journal.
async fn left(format: Format) -> (Vec<u8>, JournalPages) {
    let (disk, storage) = disk(&[]);
    format.create(&storage, 1 << 20, None).await.unwrap();
    let pages = JournalPages::new(64);
    let node = format.open_with(&storage, pages.journaling().unwrap()).await.unwrap();
    node.write(&CX, 4096, Bytes::from(vec![0x17; 100_000]), WriteFlags::empty()).await.unwrap();
    let left = (disk.media().to_bytes(), pages.copy());
    node.close(&CX).await.unwrap();
    left
}

/// What the bytes of the image become in QEMU's hands.
fn by_qemu(bytes: &[u8], format: &str, steps: impl Fn(&str)) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("image.{format}"));
    std::fs::write(&path, bytes).unwrap();
    steps(path.to_str().unwrap());
    std::fs::read(&path).unwrap()
}

#[test]
fn a_reader_leaves_the_bit_and_whoever_opens_for_writing_clears_it_and_the_journal_is_refused() {
    for (format, at, bit) in FORMATS {
        let name = format.qemu_name();
        World::new(0).run(async {
            let (image, pages) = left(format).await;
            assert_eq!(image[at] & bit, bit, "set before the first change");
            let read = by_qemu(&image, name, |path| {
                qemu("qemu-img", &["info", path]);
                qemu("qemu-img", &["map", "-f", name, path]);
                qemu("qemu-io", &["-r", "-f", name, "-c", "read 0 64k", path]);
            });
            assert_eq!(read[at] & bit, bit);
            let (after, storage) = disk(&read);
            let node = format.open_with(&storage, pages.copy().journaling().unwrap()).await.unwrap();
            assert_eq!(&node.read_vec(&CX, 4096, 100_000).await.unwrap()[..], &[0x17; 100_000]);
            node.close(&CX).await.unwrap();
            assert_eq!(after.media().to_bytes()[at] & bit, 0, "cleared on a clean close");
            let writers: [&dyn Fn(&str); 2] =
                [&|path| qemu("qemu-io", &["-f", name, "-c", "flush", path]), &|path| {
                    qemu("qemu-img", &["check", "-q", "-r", "all", "-f", name, path])
                }];
            for writer in writers {
                let written = by_qemu(&image, name, writer);
                assert_eq!(written[at] & bit, 0);
                let (_, storage) = disk(&written);
                let opened = format.open_with(&storage, pages.copy().journaling().unwrap()).await;
                let error = opened.map(drop).unwrap_err().to_string();
                assert!(error.contains("another program has opened the image for writing"), "{error}");
                // Who takes the loss deletes the journal.
                format.open_with(&storage, JournalPages::new(64).journaling().unwrap()).await.unwrap();
            }
        });
    }
}

#[test]
fn our_own_check_and_a_writer_without_the_journal_count_as_others() {
    for (format, at, bit) in FORMATS {
        World::new(0).run(async {
            let (image, _) = left(format).await;
            let (checked, storage) = disk(&image);
            format.check(&storage, infill_node::Repair::Nothing).await.unwrap();
            assert_eq!(checked.media().to_bytes()[at] & bit, bit);
            format.check(&storage, infill_node::Repair::Leaks).await.unwrap();
            assert_eq!(checked.media().to_bytes()[at] & bit, 0);
            let (written, storage) = disk(&image);
            let node = format.open(&storage).await.unwrap();
            // QED repairs what was not closed.
            let repaired = matches!(format, Format::Qed(_));
            assert_eq!(written.media().to_bytes()[at] & bit, if repaired { 0 } else { bit });
            node.write(&CX, 0, Bytes::from_static(&[1; 512]), WriteFlags::empty()).await.unwrap();
            assert_eq!(written.media().to_bytes()[at] & bit, 0);
        });
    }
}

#[test]
fn an_image_that_is_not_as_its_journal_says_is_refused() {
    for (format, ..) in FORMATS {
        World::new(0).run(async {
            let (image, pages) = left(format).await;
            let journal = pages.journal().unwrap();
            let place =
                journal.found().records.iter().map(|record| record.place).find(|place| place >> 63 == 0);
            let place = place.expect("an entry") as usize;
            let mut foreign = image.clone();
            foreign.resize(foreign.len().max(place + 8), 0);
            foreign[place..place + 8].copy_from_slice(&[0x11; 8]);
            let (_, storage) = disk(&foreign);
            let opened = format.open_with(&storage, pages.journaling().unwrap()).await;
            let error = opened.map(drop).unwrap_err().to_string();
            assert!(error.contains("neither what the journal"), "{error}");
        });
    }
}

/// A failed sync: what is recorded may name what is not there, and the guest was told.
#[test]
fn nothing_is_replayed_after_a_failed_sync() {
    for (format, ..) in FORMATS {
        World::new(0).run(async {
            let (disk, storage) = disk(&[]);
            format.create(&storage, 1 << 20, None).await.unwrap();
            let pages = JournalPages::new(64);
            let node = format.open_with(&storage, pages.journaling().unwrap()).await.unwrap();
            node.write(&CX, 0, Bytes::from(vec![0x17; 4096]), WriteFlags::empty()).await.unwrap();
            assert!(!pages.journal().unwrap().found().is_empty());
            disk.fail(DiskOp::Sync, 0, 1, infill_base::ErrorKind::Io);
            node.sync(&CX).await.unwrap_err();
            assert!(pages.journal().unwrap().found().is_empty());
        });
    }
}

#[test]
fn an_image_that_names_a_journal_which_is_gone_opens_as_after_a_power_cut() {
    for (format, at, bit) in FORMATS {
        World::new(0).run(async {
            let (image, _) = left(format).await;
            let (after, storage) = disk(&image);
            let pages = JournalPages::new(64);
            let node = format.open_with(&storage, pages.journaling().unwrap()).await.unwrap();
            node.close(&CX).await.unwrap();
            assert_eq!(after.media().to_bytes()[at] & bit, 0);
        });
    }
}
