//! Character devices while the daemon runs: `query-chardev`, `chardev-*`, `ringbuf-*`.
//!
//! Monitors are on the devices of the command line. A device that is added later has nobody who talks over it: a socket is
//! listened at, a file is open, a ring buffer holds what managers write to it. What never happens: a device is taken from under
//! a monitor; memory that clients make grow without a limit.

use std::collections::{BTreeMap, VecDeque};
use std::fs::OpenOptions;
use std::path::Path;
use std::rc::Rc;

use infill_qmp::QmpError;
use infill_qmp::chardev::{ChardevBackend, ChardevCommand};
use serde_json::{Value, json};

use super::chardev::{Chardev, Device};
use super::control::Control;

/// Bytes that a ring buffer keeps where nobody says it, and at most.
pub const RINGBUF_BYTES_DEFAULT: i64 = 64 << 10;
const RINGBUF_BYTES_MAX: i64 = 16 << 20;
/// Devices at a time.
const CHARDEVS_MAX: usize = 256;

/// The last bytes that were written to it.
#[derive(Debug)]
pub struct Ring {
    bytes: VecDeque<u8>,
    size: usize,
}

impl Ring {
    /// Keeps `size` bytes, which take memory when they are there.
    pub fn new(size: i64) -> Result<Ring, QmpError> {
        if size <= 0 || size & (size - 1) != 0 {
            return Err(QmpError::generic("size of ringbuf chardev must be power of two"));
        }
        if size > RINGBUF_BYTES_MAX {
            let why = format!("size of ringbuf chardev must be at most {RINGBUF_BYTES_MAX}");
            return Err(QmpError::generic(why));
        }
        Ok(Ring { bytes: VecDeque::new(), size: usize::try_from(size).unwrap_or(usize::MAX) })
    }

    fn write(&mut self, data: &[u8]) {
        let data = &data[data.len().saturating_sub(self.size)..];
        let over = (self.bytes.len() + data.len()).saturating_sub(self.size);
        self.bytes.drain(..over);
        self.bytes.extend(data);
    }

    fn read(&mut self, size: usize) -> Vec<u8> {
        let size = size.min(self.bytes.len());
        self.bytes.drain(..size).collect()
    }
}

/// Makes the file that a device is. Nobody writes to it.
pub fn make_file(path: &str, append: bool) -> Result<(), QmpError> {
    let mut options = OpenOptions::new();
    let opened = options.create(true).write(true).truncate(!append).append(append).open(Path::new(path));
    opened.map(drop).map_err(|error| {
        let why = error.to_string();
        let why = why.split(" (os error ").next().unwrap_or_default();
        QmpError::generic(format!("Could not open '{path}': {why}"))
    })
}

/// What a device is, and who has it.
pub enum Held {
    /// A monitor is on it.
    Monitor,
    /// A monitor could be on it.
    Free(Chardev),
    /// Memory.
    Ring(Ring),
    /// Nothing that anybody here uses.
    Idle,
}

/// A device.
pub struct Running {
    /// What it is called.
    pub filename: String,
    /// Its type, as `qom-list` tells it.
    pub kind: &'static str,
    /// What it is.
    pub held: Held,
}

impl Running {
    /// Opens a device.
    pub async fn open(mut device: Device) -> Result<Running, QmpError> {
        let kind = device.kind();
        let held = device.open().await?;
        Ok(Running { filename: device.to_string(), kind, held })
    }

    fn told(&self, label: &str) -> Value {
        let waits = matches!(self.held, Held::Free(Chardev::Server(..)));
        let before = if waits { "disconnected:" } else { "" };
        json!({
            "label": label,
            "filename": format!("{before}{}", self.filename),
            "frontend-open": matches!(self.held, Held::Monitor),
        })
    }
}

/// All devices, by their names.
pub type Devices = BTreeMap<String, Running>;

fn not_found(id: &str) -> QmpError {
    QmpError::generic(format!("Chardev '{id}' not found"))
}

impl Control {
    /// `query-chardev`.
    pub(super) fn query_chardev(&self) -> Value {
        self.chardevs.borrow().iter().map(|(label, device)| device.told(label)).collect()
    }

    /// `chardev-*`, `ringbuf-*`.
    pub(super) async fn chardev_command(self: &Rc<Self>, command: ChardevCommand) -> Result<Value, QmpError> {
        match command {
            ChardevCommand::Add { id, backend } => {
                if self.chardevs.borrow().contains_key(&id) {
                    return Err(QmpError::generic(format!("Chardev with id '{id}' already exists")));
                }
                if self.chardevs.borrow().len() >= CHARDEVS_MAX {
                    let why = format!("there are {CHARDEVS_MAX} chardevs, which is the most: remove one");
                    return Err(QmpError::generic(why));
                }
                self.open_chardev(id, backend).await
            }
            ChardevCommand::Change { id, backend } => {
                match self.chardevs.borrow().get(&id).map(|device| &device.held) {
                    None => return Err(QmpError::generic(format!("Chardev '{id}' does not exist"))),
                    Some(Held::Monitor) => {
                        return Err(QmpError::generic("Chardev user does not support chardev hotswap"));
                    }
                    Some(_) => {}
                }
                self.open_chardev(id, backend).await
            }
            ChardevCommand::Remove { id } => {
                let mut devices = self.chardevs.borrow_mut();
                match devices.get(&id).map(|device| &device.held) {
                    None => return Err(not_found(&id)),
                    Some(Held::Monitor) => return Err(QmpError::generic(format!("Chardev '{id}' is busy"))),
                    Some(_) => devices.remove(&id),
                };
                Ok(json!({}))
            }
            ChardevCommand::SendBreak { id } => match self.chardevs.borrow().contains_key(&id) {
                // Nothing here is a serial line.
                true => Ok(json!({})),
                false => Err(not_found(&id)),
            },
            ChardevCommand::RingbufWrite { device, data, format } => {
                let data = self.with_ring(&device, |_| format.decode(data))??;
                self.with_ring(&device, |ring| ring.write(&data))?;
                Ok(json!({}))
            }
            ChardevCommand::RingbufRead { device, size, format } => {
                self.with_ring(&device, |ring| match usize::try_from(size).ok().filter(|size| *size > 0) {
                    Some(size) => Ok(Value::String(format.encode(&ring.read(size)))),
                    None => Err(QmpError::generic("size must be greater than zero")),
                })?
            }
        }
    }

    fn with_ring<T>(&self, device: &str, what: impl FnOnce(&mut Ring) -> T) -> Result<T, QmpError> {
        match self.chardevs.borrow_mut().get_mut(device) {
            None => Err(QmpError::generic(format!("Device '{device}' not found"))),
            Some(Running { held: Held::Ring(ring), .. }) => Ok(what(ring)),
            Some(_) => Err(QmpError::generic(format!("{device} is not a ringbuf device"))),
        }
    }

    /// Opens what is `id` from now on. What was it before stays where that fails.
    async fn open_chardev(&self, id: String, backend: ChardevBackend) -> Result<Value, QmpError> {
        let device = Device::of(backend);
        let is_there = |device: &Device| {
            let devices = self.chardevs.borrow();
            devices.get(&id).is_some_and(|old| {
                old.filename == device.to_string() && matches!(old.held, Held::Free(Chardev::Server(..)))
            })
        };
        let opened = match device {
            // Where it listens already.
            Ok(device) if is_there(&device) => return Ok(json!({})),
            Ok(device) => Running::open(device).await,
            Err(error) => Err(error),
        };
        let opened = opened
            .map_err(|error| QmpError::generic(format!("Failed to add chardev '{id}': {}", error.desc)))?;
        let mut devices = self.chardevs.borrow_mut();
        if devices.get(&id).is_some_and(|device| matches!(device.held, Held::Monitor)) {
            return Err(QmpError::generic(format!("Chardev '{id}' is busy")));
        }
        devices.insert(id, opened);
        Ok(json!({}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_the_last_bytes_and_no_more() {
        let mut ring = Ring::new(8).unwrap();
        ring.write(b"0123456789");
        ring.write(b"ab");
        assert_eq!(ring.read(3), b"456");
        ring.write(b"c");
        assert_eq!((ring.read(100), ring.read(1)), (b"789abc".to_vec(), Vec::new()));
        for wrong in [0, -16, 100, RINGBUF_BYTES_MAX * 2, i64::MAX] {
            assert!(Ring::new(wrong).is_err(), "{wrong}");
        }
    }
}
