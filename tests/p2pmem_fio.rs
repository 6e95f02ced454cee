//! fio with peer memory as its buffers, of every provider and by both kinds of node: several jobs, each with memory of its
//! own, every block verified. And it finds what is not right.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use p2plab::lab::Guest;
use p2plab::topology::{CmbOptions, Fault, FaultEffect, MIB, Nvme, Nvram, PmrOptions};
use p2plab::wait::HOTPLUG;
use p2plab_nvme::spec::command::io;
use p2plab_pcie::TlpKind;
use p2plab_tests::p2pmem::{complaints, start};
use p2plab_tests::tools::{machine, number, parse};

use crate::disks::medium;

/// All that one run of fio may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(100);
/// What every job has: asynchronous direct I/O, each block with a checksum, the first wrong one ends the run. Not
/// --thread: then fio 3.39 frees the file's name once for each job.
const VERIFY: &str = "--ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --randrepeat=1";
/// Bytes of each peer memory.
const MEMORY: u64 = 64 * MIB;
/// Jobs that allocate memory in one run.
const JOBS: u64 = 5;

/// The node that any publisher has, of endpoint `name`.
fn allocate(guest: &Guest<'_>, name: &str) -> String {
    let address = guest.pci_address(name).unwrap();
    format!("/sys/bus/pci/devices/{address}/p2pmem/allocate")
}

/// What p2pmem calls the memory of endpoint `name`, once it knows of it: `p2pmemN`.
fn device(guest: &Guest<'_>, name: &str) -> String {
    let address = guest.pci_address(name).unwrap();
    let line = format!("ls /sys/bus/pci/devices/{address}/p2pmem_dev");
    guest.wait_until("its device", &line, HOTPLUG).unwrap();
    guest.sh(&line).unwrap().trim().to_owned()
}

/// Three jobs with blocks of mixed sizes and two with small ones, in processes of their own, write in random order and
/// read back through the memory of a CMB, of a PMR and of an NVRAM card; by the device and by `p2pmem/allocate`. All of the
/// data passes between disk and memory once each way, and none of it crosses the upstream port.
#[test]
fn jobs_verify_through_every_memory_by_both_nodes() {
    let name = "p2pmem_jobs_verify_through_every_memory";
    let ssds = [
        Nvme::memory(64 * MIB).cmb_with(CmbOptions::new(MEMORY).data_only().mapped()),
        Nvme::memory(64 * MIB).pmr(PmrOptions::memory(MEMORY).mapped()),
        Nvme::memory(128 * MIB),
    ];
    let topology = machine("p2pmem-fio", ssds)
        .nvram("nv0", "sw0.3", Nvram::memory(MEMORY).mapped())
        .own_module("nvme");
    let lab = start(name, topology, &["ssd0", "ssd1", "ssd2"]);
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd2").unwrap().block_device;
    for owner in ["ssd0", "ssd1", "nv0"] {
        let number = device(&guest, owner);
        let device = format!("/dev/{number}");
        for memory in [&device, &allocate(&guest, owner)] {
            let before = lab.traffic();
            let (written, read) = jobs(&guest, memory, &disk);
            assert_eq!((written, read), (16 * MIB, 16 * MIB), "{memory}");
            let traffic = lab.traffic().since(&before);
            let fetched = traffic.between("ssd2", owner, TlpKind::MRd);
            let stored = traffic.between("ssd2", owner, TlpKind::MWr);
            assert_eq!(fetched.requested_bytes, written, "{traffic}");
            assert_eq!(stored.payload_bytes, read, "{traffic}");
            assert!(traffic.upstream_payload_bytes() < MIB, "{traffic}");
        }
        // Each job had its own memory, and all of it is free again.
        let line = format!("cat /sys/kernel/debug/p2pmem/{number}/stats");
        let stats = guest.sh(&line).unwrap();
        assert!(
            stats.contains(&format!("allocations {JOBS}\n")),
            "{owner}: {stats}"
        );
        assert!(stats.contains(&format!("free {MEMORY}\n")), "{stats}");
    }
    assert_eq!(complaints(&guest, &[]).unwrap(), Vec::<String>::new());
    lab.finish();
}

/// Runs [`JOBS`] jobs of two kinds at once on `disk`; bytes written, and bytes read and found right.
fn jobs(guest: &Guest<'_>, memory: &str, disk: &str) -> (u64, u64) {
    let each = format!("{VERIFY} --iomem=mmapshared:{memory} --rw=randwrite --filename={disk}");
    let line = format!(
        "fio --output-format=json \
         --name=mixed {each} --bsrange=4k-128k --size=4m --offset_increment=8m --numjobs=3 --iodepth=8 \
         --name=small {each} --bs=4k --offset=64m --size=2m --offset_increment=4m --numjobs=2 --iodepth=16"
    );
    let text = guest.system_within(&line, DEADLINE).unwrap();
    let report = parse(&text);
    let jobs = report["jobs"].as_array().unwrap();
    assert_eq!(jobs.len() as u64, JOBS, "{text}");
    assert!(jobs.iter().all(|job| number(&job["error"]) == 0), "{text}");
    let sum = |kind: &str| jobs.iter().map(|job| number(&job[kind]["io_bytes"])).sum();
    (sum("write"), sum("read"))
}

/// A byte that changes on the disk between a job's write and its read, in the same run, ends the run, and fio names the
/// block; by both kinds of node. Unharmed, the same run passes.
#[test]
fn a_byte_that_changes_under_fio_is_found() {
    /// In the range of the third job, and in no block's header: blocks begin at multiples of 4 KiB.
    const PLACE: u64 = 33 * MIB + 2048;
    /// Far longer than it takes to see the write.
    const AWHILE: Duration = Duration::from_secs(3);
    let name = "p2pmem_a_byte_that_changes_under_fio";
    let cmb = CmbOptions::new(MEMORY).data_only().mapped();
    let ssds = [
        Nvme::memory(64 * MIB).cmb_with(cmb),
        Nvme::memory(128 * MIB),
    ];
    let lab = start(name, machine("p2pmem-fio", ssds), &["ssd0", "ssd1"]);
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd1").unwrap().block_device;
    let file = medium(&lab, "ssd1");
    let controller = lab.devices().device("ssd1").unwrap().nvme().unwrap();
    for memory in ["/dev/p2pmem0", &allocate(&guest, "ssd0")] {
        let line = format!(
            "fio {VERIFY} --iomem=mmapshared:{memory} --rw=randwrite --bsrange=4k-128k --size=2m \
             --offset_increment=16m --numjobs=4 --iodepth=8 --name=p2pmem --filename={disk}"
        );
        guest.system_within(&line, DEADLINE).unwrap();

        file.write_all_at(&[0; 512], PLACE).unwrap();
        // The job's read of the block waits until the byte has changed.
        let late = Fault {
            opcode: Some(io::READ),
            lba: Some(PLACE / 512..=PLACE / 512),
            count: Some(1),
            ..Fault::new(FaultEffect::Delay(AWHILE))
        };
        let late = controller.faults().add(late);
        let output = std::thread::scope(|threads| {
            let changed = threads.spawn(|| change_when_written(&file, PLACE));
            let output = guest.try_system(&line).unwrap();
            changed.join().unwrap();
            output
        });
        assert_eq!(
            controller.faults().remove(late),
            Some(1),
            "nothing was late"
        );
        assert!(!output.status.success(), "{}", output.text());
        let said = output.text() + &output.error_text();
        assert_eq!(said.matches("verify failed at file").count(), 1, "{said}");
        let of = |what: &str| {
            let (_, rest) = said.split_once(what)?;
            rest.split(|c: char| !c.is_ascii_digit())
                .next()?
                .parse()
                .ok()
        };
        let (start, length): (u64, u64) = (of(" offset ").unwrap(), of(", length ").unwrap());
        assert!((start..start + length).contains(&PLACE), "{said}");
    }
    lab.finish();
}

/// Turns the first byte at `place` over as soon as something was written there.
fn change_when_written(file: &File, place: u64) {
    let until = Instant::now() + DEADLINE;
    let mut bytes = [0; 8];
    while bytes == [0; 8] {
        assert!(Instant::now() < until, "nothing was written");
        std::thread::sleep(Duration::from_millis(1));
        file.read_exact_at(&mut bytes, place).unwrap();
    }
    file.write_all_at(&[!bytes[0]], place).unwrap();
}
