//! What a peer sends to the NBD client.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| infill_nbd::fuzz_client(data));
