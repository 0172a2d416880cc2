//! The demonstration's processes: a daemon that can be killed, and the source behind a slow link.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use infill_io::{
    Address, FileOptions, FileStorage, Listener, Reactors, Relay, RelayBytes, RelayOptions, connector,
};
use infill_nbd::{Export, Exports, Server, ServerLimits};
use infill_node::{NodeHandle, RawNode};
use infill_storage::rt;
use serde_json::{Value, json};

use crate::monitor::Monitor;

/// How long the daemon may take until its monitor answers.
const START_LIMIT: Duration = Duration::from_secs(20);
/// The name under which the disk is offered.
pub const EXPORT: &str = "disk";
/// The node that is filled; the export lies on a copy-on-read node above it.
pub const OVERLAY_NODE: &str = "overlay";

/// `infill daemon` as a child, killed when this goes.
pub struct Daemon {
    child: Child,
    pub monitor: Monitor,
    pub started: Instant,
}

impl Daemon {
    /// Starts it with the overlay's node, and its monitor and NBD sockets in `dir`.
    pub fn start(dir: &Path, overlay: &Path) -> Result<Daemon> {
        let monitor = dir.join("monitor");
        let blockdev = json!({
            "driver": "copy-on-read", "node-name": EXPORT,
            "file": {
                "driver": "qcow2", "node-name": OVERLAY_NODE,
                "file": {"driver": "file", "filename": overlay}
            }
        });
        let program = std::env::current_exe().context("this program's own file")?;
        let started = Instant::now();
        let mut child = Command::new(program)
            .arg("daemon")
            .args(["--blockdev", &blockdev.to_string()])
            .args(["--chardev", &format!("socket,id=m,path={},server=on,wait=off", monitor.display())])
            .args(["--monitor", "chardev=m"])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", disk_socket(dir).display())])
            .args(["--export", &format!("type=nbd,id=e,node-name={EXPORT},name={EXPORT},writable=on")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("starting the daemon")?;
        let monitor = loop {
            match Monitor::connect(&monitor) {
                Ok(monitor) => break monitor,
                Err(error) => {
                    if let Some(status) = child.try_wait()? {
                        bail!("the daemon ended at once: {status}");
                    }
                    if started.elapsed() > START_LIMIT {
                        let _ = child.kill();
                        let _ = child.wait();
                        return Err(error);
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        };
        Ok(Daemon { child, monitor, started })
    }

    /// Begins to fill the overlay.
    pub fn stream(&mut self) -> Result<()> {
        self.monitor.call("block-stream", json!({"job-id": "fill", "device": OVERLAY_NODE}))?;
        Ok(())
    }

    /// (bytes done, bytes in all) of the fill; `None` once it is over.
    pub fn progress(&mut self) -> Result<Option<(u64, u64)>> {
        let jobs = self.monitor.call("query-block-jobs", json!({}))?;
        let number = |name: &str| jobs[0][name].as_u64();
        Ok(number("offset").zip(number("len")))
    }

    /// Waits for the event that says that the fill is durable.
    pub fn stream_completed(&mut self) -> Result<()> {
        let end = Instant::now() + START_LIMIT;
        while Instant::now() < end {
            let Some(event) = self.monitor.event(START_LIMIT)? else { break };
            if event["event"] == "BLOCK_JOB_COMPLETED" {
                let error: Option<&Value> = event["data"].get("error");
                return error.map_or(Ok(()), |error| Err(anyhow!("the fill failed: {error}")));
            }
        }
        bail!("the fill does not end")
    }

    /// `kill -9`.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends it cleanly.
    pub fn quit(mut self) -> Result<()> {
        self.monitor.call("quit", json!({}))?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The socket at which the daemon offers the disk.
pub fn disk_socket(dir: &Path) -> PathBuf {
    dir.join("disk.sock")
}

/// The base image, offered read-only behind a slow link. Dropped, it is gone with all its connections.
pub struct Source {
    _reactors: Reactors,
    pub bytes: Arc<RelayBytes>,
}

impl Source {
    /// Offers `base` at the far end of the link; the near end is `near`.
    pub fn start(base: &Path, far: &Path, near: &Path, link: RelayOptions) -> Result<Source> {
        let reactors = Reactors::start(1)?;
        let storage = FileStorage::open_handle(base, FileOptions::read_only())?;
        let exports = Exports::default();
        exports.add(Export::new("", NodeHandle::new(RawNode::new(storage, true))))?;
        let server = Server::new(exports, ServerLimits::default());
        let (far, near) = (Address::Unix(far.to_owned()), Address::Unix(near.to_owned()));
        let bytes = reactors.block_on(move || async move {
            let listener = Listener::bind(&far)?;
            rt::spawn(async move {
                while let Ok(accepted) = listener.accept().await {
                    let server = server.clone();
                    rt::spawn(async move {
                        if let Ok(connection) = accepted.into_connection() {
                            // Why a connection ended is its client's business.
                            let _ = server.serve(connection).await;
                        }
                    });
                }
            });
            let relay = Relay::start(Listener::bind(&near)?, connector(&far), link);
            let bytes = relay.bytes();
            // It lives as long as its reactor.
            rt::spawn(async move {
                let _relay = relay;
                std::future::pending::<()>().await;
            });
            anyhow::Ok(bytes)
        })?;
        Ok(Source { _reactors: reactors, bytes })
    }
}
