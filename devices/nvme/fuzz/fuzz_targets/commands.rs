#![no_main]
//! Commands on admin and I/O queues; see `p2plab_nvme_fuzz::commands`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| p2plab_nvme_fuzz::commands::run(data));
