//! Descriptions of nodes, as `blockdev-add` gives them: who may use what, and what goes when.

use std::path::Path;

use infill_base::{Ctx, ExtentKind, WriteFlags};
use infill_io::Reactors;

use super::*;

fn run<F: Future<Output = ()> + 'static>(
    make: impl FnOnce(Blockdevs, tempfile::TempDir) -> F + Send + 'static,
) {
    let dir = tempfile::tempdir().unwrap();
    Reactors::start(1).unwrap().block_on(move || make(Blockdevs::new(OpenPolicy::default()), dir));
}

/// Adds what a JSON text describes; `DIR` in it stands for the directory.
async fn add(blockdevs: &Blockdevs, dir: &Path, text: &str) -> Result<String> {
    let text = text.replace("DIR", dir.to_str().unwrap());
    blockdevs.add(BlockdevOptions::of_argument(&text)?).await
}

async fn refused(blockdevs: &Blockdevs, dir: &Path, text: &str, why: &str) {
    let before = blockdevs.graph().list().len();
    let error = format!("{:#}", add(blockdevs, dir, text).await.unwrap_err());
    assert!(error.contains(why), "{text}: {error}");
    assert_eq!(blockdevs.graph().list().len(), before, "{text}: something is left of it");
}

/// A raw file of 64 KiB that is full of `byte`.
fn raw(dir: &Path, name: &str, byte: u8) {
    std::fs::write(dir.join(name), vec![byte; 64 << 10]).unwrap();
}

/// An overlay of 64 KiB whose header names `backing`.
async fn overlay(dir: &Path, name: &str, backing: &str, format: &str) {
    use infill_io::{FileOptions, FileStorage};
    let storage = FileStorage::open_handle(dir.join(name), FileOptions::create_new(0)).unwrap();
    let options = infill_qcow2::CreateOptions {
        size: 64 << 10,
        backing: Some(infill_node::BackingRef { filename: backing.into(), format: Some(format.into()) }),
        ..Default::default()
    };
    infill_qcow2::create(&Ctx::GUEST, &storage, &options).await.unwrap();
}

async fn byte_of(blockdevs: &Blockdevs, name: &str) -> u8 {
    blockdevs.get(name).unwrap().read_vec(&Ctx::GUEST, 4096, 1).await.unwrap()[0]
}

/// As that of a process that was killed, whose files the kernel has not closed yet.
#[test]
fn an_image_that_is_given_up_in_a_moment_is_waited_for_and_others_are_added_meanwhile() {
    use std::pin::pin;

    use futures_util::future::{Either, select};
    use infill_io::{FileOptions, FileStorage};

    run(|blockdevs, dir| async move {
        let dir = dir.path();
        overlay(dir, "disk", "base", "raw").await;
        raw(dir, "other", 1);
        let writer = FileStorage::open(dir.join("disk"), FileOptions::default()).unwrap();
        let text = r#"{"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"DIR/disk"},"backing":null}"#;
        refused(&blockdevs, dir, text, "Failed to get").await;
        let options = BlockdevOptions::of_argument(&text.replace("DIR", dir.to_str().unwrap())).unwrap();
        let error = blockdevs.add_patiently(&options).await.unwrap_err();
        assert!(is_locked(&error), "{error:#}");
        let waiting = pin!(blockdevs.add_patiently(&options));
        let other = pin!(add(&blockdevs, dir, r#"{"driver":"file","node-name":"o","filename":"DIR/other"}"#));
        let Either::Right((other, waiting)) = select(waiting, other).await else {
            panic!("the image is open elsewhere")
        };
        other.unwrap();
        drop(writer);
        waiting.await.unwrap();
    });
}

#[test]
fn children_in_place_go_with_their_parent_and_named_ones_stay() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 1);
        overlay(dir, "top", "base", "raw").await;
        add(&blockdevs, dir, r#"{"driver":"file","node-name":"f","filename":"DIR/top"}"#).await.unwrap();
        add(&blockdevs, dir, r#"{"driver":"qcow2","node-name":"q","file":"f"}"#).await.unwrap();
        // The header's backing file: a raw node over a file node.
        assert_eq!(blockdevs.graph().list().len(), 4);
        assert_eq!(blockdevs.chain("q").len(), 2);
        assert_eq!(byte_of(&blockdevs, "q").await, 1);
        let implicit = blockdevs.facts("q").unwrap().backing.unwrap();
        for (name, why) in
            [("f", "in use"), (implicit.as_str(), "belongs to"), ("nobody", "Failed to find node")]
        {
            let error = blockdevs.del(name).await.unwrap_err().to_string();
            assert!(error.contains(why), "{name}: {error}");
        }
        blockdevs.del("q").await.unwrap();
        assert_eq!(blockdevs.graph().list().len(), 1);
        blockdevs.del("f").await.unwrap();
        assert!(blockdevs.graph().list().is_empty());
    });
}

#[test]
fn what_the_options_say_of_the_backing_goes_before_the_header() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 1);
        raw(dir, "other", 2);
        overlay(dir, "top", "base", "raw").await;
        let top = |node: &str, backing: &str| {
            format!(
                r#"{{"driver":"qcow2","node-name":"{node}","read-only":true,{backing}
                    "file":{{"driver":"file","filename":"DIR/top"}}}}"#
            )
        };
        add(&blockdevs, dir, r#"{"driver":"file","node-name":"o","read-only":true,"filename":"DIR/other"}"#)
            .await
            .unwrap();
        add(&blockdevs, dir, &top("header", "")).await.unwrap();
        add(&blockdevs, dir, &top("none", r#""backing":null,"#)).await.unwrap();
        add(&blockdevs, dir, &top("named", r#""backing":"o","#)).await.unwrap();
        let inner = r#""backing":{"driver":"raw","file":{"driver":"file","filename":"DIR/other"}},"#;
        add(&blockdevs, dir, &top("inner", inner)).await.unwrap();
        for (name, byte) in [("header", 1), ("none", 0), ("named", 2), ("inner", 2)] {
            assert_eq!(byte_of(&blockdevs, name).await, byte, "{name}");
        }
        blockdevs.close_all().await.unwrap();
        assert!(blockdevs.graph().list().is_empty());
    });
}

#[test]
fn a_refused_description_leaves_nothing_open_and_nothing_locked() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 1);
        overlay(dir, "top", "base", "raw").await;
        overlay(dir, "broken", "missing", "raw").await;
        let file = r#"{"driver":"file","node-name":"f","filename":"DIR/broken"}"#;
        add(&blockdevs, dir, file).await.unwrap();
        for (text, why) in [
            (file, "Duplicate nodes with node-name='f'"),
            (r#"{"driver":"qcow2","node-name":"q","file":"f"}"#, "missing"),
            (r#"{"driver":"qed","node-name":"q","file":"f"}"#, "not a qed image"),
            (r#"{"driver":"qcow2","node-name":"q","file":"nobody"}"#, "nor node-name='nobody'"),
            (r#"{"driver":"raw","node-name":"q","file":"f","offset":1073741824,"size":512}"#, "inside"),
            (r#"{"driver":"raw","node-name":"q","read-only":true,"backing":null,"file":"f"}"#, "backing"),
            (r#"{"driver":"file","node-name":"g","force-share":true,"filename":"DIR/base"}"#, "force-share"),
            (
                r#"{"driver":"qcow2","node-name":"q","file":{"driver":"file","node-name":"q","filename":"DIR/top"}}"#,
                "Duplicate",
            ),
        ] {
            refused(&blockdevs, dir, text, why).await;
        }
        // Nobody holds it any more: a writer of its own may.
        blockdevs.claim("f", "a test", Access::Owner).unwrap();
        blockdevs.release("f", "a test");
        blockdevs.close_all().await.unwrap();
    });
}

#[test]
fn nobody_writes_to_what_others_rely_on() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 1);
        overlay(dir, "one", "base", "raw").await;
        overlay(dir, "two", "base", "raw").await;
        add(
            &blockdevs,
            dir,
            r#"{"driver":"raw","node-name":"base","file":{"driver":"file","filename":"DIR/base"}}"#,
        )
        .await
        .unwrap();
        let over = |name: &str| {
            format!(
                r#"{{"driver":"qcow2","node-name":"{name}","backing":"base",
                    "file":{{"driver":"file","filename":"DIR/{name}"}}}}"#
            )
        };
        blockdevs.claim("base", "a writer", Access::Writer).unwrap();
        refused(&blockdevs, dir, &over("one"), "a writer writes to it").await;
        blockdevs.release("base", "a writer");
        add(&blockdevs, dir, &over("one")).await.unwrap();
        add(&blockdevs, dir, &over("two")).await.unwrap();
        // Overlays that nobody uses rely on nothing; one that is used does, and is not used over what is being written.
        blockdevs.claim("two", "export 'e'", Access::Reader).unwrap();
        assert!(blockdevs.claim("base", "a writer", Access::Writer).is_err());
        blockdevs.release("two", "export 'e'");
        blockdevs.claim("base", "a writer", Access::Writer).unwrap();
        let used = blockdevs.claim("two", "export 'e'", Access::Reader).unwrap_err();
        assert!(used.to_string().contains("a writer writes to 'base'"), "{used}");
        blockdevs.release("base", "a writer");
        blockdevs.claim("two", "export 'e'", Access::Reader).unwrap();
        assert!(blockdevs.claim("base", "a writer", Access::Writer).is_err());
        blockdevs.release("two", "export 'e'");
        blockdevs.claim("base", "a reader", Access::Reader).unwrap();
        blockdevs.release("base", "a reader");
        // The file of an image that is open belongs to that image.
        refused(&blockdevs, dir, &over("one").replace("\"one\"", "\"again\""), "open it for writing").await;
        blockdevs.close_all().await.unwrap();
    });
}

#[test]
fn a_copy_on_read_filter_keeps_what_is_read_through_it() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 3);
        overlay(dir, "top", "base", "raw").await;
        add(
            &blockdevs,
            dir,
            r#"{"driver":"copy-on-read","node-name":"c","file":
                {"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"DIR/top"}}}"#,
        )
        .await
        .unwrap();
        assert_eq!(byte_of(&blockdevs, "c").await, 3);
        // A job may fill the overlay below the filter.
        blockdevs.claim("q", "job 'j'", Access::Writer).unwrap();
        blockdevs.release("q", "job 'j'");
        let overlay = blockdevs.get("q").unwrap();
        overlay.backing().unwrap().copy_on_read().unwrap().settle().await;
        let extents = overlay.extents(&Ctx::GUEST, 0, 64 << 10).await.unwrap();
        assert_eq!(extents[0].kind, ExtentKind::Data);
        drop(overlay);
        blockdevs.del("c").await.unwrap();
        assert!(blockdevs.graph().list().is_empty(), "children in place go with the filter");
        refused(&blockdevs, dir, r#"{"driver":"copy-on-read","read-only":true,"file":"q"}"#, "read-only")
            .await;
    });
}

#[test]
fn windows_of_one_file_are_written_side_by_side() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 1);
        add(&blockdevs, dir, r#"{"driver":"file","node-name":"f","filename":"DIR/base"}"#).await.unwrap();
        for (name, offset) in [("one", 0), ("two", 32 << 10)] {
            let window = format!(
                r#"{{"driver":"raw","node-name":"{name}","file":"f","offset":{offset},"size":{}}}"#,
                32 << 10
            );
            add(&blockdevs, dir, &window).await.unwrap();
            let data = vec![if offset == 0 { 8 } else { 9 }; 32 << 10];
            blockdevs.get(name).unwrap().write(&Ctx::GUEST, 0, data, WriteFlags::empty()).await.unwrap();
        }
        refused(&blockdevs, dir, r#"{"driver":"raw","node-name":"whole","file":"f"}"#, "writes to it").await;
        blockdevs.close_all().await.unwrap();
        let bytes = std::fs::read(dir.join("base")).unwrap();
        assert!(
            bytes[..32 << 10].iter().all(|byte| *byte == 8)
                && bytes[32 << 10..].iter().all(|byte| *byte == 9)
        );
    });
}

#[test]
fn after_a_stream_the_graph_has_let_the_base_go() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 4);
        overlay(dir, "top", "base", "raw").await;
        let top = r#"{"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"DIR/top"}}"#;
        add(&blockdevs, dir, top).await.unwrap();
        let node = blockdevs.get("q").unwrap();
        node.set_backing_ref(&Ctx::FILL, None).await.unwrap();
        node.backing().unwrap().replace(None).await;
        blockdevs.backing_changed("q").await.unwrap();
        assert_eq!(blockdevs.chain("q"), ["q"]);
        assert_eq!(blockdevs.graph().list().len(), 2);
        // The base's lock is gone with it.
        let base = r#"{"driver":"raw","node-name":"b","file":{"driver":"file","filename":"DIR/base"}}"#;
        add(&blockdevs, dir, base).await.unwrap();
        let data = vec![5; 512];
        blockdevs.get("b").unwrap().write(&Ctx::GUEST, 0, data, WriteFlags::empty()).await.unwrap();
        blockdevs.close_all().await.unwrap();
    });
}

#[test]
fn a_node_that_somebody_uses_is_told_when_everything_is_closed() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 1);
        let options = r#"{"driver":"file","node-name":"f","filename":"DIR/base"}"#;
        add(&blockdevs, dir, options).await.unwrap();
        add(&blockdevs, dir, r#"{"driver":"null-co","node-name":"n","size":4096}"#).await.unwrap();
        blockdevs.claim("f", "export 'e'", Access::Reader).unwrap();
        let error = blockdevs.close_all().await.unwrap_err().to_string();
        assert!(error.contains("export 'e'"), "{error}");
        assert_eq!(blockdevs.graph().list().len(), 1);
    });
}

#[test]
fn an_image_that_moved_is_opened_where_that_is_asked_for_and_never_for_writing() {
    run(|blockdevs, dir| async move {
        let dir = dir.path();
        raw(dir, "base", 1);
        overlay(dir, "top", "base", "raw").await;
        let text = |read_only: bool| {
            format!(
                r#"{{"driver":"qcow2","node-name":"q","read-only":{read_only},
                    "file":{{"driver":"file","filename":"DIR/top"}}}}"#
            )
        };
        // Marked while it is open, and opened anew, read-only, for those who have it.
        add(&blockdevs, dir, &text(false)).await.unwrap();
        blockdevs.get("q").unwrap().set_fence(&Ctx::GUEST, true).await.unwrap();
        let sealed = Opened { read_only: true, discard: DiscardMode::Ignore };
        let turn = blockdevs.change_graph().await;
        blockdevs.open_anew(&turn, "q", sealed).await.unwrap();
        assert_eq!(byte_of(&blockdevs, "q").await, 1);
        let error = blockdevs.make_writable_in(&turn, "q").await.unwrap_err();
        assert!(format!("{error:#}").contains("moved to another host"), "{error:#}");
        assert_eq!(byte_of(&blockdevs, "q").await, 1);
        blockdevs.del_in(&turn, "q").await.unwrap();
        drop(turn);

        for read_only in [false, true] {
            refused(&blockdevs, dir, &text(read_only), "moved to another host").await;
        }
        let options = |read_only| {
            BlockdevOptions::of_argument(&text(read_only).replace("DIR", dir.to_str().unwrap())).unwrap()
        };
        let turn = blockdevs.change_graph().await;
        let error = blockdevs.add_fenced(&turn, options(false), true).await.unwrap_err();
        assert!(format!("{error:#}").contains("moved to another host"), "{error:#}");
        blockdevs.add_fenced(&turn, options(true), true).await.unwrap();
        assert_eq!(byte_of(&blockdevs, "q").await, 1);
    });
}
