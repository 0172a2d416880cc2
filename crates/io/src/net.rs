//! Byte streams: TCP, Unix sockets, standard input and output.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use compio::buf::{BufResult, IntoInner, IoBuf};
use compio::driver::op::{Interest, PollOnce, Read, Recv, RecvFlags, SendFlags, SendVectored, WriteVectored};
use futures_util::future::LocalBoxFuture;
use infill_base::{ErrorKind, Gather, IoError, IoResult};
use infill_storage::stream::{Connection, StreamRead, StreamWrite};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use smallvec::SmallVec;

use crate::linger;

/// Most runs of bytes that one send hands to the kernel (its own limit is 1024).
const MAX_RUNS: usize = 1024;

/// Clients that may wait in the kernel until they are accepted.
const BACKLOG: i32 = 128;
/// Modes of socket files, before the umask.
const FILE_MODE: Mode = Mode::from_raw_mode(0o777);
const GUARDED_MODE: Mode = Mode::from_raw_mode(0o660);

/// Where to listen, or to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host (name or number) and port.
    Tcp {
        /// The host; empty listens on all of them.
        host: String,
        /// The port; 0 lets the kernel choose one to listen on.
        port: u16,
    },
    /// A socket file.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A listening socket. A socket file that it made is removed with it.
pub struct Listener {
    socket: Arc<Socket>,
    address: Address,
    made: Option<PathBuf>,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl AsFd for Socket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Listener {
    /// Listens at `address`. A stale socket file (nobody listens there) is replaced; a live one is an error. Who may
    /// connect to a socket file is decided by its mode, which the process's umask makes (022: its own user alone).
    ///
    /// A port that is taken is waited for, which blocks the thread for up to 2 s: it may be that of a process that was killed.
    pub fn bind(address: &Address) -> IoResult<Listener> {
        Listener::bind_with(address, FILE_MODE)
    }

    /// As [`Listener::bind`], but whatever the umask is, a socket file is never for everybody: at most for the group.
    pub fn bind_guarded(address: &Address) -> IoResult<Listener> {
        Listener::bind_with(address, GUARDED_MODE)
    }

    fn bind_with(address: &Address, mode: Mode) -> IoResult<Listener> {
        let named = |error: io::Error| IoError::from(error).in_node(address);
        let (socket, address, made) = match address {
            Address::Tcp { host, port } => {
                let host = if host.is_empty() { "::" } else { host.as_str() };
                let socket = bind_tcp(host, *port).map_err(named)?;
                let port = socket.local_addr().map_err(named)?.port();
                (Socket::Tcp(socket), Address::Tcp { host: host.to_owned(), port }, None)
            }
            Address::Unix(path) => {
                let socket = match bind_unix(path, mode) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
                        std::fs::remove_file(path).and_then(|()| bind_unix(path, mode))
                    }
                    other => other,
                };
                (Socket::Unix(socket.map_err(named)?), address.clone(), Some(path.clone()))
            }
        };
        Listener::over(socket, address, made)
    }

    /// Takes a listening socket that somebody else has made (socket activation, a manager's descriptor).
    pub fn from_fd(fd: OwnedFd) -> IoResult<Listener> {
        let local = rustix::net::getsockname(&fd).map_err(io::Error::from)?;
        let (socket, address) = match SocketAddr::try_from(local) {
            Ok(addr) => {
                let address = Address::Tcp { host: addr.ip().to_string(), port: addr.port() };
                (Socket::Tcp(fd.into()), address)
            }
            Err(_) => (Socket::Unix(fd.into()), Address::Unix("(passed socket)".into())),
        };
        Listener::over(socket, address, None)
    }

    /// The listening socket that this process was started with as descriptor `number` (it stays open beside this).
    pub fn inherited(number: i32) -> IoResult<Listener> {
        let no_socket = || {
            let why = format!("File descriptor '{number}' is not a socket that listens");
            IoError::new(ErrorKind::InvalidInput, why)
        };
        // Standard input, output and error are no sockets to listen at, and -1 is no descriptor.
        if number <= 2 {
            return Err(no_socket());
        }
        // SAFETY: the number is not -1, and all that is done through it is to duplicate it: a number that is not open is
        // refused by the kernel, and one that is somebody else's is left as it is.
        let passed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        let own = rustix::io::fcntl_dupfd_cloexec(passed, 0).map_err(|_| no_socket())?;
        match rustix::net::sockopt::socket_acceptconn(&own) {
            Ok(true) => Listener::from_fd(own),
            Ok(false) | Err(_) => Err(no_socket()),
        }
    }

    fn over(socket: Socket, address: Address, made: Option<PathBuf>) -> IoResult<Listener> {
        match &socket {
            Socket::Tcp(socket) => socket.set_nonblocking(true)?,
            Socket::Unix(socket) => socket.set_nonblocking(true)?,
        }
        Ok(Listener { socket: Arc::new(socket), address, made })
    }

    /// Where it listens, with the port that the kernel chose.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection, not yet bound to a reactor.
    pub async fn accept(&self) -> IoResult<Accepted> {
        loop {
            let result = match &*self.socket {
                Socket::Tcp(socket) => socket.accept().map(|(stream, peer)| {
                    let _ = stream.set_nodelay(true);
                    Accepted { fd: stream.into(), peer: peer.to_string() }
                }),
                Socket::Unix(socket) => socket.accept().map(|(stream, _)| Accepted {
                    peer: format!("a client of {}{}", self.address, who(&stream)),
                    fd: stream.into(),
                }),
            };
            match result {
                Ok(accepted) => return Ok(accepted),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let op = PollOnce::new(self.socket.clone(), Interest::Readable);
                    compio::runtime::submit(op).await.0?;
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => return Err(IoError::from(error).in_node(&self.address)),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes a socket file of a mode (less the umask) that listens.
fn bind_unix(path: &Path, mode: Mode) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file gets the socket's own mode: there is no moment at which it has another one.
    rustix::fs::fchmod(&socket, mode)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Who is at the other end of a Unix socket, as the kernel knows it: behind a name, for messages.
fn who(stream: &UnixStream) -> String {
    match rustix::net::sockopt::socket_peercred(stream) {
        Ok(peer) => format!(" (process {}, user {})", peer.pid.as_raw_nonzero(), peer.uid.as_raw()),
        Err(_) => String::new(),
    }
}

/// Listens at a port. Who had it may have been killed a moment ago, which cannot be seen, unlike with a socket file.
fn bind_tcp(host: &str, port: u16) -> io::Result<TcpListener> {
    linger::retry(|| TcpListener::bind((host, port)), |error| error.kind() == io::ErrorKind::AddrInUse)
}

/// Whether nobody listens behind a socket file, or only a process that is gone: after a kill its sockets are closed a little
/// later than it ends, and whoever starts it anew at once is not to be refused for that.
fn is_stale(path: &Path) -> bool {
    match UnixStream::connect(path) {
        Ok(stream) => {
            let listener = rustix::net::sockopt::socket_peercred(stream);
            listener.is_ok_and(|listener| {
                rustix::process::test_kill_process(listener.pid) == Err(rustix::io::Errno::SRCH)
            })
        }
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
    }
}

/// A connection that may still go to any reactor.
pub struct Accepted {
    fd: OwnedFd,
    peer: String,
}

impl Accepted {
    /// A socket that is connected to `peer`.
    pub(crate) fn new(fd: OwnedFd, peer: String) -> Accepted {
        Accepted { fd, peer }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// A second hold of it, by which it can be made to end in a reset.
    pub(crate) fn resettable(&self) -> IoResult<Resettable> {
        Ok(Resettable(self.fd.try_clone()?))
    }

    /// Binds it to this reactor.
    pub fn into_connection(self) -> IoResult<Connection> {
        // The ring waits by itself and wants sockets that block; poll wants them otherwise.
        let ring = compio::runtime::Runtime::with_current(|ring| ring.driver_type()).is_iouring();
        rustix::io::ioctl_fionbio(&self.fd, !ring).map_err(io::Error::from)?;
        let fd = Arc::new(self.fd);
        Ok(Connection {
            reader: Box::new(SocketReader(fd.clone())),
            writer: Box::new(SocketWriter(fd)),
            peer: self.peer,
        })
    }
}

/// A connection beside whoever uses it.
pub(crate) struct Resettable(OwnedFd);

impl Resettable {
    /// Where it is TCP, its end is a reset once all who hold it have dropped it.
    pub(crate) fn reset_when_dropped(self) {
        // A socket of another kind does not know how, and ends in its own way.
        let _ = rustix::net::sockopt::set_socket_linger(&self.0, Some(std::time::Duration::ZERO));
    }
}

struct SocketReader(Arc<OwnedFd>);

impl StreamRead for SocketReader {
    fn read(&mut self, buf: BytesMut) -> LocalBoxFuture<'_, IoResult<BytesMut>> {
        Box::pin(async move {
            let mut buf = buf;
            debug_assert!(buf.capacity() > buf.len(), "nowhere to receive to");
            loop {
                let (filled, end) = (buf.len(), buf.capacity());
                let op = Recv::new(self.0.clone(), buf.slice(filled..end), RecvFlags::empty());
                let BufResult(result, slice) = compio::runtime::submit(op).await.into_inner();
                buf = slice.into_inner();
                match result {
                    Ok(n) => {
                        // SAFETY: the kernel has filled n bytes behind the first `filled`, within the capacity.
                        unsafe { buf.set_len(filled + n) };
                        return Ok(buf);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
        })
    }
}

struct SocketWriter(Arc<OwnedFd>);

/// Runs of bytes on their way out.
type Runs = SmallVec<[Bytes; 3]>;

/// Drops the first `n` bytes, which were sent.
fn skip(runs: &mut Runs, mut n: usize) {
    let mut whole = 0;
    for run in runs.iter_mut() {
        if n < run.len() {
            run.advance(n);
            break;
        }
        n -= run.len();
        whole += 1;
    }
    runs.drain(..whole);
}

impl StreamWrite for SocketWriter {
    fn write_all(&mut self, data: Gather) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(async move {
            let mut left = data.into_runs();
            while !left.is_empty() {
                // The runs go to the operation and come back: cloning each costs more than all else here.
                let later =
                    if left.len() > MAX_RUNS { left.drain(MAX_RUNS..).collect() } else { Runs::new() };
                let op = SendVectored::new(self.0.clone(), left, SendFlags::NOSIGNAL);
                let BufResult(result, runs) = compio::runtime::submit(op).await.into_inner();
                left = runs;
                match result {
                    Ok(n) => skip(&mut left, n),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
                left.extend(later);
            }
            Ok(())
        })
    }

    fn shutdown(&mut self) -> LocalBoxFuture<'_, IoResult<()>> {
        // From now on everything that was sent is to arrive, also when the connection is dropped next. (A connector's TCP
        // connection is aborted otherwise; on other sockets this changes nothing.)
        let linger = rustix::net::sockopt::set_socket_linger(&*self.0, None);
        let result = linger.and_then(|()| rustix::net::shutdown(&*self.0, rustix::net::Shutdown::Write));
        Box::pin(async move { result.map_err(|error| io::Error::from(error).into()) })
    }
}

/// Standard input and output as a byte stream (a monitor on `stdio`).
pub fn stdio() -> IoResult<Connection> {
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    let output = io::stdout().as_fd().try_clone_to_owned()?;
    Ok(Connection {
        reader: Box::new(PipeReader(Arc::new(input))),
        writer: Box::new(PipeWriter(Arc::new(output))),
        peer: "standard input".into(),
    })
}

struct PipeReader(Arc<OwnedFd>);

impl StreamRead for PipeReader {
    fn read(&mut self, buf: BytesMut) -> LocalBoxFuture<'_, IoResult<BytesMut>> {
        Box::pin(async move {
            let (filled, end) = (buf.len(), buf.capacity());
            let op = Read::new(self.0.clone(), buf.slice(filled..end));
            let BufResult(result, slice) = compio::runtime::submit(op).await.into_inner();
            let mut buf = slice.into_inner();
            let n = result?;
            // SAFETY: the kernel has filled n bytes behind the first `filled`, within the capacity.
            unsafe { buf.set_len(filled + n) };
            Ok(buf)
        })
    }
}

struct PipeWriter(Arc<OwnedFd>);

impl StreamWrite for PipeWriter {
    fn write_all(&mut self, data: Gather) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(async move {
            let mut left = data;
            while !left.is_empty() {
                let runs = left.runs().iter().take(MAX_RUNS).cloned().collect::<Vec<_>>();
                let op = WriteVectored::new(self.0.clone(), runs);
                let BufResult(result, _) = compio::runtime::submit(op).await;
                let n = result?;
                left = left.slice(n, left.len() - n);
            }
            Ok(())
        })
    }

    fn shutdown(&mut self) -> LocalBoxFuture<'_, IoResult<()>> {
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Reactors, connector};
    use infill_storage::rt;

    #[test]
    fn what_was_sent_is_skipped_across_runs() {
        let runs = || Runs::from_iter([Bytes::from_static(b"abc"), Bytes::from_static(b"defg")]);
        for n in 0..=7 {
            let mut left = runs();
            skip(&mut left, n);
            assert_eq!(left.concat(), b"abcdefg"[n..], "{n}");
            assert!(left.iter().all(|run| !run.is_empty()));
        }
    }

    async fn echo(address: Address) {
        let listener = Listener::bind(&address).unwrap();
        let address = listener.address().clone();
        rt::spawn(async move {
            let mut connection = listener.accept().await.unwrap().into_connection().unwrap();
            loop {
                let buf = connection.reader.read(BytesMut::with_capacity(1000)).await.unwrap();
                if buf.is_empty() {
                    return;
                }
                connection.writer.write_all(buf.freeze().into()).await.unwrap();
            }
        });
        let mut connection = connector(&address).connect().await.unwrap();
        let mut data = Gather::new();
        (0..3000_u32).for_each(|i| data.push(Bytes::from(vec![i as u8; 100])));
        let sent = data.to_bytes();
        let (mut reader, mut writer) = (connection.reader, connection.writer);
        rt::spawn(async move {
            writer.write_all(data).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        let mut got = BytesMut::with_capacity(16);
        loop {
            got.reserve(4096);
            let before = got.len();
            got = reader.read(got).await.unwrap();
            if got.len() == before {
                break;
            }
        }
        connection.peer.clear();
        assert!(got == sent, "{} of {} bytes came back", got.len(), sent.len());
    }

    /// As that of a process that was killed, which the kernel has not taken down yet.
    #[test]
    fn a_port_that_is_given_up_in_a_moment_is_waited_for_and_one_that_is_not_is_refused() {
        let old = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = old.local_addr().unwrap().port();
        let address = Address::Tcp { host: "127.0.0.1".into(), port };
        let refused = Listener::bind(&address).map(drop).unwrap_err();
        assert!(refused.to_string().contains("in use"), "{refused}");
        let going = std::thread::spawn(move || {
            std::thread::sleep(linger::LOOK * 4);
            drop(old);
        });
        Listener::bind(&address).unwrap();
        going.join().unwrap();
    }

    #[test]
    fn only_a_socket_that_listens_is_taken_over_by_its_number() {
        use std::net::TcpStream;
        use std::os::fd::AsRawFd as _;

        let listening = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(listening.local_addr().unwrap()).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for number in [-1, 0, i32::MAX, connected.as_raw_fd(), file.as_raw_fd()] {
            assert!(Listener::inherited(number).is_err(), "{number}");
        }
        let taken = Listener::inherited(listening.as_raw_fd()).unwrap();
        let port = listening.local_addr().unwrap().port();
        assert_eq!(*taken.address(), Address::Tcp { host: "127.0.0.1".into(), port });
        drop(taken);
        TcpStream::connect(("127.0.0.1", port)).expect("the one that was passed is still open");
    }

    #[test]
    fn bytes_travel_over_tcp() {
        let reactors = Reactors::start(1).unwrap();
        reactors.block_on(|| echo(Address::Tcp { host: "127.0.0.1".into(), port: 0 }));
    }

    #[test]
    fn bytes_travel_over_unix_sockets_and_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let address = Address::Unix(path.clone());
        Reactors::start(1).unwrap().block_on(move || echo(address));
        assert!(!path.exists(), "the listener removes its socket");
    }

    #[test]
    fn a_socket_that_outlives_its_process_for_a_moment_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        // The one that listens ends; another one holds its socket open, as the kernel does for a while after a kill.
        let script = "import os, socket, sys, time\ns = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\n\
                      pid = os.fork()\nif pid: print(pid, flush=True)\nelse: os.close(1); os.close(2); time.sleep(60)";
        let ended = std::process::Command::new("python3").args(["-c", script]).arg(&path).output().unwrap();
        let holder = String::from_utf8(ended.stdout).unwrap().trim().parse().unwrap();
        let holder = rustix::process::Pid::from_raw(holder).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        Reactors::start(1).unwrap().block_on(move || async move {
            let address = Address::Unix(path);
            let listener = Listener::bind(&address);
            rustix::process::kill_process(holder, rustix::process::Signal::KILL).unwrap();
            let _listener = listener.unwrap();
            assert!(Listener::bind(&address).is_err(), "somebody listens there");
        });
    }

    #[test]
    fn a_guarded_socket_is_never_for_everybody_and_its_client_is_known() {
        use std::os::unix::fs::PermissionsExt as _;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        Reactors::start(1).unwrap().block_on(move || async move {
            let listener = Listener::bind_guarded(&Address::Unix(path.clone())).unwrap();
            // Whatever the umask of this process is.
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o007, 0, "{mode:o}");
            assert_eq!(mode & 0o600, 0o600, "{mode:o}");
            let _client = UnixStream::connect(&path).unwrap();
            let peer = listener.accept().await.unwrap().peer().to_owned();
            let known = format!("(process {}, user ", std::process::id());
            assert!(peer.contains(&known), "{peer}");
        });
    }

    #[test]
    fn a_live_socket_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _live = UnixListener::bind(&path).unwrap();
        assert!(Listener::bind(&Address::Unix(path.clone())).is_err());
        assert!(UnixStream::connect(path).is_ok());
    }
}
