//! Metrics (`--metrics ADDRESS`): figures of disks and jobs, in the text format that Prometheus reads, over HTTP.
//!
//! `GET /metrics` is all that is answered. What never happens: a request that is larger than [`REQUEST_BYTES_MAX`] or takes
//! longer than [`REQUEST_TIME`], more clients at a time than [`CLIENTS_MAX`]. It is not for strangers: there is neither
//! encryption nor a password, so it belongs on a local address or a socket file. Nodes count from their opening on where
//! metrics are asked for, and not at all otherwise; a scrape costs a pass over all nodes and jobs on the control reactor.

use std::fmt::Write as _;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::{Bytes, BytesMut};
use infill_base::Class;
use infill_io::{Accepted, Address, Listener};
use infill_node::{BUCKET_MICROS, CLASSES, LatencyKind};
use infill_storage::{Permits, rt};

use super::control::Control;

/// Longest request, in bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// How long a client may take to ask, and then to read the answer.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// Clients at a time; the next ones wait in the kernel's queue.
const CLIENTS_MAX: u64 = 16;
/// How long no client is accepted after that has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Listens at `HOST:PORT`, or at a socket file.
pub fn listen(address: &str) -> Result<Listener> {
    let address = match address.rsplit_once(':') {
        _ if address.starts_with('/') => Address::Unix(address.into()),
        Some((host, port)) => {
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            let port = port
                .parse()
                .with_context(|| format!("--metrics {address}: a port is a number up to 65535"))?;
            Address::Tcp { host, port }
        }
        None => bail!("--metrics {address}: give HOST:PORT, or a socket file by its whole path"),
    };
    Listener::bind(&address).map_err(|error| anyhow::anyhow!("--metrics {address}: {}", error.message()))
}

/// Serves for ever.
pub async fn serve(control: Rc<Control>, listener: Listener) {
    let slots = Permits::new(CLIENTS_MAX);
    loop {
        let slot = slots.take(1).await;
        match listener.accept().await {
            Ok(accepted) => {
                let control = control.clone();
                rt::spawn(async move {
                    if rt::timeout(REQUEST_TIME, talk(&control, accepted)).await.is_none() {
                        tracing::debug!("a client of the metrics was too slow");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "no client of the metrics could be accepted; trying again");
                rt::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn talk(control: &Rc<Control>, accepted: Accepted) {
    let Ok(mut connection) = accepted.into_connection() else { return };
    let mut request = BytesMut::with_capacity(REQUEST_BYTES_MAX);
    let answer = loop {
        if request.windows(4).any(|end| end == b"\r\n\r\n") {
            break answer(control, &request);
        }
        let before = request.len();
        if before == request.capacity() {
            break http("431 Request Header Fields Too Large", "the request is too long\n");
        }
        match pin!(connection.reader.read(request)).await {
            Ok(more) if more.len() > before => request = more,
            Ok(_) | Err(_) => return,
        }
    };
    let sent = connection.writer.write_all(Bytes::from(answer).into()).await;
    if sent.is_ok() {
        // Whether it has arrived changes nothing here.
        let _ = connection.writer.shutdown().await;
    }
}

fn answer(control: &Rc<Control>, request: &[u8]) -> String {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics")) => http("200 OK", &text(control)),
        (Some(b"GET"), Some(_)) => http("404 Not Found", "ask for /metrics\n"),
        _ => http("405 Method Not Allowed", "GET /metrics is all that is answered\n"),
    }
}

fn http(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}

/// The text, built up family by family.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (nth, (label, text)) in labels.iter().enumerate() {
            let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{escaped}\"", if nth == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

const fn class_name(class: Class) -> &'static str {
    match class {
        Class::Fill => "fill",
        Class::AroundMiss => "around-miss",
        Class::Prefetch => "prefetch",
        Class::Guest => "guest",
    }
}

/// Everything there is to tell.
fn text(control: &Rc<Control>) -> String {
    let mut out = Text::default();
    out.family("infill_build_info", "gauge", "What runs.");
    out.sample("infill_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    if let Some(state) = &control.state {
        out.family("infill_state_held", "gauge", "Entries of the state that could not be made again yet.");
        out.sample("infill_state_held", &[], state.held_count());
    }
    nodes(control, &mut out);
    jobs(control, &mut out);
    out.0
}

fn nodes(control: &Rc<Control>, out: &mut Text) {
    let nodes = control.blockdevs().graph().list();
    let name = "infill_node_latency_seconds";
    out.family(
        name,
        "histogram",
        "How long requests of guests took (miss: of it, what was asked of this node as backing).",
    );
    for (node, handle) in &nodes {
        for kind in LatencyKind::ALL {
            let histogram = handle.latency().meter().latency(kind);
            let labels = [("node", node.as_str()), ("kind", kind.as_str())];
            let mut count = 0;
            for (at, more) in histogram.counts.iter().enumerate() {
                count += more;
                let bound = BUCKET_MICROS.get(at).map(|bound| format!("{}", *bound as f64 / 1e6));
                let labels = [labels[0], labels[1], ("le", bound.as_deref().unwrap_or("+Inf"))];
                out.sample("infill_node_latency_seconds_bucket", &labels, count);
            }
            out.sample("infill_node_latency_seconds_sum", &labels, histogram.micros as f64 / 1e6);
            out.sample("infill_node_latency_seconds_count", &labels, count);
        }
    }
    let name = "infill_node_read_bytes_total";
    out.family(name, "counter", "Bytes that were read of the node, by who asked.");
    for (node, handle) in &nodes {
        for class in CLASSES {
            let labels = [("node", node.as_str()), ("class", class_name(class))];
            out.sample(name, &labels, handle.latency().meter().read_bytes(class));
        }
    }
    let name = "infill_node_written_bytes_total";
    out.family(name, "counter", "Bytes that were written to the node.");
    for (node, handle) in &nodes {
        out.sample(name, &[("node", node)], handle.latency().meter().written_bytes());
    }
    let name = "infill_node_populated_bytes_total";
    out.family(name, "counter", "Bytes that copy-on-read and jobs have put into the node from below.");
    for (node, handle) in &nodes {
        out.sample(name, &[("node", node)], handle.latency().meter().populated_bytes());
    }
}

fn jobs(control: &Rc<Control>, out: &mut Text) {
    let jobs = control.jobs().query_block();
    let mut family = |name: &str, help: &str, value: &dyn Fn(&infill_job::BlockJobInfo) -> u64| {
        out.family(name, "gauge", help);
        for job in &jobs {
            let labels = [("job", job.progress.device.as_str()), ("type", job.progress.kind.as_str())];
            out.sample(name, &labels, value(job));
        }
    };
    family("infill_job_length_bytes", "How much there is to do.", &|job| job.progress.len);
    family("infill_job_progress_bytes", "How much is done.", &|job| job.progress.offset);
    family("infill_job_durable_bytes", "How much of it is on stable storage.", &|job| job.durable);
    family("infill_job_at_risk_bytes", "How much only the source has for certain.", &|job| {
        job.progress.len.saturating_sub(job.durable)
    });
    family("infill_job_paused", "Whether it is paused.", &|job| u64::from(job.paused));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut out = Text::default();
        out.sample("a", &[("b", "x\"\\\n"), ("c", "d")], 1);
        out.sample("e", &[], 0.5);
        assert_eq!(out.0, "a{b=\"x\\\"\\\\\\n\",c=\"d\"} 1\ne 0.5\n");
    }
}
