//! `blockdev-create`.

use crate::blockdev::{BlockdevRef, DriverName, is_driver, read_ref};
use crate::error::QmpError;
use crate::members::{Members, Words};

/// How much space a new file or image takes from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// None.
    #[default]
    Off,
    /// That of its tables.
    Metadata,
    /// All of it, without writing it.
    Falloc,
    /// All of it, with zeroes written.
    Full,
}

impl Words for Preallocation {
    const WORDS: &'static [(&'static str, Preallocation)] = &[
        ("off", Preallocation::Off),
        ("metadata", Preallocation::Metadata),
        ("falloc", Preallocation::Falloc),
        ("full", Preallocation::Full),
    ];
}

/// The name of a backing file, as a new header is to have it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CreateBacking {
    /// Its name.
    pub file: Option<String>,
    /// Its format.
    pub format: Option<&'static str>,
}

impl CreateBacking {
    fn read(options: &mut Members) -> Result<CreateBacking, QmpError> {
        let file = options.opt_str("backing-file")?;
        let format = options.opt_word("backing-fmt")?.map(DriverName::as_str);
        Ok(CreateBacking { file, format })
    }
}

/// A new qcow2 image.
#[derive(Clone, Debug, PartialEq)]
pub struct CreateQcow2 {
    /// Where it goes.
    pub file: BlockdevRef,
    /// Size of the disk, in bytes.
    pub size: u64,
    /// What it lies on.
    pub backing: CreateBacking,
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Cluster size, in bytes.
    pub cluster_bytes: Option<u64>,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Width of a refcount, in bits, as it came.
    pub refcount_bits: Option<i64>,
    /// How much space it takes from the beginning.
    pub preallocation: Preallocation,
    /// Whether compressed clusters are compressed with zstd.
    pub zstd: bool,
    /// Whether the data lie outside as they are, in a file that cannot be named.
    pub data_file_raw: bool,
}

/// A new QED image.
#[derive(Clone, Debug, PartialEq)]
pub struct CreateQed {
    /// Where it goes.
    pub file: BlockdevRef,
    /// Size of the disk, in bytes.
    pub size: u64,
    /// What it lies on.
    pub backing: CreateBacking,
    /// Cluster size, in bytes.
    pub cluster_bytes: Option<u64>,
    /// Clusters of a table, as it came.
    pub table_clusters: Option<i64>,
}

/// What is to be made.
#[derive(Clone, Debug, PartialEq)]
pub enum CreateOptions {
    /// A file.
    File {
        /// Its path.
        filename: String,
        /// Its size, in bytes.
        size: u64,
        /// How much space it takes from the beginning.
        preallocation: Preallocation,
    },
    /// A qcow2 image.
    Qcow2(Box<CreateQcow2>),
    /// A QED image.
    Qed(Box<CreateQed>),
}

/// `blockdev-create`.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockdevCreate {
    /// The job's id.
    pub job_id: String,
    /// What is to be made.
    pub options: CreateOptions,
}

/// A driver that something may be made of.
#[derive(Clone, Copy, Debug)]
enum Creatable {
    File,
    Qcow2,
    Qed,
    /// QEMU makes it, and we do not.
    Unbuilt(&'static str),
    /// Nobody makes it.
    Nothing,
}

macro_rules! unbuilt {
    ($($name:literal),* $(,)?) => { &[$(($name, Creatable::Unbuilt($name))),*] };
}

/// Formats that QEMU makes and we do not.
const UNBUILT: &[(&str, Creatable)] =
    unbuilt!["gluster", "luks", "nfs", "parallels", "qcow", "rbd", "ssh", "vdi", "vhdx", "vmdk", "vpc",];

impl Words for Creatable {
    const WORDS: &'static [(&'static str, Creatable)] =
        &[("file", Creatable::File), ("qcow2", Creatable::Qcow2), ("qed", Creatable::Qed)];

    fn of(word: &str) -> Option<&'static Creatable> {
        let known = Self::WORDS.iter().chain(UNBUILT).find(|(name, _)| *name == word);
        known.map(|(_, driver)| driver).or(is_driver(word).then_some(&Creatable::Nothing))
    }
}

#[derive(Clone, Copy, Debug)]
struct Version(u32);

impl Words for Version {
    const WORDS: &'static [(&'static str, Version)] = &[("v2", Version(2)), ("v3", Version(3))];
}

#[derive(Clone, Copy, Debug)]
struct IsZstd(bool);

impl Words for IsZstd {
    const WORDS: &'static [(&'static str, IsZstd)] = &[("zlib", IsZstd(false)), ("zstd", IsZstd(true))];
}

impl BlockdevCreate {
    pub(crate) fn take(arguments: &mut Members) -> Result<BlockdevCreate, QmpError> {
        let job_id = arguments.str("job-id")?;
        let mut options = arguments.object("options")?;
        let made = match options.word("driver")? {
            Creatable::File => Some(read_file(&mut options)?),
            Creatable::Qcow2 => Some(CreateOptions::Qcow2(Box::new(CreateQcow2::read(&mut options)?))),
            Creatable::Qed => Some(CreateOptions::Qed(Box::new(CreateQed::read(&mut options)?))),
            Creatable::Unbuilt(other) => {
                return Err(QmpError::generic(format!(
                    "driver '{other}' is not supported by blockdev-create yet: use file, qcow2 or qed"
                )));
            }
            Creatable::Nothing => None,
        };
        options.finish()?;
        let options = made.ok_or_else(|| QmpError::generic("Driver does not support blockdev-create"))?;
        Ok(BlockdevCreate { job_id, options })
    }
}

fn read_file(options: &mut Members) -> Result<CreateOptions, QmpError> {
    let filename = options.str("filename")?;
    let size = options.u64("size")?;
    let preallocation = options.opt_word("preallocation")?.unwrap_or_default();
    // Advice to file systems that have it: the file is the same without.
    options.opt_bool("nocow")?;
    options.opt_u64("extent-size-hint")?;
    Ok(CreateOptions::File { filename, size, preallocation })
}

impl CreateQcow2 {
    fn read(options: &mut Members) -> Result<CreateQcow2, QmpError> {
        let created = CreateQcow2 {
            file: read_ref(options, "file")?,
            extended_l2: options.opt_bool("extended-l2")?.unwrap_or(false),
            size: options.u64("size")?,
            version: options.opt_word("version")?.map_or(3, |version: Version| version.0),
            backing: CreateBacking::read(options)?,
            cluster_bytes: options.opt_u64("cluster-size")?,
            preallocation: options.opt_word("preallocation")?.unwrap_or_default(),
            lazy_refcounts: options.opt_bool("lazy-refcounts")?.unwrap_or(false),
            refcount_bits: options.opt_int("refcount-bits")?,
            zstd: options.opt_word("compression-type")?.is_some_and(|how: IsZstd| how.0),
            data_file_raw: options.opt_bool("data-file-raw")?.unwrap_or(false),
        };
        for name in ["encrypt", "data-file"] {
            options.refuse(name, "such images cannot be opened")?;
        }
        Ok(created)
    }
}

impl CreateQed {
    fn read(options: &mut Members) -> Result<CreateQed, QmpError> {
        Ok(CreateQed {
            file: read_ref(options, "file")?,
            size: options.u64("size")?,
            backing: CreateBacking::read(options)?,
            cluster_bytes: options.opt_u64("cluster-size")?,
            table_clusters: options.opt_int("table-size")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(options: &str) -> Result<CreateOptions, String> {
        let text = format!(r#"{{"job-id": "j", "options": {options}}}"#);
        let read = BlockdevCreate::take(&mut Members::of_argument(&text, None).unwrap());
        read.map(|create| create.options).map_err(|error| error.desc)
    }

    #[test]
    fn an_image_has_the_defaults_that_managers_know() {
        let CreateOptions::Qcow2(image) = read(r#"{"driver": "qcow2", "file": "f", "size": 512}"#).unwrap()
        else {
            panic!()
        };
        assert!(!image.extended_l2 && !image.lazy_refcounts && !image.zstd);
        assert_eq!((image.version, image.preallocation), (3, Preallocation::Off));
        assert_eq!(image.backing, CreateBacking::default());
    }

    #[test]
    fn what_cannot_be_made_is_refused_by_name() {
        for (options, why) in [
            (r#"{"driver": "raw"}"#, "Driver does not support blockdev-create"),
            (r#"{"driver": "raw", "size": 1}"#, "Parameter 'options.size' is unexpected"),
            (r#"{"driver": "zz"}"#, "Parameter 'driver' does not accept value 'zz'"),
            (
                r#"{"driver": "vdi", "file": "f", "size": 1}"#,
                "driver 'vdi' is not supported by blockdev-create yet: use file, qcow2 or qed",
            ),
            (r#"{"driver": "file", "filename": "f"}"#, "Parameter 'options.size' is missing"),
            (
                r#"{"driver": "qcow2", "file": "f", "size": 1, "encrypt": {}}"#,
                "'options.encrypt' is not supported yet: such images cannot be opened",
            ),
        ] {
            assert_eq!(read(options), Err(why.into()), "{options}");
        }
    }
}
