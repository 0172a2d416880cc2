//! An image whose disk moved to another host: nobody starts it, we read it where we are told to, and all else of it stays.

mod bench;

use std::path::Path;
use std::process::Command;

use bench::{Bench, run, text};
use infill_base::{Ctx, ErrorKind, OpenError, WriteFlags};
use infill_node::{BackingRef, Bitmap, NodeHandle, RawNode, Repair};
use infill_qcow2::{CreateOptions, MOVED_FACT, OpenOptions, Qcow2, check, create, set_fence};
use infill_sim::World;
use infill_storage::sync::Arc;
use infill_storage::{MemoryStorage, StorageHandle};

const CX: &Ctx = &Ctx::GUEST;
const SIZE: u64 = 4 << 20;
const NAME: &str = "moved to another host";

fn memory(bytes: Vec<u8>) -> (Arc<MemoryStorage>, StorageHandle) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    (storage.clone(), StorageHandle::from_arc(storage))
}

async fn new_image(options: CreateOptions) -> (Arc<MemoryStorage>, StorageHandle) {
    let (bytes, storage) = memory(Vec::new());
    create(CX, &storage, &CreateOptions { size: SIZE, ..options }).await.unwrap();
    (bytes, storage)
}

async fn open(storage: &StorageHandle, read_only: bool, fenced: bool) -> Result<NodeHandle, OpenError> {
    let options = OpenOptions { read_only, fenced, ..OpenOptions::default() };
    Ok(NodeHandle::new(Qcow2::open(CX, storage.clone(), options).await?))
}

async fn write(node: &NodeHandle, at: u64, byte: u8) {
    node.write(CX, at, vec![byte; 70_000], WriteFlags::empty()).await.unwrap();
}

fn is_marked(bytes: &[u8]) -> bool {
    u64::from_be_bytes(bytes[72..80].try_into().unwrap()) & 1 << 62 != 0
}

/// What a tool says that has to fail.
fn fails(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{tool}: {error}; apt-get install qemu-utils"));
    assert!(!output.status.success(), "{tool} {args:?} takes it");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn qemu_refuses(path: &Path) {
    let socket = format!("--socket={}", text(&path.with_extension("sock")));
    for (tool, args) in [
        ("qemu-img", vec!["info", text(path)]),
        ("qemu-img", vec!["check", "-r", "all", text(path)]),
        ("qemu-io", vec!["-r", "-c", "read 0 512", text(path)]),
        ("qemu-nbd", vec!["--read-only", socket.as_str(), "-f", "qcow2", text(path)]),
    ] {
        let said = fails(tool, &args);
        assert!(said.contains(NAME), "{tool} {args:?}: {said}");
    }
}

fn shapes() -> Vec<CreateOptions> {
    let backing = |format: &str| {
        Some(BackingRef { filename: "a-base-that-is-not-there".into(), format: Some(format.into()) })
    };
    vec![
        CreateOptions::default(),
        CreateOptions { extended_l2: true, backing: backing("raw"), ..CreateOptions::default() },
        CreateOptions { cluster_bytes: 512, backing: backing("qcow2"), ..CreateOptions::default() },
        CreateOptions { lazy_refcounts: true, backing: backing(&"f".repeat(15)), ..CreateOptions::default() },
    ]
}

#[test]
fn qemu_refuses_an_image_that_moved_by_its_name_and_has_it_back_byte_for_byte() {
    for options in shapes() {
        let bench = Bench::new();
        World::new(0).run(async {
            let what = format!("{options:?}");
            let (bytes, storage) = new_image(options).await;
            let before = bytes.to_bytes();
            set_fence(CX, &storage, true).await.unwrap();
            set_fence(CX, &storage, true).await.unwrap();
            assert!(is_marked(&bytes.to_bytes()), "{what}");
            let path = bench.file("moved.qcow2", &bytes.to_bytes());
            qemu_refuses(&path);
            set_fence(CX, &storage, false).await.unwrap();
            set_fence(CX, &storage, false).await.unwrap();
            assert!(bytes.to_bytes() == before, "{what}: something else has changed");
        });
    }
}

#[test]
fn it_opens_when_that_is_asked_for_and_then_only_for_reading() {
    World::new(0).run(async {
        let (_, storage) = new_image(CreateOptions::default()).await;
        let node = open(&storage, false, false).await.unwrap();
        write(&node, 5000, 3).await;
        node.close(CX).await.unwrap();
        set_fence(CX, &storage, true).await.unwrap();
        for (read_only, fenced) in [(false, false), (true, false), (false, true)] {
            let error = open(&storage, read_only, fenced).await.expect_err("it opens").to_string();
            for word in [NAME, "`infill whois`", "`infill reclaim`"] {
                assert!(error.contains(word), "{error}");
            }
        }
        let node = open(&storage, true, true).await.unwrap();
        assert_eq!(node.read_vec(CX, 5000, 70_000).await.unwrap(), vec![3; 70_000]);
        assert!(node.info().format_specific.iter().any(|(fact, _)| *fact == MOVED_FACT));
        let refused = node.set_fence(CX, false).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotPermitted);
        node.close(CX).await.unwrap();

        let report = check(CX, &storage, Repair::Nothing).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0));
        assert!(report.messages.iter().any(|line| line.contains(NAME)), "{:?}", report.messages);
        let refused = check(CX, &storage, Repair::Leaks).await.unwrap_err().to_string();
        assert!(refused.contains(NAME), "{refused}");

        // Where nothing moved, the option changes nothing.
        set_fence(CX, &storage, false).await.unwrap();
        let node = open(&storage, false, true).await.unwrap();
        write(&node, 0, 4).await;
        assert!(!node.info().format_specific.iter().any(|(fact, _)| *fact == MOVED_FACT));
        node.close(CX).await.unwrap();
    });
}

#[test]
fn an_open_image_is_marked_while_it_is_held_and_no_other_change_of_its_header_undoes_that() {
    for options in shapes().into_iter().filter(|options| options.cluster_bytes > 512) {
        let bench = Bench::new();
        World::new(0).run(async {
            let what = format!("{options:?}");
            let (bytes, storage) = new_image(options).await;
            let node = open(&storage, false, false).await.unwrap();
            let bitmap = Arc::new(Bitmap::new("b", node.len(), 65536).unwrap());
            bitmap.set_persistent(true);
            node.hold_changes().await.add_bitmap(bitmap).unwrap();
            let held = node.hold_changes().await;
            node.set_fence(CX, true).await.unwrap();
            assert!(is_marked(&bytes.to_bytes()), "{what}");
            drop(held);

            // The autoclear bits before the first write, a longer table of clusters, the size, the name of the backing.
            write(&node, 100_000, 7).await;
            node.sync(CX).await.unwrap();
            node.resize(CX, SIZE + (1 << 20)).await.unwrap();
            let other = BackingRef { filename: "another".into(), format: Some("raw".into()) };
            node.set_backing_ref(CX, Some(other)).await.unwrap();
            assert!(is_marked(&bytes.to_bytes()), "{what}");
            node.set_backing_ref(CX, None).await.unwrap();
            assert!(is_marked(&bytes.to_bytes()), "{what}");
            assert_eq!(node.read_vec(CX, 100_000, 70_000).await.unwrap(), vec![7; 70_000]);
            // Its bitmap is stored.
            node.close(CX).await.unwrap();
            assert!(is_marked(&bytes.to_bytes()), "{what}");
            assert!(open(&storage, true, true).await.unwrap().bitmap("b").is_ok(), "{what}");

            set_fence(CX, &storage, false).await.unwrap();
            let path = bench.file("back.qcow2", &bytes.to_bytes());
            run("qemu-img", &["check", "-q", text(&path)]);
            let node = open(&storage, false, false).await.unwrap();
            assert_eq!(node.len(), SIZE + (1 << 20));
            node.set_fence(CX, true).await.unwrap();
            node.set_fence(CX, false).await.unwrap();
            node.close(CX).await.unwrap();
            assert!(!is_marked(&bytes.to_bytes()), "{what}");
        });
    }
}

#[test]
fn an_image_of_qemu_gets_the_name_and_is_refused_by_it() {
    let bench = Bench::new();
    bench.file("base.raw", &[7; 4096]);
    let backed = format!("backing_fmt=raw,backing_file={}", text(&bench.path("base.raw")));
    // In a cluster of 512 bytes its own table fills the header: another name gives way.
    for options in ["cluster_size=65536", backed.as_str(), "cluster_size=512"] {
        let path = bench.image("a.qcow2", options, "4M", &["write -P 1 0 1M"]);
        World::new(0).run(async {
            let (bytes, storage) = memory(std::fs::read(&path).unwrap());
            let before = bench.content(&path);
            set_fence(CX, &storage, true).await.unwrap();
            std::fs::write(&path, bytes.to_bytes()).unwrap();
            qemu_refuses(&path);
            set_fence(CX, &storage, false).await.unwrap();
            std::fs::write(&path, bytes.to_bytes()).unwrap();
            run("qemu-img", &["check", "-q", text(&path)]);
            assert!(bench.content(&path) == before, "{options}");
        });
    }
}

#[test]
fn what_cannot_be_marked_says_so_and_is_left_as_it_is() {
    World::new(0).run(async {
        let v2 = CreateOptions { version: 2, ..CreateOptions::default() };
        let (bytes, storage) = new_image(v2).await;
        let before = bytes.to_bytes();
        let refused = set_fence(CX, &storage, true).await.unwrap_err().to_string();
        assert!(refused.contains("version 2"), "{refused}");
        set_fence(CX, &storage, false).await.unwrap();
        let node = open(&storage, false, false).await.unwrap();
        assert_eq!(node.set_fence(CX, true).await.unwrap_err().kind(), ErrorKind::Unsupported);
        node.close(CX).await.unwrap();
        assert!(bytes.to_bytes() == before);

        let (bytes, _) = new_image(CreateOptions::default()).await;
        let mut other = bytes.to_bytes();
        other[79] |= 1 << 5;
        let (bytes, storage) = memory(other.clone());
        let refused = set_fence(CX, &storage, true).await.unwrap_err().to_string();
        assert!(refused.contains("incompatible feature 5"), "{refused}");
        assert!(bytes.to_bytes() == other);

        let raw = StorageHandle::new(MemoryStorage::new(1 << 20));
        assert!(matches!(set_fence(CX, &raw, true).await, Err(OpenError::NotThisFormat { .. })));
        let refused = NodeHandle::new(RawNode::new(raw, false)).set_fence(CX, true).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("raw"), "{refused}");
    });
}
