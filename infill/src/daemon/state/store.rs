//! The file that holds the records: a redb database, opened by one process at a time.
//!
//! What never happens: a database that is damaged or of an unknown schema changed, deleted or taken for an empty one; a
//! panic of the database that ends the daemon; a write that is reported before it is on stable storage.
//!
//! `DIR/lock` is locked first, so that a second daemon is told who has the state. A new database is written under another
//! name and then renamed, so a kill in the middle leaves none rather than half of one.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use infill_storage::sync::{Mutex, lock};
use redb::{Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use rustix::fs::{FlockOperation, flock};

use super::record::Record;

/// The layout of the database that this program writes. A daemon that knew the first one alone would begin a copy anew and leave
/// the map that its record names as it is; one that knew the second one knows no bitmaps, and one that knew the third none of an
/// image. So none of them may read what this one has written.
const SCHEMA: u64 = 4;
/// The oldest layout that is read.
const SCHEMA_OLDEST: u64 = 1;
/// Records, in the order in which what they tell of was made.
const RECORDS: TableDefinition<u64, &[u8]> = TableDefinition::new("records");
/// Records of migrations, by migration and side. Absent in a database of a daemon that has never known one.
const MIGRATIONS: TableDefinition<&str, &[u8]> = TableDefinition::new("migrations");
/// What is said of the database itself.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// In [`META`]: the schema.
const SCHEMA_KEY: &str = "schema";
/// Memory for pages of the database, in bytes. It holds some kilobytes.
const CACHE_BYTES: usize = 1 << 20;

/// A record that is written, or removed.
pub type Change = (u64, Option<Vec<u8>>);

/// The file of a state.
pub struct Store {
    path: PathBuf,
    /// `None` after a write that failed: it is opened again.
    database: Mutex<Option<Database>>,
    _locked: File,
}

/// Runs `work` on the database. A panic of it is an error.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| bail!("the database could not be read"))
}

fn opened(path: &Path, check: bool) -> Result<Database> {
    guarded(|| {
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(check);
        Ok(builder.open(path)?)
    })
}

/// The error of a database that is not as this program has left it.
fn damaged(path: &Path, why: impl std::fmt::Display) -> anyhow::Error {
    anyhow!(
        "{} is damaged ({why}): nothing is started from it and it is left in place; put a copy of it back, or move it away \
         to start with nothing",
        path.display()
    )
}

impl Store {
    /// Opens the state in `dir`, made where there is none, and reads it.
    pub fn open(dir: &Path) -> Result<(Store, Vec<(u64, Record)>)> {
        if !dir.exists() {
            // It may hold secrets.
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.with_context(|| format!("cannot make the directory of the state, {}", dir.display()))?;
        }
        let locked = lock_directory(dir)?;
        let path = dir.join("state.redb");
        let empty = match std::fs::metadata(&path) {
            Ok(meta) => meta.len() == 0,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                create(&path).with_context(|| format!("cannot create {}", path.display()))?;
                false
            }
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        if empty {
            return Err(damaged(&path, "it is empty"));
        }
        let database = opened(&path, true).map_err(|error| match error.downcast_ref::<DatabaseError>() {
            Some(DatabaseError::DatabaseAlreadyOpen) => {
                anyhow!("{} is open in another process", path.display())
            }
            Some(DatabaseError::Storage(redb::StorageError::Io(io)))
                if io.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                anyhow!("cannot open {}: {io}", path.display())
            }
            _ => damaged(&path, &error),
        })?;
        let records = guarded(|| read(&database)).map_err(|error| match error.downcast::<UnknownSchema>() {
            Ok(UnknownSchema(found)) => anyhow!(
                "{} has schema {found}, and this program (infill {}) knows schema {SCHEMA}: start it with the version that \
                 wrote it, or move it away to start with nothing",
                path.display(),
                env!("CARGO_PKG_VERSION")
            ),
            Err(error) => damaged(&path, format!("{error:#}")),
        })?;
        Ok((Store { path, database: Mutex::new(Some(database)), _locked: locked }, records))
    }

    /// Makes all changes in one transaction. On stable storage when it returns.
    pub fn write(&self, changes: &[Change]) -> Result<()> {
        self.transact(|database| write(database, changes))
    }

    /// Writes the record of one side of a migration. On stable storage when it returns.
    pub fn write_migration(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.transact(|database| {
            let transaction = database.begin_write()?;
            transaction.open_table(MIGRATIONS)?.insert(key, bytes)?;
            transaction.commit()?;
            Ok(())
        })
    }

    /// The records of migrations.
    pub fn migrations(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let slot = lock(&self.database);
        let Some(database) = &*slot else { bail!("{} is not open", self.path.display()) };
        guarded(|| {
            let table = match database.begin_read()?.open_table(MIGRATIONS) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                table => table?,
            };
            let row = |row: Result<(redb::AccessGuard<'_, &str>, redb::AccessGuard<'_, &[u8]>), _>| {
                let (key, bytes) = row?;
                Ok((key.value().to_owned(), bytes.value().to_vec()))
            };
            table.iter()?.map(row).collect()
        })
    }

    fn transact(&self, work: impl FnOnce(&Database) -> Result<()>) -> Result<()> {
        let mut slot = lock(&self.database);
        let database = match slot.take() {
            Some(database) => database,
            None => opened(&self.path, false)?,
        };
        // One that failed is not used again.
        let database = guarded(move || {
            work(&database)?;
            Ok(database)
        })
        .with_context(|| format!("writing {}", self.path.display()))?;
        *slot = Some(database);
        Ok(())
    }
}

/// Makes this process the only one that uses `dir`.
fn lock_directory(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let open = File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path);
    let mut file = open.with_context(|| format!("cannot open {}", path.display()))?;
    if let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
        let mut holder = String::new();
        let _ = file.read_to_string(&mut holder);
        if error != rustix::io::Errno::WOULDBLOCK {
            bail!("cannot lock {}: {error}", path.display());
        }
        bail!(
            "the state in {} is in use by another daemon (process {}): end that one, or give this one a directory of its \
             own",
            dir.display(),
            holder.trim()
        );
    }
    // For the message above only.
    let noted =
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    noted.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(file)
}

/// Writes an empty database at `path`, whole or not at all.
fn create(path: &Path) -> Result<()> {
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    guarded(|| {
        let database = Builder::new().create(&new)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
        let transaction = database.begin_write()?;
        transaction.open_table(META)?.insert(SCHEMA_KEY, SCHEMA)?;
        transaction.open_table(RECORDS)?;
        transaction.commit()?;
        Ok(())
    })?;
    std::fs::rename(&new, path)?;
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[derive(Debug)]
struct UnknownSchema(u64);

impl std::fmt::Display for UnknownSchema {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unknown schema {}", self.0)
    }
}

impl std::error::Error for UnknownSchema {}

fn read(database: &Database) -> Result<Vec<(u64, Record)>> {
    let transaction = database.begin_read()?;
    let schema = transaction.open_table(META)?.get(SCHEMA_KEY)?.map(|schema| schema.value());
    match schema {
        Some(SCHEMA_OLDEST..=SCHEMA) => {}
        Some(other) => bail!(UnknownSchema(other)),
        None => bail!("it does not say its schema"),
    }
    let mut records = Vec::new();
    for row in transaction.open_table(RECORDS)?.iter()? {
        let (at, bytes) = row?;
        let at = at.value();
        let record = serde_json::from_slice(bytes.value()).with_context(|| format!("record {at}"))?;
        records.push((at, record));
    }
    Ok(records)
}

fn write(database: &Database, changes: &[Change]) -> Result<()> {
    let transaction = database.begin_write()?;
    {
        transaction.open_table(META)?.insert(SCHEMA_KEY, SCHEMA)?;
        let mut records = transaction.open_table(RECORDS)?;
        for (at, record) in changes {
            match record {
                Some(bytes) => records.insert(at, bytes.as_slice())?,
                None => records.remove(at)?,
            };
        }
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::record::{Key, Kind};
    use super::*;

    fn record(name: &str) -> Record {
        let given = serde_json::from_str(r#"{"driver": "null-co"}"#).unwrap();
        let key = Key::new(Kind::Node, name);
        Record {
            key,
            command: "blockdev-add".into(),
            given,
            strings: false,
            now: None,
            job: None,
            bits: None,
        }
    }

    fn bytes(record: &Record) -> Option<Vec<u8>> {
        Some(serde_json::to_vec(record).unwrap())
    }

    fn refused(dir: &Path) -> String {
        format!("{:#}", Store::open(dir).err().expect("it is refused"))
    }

    #[test]
    fn what_was_written_is_read_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let dir = &dir.path().join("a/b");
        let (store, records) = Store::open(dir).unwrap();
        assert_eq!(records, []);
        assert_eq!(std::fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(dir.join("state.redb")).unwrap().permissions().mode() & 0o777, 0o600);
        store
            .write(&[(300, bytes(&record("c"))), (2, bytes(&record("b"))), (1, bytes(&record("a")))])
            .unwrap();
        store.write(&[(2, None), (1, bytes(&record("z")))]).unwrap();
        assert!(refused(dir).contains(&format!("in use by another daemon (process {})", std::process::id())));
        drop(store);
        let (_store, records) = Store::open(dir).unwrap();
        assert_eq!(records, [(1, record("z")), (300, record("c"))]);
    }

    fn set_schema(dir: &Path, schema: u64) {
        let database = Database::open(dir.join("state.redb")).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(META).unwrap().insert(SCHEMA_KEY, schema).unwrap();
        transaction.commit().unwrap();
    }

    #[test]
    fn records_of_migrations_are_kept_beside_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        assert_eq!(store.migrations().unwrap(), []);
        store.write_migration("m source", b"one").unwrap();
        store.write_migration("m source", b"two").unwrap();
        store.write_migration("l target", b"three").unwrap();
        drop(store);
        let (store, records) = Store::open(dir.path()).unwrap();
        assert_eq!(records, []);
        let kept = store.migrations().unwrap();
        assert_eq!(kept, [("l target".into(), b"three".to_vec()), ("m source".into(), b"two".to_vec())]);
    }

    #[test]
    fn a_schema_that_is_not_known_is_refused_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        set_schema(dir.path(), 7);
        let why = refused(dir.path());
        assert!(why.contains("has schema 7") && why.contains(&format!("knows schema {SCHEMA}")), "{why}");
    }

    #[test]
    fn what_is_written_to_an_older_schema_is_of_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        set_schema(dir.path(), 1);
        let (store, _) = Store::open(dir.path()).unwrap();
        store.write(&[(1, bytes(&record("a")))]).unwrap();
        drop(store);
        let database = Database::open(dir.path().join("state.redb")).unwrap();
        let meta = database.begin_read().unwrap().open_table(META).unwrap();
        assert_eq!(meta.get(SCHEMA_KEY).unwrap().unwrap().value(), SCHEMA);
    }

    #[test]
    fn damage_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        {
            let (store, _) = Store::open(dir.path()).unwrap();
            store.write(&(0..200).map(|at| (at, bytes(&record("n")))).collect::<Vec<_>>()).unwrap();
        }
        let sound = std::fs::read(&path).unwrap();
        let mut refusals = 0;
        for at in (0..sound.len()).step_by(sound.len() / 64) {
            let mut torn = sound.clone();
            let end = (at + 600).min(torn.len());
            torn[at..end].iter_mut().for_each(|byte| *byte ^= 0xa5);
            std::fs::write(&path, &torn).unwrap();
            // Damage to what is free is none.
            match Store::open(dir.path()) {
                Ok((_, records)) => assert_eq!(records.len(), 200, "at {at}"),
                Err(error) => {
                    let why = format!("{error:#}");
                    assert!(why.contains("is damaged") && why.contains("left in place"), "{why}");
                    assert!(path.exists());
                    refusals += 1;
                }
            }
        }
        assert!(refusals > 4, "{refusals}");
        for length in [0, 1, 4095, sound.len() / 2] {
            std::fs::write(&path, &sound[..length]).unwrap();
            assert!(refused(dir.path()).contains("is damaged"), "{length}");
            assert_eq!(std::fs::metadata(&path).unwrap().len(), length as u64);
        }
        std::fs::write(&path, b"something else entirely").unwrap();
        assert!(refused(dir.path()).contains("is damaged"));
    }

    #[test]
    fn a_record_that_is_not_understood_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        store.write(&[(5, Some(b"{}".to_vec()))]).unwrap();
        drop(store);
        assert!(refused(dir.path()).contains("record 5"));
    }

    #[test]
    fn a_kill_while_it_was_created_leaves_none() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("state.new"), b"half of one").unwrap();
        assert_eq!(Store::open(dir.path()).unwrap().1, []);
    }
}
