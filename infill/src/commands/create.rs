//! `infill create`: an empty image, or an overlay over a base that may be anywhere.
//!
//! Order: options are understood and tried out on a device that forgets, the backing chain is opened and looked at, and
//! only then is an existing file emptied (under its writer's lock).

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use infill_base::{Ctx, ErrorKind, WriteFlags, align_up, zero_bytes};
use infill_io::{Create, FileOptions, FileStorage};
use infill_nbd::OnLost;
use infill_node::BackingRef;
use infill_qcow2::Compression;
use infill_storage::{NullStorage, StorageHandle};

use crate::args::CreateArgs;
use crate::blockdev::{Blockdevs, FormatKind, Image, Located, OpenPolicy, locate, resolve_backing};
use crate::commands::run;
use crate::out::print;
use crate::size::parse_size;

/// Sizes of disks are multiples of this.
const SECTOR_BYTES: u64 = 512;
/// `preallocation=full` is written in pieces of this size.
const FULL_PIECE_BYTES: u64 = 4 << 20;

/// Options by name, for `-o help`.
const RAW_OPTIONS: &[(&str, &str)] = &[
    ("size=<size>", "size of the disk"),
    ("preallocation=<off|falloc|full>", "reserve the space, or write zeroes to all of it"),
];
const QCOW2_OPTIONS: &[(&str, &str)] = &[
    ("size=<size>", "size of the disk"),
    ("backing_file=<name>", "the image that the new one lies over"),
    ("backing_fmt=<fmt>", "format of the backing file"),
    ("compat=<v2|0.10|v3|1.1>", "version of the format (v3)"),
    ("cluster_size=<size>", "a power of two from 512 to 2M (64k)"),
    (
        "extended_l2=<on|off>",
        "subclusters, which QEMU reads from 5.2 on (on, where version and clusters allow it)",
    ),
    ("refcount_bits=<num>", "a power of two from 1 to 64 (16)"),
    ("compression_type=<zlib|zstd>", "how compressed clusters are compressed (zlib)"),
    ("lazy_refcounts=<on|off>", "write refcounts late (off)"),
    ("preallocation=<off|metadata|falloc|full>", "take the space of tables, or of everything, at once (off)"),
];
const QED_OPTIONS: &[(&str, &str)] = &[
    ("size=<size>", "size of the disk"),
    ("backing_file=<name>", "the image that the new one lies over"),
    ("backing_fmt=<fmt>", "format of the backing file"),
    ("cluster_size=<size>", "a power of two from 4k to 64M (64k)"),
    ("table_size=<num>", "clusters of a table, a power of two from 1 to 16 (4)"),
];

/// Smallest cluster that can have subclusters, in bytes.
const EXTENDED_L2_CLUSTER_BYTES_MIN: u64 = 16 << 10;

/// What an image is to be like.
#[derive(Clone, Debug)]
enum Plan {
    Raw { size: u64, preallocation: Preallocation },
    Qcow2(infill_qcow2::CreateOptions),
    Qed(infill_qed::CreateOptions),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Preallocation {
    #[default]
    Off,
    Falloc,
    Full,
}

/// `-o` as pairs. A doubled comma is a comma in a value.
fn pairs(lists: &[String]) -> Result<Vec<(String, String)>> {
    let mut out = Vec::new();
    for list in lists {
        for item in list.replace(",,", "\0").split(',').filter(|item| !item.is_empty()) {
            let item = item.replace('\0', ",");
            let Some((key, value)) = item.split_once('=') else {
                bail!("-o {item}: an option is written key=value; -o help lists them");
            };
            out.push((key.to_owned(), value.to_owned()));
        }
    }
    Ok(out)
}

/// Options of one image, taken one by one.
struct Options(Vec<(String, String)>);

impl Options {
    /// The last value given for `key`.
    fn take(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().rposition(|(other, _)| other == key)?;
        let value = self.0.swap_remove(at).1;
        self.0.retain(|(other, _)| other != key);
        Some(value)
    }

    fn take_size(&mut self, key: &str) -> Result<Option<u64>> {
        let parse = |value: String| parse_size(&value).map_err(|why| anyhow::anyhow!("option {key}: {why}"));
        self.take(key).map(parse).transpose()
    }

    fn take_number(&mut self, key: &str) -> Result<Option<u32>> {
        let parse = |value: String| {
            value.parse().map_err(|_| anyhow::anyhow!("option {key}: '{value}' is no number that fits"))
        };
        self.take(key).map(parse).transpose()
    }

    fn take_flag(&mut self, key: &str) -> Result<Option<bool>> {
        let parse = |value: String| match value.as_str() {
            "on" | "yes" | "true" => Ok(true),
            "off" | "no" | "false" => Ok(false),
            _ => bail!("option {key}: '{value}' is neither on nor off"),
        };
        self.take(key).map(parse).transpose()
    }

    fn finish(self, format: FormatKind) -> Result<()> {
        match self.0.first() {
            None => Ok(()),
            Some((key, _)) => bail!(
                "the option '{key}' is not known for {}, or not supported; -o help lists those that are",
                format.as_str()
            ),
        }
    }
}

/// Creates an image.
pub fn main(args: CreateArgs) -> Result<ExitCode> {
    if args.options.iter().any(|list| matches!(list.as_str(), "help" | "?")) {
        print(&help(format_of(&args)))?;
        return Ok(ExitCode::SUCCESS);
    }
    run(move || async move {
        let Some(filename) = &args.filename else { bail!("which file is to be created? Name one") };
        let told = create(filename, &args).await.with_context(|| filename.clone())?;
        if !args.quiet {
            print(&told)?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// An image with a backing file is qcow2, and any other raw, where nothing else is said.
fn format_of(args: &CreateArgs) -> FormatKind {
    let overlay = args.backing.is_some() || args.options.iter().any(|list| list.contains("backing_file="));
    args.format.unwrap_or(if overlay { FormatKind::Qcow2 } else { FormatKind::Raw })
}

fn help(format: FormatKind) -> String {
    let options = match format {
        FormatKind::Raw => RAW_OPTIONS,
        FormatKind::Qcow2 => QCOW2_OPTIONS,
        FormatKind::Qed => QED_OPTIONS,
    };
    let lines = options.iter().map(|(option, what)| format!("  {option:<34} {what}\n"));
    format!("Options of {}:\n{}", format.as_str(), lines.collect::<String>())
}

async fn create(filename: &str, args: &CreateArgs) -> Result<String> {
    let format = format_of(args);
    let mut options = Options(pairs(&args.options)?);
    let target = match locate(filename)? {
        Located::Protocol(options) => super::file_path(&options),
        Located::Tree(_) => None,
    };
    let Some(target) = target else { bail!("an image is created in a file: name one") };

    let backing_file = options.take("backing_file").or_else(|| args.backing.clone());
    let backing_format = match options.take("backing_fmt") {
        Some(name) => Some(FormatKind::parse(&name)?),
        None => args.backing_format,
    };
    let mut size = options.take_size("size")?.or(args.size);
    let backing = match &backing_file {
        None if backing_format.is_some() => {
            bail!("a backing format is given, but no backing file: -b is missing")
        }
        None => None,
        Some(_) if format == FormatKind::Raw => {
            bail!(
                "raw cannot have a backing file, for it cannot tell absent from zero: use -f qcow2 or -f qed"
            )
        }
        Some(name) if args.unchecked => Some((name.clone(), backing_format)),
        Some(name) => {
            let (found, len) = look_at_backing(filename, &target, name, backing_format).await?;
            size = size.or(Some(len));
            Some((name.clone(), Some(found)))
        }
    };
    let Some(size) = size else { bail!("how large shall the disk be? Give a size, as 10G") };
    let size = align_up(size, SECTOR_BYTES);
    let backing = backing.map(|(filename, format)| BackingRef {
        filename,
        format: format.map(|format| format.as_str().to_owned()),
    });
    let plan = plan(format, size, backing, &mut options)?;
    options.finish(format)?;
    plan.try_out().await?;
    let storage = FileOptions { create: Create::Truncate(0), ..FileOptions::default() };
    let storage = FileStorage::open_handle(&target, storage)?;
    plan.write(&storage).await?;
    sync_directory(&target)?;
    Ok(plan.told(filename))
}

/// Opens the backing chain as the new image will see it: the format and size of its top.
async fn look_at_backing(
    overlay: &str,
    target: &Path,
    name: &str,
    format: Option<FormatKind>,
) -> Result<(FormatKind, u64)> {
    let whole = resolve_backing(overlay, name)?;
    let blockdevs = Blockdevs::new(OpenPolicy { on_lost: OnLost::Fail, ..OpenPolicy::default() });
    let top = blockdevs.add_image(&Image { format, ..Image::read_only(&whole) }).await?;
    let result = (|| {
        let driver = FormatKind::parse(blockdevs.facts(&top)?.driver)?;
        if format.is_none() && driver != FormatKind::Raw {
            bail!(
                "the backing file '{name}' looks like {0}, but its format is not given: say -F {0} (or -F raw if what \
                 it holds only looks like that)",
                driver.as_str()
            );
        }
        let same = |layer: &String| {
            let file = blockdevs.bottom_path(layer).and_then(|path| std::fs::metadata(path).ok());
            let new = std::fs::metadata(target).ok();
            file.zip(new).is_some_and(|(a, b)| (a.dev(), a.ino()) == (b.dev(), b.ino()))
        };
        if blockdevs.chain(&top).iter().any(same) {
            bail!("the new image would be its own backing file: '{name}' is, or lies over, {overlay}");
        }
        Ok((driver, blockdevs.get(&top)?.len()))
    })();
    blockdevs.close_all().await?;
    result
}

fn plan(format: FormatKind, size: u64, backing: Option<BackingRef>, options: &mut Options) -> Result<Plan> {
    Ok(match format {
        FormatKind::Raw => {
            let preallocation = match options.take("preallocation").as_deref() {
                None | Some("off") => Preallocation::Off,
                Some("falloc") => Preallocation::Falloc,
                Some("full") => Preallocation::Full,
                Some(other) => {
                    bail!("option preallocation: '{other}' is not possible; off, falloc and full are")
                }
            };
            Plan::Raw { size, preallocation }
        }
        FormatKind::Qcow2 => {
            let version = match options.take("compat").as_deref() {
                None | Some("v3" | "1.1") => 3,
                Some("v2" | "0.10") => 2,
                Some(other) => bail!("option compat: '{other}' is not possible; v2 (0.10) and v3 (1.1) are"),
            };
            let compression = match options.take("compression_type").as_deref() {
                None | Some("zlib") => Compression::Deflate,
                Some("zstd") => Compression::Zstd,
                Some(other) => bail!("option compression_type: '{other}' is not possible; zlib and zstd are"),
            };
            let preallocation = match options.take("preallocation").as_deref() {
                None | Some("off") => infill_qcow2::Preallocation::Off,
                Some("metadata") => infill_qcow2::Preallocation::Metadata,
                Some("falloc") => infill_qcow2::Preallocation::Falloc,
                Some("full") => infill_qcow2::Preallocation::Full,
                Some(other) => {
                    bail!(
                        "option preallocation: '{other}' is not possible; off, metadata, falloc and full are"
                    )
                }
            };
            let defaults = infill_qcow2::CreateOptions::default();
            let cluster_bytes = options.take_size("cluster_size")?.unwrap_or(defaults.cluster_bytes);
            let can_have_subclusters = version >= 3 && cluster_bytes >= EXTENDED_L2_CLUSTER_BYTES_MIN;
            Plan::Qcow2(infill_qcow2::CreateOptions {
                size,
                backing,
                version,
                compression,
                cluster_bytes,
                refcount_bits: options.take_number("refcount_bits")?.unwrap_or(defaults.refcount_bits),
                extended_l2: options.take_flag("extended_l2")?.unwrap_or(can_have_subclusters),
                lazy_refcounts: options.take_flag("lazy_refcounts")?.unwrap_or(defaults.lazy_refcounts),
                preallocation,
            })
        }
        FormatKind::Qed => {
            let defaults = infill_qed::CreateOptions::default();
            Plan::Qed(infill_qed::CreateOptions {
                size,
                backing,
                cluster_bytes: options.take_size("cluster_size")?.unwrap_or(defaults.cluster_bytes),
                table_clusters: options.take_number("table_size")?.unwrap_or(defaults.table_clusters),
            })
        }
    })
}

impl Plan {
    /// Makes the image on a device that forgets, so that what is refused is refused before a file is touched.
    async fn try_out(&self) -> Result<()> {
        let device = NullStorage { len: i64::MAX as u64, latency: Duration::ZERO, tells_zero: true };
        let device = StorageHandle::new(device);
        match self {
            Plan::Raw { .. } => Ok(()),
            Plan::Qcow2(options) => Ok(infill_qcow2::create(&Ctx::GUEST, &device, options).await?),
            Plan::Qed(options) => Ok(infill_qed::create(&Ctx::GUEST, &device, options).await?),
        }
    }

    async fn write(&self, storage: &StorageHandle) -> Result<()> {
        let cx = Ctx::GUEST;
        match self {
            Plan::Qcow2(options) => infill_qcow2::create(&cx, storage, options).await?,
            Plan::Qed(options) => infill_qed::create(&cx, storage, options).await?,
            Plan::Raw { size, preallocation } => {
                match preallocation {
                    Preallocation::Off => match storage.set_len(&cx, *size).await {
                        // A block device has the length that it has.
                        Err(error) if error.kind() == ErrorKind::Unsupported && storage.len() >= *size => {}
                        result => result?,
                    },
                    Preallocation::Falloc => storage.allocate(&cx, 0, *size).await?,
                    Preallocation::Full => {
                        let mut at = 0;
                        while at < *size {
                            let piece = (*size - at).min(FULL_PIECE_BYTES);
                            storage.write(&cx, at, zero_bytes(piece as usize), WriteFlags::empty()).await?;
                            at += piece;
                        }
                    }
                }
                storage.sync(&cx).await?;
            }
        }
        Ok(())
    }

    /// What qemu-img says of it.
    fn told(&self, filename: &str) -> String {
        let on = |flag: bool| if flag { "on" } else { "off" };
        let backing = |backing: &Option<BackingRef>| {
            let Some(BackingRef { filename, format }) = backing else { return String::new() };
            let format = format.as_ref().map(|format| format!(" backing_fmt={format}")).unwrap_or_default();
            format!(" backing_file={filename}{format}")
        };
        match self {
            Plan::Raw { size, .. } => format!("Formatting '{filename}', fmt=raw size={size}\n"),
            Plan::Qcow2(options) => format!(
                "Formatting '{filename}', fmt=qcow2 cluster_size={} extended_l2={} compression_type={} size={}{} \
                 lazy_refcounts={} refcount_bits={}\n",
                options.cluster_bytes,
                on(options.extended_l2),
                options.compression.name(),
                options.size,
                backing(&options.backing),
                on(options.lazy_refcounts),
                options.refcount_bits
            ),
            Plan::Qed(options) => format!(
                "Formatting '{filename}', fmt=qed size={}{} cluster_size={}\n",
                options.size,
                backing(&options.backing),
                options.cluster_bytes
            ),
        }
    }
}

/// A new file exists only after its directory was synced too.
fn sync_directory(file: &Path) -> Result<()> {
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let synced = std::fs::File::open(directory).and_then(|directory| directory.sync_all());
    synced.with_context(|| format!("syncing the directory {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubled_comma_is_part_of_a_value_and_the_last_of_two_counts() {
        let lists = ["a=1,b=x,,y".to_owned(), "a=2".to_owned()];
        let mut options = Options(pairs(&lists).unwrap());
        assert_eq!(options.take("a").as_deref(), Some("2"));
        assert_eq!(options.take("a"), None);
        assert_eq!(options.take("b").as_deref(), Some("x,y"));
        assert!(options.finish(FormatKind::Raw).is_ok());
        assert!(pairs(&["a".to_owned()]).is_err());
    }

    #[test]
    fn an_unknown_option_is_refused_by_name() {
        let options = Options(pairs(&["encryption=on".to_owned()]).unwrap());
        assert!(options.finish(FormatKind::Qcow2).unwrap_err().to_string().contains("'encryption'"));
    }
}
