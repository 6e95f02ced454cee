//! fio with /dev/p2pmemN as its memory: several jobs, each with memory of its own, every block verified.

use std::time::Duration;

use p2plab::topology::{CmbOptions, MIB, Nvme};
use p2plab_pcie::TlpKind;
use p2plab_tests::p2pmem::{complaints, node, start};
use p2plab_tests::tools::{machine, number, parse};

/// All that one run of fio may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(100);

/// Four jobs, in processes of their own, write blocks of mixed sizes in random order and read them back through the
/// memory of ssd0, by the device's two names. None of the data crosses the upstream port.
#[test]
fn jobs_with_memory_of_their_own_verify() {
    let name = "p2pmem_jobs_with_memory_of_their_own";
    let cmb = CmbOptions::new(64 * MIB).data_only().mapped();
    let ssds = [
        Nvme::memory(128 * MIB).cmb_with(cmb),
        Nvme::memory(128 * MIB),
    ];
    let lab = start(name, machine("p2pmem-fio", ssds), &["ssd0", "ssd1"]);
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd1").unwrap().block_device;
    let by_address = node(&guest, "ssd0", 4).unwrap();
    let before = lab.traffic();
    for (at, memory) in ["/dev/p2pmem0", &by_address].into_iter().enumerate() {
        let line = format!(
            // Not --thread: then fio 3.39 frees the file's name once for each job.
            "fio --output-format=json --group_reporting --ioengine=libaio --direct=1 --verify=crc32c \
             --verify_fatal=1 --randrepeat=1 --randseed={at} --iomem=mmapshared:{memory} --rw=randwrite \
             --bsrange=4k-128k --size=8m --offset_increment=16m --numjobs=4 --iodepth=8 --name=p2pmem --filename={disk}"
        );
        let text = guest.system_within(&line, DEADLINE).unwrap();
        let report = parse(&text);
        let job = &report["jobs"][0];
        assert_eq!(number(&job["error"]), 0, "{text}");
        assert_eq!(number(&job["write"]["io_bytes"]), 32 * MIB, "{text}");
        assert_eq!(number(&job["read"]["io_bytes"]), 32 * MIB, "{text}");
    }
    let traffic = lab.traffic().since(&before);
    let fetched = traffic.between("ssd1", "ssd0", TlpKind::MRd);
    let stored = traffic.between("ssd1", "ssd0", TlpKind::MWr);
    assert_eq!(fetched.requested_bytes, 64 * MIB, "{traffic}");
    assert_eq!(stored.payload_bytes, 64 * MIB, "{traffic}");
    assert!(traffic.upstream_payload_bytes() < 2 * MIB, "{traffic}");
    // Each job had its own memory, and all of it is free again.
    let stats = guest
        .sh("cat /sys/kernel/debug/p2pmem/p2pmem0/stats")
        .unwrap();
    assert!(stats.contains("allocations 8\n"), "{stats}");
    assert!(stats.contains(&format!("free {}\n", 64 * MIB)), "{stats}");
    assert_eq!(complaints(&guest, &[]).unwrap(), Vec::<String>::new());
    lab.finish();
}
