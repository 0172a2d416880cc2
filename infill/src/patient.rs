//! Reading a small file that may be a pipe (`/dev/fd/3`, a shell's `<(…)`): whoever writes there may never come.

use std::fs::OpenOptions;
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

/// How long all of a pipe's content may take. (A file is there, or its file system is waited for.)
pub const PIPE_PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that are read at a time.
const PIECE_BYTES: u64 = 64 << 10;

/// Reads a file, or a pipe until its end, into `content`; one byte more than `bytes_max` of what is longer.
pub fn read(path: &Path, bytes_max: u64, patience: Duration, content: &mut Vec<u8>) -> Result<()> {
    let end = Instant::now() + patience;
    // Else a pipe that nobody writes to is waited for here.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let mut file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    loop {
        let left = (bytes_max + 1).saturating_sub(content.len() as u64);
        if left == 0 {
            return Ok(());
        }
        let time = Timespec::try_from(end.saturating_duration_since(Instant::now())).map_err(Error::other)?;
        if poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&time))? == 0 {
            let why = format!("it is a pipe, and nobody has written all of it in {patience:?}");
            return Err(Error::new(ErrorKind::TimedOut, why));
        }
        match file.by_ref().take(left.min(PIECE_BYTES)).read_to_end(content) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use super::*;

    fn read_all(path: &Path, patience: Duration) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        read(path, 100_000, patience, &mut content).map(|()| content)
    }

    #[test]
    fn a_pipe_is_read_to_its_end_and_one_that_nobody_writes_to_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::from(0o600)).unwrap();
        let error = read_all(&pipe, Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("nobody has written all of it"), "{error}");
        let there = pipe.clone();
        let writing = std::thread::spawn(move || {
            let mut pipe = File::options().write(true).open(there).unwrap();
            // Never all at once, for a pipe holds less.
            pipe.write_all(&[b'a'; 90_000]).unwrap();
            pipe.write_all(b"b").unwrap();
        });
        assert_eq!(read_all(&pipe, Duration::from_secs(60)).unwrap(), [&[b'a'; 90_000][..], b"b"].concat());
        writing.join().unwrap();
    }

    #[test]
    fn no_more_is_read_than_one_byte_too_many() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all(&[7; 200_000]).unwrap();
        assert_eq!(read_all(file.path(), PIPE_PATIENCE).unwrap().len(), 100_001);
        assert!(read_all(Path::new("/nowhere"), PIPE_PATIENCE).is_err());
    }
}
