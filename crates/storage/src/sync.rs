//! The one place from which synchronisation primitives come, so that shuttle can take their place.
//!
//! Locks guard memory only and are never held across an await (I1).

pub use std::sync::{Arc, Mutex, MutexGuard, RwLock, Weak, atomic};

/// Locks a mutex; what a panicking thread left behind is used as it is (every critical section here is panic-free
/// or leaves its value valid).
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
