//! `__infill_query-load`: what has been asked of nodes, and how long it took. `infill top` shows it.
//!
//! Counted from the first time that somebody asks, so a daemon whom nobody watches pays nothing.

use infill_base::Class;
use infill_node::{BUCKET_MICROS, LatencyKind, NodeHandle};
use serde_json::{Value, json};

use super::control::Control;

impl Control {
    /// `__infill_query-load`. Counters only grow; who asks twice knows what happened between.
    pub(super) fn query_load(&self) -> Value {
        self.meter_nodes();
        let exported = self.exported_nodes();
        let one = |(name, node): &(String, NodeHandle)| {
            let meter = node.latency().meter();
            let latencies: Vec<_> = LatencyKind::ALL
                .into_iter()
                .map(|kind| {
                    let histogram = meter.latency(kind);
                    json!({ "kind": kind.as_str(), "micros": histogram.micros, "counts": histogram.counts })
                })
                .collect();
            let read = |classes: &[Class]| classes.iter().map(|class| meter.read_bytes(*class)).sum::<u64>();
            json!({
                "node-name": name,
                "exported": exported.contains(name),
                "read-bytes": read(&[Class::Guest]),
                "fill-bytes": read(&[Class::Fill, Class::AroundMiss, Class::Prefetch]),
                "written-bytes": meter.written_bytes(),
                "populated-bytes": meter.populated_bytes(),
                "latencies": latencies,
            })
        };
        let nodes: Vec<_> = self.blockdevs().graph().list().iter().map(one).collect();
        json!({ "bucket-micros": BUCKET_MICROS, "nodes": nodes })
    }
}
