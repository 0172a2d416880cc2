//! How fast a stream fills an overlay in memory from a source that answers late, beside a plain pipelined copy.
//!
//! `cargo run --release -p infill-job --example fill_rate [MiB]`. Shows what the fill itself costs and how well it finds
//! a distant source's rate; formats and protocols are not part of it. The copy keeps 64 requests of 256 KiB in flight
//! and knows nothing of guests. Every byte that was moved is checked.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::{StreamExt, stream};
use infill_base::{
    Ctx, ErrorKind, Extent, ExtentKind, Extents, Gather, IoError, IoResult, Limits, WriteFlags, ZeroFlags,
};
use infill_io::Reactors;
use infill_job::stream::{StreamOptions, start};
use infill_job::{JobOptions, Jobs};
use infill_node::{MemoryOverlay, NodeHandle, RawNode};
use infill_storage::{Storage, StorageHandle, rt};

const COPY_REQUEST: u64 = 256 << 10;
const COPY_IN_FLIGHT: usize = 64;

/// Bytes that cost nothing, after a delay.
struct Late {
    len: u64,
    delay: Duration,
}

fn byte_at(at: u64) -> u8 {
    (at / 4096 % 251) as u8 + 1
}

fn refused<T>() -> IoResult<T> {
    Err(IoError::new(ErrorKind::NotPermitted, "the source is read-only"))
}

impl Storage for Late {
    fn limits(&self) -> Limits {
        Limits { writable: false, ..Limits::default() }
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn name(&self) -> String {
        "late".into()
    }
    async fn read(&self, _: &Ctx, at: u64, mut buf: BytesMut) -> IoResult<BytesMut> {
        if !self.delay.is_zero() {
            rt::sleep(self.delay).await;
        }
        for (nth, page) in buf.chunks_mut(4096).enumerate() {
            page.fill(byte_at(at + nth as u64 * 4096));
        }
        Ok(buf)
    }
    async fn write(&self, _: &Ctx, _: u64, _: Gather, _: WriteFlags) -> IoResult<()> {
        refused()
    }
    async fn write_zeroes(&self, _: &Ctx, _: u64, _: u64, _: ZeroFlags) -> IoResult<()> {
        refused()
    }
    async fn discard(&self, _: &Ctx, _: u64, _: u64) -> IoResult<()> {
        refused()
    }
    async fn sync(&self, _: &Ctx) -> IoResult<()> {
        Ok(())
    }
    async fn set_len(&self, _: &Ctx, _: u64) -> IoResult<()> {
        refused()
    }
    async fn extents(&self, _: &Ctx, at: u64, len: u64) -> IoResult<Extents> {
        Ok(vec![Extent::new(at, len, ExtentKind::Data)])
    }
}

fn overlay(len: u64, delay: Duration) -> (NodeHandle, NodeHandle) {
    let source = NodeHandle::new(RawNode::new(StorageHandle::new(Late { len, delay }), true));
    (NodeHandle::new(MemoryOverlay::new(len, 64 << 10, Some(source.clone()))), source)
}

async fn check(top: &NodeHandle) {
    let mut at = 0;
    while at < top.len() {
        let data = top.read_vec(&Ctx::FILL, at, 1 << 20).await.expect("reads");
        for (nth, page) in data.chunks(4096).enumerate() {
            let byte = byte_at(at + nth as u64 * 4096);
            assert!(page.iter().all(|other| *other == byte), "wrong byte near {at}");
        }
        at += data.len() as u64;
    }
}

async fn copied(len: u64, delay: Duration) -> Duration {
    let (top, source) = overlay(len, delay);
    let begin = Instant::now();
    stream::iter((0..len / COPY_REQUEST).map(|nth| nth * COPY_REQUEST))
        .for_each_concurrent(COPY_IN_FLIGHT, |at| {
            let (top, source) = (&top, &source);
            async move {
                let data = source.read_vec(&Ctx::FILL, at, COPY_REQUEST as usize).await.expect("reads");
                top.write(&Ctx::FILL, at, data.freeze(), WriteFlags::empty()).await.expect("writes");
            }
        })
        .await;
    let took = begin.elapsed();
    check(&top).await;
    took
}

async fn streamed(len: u64, delay: Duration) -> Duration {
    let (top, _) = overlay(len, delay);
    let begin = Instant::now();
    let job = start(&Jobs::new(), JobOptions::new("fill"), StreamOptions::new(top.clone()));
    job.expect("starts").wait().await.expect("completes");
    let took = begin.elapsed();
    assert!(!top.backing().is_some_and(|slot| slot.is_some()));
    check(&top).await;
    took
}

fn main() -> std::io::Result<()> {
    let mib = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(512_u64).clamp(1, 4096);
    let reactors = Reactors::start(1)?;
    println!("{mib} MiB; MB/s, best of 3\ndelay      copy    stream   ratio");
    for delay in [0, 1, 5, 20].map(Duration::from_millis) {
        let (copy, fill) = reactors.block_on(move || async move {
            let (mut copy, mut fill) = (Duration::MAX, Duration::MAX);
            for _ in 0..3 {
                copy = copy.min(copied(mib << 20, delay).await);
                fill = fill.min(streamed(mib << 20, delay).await);
            }
            (copy, fill)
        });
        let rate = |took: Duration| (mib << 20) as f64 / took.as_secs_f64() / 1e6;
        println!(
            "{:>3} ms {:>9.0} {:>9.0} {:>7.2}",
            delay.as_millis(),
            rate(copy),
            rate(fill),
            rate(fill) / rate(copy)
        );
    }
    Ok(())
}
