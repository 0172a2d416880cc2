//! Deaths of a process whose guest lives on (P1b).
//!
//! At a boundary the process dies: what had completed is in the volatile cache of its disk, its memory is gone but for the
//! journal. A successor opens the image, replays, and answers the FLUSH of the guest, who remembers everything that was
//! acknowledged. Then the power is cut. Whatever was acknowledged before the FLUSH has to be there.

use bytes::Bytes;
use infill_base::{Ctx, WriteFlags};
use infill_node::NodeHandle;
use infill_sim::{CrashPoint, DiskOptions, JournalPages, Media, Rng, SimDisk, World};
use infill_storage::StorageHandle;
use infill_storage::journal::Journaling;
use infill_storage::sync::{Arc, Mutex, lock};

use super::Outlived;
use super::judge::{Judge, State};
use crate::format::failed;
use crate::guest::{read_all, read_pieces};
use crate::model::Model;
use crate::{Format, Violation};

/// Of 1000 successors, how many die or lose power in the middle of their replay.
const CUT_PER_MILLE: u64 = 150;

/// Of 1000 successors, how many come after somebody who wrote to the image without the journal.
const FOREIGN_PER_MILLE: u64 = 30;

/// Of 1000 successors, how many go on with the image after their guest's FLUSH, and close it.
const USED_ON_PER_MILLE: u64 = 40;

/// Boundaries of a replay among which the one is drawn at which it is cut.
const BOUNDARIES_OF_REPLAY: u64 = 16;

/// What a process leaves, and what may be seen of it.
struct Remains {
    disk: SimDisk,
    pages: JournalPages,
    /// What the guest remembers.
    model: Model,
}

/// A moment of a replay at which it is cut off.
type Cut = Arc<Mutex<Option<(CrashPoint, JournalPages)>>>;

impl Judge {
    /// The journal of the next session.
    pub(super) fn journaling(&self) -> Result<Journaling, infill_base::OpenError> {
        match (&self.plan.outlived, &self.pages) {
            (Some(Outlived::Journal(_)), Some(pages)) => pages.journaling(),
            (Some(_), _) => Ok(Journaling::WriteThrough),
            (None, _) => Ok(Journaling::Off),
        }
    }

    /// Judges the death of the process at `point`.
    pub(super) fn death(&self, state: &mut State, point: &CrashPoint) {
        let Some(pages) = &self.pages else { return };
        let model = lock(&self.model).clone();
        let remains = |rng: &mut Rng, point: &CrashPoint, pages: &JournalPages| Remains {
            disk: SimDisk::after_kill(point, options(rng), rng),
            pages: pages.copy(),
            model: model.clone(),
        };
        let mut dead = remains(&mut state.rng, point, pages);
        if state.rng.per_mille(FOREIGN_PER_MILLE) {
            let result = self.foreign(&dead, state.rng.next_u64());
            state.tally.refusals += u64::from(result.as_ref().is_ok_and(|refused| *refused));
            state.violation = result.err().map(|violation| told(point, "somebody else wrote", violation));
            return;
        }
        if state.rng.per_mille(CUT_PER_MILLE) {
            let cut = self.replay_cut(&dead, &mut state.rng);
            let in_replay = cut.and_then(|cut| {
                let Some((point, pages)) = cut else { return Ok(None) };
                self.power_cut_in_replay(&point, &model, &mut state.rng)?;
                Ok(Some(remains(&mut state.rng, &point, &pages)))
            });
            match in_replay {
                Ok(None) => {}
                Ok(Some(again)) => {
                    state.tally.replays_cut += 1;
                    dead = again;
                }
                Err(violation) => {
                    state.violation = Some(told(point, "and power is cut in the replay", violation));
                    return;
                }
            }
        }
        state.tally.deaths += 1;
        let replays = dead.pages.journal().is_ok_and(|journal| !journal.found().is_empty());
        state.tally.replays += u64::from(replays);
        let result = self.successor(dead, &mut state.rng);
        state.violation =
            result.err().map(|violation| told(point, "its successor answered a FLUSH", violation));
    }

    /// Opens, answers a FLUSH, loses power.
    fn successor(&self, dead: Remains, rng: &mut Rng) -> Result<(), Violation> {
        let Remains { disk, pages, mut model } = dead;
        let storage = StorageHandle::new(disk.clone());
        let (seed, use_on, torn) = (rng.next_u64(), rng.per_mille(USED_ON_PER_MILLE), rng.per_mille(300));
        World::new(seed).run(async {
            let node = self.reopened(self.plan.format, &storage, &pages).await?;
            let flush = model.begin_sync();
            node.sync(&Ctx::GUEST).await.map_err(|error| failed("the FLUSH", &error))?;
            model.end_sync(flush);
            let after = disk.crash_point();
            let left = if torn { after.random_power_cut(rng) } else { after.durable };
            self.shows(left, &model, "after the power was cut").await?;
            if use_on {
                let content = read_all(&node).await?;
                self.use_on(&storage, node, &content, seed).await?;
                if !pages.journal().map_err(|error| failed("the journal", &error))?.found().is_empty() {
                    return Err(Violation::Broken("a clean close leaves records in the journal".into()));
                }
                // Nothing that a journal could belong to.
                self.reopened(self.sound, &storage, &JournalPages::new(1)).await?;
            }
            Ok(())
        })
    }

    async fn reopened(
        &self,
        format: Format,
        storage: &StorageHandle,
        pages: &JournalPages,
    ) -> Result<NodeHandle, Violation> {
        let journal = pages.journaling().map_err(|error| failed("the journal", &error))?;
        let (node, _) = self.open(format, storage, journal).await?;
        Ok(node)
    }

    /// The image on `media`, opened by somebody who has no journal, is sound and shows what the model allows.
    async fn shows(&self, media: Media, model: &Model, when: &str) -> Result<(), Violation> {
        let storage = StorageHandle::new(SimDisk::with(media.clone(), DiskOptions::default()));
        if !self.sound.is_marked_dirty(&media) {
            self.check(&storage, when).await?;
        }
        let (node, _) = self.open(self.sound, &storage, Journaling::Off).await?;
        let wrong = |mismatch| Violation::Content { when: when.into(), mismatch };
        model.check_crash_size(node.len()).map_err(wrong)?;
        read_pieces(&node, |at, piece| model.check_crash_at(at, piece).map_err(wrong)).await
    }

    /// A boundary of the replay, if it has one, with what the journal held there.
    fn replay_cut(
        &self,
        dead: &Remains,
        rng: &mut Rng,
    ) -> Result<Option<(CrashPoint, JournalPages)>, Violation> {
        // On a disk of its own: the cut is one of what may happen.
        let point = dead.disk.crash_point();
        let disk = SimDisk::after_kill(&point, options(rng), rng);
        let pages = dead.pages.copy();
        let (cut, mut nth) = (Cut::default(), rng.below(BOUNDARIES_OF_REPLAY));
        let (seen, held) = (cut.clone(), pages.clone());
        disk.observe(move |point| {
            if nth == 0 {
                *lock(&seen) = Some((point.clone(), held.copy()));
            }
            nth = nth.wrapping_sub(1);
        });
        let storage = StorageHandle::new(disk);
        World::new(rng.next_u64())
            .run(async { self.reopened(self.plan.format, &storage, &pages).await.map(drop) })?;
        Ok(lock(&cut).take())
    }

    /// Power is cut in a replay: nobody was told anything, so it is a crash like any other (P2, P3).
    fn power_cut_in_replay(&self, point: &CrashPoint, model: &Model, rng: &mut Rng) -> Result<(), Violation> {
        let media = point.random_power_cut(rng);
        World::new(rng.next_u64()).run(self.shows(media, model, "after a power cut in the replay"))
    }

    /// Somebody opens the image for writing without the journal; then it may not be replayed. True: there was one.
    fn foreign(&self, dead: &Remains, seed: u64) -> Result<bool, Violation> {
        let pages = &dead.pages;
        let journal = pages.journal().map_err(|error| failed("the journal", &error))?;
        let replays = !journal.found().is_empty();
        let storage = StorageHandle::new(dead.disk.clone());
        World::new(seed).run(async {
            let (node, _) = self.open(self.sound, &storage, Journaling::Off).await?;
            let wrote = node.write(&Ctx::GUEST, 0, Bytes::from_static(&[0x11; 512]), WriteFlags::FUA).await;
            wrote.map_err(|error| failed("a write without the journal", &error))?;
            node.close(&Ctx::GUEST).await.map_err(|error| failed("closing", &error))?;
            drop(node);
            let opened = self.plan.format.open_with(&storage, Journaling::Volatile(journal)).await;
            match opened {
                Ok(_) if replays => Err(Violation::Broken(
                    "the journal is taken although somebody else has written to the image".into(),
                )),
                Err(error) if !replays => Err(failed("opening with an empty journal", &error)),
                _ => Ok(replays),
            }
        })
    }
}

fn options(rng: &mut Rng) -> DiskOptions {
    DiskOptions { name: "after the death".into(), seed: rng.next_u64(), ..DiskOptions::default() }
}

fn told(point: &CrashPoint, what: &str, violation: Violation) -> Violation {
    let how = format!("after {:?}, the process died, {what}", point.boundary);
    match violation {
        Violation::Content { when, mismatch } => {
            Violation::Content { when: format!("{how}: {when}"), mismatch }
        }
        Violation::Failed { when, error } => Violation::Failed { when: format!("{how}: {when}"), error },
        Violation::Broken(what) => Violation::Broken(format!("{how}: {what}")),
    }
}
