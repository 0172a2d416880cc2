//! An explicit-state model of a migration, over the machines themselves.
//!
//! Shared by the test `model` and the example `model` (deep runs), of which each uses a part.
#![allow(dead_code)]

pub mod explore;
pub mod hosts;
pub mod promises;
pub mod runs;
pub mod world;
