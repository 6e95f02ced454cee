#![no_main]
//! Accesses to BARs and config space, and the life of a function; see `p2plab_nvme_fuzz::registers`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| p2plab_nvme_fuzz::registers::run(data));
