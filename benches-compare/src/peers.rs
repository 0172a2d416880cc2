//! The programs that are compared, as processes that end with their guard, and the two protocols spoken to them.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How long a daemon may take until its sockets answer.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A process that is killed when this goes.
pub struct Process(Child);

impl Process {
    pub fn start(command: &mut Command) -> Result<Process> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        child.map(Process).with_context(|| format!("cannot start {command:?}"))
    }

    /// Processor time so far, user and system, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        let fields: Vec<_> = after_name.split(' ').collect();
        let ticks = |index: usize| fields.get(index).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
        (ticks(11) + ticks(12)) / 100.0
    }

    /// The most memory that was resident, in MiB.
    pub fn peak_resident_mib(&self) -> Result<f64> {
        self.status_mib("VmHWM:")
    }

    /// The memory that is resident, in MiB.
    pub fn resident_mib(&self) -> Result<f64> {
        self.status_mib("VmRSS:")
    }

    fn status_mib(&self, key: &str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find(|line| line.starts_with(key)).with_context(|| format!("no {key}"))?;
        let kib: f64 = line.split_whitespace().nth(1).context("no figure")?.parse()?;
        Ok(kib / 1024.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end and gives what it printed.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let output =
        Command::new(program).args(args).output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program} {} failed: {}",
            args.join(" "),
            error.lines().next().unwrap_or("it does not say why")
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Infill,
    Qemu,
}

/// Where the programs are.
pub struct Programs {
    pub infill: PathBuf,
}

/// A storage daemon with one node `d`, exported over NBD as `d`.
pub struct Daemon {
    pub process: Process,
    pub qmp: Qmp,
    pub socket: PathBuf,
    /// From the start of the process to the NBD socket's first answer to a read.
    pub first_reply: Duration,
}

impl Daemon {
    /// Starts it: the command line is the same for both programs.
    pub fn start(programs: &Programs, who: Who, dir: &Path, blockdev: &Value) -> Result<Daemon> {
        Daemon::start_by(programs, who, dir, blockdev, &[])
    }

    /// As [`Daemon::start`], by way of a command that runs it (`ip netns exec …`).
    pub fn start_by(
        programs: &Programs,
        who: Who,
        dir: &Path,
        blockdev: &Value,
        by: &[&str],
    ) -> Result<Daemon> {
        let (socket, monitor) = (dir.join(format!("{who:?}.nbd")), dir.join(format!("{who:?}.qmp")));
        let _ = std::fs::remove_file(&socket);
        let _ = std::fs::remove_file(&monitor);
        let mut words: Vec<String> = by.iter().map(|word| (*word).to_owned()).collect();
        match who {
            Who::Infill => words.extend([programs.infill.display().to_string(), "daemon".into()]),
            Who::Qemu => words.push("qemu-storage-daemon".into()),
        }
        words.extend([
            "--blockdev".into(),
            blockdev.to_string(),
            "--chardev".into(),
            format!("socket,id=m,path={},server=on,wait=off", monitor.display()),
            "--monitor".into(),
            "chardev=m".into(),
            "--nbd-server".into(),
            format!("addr.type=unix,addr.path={},max-connections=0", socket.display()),
            "--export".into(),
            "type=nbd,id=e,node-name=d,name=d,writable=on".into(),
        ]);
        let start = Instant::now();
        let process = Process::start(Command::new(&words[0]).args(&words[1..]))?;
        let mut nbd = NbdClient::connect(&socket, "d").with_context(|| format!("{who:?}"))?;
        nbd.read(0, 512).with_context(|| format!("{who:?}"))?;
        let first_reply = start.elapsed();
        let qmp = Qmp::connect(&monitor)?;
        Ok(Daemon { process, qmp, socket, first_reply })
    }

    /// The URI of its export.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///d?socket={}", self.socket.display())
    }

    /// Ends it cleanly, so that its images are synced and closed.
    pub fn quit(mut self) -> Result<()> {
        self.qmp.call("quit", json!({}))?;
        self.process.0.wait()?;
        Ok(())
    }
}

/// Tries until it works or the limit has passed.
pub fn patiently<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + START_LIMIT;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_micros(500)),
        }
    }
}

/// A monitor connection.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    pub fn connect(path: &Path) -> Result<Qmp> {
        let stream = patiently(|| Ok(UnixStream::connect(path)?))
            .with_context(|| format!("no monitor at {}", path.display()))?;
        let mut qmp = Qmp { reader: BufReader::new(stream.try_clone()?), writer: stream };
        qmp.next()?;
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.reader.read_line(&mut line)? > 0, "the monitor has closed");
        Ok(serde_json::from_str(&line)?)
    }

    /// Runs a command; events in between are dropped.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({"execute": command, "arguments": arguments});
        writeln!(self.writer, "{line}").with_context(|| format!("the monitor takes no {command}"))?;
        loop {
            let mut answer = self.next().with_context(|| format!("no answer to {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Waits for an event.
    pub fn wait(&mut self, event: &str) -> Result<Value> {
        loop {
            let message = self.next()?;
            if message["event"] == event {
                return Ok(message);
            }
        }
    }

    /// Waits for an event, at most so long.
    pub fn wait_within(&mut self, event: &str, limit: Duration) -> Result<Option<Value>> {
        let end = Instant::now() + limit;
        let socket = self.writer.try_clone()?;
        let found = loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break None;
            }
            socket.set_read_timeout(Some(left))?;
            // What is in the buffer is a whole message or nothing: each is sent at once.
            if let Err(error) = self.reader.fill_buf() {
                ensure!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
                break None;
            }
            let message = self.next()?;
            if message["event"] == event {
                break Some(message);
            }
        };
        socket.set_read_timeout(None)?;
        Ok(found)
    }

    /// Starts a stream of node `d` down to nothing.
    pub fn stream(&mut self) -> Result<()> {
        self.call("block-stream", json!({"job-id": "j", "device": "d"})).map(drop)
    }

    /// Waits for the end of the stream, which must be a success.
    pub fn stream_end(&mut self) -> Result<()> {
        let event = self.wait("BLOCK_JOB_COMPLETED")?;
        ensure!(event["data"].get("error").is_none(), "the stream failed: {event}");
        Ok(())
    }
}

/// One request at a time, by the oldest way in: what a guest at queue depth 1 sees.
pub struct NbdClient {
    stream: UnixStream,
    cookie: u64,
}

const NBD_OPTS_MAGIC: u64 = 0x4948_4156_454F_5054;
const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
const NBD_REPLY_MAGIC: u32 = 0x6744_6698;

impl NbdClient {
    pub fn connect(path: &Path, export: &str) -> Result<NbdClient> {
        patiently(|| {
            let mut stream = UnixStream::connect(path)?;
            let mut hello = [0; 18];
            stream.read_exact(&mut hello)?;
            let mut ask = 3u32.to_be_bytes().to_vec();
            ask.extend(NBD_OPTS_MAGIC.to_be_bytes());
            ask.extend(1u32.to_be_bytes());
            ask.extend((export.len() as u32).to_be_bytes());
            ask.extend(export.as_bytes());
            stream.write_all(&ask)?;
            let mut size_and_flags = [0; 10];
            stream.read_exact(&mut size_and_flags)?;
            Ok(NbdClient { stream, cookie: 0 })
        })
        .with_context(|| format!("no NBD export {export} at {}", path.display()))
    }

    fn request(&mut self, kind: u16, at: u64, len: u32, payload: &[u8]) -> Result<()> {
        self.cookie += 1;
        let mut request = NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(0u16.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(at.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(payload);
        self.stream.write_all(&request).context("the export takes no request")?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).context("the export does not answer")?;
        ensure!(reply[..4] == NBD_REPLY_MAGIC.to_be_bytes(), "not a simple reply");
        ensure!(reply[4..8] == [0; 4], "NBD error at {at}");
        Ok(())
    }

    pub fn read(&mut self, at: u64, len: u32) -> Result<Vec<u8>> {
        self.request(0, at, len, &[])?;
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    pub fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        self.request(1, at, data.len() as u32, data)
    }

    pub fn flush(&mut self) -> Result<()> {
        self.request(3, 0, 0, &[])
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// What fio measured.
pub struct Fio {
    pub ios: f64,
    /// From the first request to the last, the final flush included where it was asked for.
    pub seconds: f64,
}

impl Fio {
    /// Runs fio's NBD engine against `uri`.
    pub fn run(uri: &str, args: &[&str]) -> Result<Fio> {
        let uri = format!("--uri={uri}");
        let common = ["--name=x", "--ioengine=nbd", "--output-format=json", "--randrepeat=1", &uri];
        let start = Instant::now();
        let text = run("fio", &[&common[..], args].concat())?;
        let wall = start.elapsed().as_secs_f64();
        let report: Value = serde_json::from_str(&text[text.find('{').context("fio printed no report")?..])?;
        let job = &report["jobs"][0];
        ensure!(job["error"] == 0, "fio failed: {}", job["error"]);
        let side = if job["read"]["total_ios"].as_f64() > Some(0.0) { "read" } else { "write" };
        let ios = job[side]["total_ios"].as_f64().context("no total_ios")?;
        let seconds = job[side]["runtime"].as_f64().context("no runtime")? / 1000.0;
        // A flush at the end is outside of fio's own run time.
        let flushed = args.iter().any(|arg| arg.starts_with("--end_fsync"));
        Ok(Fio { ios, seconds: if flushed { wall } else { seconds } })
    }

    pub fn iops(&self) -> f64 {
        self.ios / self.seconds
    }
}
