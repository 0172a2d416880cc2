//! The server against the clients that people use: libnbd's tools, QEMU's tools, fio.

mod common;

use common::{Served, nbdsh, output, pattern, run};
use infill_base::Ctx;
use infill_io::{FileOptions, FileStorage};
use infill_nbd::{Export, ExportError, Exports, RemoveMode};
use infill_node::{MemoryOverlay, NodeHandle, RawNode};
use infill_storage::StorageHandle;

const MIB: usize = 1 << 20;

/// A writable export of an overlay in memory, 64 KiB clusters, over nothing.
fn memory(name: &str, len: u64) -> Export {
    let node = NodeHandle::new(MemoryOverlay::new(len, 64 << 10, None));
    Export { writable: true, allocation_depth: true, ..Export::new(name, node) }
}

fn served(exports: impl IntoIterator<Item = Export>) -> Served {
    let registry = Exports::new();
    exports.into_iter().for_each(|export| registry.add(export).unwrap());
    Served::new(registry)
}

/// A raw file with `content`, as an export.
fn raw(path: &std::path::Path, content: &[u8], writable: bool) -> Export {
    std::fs::write(path, content).unwrap();
    let options = if writable { FileOptions::default() } else { FileOptions::read_only() };
    let file = FileStorage::open(path, options).unwrap();
    let node = NodeHandle::new(RawNode::new(StorageHandle::new(file), !writable));
    Export { writable, ..Export::new("raw", node) }
}

#[test]
fn two_hundred_exports_are_listed_by_nbdinfo_and_qemu_nbd() {
    let served = served((0..200).map(|n| Export {
        description: format!("disk number {n}"),
        ..memory(&format!("export-{n:03}"), 1 << 20)
    }));
    let uri = served.uri("");
    let list = run("nbdinfo", &["--list", "--json", &uri]);
    assert_eq!(list.matches("\"export-name\"").count(), 200, "{list}");
    assert!(list.contains("disk number 199"));
    let socket = served.socket().display().to_string();
    let list = run("qemu-nbd", &["--list", "-k", &socket]);
    assert!(list.contains("exports available: 200"), "{list}");
    assert_eq!(list.matches("qemu:allocation-depth").count(), 200, "{list}");
    assert_eq!(list.matches("size:  1048576").count(), 200, "{list}");
}

#[test]
fn nbdinfo_tells_what_the_export_can_do() {
    let served = served([Export { description: "the système".into(), ..memory("disk", 1 << 20) }]);
    let info = run("nbdinfo", &["--json", &served.uri("disk")]);
    for expected in [
        "\"export-size\": 1048576",
        "\"description\": \"the système\"",
        "\"is_read_only\": false",
        "\"can_multi_conn\": true",
        "\"can_fast_zero\": true",
        "\"can_df\": true",
        "\"can_cache\": true",
        "\"block_size_maximum\": 33554432",
        "\"block_size_preferred\": 65536",
        "base:allocation",
        "qemu:allocation-depth",
    ] {
        assert!(info.contains(expected), "{expected} in {info}");
    }
    assert!(!output("nbdinfo", &[&served.uri("other")]).status.success());
    assert!(!output("nbdinfo", &[&served.uri("")]).status.success(), "no export has the empty name");
}

#[test]
fn the_empty_name_is_a_name_like_others() {
    let served = served([memory("", 1 << 20)]);
    run("nbdinfo", &[&served.uri("")]);
}

#[test]
fn nbdcopy_there_and_back_keeps_every_byte_and_the_holes() {
    let served = served([memory("disk", 64 << 20)]);
    let (source, back) = (served.path("source"), served.path("back"));
    let mut content = vec![0; 64 * MIB];
    content[5 * MIB..25 * MIB].copy_from_slice(&pattern(20 * MIB));
    content[60 * MIB + 1000..60 * MIB + 3000].copy_from_slice(&pattern(2000));
    std::fs::write(&source, &content).unwrap();
    let (source, back) = (source.display().to_string(), back.display().to_string());
    run("nbdcopy", &["--flush", &source, &served.uri("disk")]);
    run("nbdcopy", &["--connections=4", &served.uri("disk"), &back]);
    assert!(std::fs::read(&back).unwrap() == content, "the copy differs");
    let map = run("nbdinfo", &["--map", &served.uri("disk")]);
    let lines: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..3], ["0", "5242880", "3"], "{map}");
    assert_eq!(lines[1][..3], ["5242880", "20971520", "0"], "{map}");
}

#[test]
fn qemu_tools_read_write_zero_discard_and_compare() {
    let content = pattern(8 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let served = served([raw(&dir.path().join("disk"), &content, true), memory("memory", 8 << 20)]);
    let uri = served.uri("raw");
    let commands = [
        "write -P 0x5a 1M 3M",
        "write -f -P 0x5b 100 200",
        "write -z -u 5M 1M",
        "write -z 6M 512k",
        "discard 7M 64k",
        "flush",
        "read -P 0x5a 1M 3M",
        "read -P 0x5b 100 200",
        "read -P 0 5M 1M",
        "read -P 0 6M 512k",
    ];
    let args: Vec<&str> = ["-f", "raw", "-d", "unmap", &uri]
        .into_iter()
        .chain(commands.iter().flat_map(|command| ["-c", command]))
        .collect();
    let said = run("qemu-io", &args);
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    let copy = served.uri("memory");
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-m", "8", "-W", &uri, &copy]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &copy]);
    let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &copy]);
    assert!(map.contains("\"zero\": true"), "{map}");
}

#[test]
fn fio_verifies_what_it_wrote_at_depth_over_several_connections() {
    let dir = tempfile::tempdir().unwrap();
    let served = served([raw(&dir.path().join("disk"), &vec![0; 64 * MIB], true)]);
    let uri = format!("--uri={}", served.uri("raw"));
    let said = run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=4k-256k",
            "--iodepth=32",
            "--size=64m",
            "--verify=crc32c",
            "--fsync=32",
            "--verify_state_save=0",
            "--output-format=terse",
        ],
    );
    assert!(said.contains("verify"), "{said}");
}

/// What every nbdsh script begins with.
const SHELL: &str = "
h.set_uri_allow_local_file(True)
def fails(errno, f, *args):
    import errno as names
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errnum == getattr(names, errno), (errno, e.errno, e.string)
        return
    assert False, ('no error', errno)
";

#[test]
fn requests_against_the_rules_get_the_protocols_error_and_the_connection_goes_on() {
    for mode in ["simple", "structured"] {
        let served = served([memory("disk", 64 << 20), Export { writable: false, ..memory("ro", 1 << 20) }]);
        let set_up = format!(
            "{SHELL}
mode = '{mode}'
h.set_strict_mode(0)
h.set_request_structured_replies(mode != 'simple')
"
        );
        let script = "
h.connect_uri(uri)
size = h.get_size()
assert h.get_structured_replies_negotiated() == (mode != 'simple')
fails('EINVAL', h.pread, 512, size)
fails('EINVAL', h.pread, 512, size - 100)
fails('ENOSPC', h.pwrite, bytearray(512), size - 100)
fails('ENOSPC', h.zero, 512, size)
fails('EINVAL', h.trim, 512, size)
fails('EINVAL', h.cache, 512, size)
fails('EINVAL', h.flush, 1 << 9)
fails('EINVAL', h.pread, 512, 0, 1 << 12)
fails('EINVAL', h.pwrite, bytearray(512), 0, nbd.CMD_FLAG_NO_HOLE)
fails('EINVAL', h.trim, 512, 0, nbd.CMD_FLAG_REQ_ONE)
if mode == 'simple':
    fails('EINVAL', h.pread, 512, 0, nbd.CMD_FLAG_DF)
else:
    assert h.pread(512, 0, nbd.CMD_FLAG_DF) == bytes(512)
fails('EINVAL', h.pwrite, bytearray(40 << 20), 0)
h.pwrite(b'x' * 1000, 10, nbd.CMD_FLAG_FUA)
assert h.pread(1002, 9) == b'\\0' + b'x' * 1000 + b'\\0'
h.flush()
h.shutdown()
";
        nbdsh(&served.uri("disk"), &format!("{set_up}{script}"));
        let script = "
h.connect_uri(uri)
assert h.is_read_only()
fails('EPERM', h.pwrite, bytearray(512), 0)
fails('EPERM', h.trim, 512, 0)
fails('EPERM', h.zero, 512, 0)
h.flush()
assert h.pread(512, 0) == bytes(512)
h.shutdown()
";
        nbdsh(&served.uri("ro"), &format!("{set_up}{script}"));
    }
}

#[test]
fn block_status_tells_extents_and_depth() {
    // 3 GiB, so that an answer needs no 64-bit length and may have one; data in the base, then in the top.
    let len = 3 << 30;
    let base = NodeHandle::new(MemoryOverlay::new(1 << 30, 64 << 10, None));
    let top = NodeHandle::new(MemoryOverlay::new(len, 64 << 10, Some(base.clone())));
    infill_sim::block_on(async {
        let write = |node: NodeHandle, at: u64| async move {
            node.write(&Ctx::GUEST, at, vec![7; 128 << 10], Default::default()).await.unwrap();
        };
        write(base, 1 << 20).await;
        write(top.clone(), 2 << 20).await;
        top.write_zeroes(&Ctx::GUEST, 4 << 20, 64 << 10, Default::default()).await.unwrap();
    });
    let export = Export { writable: true, allocation_depth: true, ..Export::new("disk", top) };
    let served = served([export]);
    let script = format!(
        "{SHELL}
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.add_meta_context('qemu:allocation-depth')
h.add_meta_context('qemu:dirty-bitmap:none')
h.add_meta_context('x-unknown:thing')
h.connect_uri(uri)
assert h.can_meta_context('qemu:allocation-depth')
assert not h.can_meta_context('x-unknown:thing')
found = {{}}
def extent(context, offset, extents, error):
    found.setdefault(context, []).extend(zip(extents[0::2], extents[1::2]))
h.block_status(8 << 20, 0, extent)
K = 1024
M = 1024 * K
assert found['base:allocation'] == [
    (M, 3), (128 * K, 0), (M - 128 * K, 3), (128 * K, 0), (6 * M - 128 * K, 3)], found
assert found['qemu:allocation-depth'] == [
    (M, 0), (128 * K, 2), (M - 128 * K, 0), (128 * K, 1), (2 * M - 128 * K, 0),
    (64 * K, 1), (4 * M - 64 * K, 0)], found
found = {{}}
h.block_status(8 << 20, 5, extent, nbd.CMD_FLAG_REQ_ONE)
assert [len(e) for e in found.values()] == [1, 1], found
assert found['base:allocation'] == [(M - 5, 3)], found
found = {{}}
h.block_status(h.get_size() - (8 << 20), 8 << 20, extent)
assert found['base:allocation'] == [(h.get_size() - (8 << 20), 3)], found
h.set_strict_mode(0)
fails('EINVAL', h.block_status, 512, h.get_size(), extent)
h.shutdown()
"
    );
    nbdsh(&served.uri("disk"), &script);
}

#[test]
fn contexts_are_listed_by_name_by_wildcard_and_all() {
    let served = served([memory("disk", 1 << 20)]);
    let script = format!(
        "{SHELL}
h.set_opt_mode(True)
h.connect_uri(uri)
def listed(*queries):
    names = []
    for query in queries:
        h.add_meta_context(query)
    h.opt_list_meta_context(lambda name: names.append(name))
    h.clear_meta_contexts()
    return names
both = ['base:allocation', 'qemu:allocation-depth']
assert listed() == both
assert listed('base:') == both[:1]
assert listed('qemu:') == both[1:]
assert listed('qemu:', 'base:allocation') == both
assert listed('x-other:', 'nocolon', 'base:other') == []
h.opt_info()
h.set_export_name('other')
fails('ENOENT', h.opt_info)
fails('ENOTSUP', h.opt_list_meta_context, lambda name: 0)
fails('ENOENT', h.opt_go)
h.set_export_name('disk')
h.opt_go()
assert h.pread(512, 0) == bytes(512)
h.shutdown()
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.add_meta_context('base:')
h.connect_uri(uri)
assert not h.can_meta_context('base:allocation'), 'a wildcard chooses nothing'
h.set_strict_mode(0)
fails('EINVAL', h.block_status, 512, 0, lambda *args: 0)
h.shutdown()
"
    );
    nbdsh(&served.uri("disk"), &script);
}

#[test]
fn a_sparse_read_comes_as_data_and_holes_and_whole_where_it_must() {
    let served = served([memory("disk", 4 << 20)]);
    let script = format!(
        "{SHELL}
h.connect_uri(uri)
h.pwrite(b'a' * (64 * 1024), 128 * 1024)
h.zero(256 * 1024, 512 * 1024)
chunks = []
def chunk(buf, offset, status, error):
    chunks.append((offset, len(buf), status == nbd.READ_HOLE))
data = h.pread_structured(1024 * 1024, 0, chunk)
K = 1024
assert data == bytes(128 * K) + b'a' * (64 * K) + bytes(832 * K)
assert (512 * K, 256 * K, True) in chunks, chunks
chunks = []
assert h.pread_structured(1024 * 1024, 0, chunk, nbd.CMD_FLAG_DF) == data
assert chunks == [(0, 1024 * 1024, False)], chunks
h.shutdown()
"
    );
    nbdsh(&served.uri("disk"), &script);
}

#[test]
fn an_export_in_use_is_removed_hard_only_and_the_client_sees_the_end() {
    let served = served([memory("disk", 1 << 20), memory("other", 1 << 20)]);
    let exports = served.server.exports().clone();
    let flag = served.path("connected");
    let script = format!(
        "{SHELL}
h.connect_uri(uri)
open('{}', 'w').close()
import time
try:
    while True:
        h.pread(512, 0)
        time.sleep(0.01)
except nbd.Error as e:
    pass
",
        flag.display()
    );
    let uri = served.uri("disk");
    let client = std::thread::spawn(move || nbdsh(&uri, &script));
    while !flag.exists() {
        assert!(!client.is_finished(), "the client did not even connect");
        std::thread::yield_now();
    }
    let refused = exports.remove("disk", RemoveMode::Safe).err();
    assert_eq!(refused, Some(ExportError::InUse { name: "disk".into(), connections: 1 }));
    let removal = exports.remove("disk", RemoveMode::Hard).unwrap();
    infill_io::Reactors::start(1).unwrap().block_on(move || async move { removal.gone().await });
    client.join().unwrap();
    assert!(!output("nbdinfo", &[&served.uri("disk")]).status.success());
    run("nbdinfo", &[&served.uri("other")]);
}
