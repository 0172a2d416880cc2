//! What becomes of reads of what is still at the source, while that is away: they are held; and where the export's
//! hypervisor was set up for it, not for ever.
//!
//! A hypervisor that was told `rerror=stop,werror=stop` stops its machine at an I/O error and asks again when it goes on, so
//! nobody in the machine sees one: it is better off with an error after a while than with requests that hold up its own
//! commands. Reads of what is here are never failed, whatever the source does.

use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, bail};
use infill_migrate::DiskId;
use infill_storage::rt;
use serde_json::json;

use super::gate::DiskGate;
use super::node_name;
use crate::daemon::control::Control;

/// How long reads are held, where nothing else is said.
pub(super) const HOLD_TIME: Duration = Duration::from_secs(20);
/// So many reads that wait are as many as a hypervisor lets wait: QEMU's NBD client has 16 requests of a disk open, and some
/// are to be left for what can be answered.
pub(super) const HELD_READS_MAX: u64 = 12;

/// What becomes of a read of what is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum OnHold {
    /// It waits.
    #[default]
    Hold,
    /// It fails after a while, and the hypervisor stops the machine at that.
    Stop,
    /// It fails after a while, and the machine is told.
    Fail,
}

impl OnHold {
    pub(super) fn read(word: &str) -> Result<OnHold> {
        Ok(match word {
            "hold" => OnHold::Hold,
            "stop" => OnHold::Stop,
            "eio" => OnHold::Fail,
            _ => bail!("on-hold={word}: it is hold, stop or eio"),
        })
    }

    pub(super) const fn word(self) -> &'static str {
        match self {
            OnHold::Hold => "hold",
            OnHold::Stop => "stop",
            OnHold::Fail => "eio",
        }
    }
}

impl Control {
    /// The disk that is filled from the node of that name, if it is one that comes.
    fn filled_from(&self, node: &str) -> Option<(DiskId, DiskGate)> {
        let kept = self.migrations.kept.borrow();
        let ids = kept.values().flat_map(|kept| kept.record.plan().disks.iter().map(|disk| disk.id));
        let id = ids.into_iter().find(|id| node_name('b', *id) == node)?;
        Some((id, self.migrations.gate(&id.to_string())?))
    }

    /// The server behind a node was lost, or is back.
    pub(in crate::daemon) fn source_changed(self: &Rc<Self>, node: &str, is_lost: bool) {
        let Some(peers) = self.migrations.peers() else { return };
        let Some((id, gate)) = self.filled_from(node) else { return };
        if peers.on_hold == OnHold::Hold {
            return;
        }
        if !is_lost {
            if gate.source_is_back() {
                self.tell_held(id, false);
            }
            return;
        }
        let Some(loss) = gate.source_is_lost() else { return };
        let (control, patience) = (self.clone(), peers.hold_time);
        rt::spawn(async move {
            let full = gate.too_many_held(loss);
            rt::timeout(patience, full).await;
            if gate.give_up(loss) {
                control.tell_held(id, true);
            }
        });
    }

    fn tell_held(&self, disk: DiskId, given_up: bool) {
        let policy = self.migrations.peers().map_or(OnHold::Hold, |peers| peers.on_hold);
        if given_up {
            tracing::warn!("disk {disk}: its source is away, and reads of what is missing fail from now on");
        }
        let told = json!({ "name": disk.to_string(), "failing": given_up, "on-hold": policy.word() });
        self.tell("__INFILL_READS_HELD", told);
    }
}
