//! What every layer of Infill shares: extents, request context, limits, buffers and errors.
//!
//! This crate does no I/O and knows no runtime, format or protocol. Offsets and lengths that cross a trait
//! boundary are plain `u64` bytes; formats wrap them in newtypes of their own spaces.
#![forbid(unsafe_code)]

mod base64;
mod buffer;
mod context;
mod error;
mod extent;
mod faults;
mod limits;
mod throttle;

pub use base64::from_base64;
pub use buffer::{Gather, aligned_buffer, is_zero, zero_bytes};
pub use context::{Class, Ctx, DetectZeroes, DiscardMode, WriteFlags, ZeroFlags};
pub use error::{CreateError, ErrorKind, IoError, IoResult, OpenError};
pub use extent::{Extent, ExtentKind, Extents, push_extent};
pub use faults::{FaultEvent, FaultyRequest, InjectError, SetState};
pub use limits::{Limits, MAX_TRANSFER_BYTES, align_down, align_up, div_ceil, range_end, whole_units};
pub use throttle::{ThrottleKind, ThrottleLimits, ThrottleRate};
