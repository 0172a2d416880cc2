//! Crashes while an image is made: there is none yet, or there is a whole one.

use bytes::Bytes;
use infill_base::is_zero;
use infill_node::Repair;
use infill_sim::{CrashPoint, DiskOptions, Media, Rng, SimDisk, World};
use infill_storage::StorageHandle;
use infill_storage::sync::{Arc, Mutex, lock};

use crate::format::failed;
use crate::guest::read_all;
use crate::{Format, Violation};

/// States by chance at each boundary.
const STATES: usize = 12;

/// Combinations of whole writes that are all tried.
const COMBINATIONS_MAX: usize = 64;

/// Crashes at every boundary of making an image of `size` bytes; gives how many states were looked at.
///
/// `old` is what lay in the storage before.
pub fn creation(format: Format, size: u64, old: &Bytes, seed: u64) -> Result<u64, Violation> {
    let disk = SimDisk::with(Media::from_bytes(old), DiskOptions { seed, ..DiskOptions::default() });
    let points: Arc<Mutex<Vec<CrashPoint>>> = Arc::default();
    let seen = points.clone();
    disk.observe(move |point| lock(&seen).push(point.clone()));
    let storage = StorageHandle::new(disk.clone());
    World::new(seed).run(format.create(&storage, size, None))?;
    disk.stop_observing();
    let (mut rng, mut states) = (Rng::new(seed), 0);
    for point in lock(&points).iter() {
        let all: Vec<Media> = match point.all_power_cuts(COMBINATIONS_MAX) {
            Some(all) => all.collect(),
            None => (0..STATES).map(|_| point.random_power_cut(&mut rng)).collect(),
        };
        for media in all {
            states += 1;
            whole_or_none(format, size, media, seed)?;
        }
    }
    let durable = disk.crash_point().durable;
    if durable.hash() != disk.media().hash() {
        return Err(Violation::Broken("a new image is not stable when it is said to be made".into()));
    }
    whole_or_none(format, size, durable, seed)?;
    Ok(states)
}

fn whole_or_none(format: Format, size: u64, media: Media, seed: u64) -> Result<(), Violation> {
    let storage = StorageHandle::new(SimDisk::with(media, DiskOptions::default()));
    World::new(seed).run(async {
        let Ok(node) = format.open(&storage).await else { return Ok(()) };
        if node.len() != size {
            return Err(Violation::Broken(format!("half an image opens, with {} bytes", node.len())));
        }
        if !is_zero(&read_all(&node).await?) {
            return Err(Violation::Broken("an image that was being made shows old bytes".into()));
        }
        drop(node);
        let report = format.check(&storage, Repair::Nothing).await;
        let report = report.map_err(|error| failed("the check of a new image", &error))?;
        if report.corruptions + report.check_errors > 0 {
            return Err(Violation::Broken(format!("half an image opens: {:?}", report.messages)));
        }
        Ok(())
    })
}
