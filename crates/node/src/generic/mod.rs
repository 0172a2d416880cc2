//! Operations that work between any nodes: a driver calls them or defaults to them, and overrides only where it has
//! something better.

mod extents;
mod populate;
mod stream;

pub use extents::{MappedExtent, chain_extents, chain_map};
pub use populate::{LocalWrite, populate};
pub use stream::{FillPiece, StreamCursor};
