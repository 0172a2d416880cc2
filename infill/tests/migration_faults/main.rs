//! What may go wrong while disks change hosts: hosts that are away, links that lose and damage, deaths at every step.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/hosts.rs"]
mod hosts;
#[path = "../common/qmp.rs"]
mod qmp;

mod away;
mod links;

mod measures;
mod medium;
mod site;
mod soak;
