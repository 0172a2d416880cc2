//! Real machines over our disks, each with a guest that the host can judge. One program, so that they run beside each
//! other.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/guest.rs"]
mod guest;
mod libvirt;
mod live;
mod moving;
mod net;
#[path = "../common/qmp.rs"]
mod qmp;
