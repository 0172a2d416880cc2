//! A server on a socket in a temporary directory, and the real clients that speak to it.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use infill_io::{Address, Listener, Reactors};
use infill_nbd::{Exports, Server, ServerLimits, ServerTls};
use infill_storage::rt;

/// No client may take longer than this, in seconds.
const CLIENT_SECONDS: &str = "60";

/// A server that lives as long as this.
pub struct Served {
    pub server: Server,
    pub dir: tempfile::TempDir,
    socket: PathBuf,
    // Behind the rest: the connections end with it.
    _reactors: Reactors,
}

impl Served {
    pub fn new(exports: Exports) -> Served {
        Served::over(exports, None)
    }

    /// One that wants TLS, where there are credentials.
    pub fn over(exports: Exports, tls: Option<ServerTls>) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let server = Server::over(exports, ServerLimits::default(), tls);
        let reactors = Reactors::start(1).unwrap();
        let (address, accepted) = (Address::Unix(socket.clone()), server.clone());
        reactors.block_on(move || async move {
            let listener = Listener::bind(&address).unwrap();
            rt::spawn(async move {
                while let Ok(client) = listener.accept().await {
                    let (server, connection) = (accepted.clone(), client.into_connection().unwrap());
                    rt::spawn(async move {
                        if let Err(error) = server.serve(connection).await {
                            eprintln!("connection ended: {error}");
                        }
                    });
                }
            });
        });
        Served { server, dir, socket, _reactors: reactors }
    }

    /// The URI of an export.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// What a program says; it must be there, and end in time.
pub fn output(program: &str, args: &[&str]) -> Output {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap();
    assert!(
        found.status.success(),
        "{program} is missing: apt-get install qemu-utils nbdkit libnbd-bin python3-libnbd fio openssl"
    );
    // nbdsh is a script for the distribution's own python, which another one in the path may hide.
    let path = format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("timeout");
    command.arg(CLIENT_SECONDS).arg(program).args(args).env("PATH", path).output().unwrap()
}

/// Standard output of a program that must succeed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// Runs a script in nbdsh against `uri`.
pub fn nbdsh(uri: &str, script: &str) {
    let script = format!("uri = '{uri}'\n{script}");
    run("nbdsh", &["-c", &script]);
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[2]).collect()
}
