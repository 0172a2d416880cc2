//! The one place from which synchronisation primitives come, so that shuttle can take their place (feature `shuttle`,
//! for tests alone).
//!
//! Locks guard memory only and are never held across an await (I1).

#[cfg(feature = "shuttle")]
pub use shuttle::{
    hint,
    sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak, atomic},
};
#[cfg(not(feature = "shuttle"))]
pub use std::{
    hint,
    sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak, atomic},
};

/// Locks a mutex; what a panicking thread left behind is used as it is (every critical section here is panic-free
/// or leaves its value valid).
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Locks for reading, as [`lock`].
pub fn read<T>(shared: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    shared.read().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Locks for writing, as [`lock`].
pub fn write<T>(shared: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    shared.write().unwrap_or_else(|poisoned| poisoned.into_inner())
}
