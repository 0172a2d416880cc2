//! Metrics and logs of the daemon, as those who collect them see them.

mod common;
#[path = "common/qmp.rs"]
mod qmp;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{INFILL, fails, run, text};
use qmp::{Daemon, Program};
use serde_json::{Value, json};

/// What is answered to `request`.
fn asked(socket: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(common::SERVER_LIMIT)).unwrap();
    // It may be answered before it is read to its end.
    let _ = stream.write_all(request);
    let mut answer = String::new();
    let _end_or_reset = stream.read_to_string(&mut answer);
    answer
}

/// The value of a sample.
fn value(metrics: &str, sample: &str) -> u64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {sample} in {metrics}")).parse().unwrap()
}

#[test]
fn requests_bytes_and_jobs_are_counted_where_they_belong() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("base.raw"), vec![7; 4 << 20]).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path("top.qcow2")), "4M"]);
    let metrics = path("metrics");
    let node = json!({
        "driver": "qcow2", "node-name": "top",
        "file": {"driver": "file", "filename": path("top.qcow2")},
        "backing": {"driver": "raw", "node-name": "base",
                    "file": {"driver": "file", "filename": path("base.raw")}},
    });
    let server = format!("addr.type=unix,addr.path={}", text(&path("nbd")));
    let options = ["--metrics", text(&metrics), "--blockdev", &node.to_string(), "--nbd-server", &server];
    let export = ["--export", "nbd,id=e,node-name=top,name=d,writable=on"];
    let daemon = Daemon::start(Program::Infill, dir.path(), &[&options[..], &export].concat());
    let mut qmp = daemon.connect();
    let uri = format!("nbd+unix:///d?socket={}", text(&path("nbd")));
    let io = ["-c", "read 0 64k", "-c", "read 1M 64k", "-c", "write 2M 64k", "-c", "flush"];
    run("qemu-io", &[&["-f", "raw", "-t", "writeback"], &io[..], &[&uri]].concat());
    qmp.run("block-stream", json!({"job-id": "j", "device": "top", "auto-finalize": false}));
    qmp.wait_for("BLOCK_JOB_PENDING");
    let answer = asked(&metrics, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    let count = |node: &str, kind: &str| {
        value(body, &format!("infill_node_latency_seconds_count{{node=\"{node}\",kind=\"{kind}\"}}"))
    };
    assert!(count("top", "read") >= 2 && count("top", "write") == 1 && count("top", "sync") >= 1, "{body}");
    assert!(count("base", "miss") >= 2, "{body}");
    assert_eq!(
        count("top", "read"),
        value(body, "infill_node_latency_seconds_bucket{node=\"top\",kind=\"read\",le=\"+Inf\"}")
    );
    assert_eq!(value(body, "infill_node_written_bytes_total{node=\"top\"}"), 64 << 10);
    let read = |class: &str| {
        value(body, &format!("infill_node_read_bytes_total{{node=\"base\",class=\"{class}\"}}"))
    };
    assert!(read("guest") >= 128 << 10, "{body}");
    // The stream has fetched what neither guest had written.
    assert!(read("fill") >= (4 << 20) - (64 << 10), "{body}");
    assert_eq!(value(body, "infill_node_populated_bytes_total{node=\"top\"}"), (4 << 20) - (64 << 10));
    for figure in ["length", "progress"] {
        assert_eq!(value(body, &format!("infill_job_{figure}_bytes{{job=\"j\",type=\"stream\"}}")), 4 << 20);
    }
    daemon.quit(&mut qmp);
}

#[test]
fn what_is_no_request_for_metrics_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = dir.path().join("metrics");
    let daemon = Daemon::start(Program::Infill, dir.path(), &["--metrics", text(&metrics)]);
    let mut qmp = daemon.connect();
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\r\n\r\n", "405"),
        (&[b'x'; 20 << 10], "431"),
    ] {
        let answer = asked(&metrics, request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    // One that says nothing and goes, and one that stays and says nothing, keep nobody.
    drop(UnixStream::connect(&metrics).unwrap());
    let _silent = UnixStream::connect(&metrics).unwrap();
    assert!(asked(&metrics, b"GET /metrics HTTP/1.0\r\n\r\n").contains("infill_build_info"));
    daemon.quit(&mut qmp);
    for wrong in ["nowhere", "host:port"] {
        assert!(fails(INFILL, &["daemon", "--metrics", wrong]).contains("--metrics"));
    }
}

#[test]
fn logs_are_json_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let gone = dir.path().join("gone.raw");
    std::fs::write(&gone, [0; 512]).unwrap();
    let node = format!("raw,node-name=n,file.driver=file,file.filename={}", text(&gone));
    let daemon = Daemon::start(Program::Infill, dir.path(), &["--state", text(&state), "--blockdev", &node]);
    // The monitor listens before the options are carried out, and greets after.
    drop(daemon.connect());
    daemon.process.kill();
    std::fs::remove_file(&gone).unwrap();
    // It warns of the node that it cannot make again; its standard output is where it would say that it is ready.
    let mut command = Command::new(INFILL);
    command.args(["daemon", "--log-format", "json", "--state", text(&state)]);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
    drop(common::Process(child));
    let log: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert_eq!((&log["level"], &log["fields"]["name"]), (&json!("WARN"), &json!("n")), "{log}");
}
