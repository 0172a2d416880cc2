//! What clients that were written for QEMU find here.

#[path = "../common/mod.rs"]
mod common;
mod qemu_qmp;
#[path = "../common/qmp.rs"]
mod qmp;
mod schema;
