//! A bounded number of bytes in flight.

use event_listener::Event;

use crate::sync::{Arc, Mutex, lock};

/// A pool of permits, counted in bytes.
#[derive(Clone, Debug)]
pub struct Permits(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    total: u64,
    free: Mutex<u64>,
    returned: Event,
}

/// Bytes taken out of a pool; they go back when it is dropped.
#[derive(Debug)]
pub struct Permit {
    pool: Arc<Pool>,
    bytes: u64,
}

impl Permits {
    /// A pool of `total` bytes.
    pub fn new(total: u64) -> Permits {
        Permits(Arc::new(Pool { total, free: Mutex::new(total), returned: Event::new() }))
    }

    /// Takes `bytes` if they are free now. More than the pool holds counts as all of it.
    pub fn try_take(&self, bytes: u64) -> Option<Permit> {
        let bytes = bytes.min(self.0.total);
        let mut free = lock(&self.0.free);
        *free = free.checked_sub(bytes)?;
        Some(Permit { pool: self.0.clone(), bytes })
    }

    /// Takes `bytes`, waiting until they are free.
    pub async fn take(&self, bytes: u64) -> Permit {
        loop {
            if let Some(permit) = self.try_take(bytes) {
                return permit;
            }
            let returned = self.0.returned.listen();
            if let Some(permit) = self.try_take(bytes) {
                return permit;
            }
            returned.await;
        }
    }

    /// Bytes that are out.
    pub fn in_use(&self) -> u64 {
        self.0.total - *lock(&self.0.free)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *lock(&self.pool.free) += self.bytes;
        self.pool.returned.notify(usize::MAX);
    }
}
