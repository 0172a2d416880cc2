//! Connecting: without a thread that blocks, so that an attempt ends when its future is dropped.
//!
//! A client of a dead server makes attempts all the time; each must cost nothing once nobody waits for it. Names alone
//! are looked up on the thread pool (numbers are not).
//!
//! A TCP connection is lost when its peer has acknowledged nothing for [`PEER_SILENT_TIME`], idle or not: the kernel
//! asks. So a link that swallows everything is told from a peer that is slow to answer. And a TCP connection that is
//! dropped without a shutdown is aborted: what was not sent yet is never sent. (Else the kernel would go on for minutes to
//! deliver a request that its client has long repeated on another connection.)

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use compio::driver::op::{Interest, PollOnce};
use futures_util::future::LocalBoxFuture;
use infill_base::{ErrorKind, IoError, IoResult};
use infill_storage::rt;
use infill_storage::stream::{Connection, Connector};
use rustix::io::Errno;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::net::{Accepted, Address};

/// How long one attempt to connect to one address may take.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long a TCP peer may acknowledge nothing before it counts as lost.
const PEER_SILENT_TIME: Duration = Duration::from_secs(3);
/// Pause between probes of a TCP peer that has nothing to acknowledge.
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// Pause before a socket file whose queue of clients is full is asked again.
const QUEUE_PAUSE: Duration = Duration::from_millis(20);

/// Connects over TCP.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    /// Name or number.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl Connector for TcpConnector {
    fn connect(&self) -> LocalBoxFuture<'_, IoResult<Connection>> {
        Box::pin(async move {
            let fd = connect_tcp(&self.host, self.port).await;
            let fd = fd.map_err(|error| unreachable_peer(error, &self.target()))?;
            Accepted::new(fd, self.target()).into_connection()
        })
    }

    fn target(&self) -> String {
        Address::Tcp { host: self.host.clone(), port: self.port }.to_string()
    }
}

/// Tries every address of the name.
async fn connect_tcp(host: &str, port: u16) -> io::Result<OwnedFd> {
    let addrs = match host.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, port)],
        Err(_) => {
            let host = host.to_owned();
            let looked = rt::offload(move || (host, port).to_socket_addrs().map(Iterator::collect)).await;
            looked.map_err(io::Error::other)??
        }
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for addr in addrs {
        let late = || Err(io::Error::from(io::ErrorKind::TimedOut));
        match rt::timeout(CONNECT_TIME, connect_addr(addr)).await.unwrap_or_else(late) {
            Ok(fd) => return Ok(fd),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn connect_addr(addr: SocketAddr) -> io::Result<OwnedFd> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = socket(family)?;
    sockopt::set_tcp_nodelay(&fd, true)?;
    sockopt::set_socket_keepalive(&fd, true)?;
    sockopt::set_tcp_keepidle(&fd, PEER_SILENT_TIME)?;
    sockopt::set_tcp_keepintvl(&fd, PROBE_PAUSE)?;
    sockopt::set_socket_linger(&fd, Some(Duration::ZERO))?;
    sockopt::set_tcp_user_timeout(&fd, PEER_SILENT_TIME.as_millis() as u32)?;
    finish(fd, &addr).await
}

fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

/// Connects a socket that does not block.
async fn finish(fd: OwnedFd, addr: &impl SocketAddrArg) -> io::Result<OwnedFd> {
    let fd = Arc::new(fd);
    match rustix::net::connect(&*fd, addr) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => {
            compio::runtime::submit(PollOnce::new(fd.clone(), Interest::Writable)).await.0?;
            sockopt::socket_error(&*fd)??;
        }
        Err(error) => return Err(error.into()),
    }
    // The operation that waited may still hold it for a moment.
    Arc::try_unwrap(fd).or_else(|fd| fd.try_clone())
}

fn unreachable_peer(error: io::Error, target: &str) -> IoError {
    IoError::new(ErrorKind::SourceLost, format!("cannot connect to {target}")).caused_by(error)
}

/// Connects to a Unix socket.
#[derive(Clone, Debug)]
pub struct UnixConnector {
    /// The socket file.
    pub path: PathBuf,
}

impl Connector for UnixConnector {
    fn connect(&self) -> LocalBoxFuture<'_, IoResult<Connection>> {
        Box::pin(async move {
            let connect = async {
                let addr = SocketAddrUnix::new(&self.path)?;
                loop {
                    match finish(socket(AddressFamily::UNIX)?, &addr).await {
                        // The server's queue is full; the kernel has nothing to wait for.
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            rt::sleep(QUEUE_PAUSE).await
                        }
                        other => return other,
                    }
                }
            };
            let late = || Err(io::Error::new(io::ErrorKind::TimedOut, "the server takes no more clients"));
            let fd = rt::timeout(CONNECT_TIME, connect).await.unwrap_or_else(late);
            let fd = fd.map_err(|error| unreachable_peer(error, &self.target()))?;
            Accepted::new(fd, self.target()).into_connection()
        })
    }

    fn target(&self) -> String {
        self.path.display().to_string()
    }
}

/// The connector for an address.
pub fn connector(address: &Address) -> Arc<dyn Connector> {
    match address {
        Address::Tcp { host, port } => Arc::new(TcpConnector { host: host.clone(), port: *port }),
        Address::Unix(path) => Arc::new(UnixConnector { path: path.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use futures_util::FutureExt;

    use super::*;
    use crate::{Listener, Reactors};

    #[test]
    fn nobody_there_is_a_lost_source_with_its_name() {
        let errors = Reactors::start(1).unwrap().block_on(|| async {
            let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = nobody.local_addr().unwrap().port();
            drop(nobody);
            let unix = UnixConnector { path: "/nonexistent/socket".into() };
            let long = UnixConnector { path: "/x".repeat(1000).into() };
            let tcp = TcpConnector { host: "127.0.0.1".into(), port };
            let error = async |connector: &dyn Connector| connector.connect().await.err().unwrap();
            [error(&unix).await, error(&long).await, error(&tcp).await]
        });
        for error in &errors {
            assert_eq!(error.kind(), ErrorKind::SourceLost);
        }
        assert!(errors[0].to_string().contains("/nonexistent/socket"), "{}", errors[0]);
        assert!(errors[2].to_string().contains("127.0.0.1:"), "{}", errors[2]);
    }

    #[test]
    fn a_name_is_looked_up() {
        Reactors::start(1).unwrap().block_on(|| async {
            let listener = Listener::bind(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).unwrap();
            let Address::Tcp { port, .. } = *listener.address() else { panic!("not TCP") };
            let connector = TcpConnector { host: "localhost".into(), port };
            connector.connect().await.unwrap();
        });
    }

    #[test]
    fn what_was_not_sent_before_a_connection_was_dropped_is_never_sent() {
        use std::io::Read;
        const SENT: usize = 64 << 20;
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let reactors = Reactors::start(1).unwrap();
        for shutdown in [false, true] {
            let mut taken = 0;
            let (full, stuck) = std::sync::mpsc::channel();
            reactors.on(0).spawn(move || async move {
                let mut connection = TcpConnector { host: "127.0.0.1".into(), port }.connect().await.unwrap();
                if shutdown {
                    connection.writer.write_all(vec![1; 1 << 16].into()).await.unwrap();
                    connection.writer.shutdown().await.unwrap();
                } else {
                    // Until the server's buffers, and ours, are full.
                    let send = connection.writer.write_all(vec![1; SENT].into());
                    rt::timeout(Duration::from_millis(200), send).await.ok_or(()).unwrap_err();
                }
                drop(connection);
                full.send(()).unwrap();
            });
            let (mut peer, _) = server.accept().unwrap();
            stuck.recv().unwrap();
            let mut buf = vec![0; 1 << 16];
            let end = loop {
                match peer.read(&mut buf) {
                    Ok(0) => break Ok(taken),
                    Ok(n) => taken += n,
                    Err(error) => break Err(error.kind()),
                }
            };
            if shutdown {
                assert_eq!(end, Ok(1 << 16), "what was sent before a shutdown arrives");
            } else {
                assert_eq!(end, Err(io::ErrorKind::ConnectionReset), "after {taken} bytes");
            }
        }
    }

    #[test]
    fn attempts_at_a_server_that_takes_no_clients_block_no_thread() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let full = UnixListener::bind(&path).unwrap();
        Reactors::start(1).unwrap().block_on(|| async move {
            let connector = UnixConnector { path };
            // What is connected may go: its place in the queue stays taken.
            let mut places = 0;
            while connector.connect().now_or_never().is_some() {
                places += 1;
                assert!(places < 10_000, "the queue never fills up");
            }
            let mut attempts: Vec<_> = (0..2000).map(|_| connector.connect()).collect();
            assert!(attempts.iter_mut().all(|attempt| attempt.now_or_never().is_none()));
            // If each blocked a thread, the pool would be used up.
            rt::offload(|| ()).await.unwrap();
            drop(full);
        });
    }
}
