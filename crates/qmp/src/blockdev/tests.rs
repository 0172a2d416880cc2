use super::*;
use crate::json::DEPTH_MAX;

fn read(text: &str) -> BlockdevOptions {
    BlockdevOptions::of_argument(text).unwrap()
}

fn refused(text: &str) -> String {
    BlockdevOptions::of_argument(text).unwrap_err().desc
}

fn file(filename: &str) -> BlockdevOptions {
    let filename = filename.into();
    BlockdevOptions::new(Driver::File { filename, device: false, locking: Locking::Auto })
}

#[test]
fn dotted_keys_and_json_say_the_same() {
    let dotted = read(
        "driver=qcow2,node-name=top,discard=unmap,cache.direct=on,file.driver=file,file.filename=a,,b,\
         backing.driver=nbd,backing.server.type=unix,backing.server.path=/s,backing.export=e,\
         backing.reconnect-delay=0x10,l2-cache-size=1048576",
    );
    let json = read(
        r#"{"driver": "qcow2", "node-name": "top", "discard": "unmap", "cache": {"direct": true},
            "file": {"driver": "file", "filename": "a,b"}, "l2-cache-size": 1048576,
            "backing": {"driver": "nbd", "server": {"type": "unix", "path": "/s"}, "export": "e",
                        "reconnect-delay": 16}}"#,
    );
    assert_eq!(dotted, json);
    let Driver::Qcow2 { file: BlockdevRef::Definition(below), backing, options } = json.driver else {
        panic!("not qcow2")
    };
    assert_eq!(*below, file("a,b"));
    assert_eq!(options.l2_cache_bytes, Some(1 << 20));
    let BackingOption::Node(BlockdevRef::Definition(backing)) = backing else { panic!("no backing") };
    assert_eq!(backing.driver.as_str(), "nbd");
}

#[test]
fn no_backing_and_the_headers_backing_are_told_apart() {
    let backing = |text: &str| match read(text).driver {
        Driver::Qcow2 { backing, .. } | Driver::Qed { backing, .. } => backing,
        other => panic!("{other:?}"),
    };
    assert_eq!(backing("qcow2,file=f"), BackingOption::Header);
    assert_eq!(backing("qed,file=f,backing="), BackingOption::None);
    assert_eq!(backing(r#"{"driver":"qed","file":"f","backing":null}"#), BackingOption::None);
    let named = BackingOption::Node(BlockdevRef::Name("b".into()));
    assert_eq!(backing("qcow2,file=f,backing=b"), named);
}

#[test]
fn a_child_takes_what_was_not_given_from_its_parent() {
    let parent = read("qcow2,file=f,read-only=on,cache.direct=on,discard=ignore");
    let mut image = file("a");
    image.inherit(&parent, ChildRole::ImageFile);
    assert!(image.is_read_only() && image.is_direct());
    assert_eq!(image.discard_mode(), DiscardMode::Unmap);
    let mut backing = file("b");
    backing.cache_direct = Some(false);
    backing.inherit(&read("qcow2,file=f,cache.direct=on"), ChildRole::Backing);
    assert!(backing.is_read_only() && !backing.is_direct());
    assert_eq!(backing.discard_mode(), DiscardMode::Ignore);
}

/// Each row as qemu-storage-daemon 10.0.2 answers it.
#[test]
fn what_is_wrong_is_refused_with_the_words_that_managers_know() {
    for (text, why) in [
        ("", "Parameter 'driver' is missing"),
        ("node-name=n", "Parameter 'driver' is missing"),
        ("nope,node-name=n", "Parameter 'driver' does not accept value 'nope'"),
        (r#"{"driver":7}"#, "Invalid parameter type for 'driver', expected: string"),
        (r#"{"driver":"null-co","size":"12"}"#, "Invalid parameter type for 'size', expected: integer"),
        (r#"{"driver":"null-co","size":12.5}"#, "Invalid parameter type for 'size', expected: integer"),
        (r#"{"driver":"null-co","foo":12}"#, "Parameter 'foo' is unexpected"),
        (r#"{"driver":"null-co","node-name":7}"#, "Invalid parameter type for 'node-name', expected: string"),
        ("null-co,node-name=1abc", "Invalid node-name: '1abc'"),
        ("null-co,node-name=", "Invalid node-name: ''"),
        ("null-co,node-name=abcdefghijklmnopqrstuvwxyz012345", "Node name too long"),
        (
            r#"{"driver":"null-co","read-only":"on"}"#,
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        ("null-co,discard=on", "Parameter 'discard' does not accept value 'on'"),
        (
            r#"{"driver":"null-co","cache":{"direct":1}}"#,
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        ("null-co,cache.direct=maybe", "Parameter 'cache.direct' expects 'on' or 'off'"),
        ("null-co,cache.foo=on", "Parameter 'cache.foo' is unexpected"),
        (r#"{"driver":"null-co","cache":7}"#, "Invalid parameter type for 'cache', expected: object"),
        (r#"{"driver":"raw","file":7}"#, "Invalid parameter type for 'file', expected: BlockdevRef"),
        ("raw", "Parameter 'file' is missing"),
        (r#"{"driver":"raw","file":{}}"#, "Parameter 'file.driver' is missing"),
        ("raw,file.driver=file", "Parameter 'file.filename' is missing"),
        ("raw,file.driver=file,file.filename=x,offset=x", "Parameter 'offset' expects integer"),
        ("raw,file.driver=file,file.filename=x,file.bogus.z=x", "Parameter 'file.bogus' is unexpected"),
        ("nbd", "Parameter 'server' is missing"),
        ("nbd,server=unix", "Invalid parameter type for 'server', expected: object"),
        (r#"{"driver":"nbd","server":{}}"#, "Parameter 'server.type' is missing"),
        ("nbd,server.type=unix", "Parameter 'server.path' is missing"),
        ("nbd,server.type=foo,server.host=l", "Parameter 'type' does not accept value 'foo'"),
        ("nbd,server.type=inet,server.host=l", "Parameter 'server.port' is missing"),
        (
            r#"{"driver":"nbd","server":{"type":"inet","host":"l","port":1}}"#,
            "Invalid parameter type for 'server.port', expected: string",
        ),
        (
            "nbd,server.type=unix,server.path=p,tls-hostname=t",
            "'tls-hostname' is for TLS: give 'tls-creds' with it",
        ),
    ] {
        assert_eq!(refused(text), why, "{text}");
    }
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for (text, name) in [
        ("luks,file=x", "luks"),
        ("qcow2,file=f,data-file=g", "data-file"),
        ("qcow2,file=f,encrypt.format=luks", "encrypt"),
        ("file,filename=x,pr-manager=p", "pr-manager"),
    ] {
        let why = refused(text);
        assert!(why.contains(name) && why.contains("not supported yet"), "{why}");
    }
}

#[test]
fn the_deepest_tree_that_is_read_fits_the_stack() {
    let depth = DEPTH_MAX - 2;
    let open = r#"{"driver":"raw","file":"#.repeat(depth);
    let text = format!("{open}\"f\"{}", "}".repeat(depth));
    let mut options = read(&text);
    let mut levels = 1;
    while let Driver::Raw { file: BlockdevRef::Definition(below), .. } = options.driver {
        options = *below;
        levels += 1;
    }
    assert_eq!(levels, depth);
}
