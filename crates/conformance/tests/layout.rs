//! The parsers that judge the drivers are judged by QEMU's images.

use std::fs;
use std::path::Path;
use std::process::Command;

use infill_conformance::Format;
use infill_conformance::layout::{Layout, Name};
use infill_sim::Media;

fn run(directory: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: apt-get install qemu-utils ({error})"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {words}");
}

/// An image that QEMU made: clusters 0, 3 and 40 of 4 KiB written, cluster 3 zeroed in one.
fn image(format: &str, options: &str) -> Media {
    let directory = tempfile::tempdir().expect("a directory");
    run(directory.path(), "qemu-img", &["create", "-q", "-f", format, "-o", options, "i", "8M"]);
    let writes = ["-c", "write -P 1 0 4k", "-c", "write -P 2 12k 4k", "-c", "write -P 3 160k 4k"];
    run(directory.path(), "qemu-io", &[&["-f", format], &writes[..], &["i"]].concat());
    Media::from_bytes(&fs::read(directory.path().join("i")).expect("the image"))
}

fn data(layout: &Layout) -> Vec<u64> {
    let mut data: Vec<u64> = layout
        .named
        .values()
        .flatten()
        .filter_map(|name| if let Name::Data(guest) = name { Some(*guest) } else { None })
        .collect();
    data.sort_unstable();
    data
}

fn parse(format: Format, media: &Media) -> Layout {
    Layout::parse(format, media).expect("has a structure").expect("is well formed")
}

#[test]
fn qcow2_images_of_qemu_name_what_was_written_and_contradict_nothing() {
    for (options, cluster) in [
        ("cluster_size=4k", 4096),
        ("cluster_size=64k,extended_l2=on", 65536),
        ("cluster_size=512,refcount_bits=64", 512),
        ("cluster_size=4k,refcount_bits=1", 4096),
        ("cluster_size=4k,compat=0.10", 4096),
    ] {
        let layout = parse(Format::QCOW2, &image("qcow2", options));
        assert_eq!(layout.contradiction(), None, "{options}");
        assert_eq!(layout.cluster_bytes, cluster);
        let expected: Vec<u64> = [0, 12288, 163_840_u64]
            .iter()
            .flat_map(|at| (0..4096_u64).step_by(512).map(move |more| (at + more) / cluster * cluster))
            .collect();
        let mut expected = expected;
        expected.dedup();
        assert_eq!(data(&layout), expected, "{options}");
        let counts = layout.refcounts.as_ref().expect("has refcounts");
        assert!(layout.named.keys().all(|cluster| counts[cluster] == 1), "{options}: every name counts once");
    }
}

#[test]
fn qed_images_of_qemu_name_what_was_written_and_contradict_nothing() {
    let layout = parse(Format::QED, &image("qed", "cluster_size=4k,table_size=2"));
    assert_eq!(layout.contradiction(), None);
    assert_eq!(data(&layout), [0, 12288, 163_840]);
}

#[test]
fn a_cluster_that_is_named_twice_or_counts_too_little_is_seen() {
    let mut media = image("qcow2", "cluster_size=4k");
    let layout = parse(Format::QCOW2, &media);
    let table =
        layout.named.iter().find(|(_, names)| names[0] == Name::L2Table).expect("an L2 table").0 * 4096;
    let mut entry = [0; 8];
    media.read(table, &mut entry);
    media.write(table + 8, &entry);
    assert!(parse(Format::QCOW2, &media).contradiction().is_some_and(|what| what.contains("named as [Data")));
    media.write(table, &(0x8000_0000_0010_0000_u64).to_be_bytes());
    media.write(table + 8, &[0; 8]);
    let far = parse(Format::QCOW2, &media).contradiction();
    assert!(far.as_ref().is_some_and(|what| what.contains("counts too little")), "{far:?}");
    let mut media = image("qed", "cluster_size=4k,table_size=2");
    media.set_len(media.len() - 1);
    let cut = parse(Format::QED, &media).contradiction();
    assert!(cut.is_some_and(|what| what.contains("behind the file's end")));
}
