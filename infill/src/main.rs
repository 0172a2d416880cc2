//! The `infill` program.
fn main() {}
