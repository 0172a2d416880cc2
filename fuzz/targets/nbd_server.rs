//! What a peer sends to the NBD server.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infill_nbd::fuzz_server(data));
