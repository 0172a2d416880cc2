//! `infill demo`: the whole story on this machine, in a minute, with nothing installed.
//!
//! A base image lies behind a slow link. Its overlay is served at once; a guest reads and writes and verifies every byte,
//! while the overlay is filled, while the daemon is killed in the middle, and after it goes on. At the end the source is
//! taken away, and the whole disk is verified.

mod daemon;
mod guest;
mod model;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::BytesMut;
use infill_base::Ctx;
use infill_io::{Address, FileOptions, FileStorage, Reactors, RelayOptions};
use infill_node::BackingRef;

use daemon::{Daemon, EXPORT, Source, disk_socket};
use guest::{Guest, Latencies, Load};
use model::{BLOCK_BYTES, SECTORS, Verdict};

use crate::progress::bytes_bar;

/// The guest's disk, in bytes.
const DISK_BYTES: u64 = 512 << 20;
/// The link: 20 ms there and back, 320 Mbit/s.
const LINK: RelayOptions =
    RelayOptions { delay: Duration::from_millis(10), bytes_per_second: Some(40_000_000) };
/// How long the guest is watched before the fill begins.
const ALONE: Duration = Duration::from_secs(4);
/// The daemon is killed when this much of the disk has been got through.
const KILL_AT_PERCENT: u64 = 50;
/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(100);

/// A folder that goes with this.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("infill-demo-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("making the folder {}", path.display()))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What was seen on the way.
struct Story {
    first_byte: Duration,
    alone: Latencies,
    beside: Latencies,
    fill_time: Duration,
    fetched: u64,
    killed_at: u64,
    verdict: Verdict,
    verified: u64,
}

/// Tells it, and fails if a byte was wrong.
pub fn main() -> Result<()> {
    let folder = Folder::new()?;
    let story = play(&folder.0)?;
    print_table(&story);
    ensure!(story.verdict.is_good(), "data was lost: see the table");
    Ok(())
}

fn say(text: &str) {
    println!("• {text}");
    let _ = std::io::stdout().flush();
}

fn play(dir: &Path) -> Result<Story> {
    let (base, overlay, near) = (dir.join("base.raw"), dir.join("overlay.qcow2"), dir.join("near"));
    let data = model::base_data_bytes(DISK_BYTES);
    say(&format!(
        "a base image of {}, {} of it data, behind a link of 20 ms and 40 MB/s",
        mib(DISK_BYTES),
        mib(data)
    ));
    make_base(&base)?;
    let source = Source::start(&base, &dir.join("far"), &near, LINK)?;
    let reactors = Reactors::start(1)?;
    make_overlay(&reactors, &overlay, &near)?;

    let mut daemon = Daemon::start(dir, &overlay)?;
    let socket = Address::Unix(disk_socket(dir));
    let first_byte = first_byte(&reactors, &socket, &daemon)?;
    say(&format!("the overlay is served: its first byte came after {}", ms(first_byte)));

    let load = Load::start(&reactors, &socket, EXPORT, Guest::new(DISK_BYTES));
    std::thread::sleep(ALONE);
    let (guest, alone) = load.end()?;
    say("the guest reads, writes, flushes and verifies; now the overlay is filled as well");

    let load = Load::start(&reactors, &socket, EXPORT, guest);
    let start = Instant::now();
    daemon.stream()?;
    let killed_at = follow(&mut daemon, Some(KILL_AT_PERCENT))?;
    let mut fill_time = start.elapsed();
    daemon.kill()?;
    let (guest, mut beside) = load.end()?;
    say(&format!("kill -9 at {killed_at} %"));

    let mut daemon = Daemon::start(dir, &overlay)?;
    let (guest, verdict) = guest::after_crash(&reactors, &socket, EXPORT, guest)?;
    say(&format!("started again: {} blocks that the guest had written were looked at", verdict.blocks));
    let load = Load::start(&reactors, &socket, EXPORT, guest);
    let start = Instant::now();
    daemon.stream()?;
    follow(&mut daemon, None)?;
    daemon.stream_completed()?;
    fill_time += start.elapsed();
    let (guest, latencies) = load.end()?;
    beside.add(latencies);
    daemon.quit()?;
    let fetched = source.bytes.to_client();
    drop(source);
    std::fs::remove_file(&base)?;
    say("the fill is complete and durable; the source is taken away");

    let daemon = Daemon::start(dir, &overlay)?;
    let bar = bytes_bar("verifying");
    bar.set_length(DISK_BYTES);
    let verified = guest::verify_all(&reactors, &socket, EXPORT, guest, {
        let bar = bar.clone();
        move |at| bar.set_position(at)
    })?;
    bar.finish_and_clear();
    daemon.quit()?;
    Ok(Story { first_byte, alone, beside, fill_time, fetched, killed_at, verdict, verified })
}

/// Shows the fill's progress, until it is over or has got that far; in percent of the disk.
fn follow(daemon: &mut Daemon, until_percent: Option<u64>) -> Result<u64> {
    let bar = bytes_bar("filling");
    let mut percent = 0;
    while let Some((done, all)) = daemon.progress()? {
        percent = (done * 100).checked_div(all).unwrap_or(0);
        bar.set_length(all);
        bar.set_position(done);
        if until_percent.is_some_and(|until| percent >= until) {
            break;
        }
        std::thread::sleep(TICK);
    }
    bar.finish_and_clear();
    Ok(percent)
}

/// The base image: data where the model says so, holes elsewhere.
fn make_base(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create_new(path).with_context(|| format!("making {}", path.display()))?;
    file.set_len(DISK_BYTES)?;
    let mut run = Vec::new();
    for block in 0..DISK_BYTES / BLOCK_BYTES as u64 {
        if !model::base_has_data(block) {
            continue;
        }
        run.extend(model::block_bytes(block, &[0; SECTORS]));
        if !model::base_has_data(block + 1) || run.len() >= 1 << 20 {
            let end = (block + 1) * BLOCK_BYTES as u64;
            file.write_all_at(&run, end - run.len() as u64).context("writing the base image")?;
            run.clear();
        }
    }
    Ok(file.sync_all()?)
}

/// An empty overlay whose header names the near end of the link.
fn make_overlay(reactors: &Reactors, path: &Path, near: &Path) -> Result<()> {
    let filename = format!("nbd+unix:///?socket={}", near.display());
    let options = infill_qcow2::CreateOptions {
        size: DISK_BYTES,
        extended_l2: true,
        backing: Some(BackingRef { filename, format: Some("raw".into()) }),
        ..Default::default()
    };
    let path = path.to_owned();
    reactors.block_on(move || async move {
        let storage = FileStorage::open_handle(&path, FileOptions::create_new(0))?;
        infill_qcow2::create(&Ctx::GUEST, &storage, &options).await.context("creating the overlay")
    })
}

/// From the daemon's start to the first byte of the disk.
fn first_byte(reactors: &Reactors, socket: &Address, daemon: &Daemon) -> Result<Duration> {
    let socket = socket.clone();
    reactors.block_on(move || async move {
        let disk = guest::connect(&socket, EXPORT).await?;
        disk.read(&Ctx::GUEST, 0, BytesMut::zeroed(BLOCK_BYTES)).await?;
        anyhow::Ok(())
    })?;
    Ok(daemon.started.elapsed())
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// Median and 99th percentile.
fn spread(latencies: &[Duration]) -> String {
    let mut sorted = latencies.to_vec();
    sorted.sort();
    let at =
        |percent: usize| sorted.get((sorted.len().max(1) - 1) * percent / 100).copied().unwrap_or_default();
    let text = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1e3);
    format!("{} / {} ms", text(at(50)), text(at(99)))
}

fn print_table(story: &Story) {
    let data = model::base_data_bytes(DISK_BYTES);
    let link = LINK.bytes_per_second.unwrap_or(u64::MAX) as f64;
    let rate = data as f64 / story.fill_time.as_secs_f64() / 1e6;
    let Verdict { blocks, lost, third_values, unflushed_kept } = story.verdict;
    let rows = [
        (
            "time to first byte",
            format!("{} (copying first: {:.1} s)", ms(story.first_byte), data as f64 / link),
        ),
        ("", format!("{:<22}{}", "guest alone", "beside the fill")),
        ("guest reads, p50 / p99", pair(&story.alone.reads, &story.beside.reads)),
        ("guest writes", pair(&story.alone.writes, &story.beside.writes)),
        ("guest flushes", pair(&story.alone.flushes, &story.beside.flushes)),
        (
            "fill rate",
            format!("{rate:.0} MB/s, over a link of {:.0} MB/s that the guest uses too", link / 1e6),
        ),
        ("bytes fetched", format!("{} for {} of data, counted on the link", mib(story.fetched), mib(data))),
        (
            "kill -9",
            format!(
                "at {} %: {blocks} written blocks, {lost} flushed sectors lost, {third_values} third values; \
                 {unflushed_kept} blocks kept more than was flushed",
                story.killed_at
            ),
        ),
        ("verified at the end", format!("{}, without the source", mib(story.verified))),
    ];
    println!();
    for (name, value) in rows {
        println!("  {name:<24}{value}");
    }
}

fn pair(alone: &[Duration], beside: &[Duration]) -> String {
    format!("{:<22}{}", spread(alone), spread(beside))
}
