//! What a Controller Memory Buffer is used for besides peers' data: submission queues, and the CPU's own accesses.

use p2plab::topology::{CmbOptions, CmbScheme, GIB, MIB, Nvme, Topology};
use p2plab_guest::protocol::Exit;
use p2plab_pcie::TlpKind;
use p2plab_tests::TestLab;
use p2plab_tests::reading::{Seen, Watch};

/// One SSD with `cmb`; the nvme driver puts queues into a CMB if `queues` says so.
fn one_ssd(name: &str, cmb: CmbOptions, queues: bool) -> Topology {
    Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).cmb_with(cmb))
        .load_module(format!("nvme use_cmb_sqes={}", u8::from(queues)))
        .build()
        .unwrap()
}

/// Writes and reads back a pattern; what was seen has been held against the model.
fn use_disk(lab: &TestLab, topology: &Topology) -> Seen {
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd0").unwrap().block_device;
    let watch = Watch::begin(lab, topology).unwrap();
    guest
        .sh(&format!(
            "p2pcopy --check --size 1MiB --chunk 64KiB --destination-offset 8MiB {disk} {disk}"
        ))
        .unwrap();
    watch.end()
}

/// Commands on I/O queues: how many, and how many of them were fetched from the controller's own CMB.
fn io_commands(seen: &Seen) -> (u64, u64) {
    let io = || seen.trace("ssd0").entries.iter().filter(|e| e.queue > 0);
    (
        io().count() as u64,
        io().filter(|e| e.fetch.internal).count() as u64,
    )
}

/// Bytes that the CPU wrote to the SSD.
fn cpu_writes(seen: &Seen) -> u64 {
    seen.traffic
        .between("cpu", "ssd0", TlpKind::MWr)
        .payload_bytes
}

/// With use_cmb_sqes=1 the CPU writes commands into the CMB, 64 bytes each, and the SSD fetches none over the bus.
#[test]
fn submission_queues_in_the_cmb() {
    let topology = one_ssd("sqes", CmbOptions::new(64 * MIB), true);
    let lab = TestLab::start("submission_queues_in_the_cmb", topology.clone());
    let seen = use_disk(&lab, &topology);
    let (commands, internal) = io_commands(&seen);
    assert!(commands >= 32);
    assert_eq!(internal, commands);
    // Beside the commands there are doorbells: 4 bytes, at most two for each command.
    let doorbells = cpu_writes(&seen) - 64 * commands;
    assert!(
        (4..=8 * commands).contains(&doorbells),
        "{doorbells} for {commands}"
    );
    lab.finish();
}

/// With use_cmb_sqes=0 the queues are in host memory, though the controller would take them.
#[test]
fn submission_queues_in_host_memory() {
    let topology = one_ssd("no-sqes", CmbOptions::new(64 * MIB), false);
    let lab = TestLab::start("submission_queues_in_host_memory", topology.clone());
    let seen = use_disk(&lab, &topology);
    let (commands, internal) = io_commands(&seen);
    assert_eq!((commands > 0, internal), (true, 0));
    assert!(
        seen.traffic
            .between("ssd0", "memory", TlpKind::MRd)
            .requested_bytes
            >= 64 * commands
    );
    assert!(cpu_writes(&seen) <= 8 * commands);
    lab.finish();
}

/// Where the CMB is mapped into the guest, the CPU's commands pass by the counters, and these say so.
#[test]
fn a_mapped_cmb_says_that_the_cpu_is_not_observed() {
    let topology = one_ssd("mapped", CmbOptions::new(64 * MIB).mapped(), true);
    let lab = TestLab::start("a_mapped_cmb", topology.clone());
    let seen = use_disk(&lab, &topology);
    let (commands, internal) = io_commands(&seen);
    assert_eq!((commands > 0, internal), (true, commands));
    assert!(cpu_writes(&seen) <= 8 * commands);
    assert!(!seen.traffic.port("ssd0").unwrap().cpu_accesses_observed);
    assert!(
        seen.traffic
            .to_string()
            .contains("CPU accesses not observed")
    );
    lab.finish();
}

/// The kernel offers CMBs of all sizes whole, and a copy passes through each.
#[test]
fn cmbs_of_all_sizes() {
    let sizes = [("ssd0", 2 * MIB), ("ssd1", 64 * MIB), ("ssd2", 512 * MIB)];
    let mut topology = Topology::builder("sizes")
        .root_port("rp0")
        .switch("sw0", "rp0", 4);
    for ((name, size), port) in sizes.into_iter().zip(0..) {
        let ssd = Nvme::memory(GIB / 4).cmb_with(CmbOptions::new(size).data_only());
        topology = topology.nvme(name, format!("sw0.{port}"), ssd);
    }
    let topology = topology.build().unwrap();
    let lab = TestLab::start("cmbs_of_all_sizes", topology.clone());
    let guest = lab.guest().unwrap();
    let ssds = sizes.map(|(name, _)| guest.nvme(name).unwrap());
    for ((ssd, (name, size)), to) in ssds.iter().zip(sizes).zip(ssds.iter().cycle().skip(1)) {
        let p2pmem = ssd.p2pmem.as_ref().unwrap();
        let folder = p2pmem.trim_end_matches("/allocate");
        let text = guest
            .sh(&format!("cat {folder}/size {folder}/available"))
            .unwrap();
        assert_eq!(text, format!("{size}\n{size}\n"), "{name}");
        let (from, to) = (&ssd.block_device, &to.block_device);
        let watch = Watch::begin(&lab, &topology).unwrap();
        guest
            .sh(&format!(
                "p2pcopy --check --size 4MiB --depth 2 --buffer {p2pmem} {from} {to}"
            ))
            .unwrap();
        watch.end();
    }
    lab.finish();
}

/// The CPU may use a mapping of the CMB like memory; what it reads and writes there crosses the switch.
#[test]
fn the_cpus_own_accesses_are_counted() {
    let topology = one_ssd("cpu", CmbOptions::new(64 * MIB).data_only(), false);
    let lab = TestLab::start("the_cpus_own_accesses_are_counted", topology.clone());
    let guest = lab.guest().unwrap();
    let buffer = guest.nvme("ssd0").unwrap().p2pmem.unwrap();
    guest
        .sh("dd if=/dev/urandom of=/from bs=4096 count=2")
        .unwrap();
    let watch = Watch::begin(&lab, &topology).unwrap();
    // Both are files in memory: the kernel copies from the one into the buffer, and from there into the other.
    guest
        .sh(&format!(
            "p2pcopy --chunk 4KiB --buffer {buffer} /from /to && cmp /from /to"
        ))
        .unwrap();
    let seen = watch.end();
    assert_eq!(seen.commands(), 0);
    assert_eq!(cpu_writes(&seen), 8192);
    let requested = |kind| seen.traffic.between("cpu", "ssd0", kind).requested_bytes;
    let loads = requested(TlpKind::MRd);
    // A load whose store then faults (the other file's page is not there yet) is done again.
    assert!((8192..=8192 + 64).contains(&loads), "{loads}");
    // The kernel may look at the SSD's config space meanwhile: that completes with data, too.
    let completed = seen.traffic.between("ssd0", "cpu", TlpKind::CplD);
    assert_eq!(completed.payload_bytes, loads + requested(TlpKind::CfgRd));
    lab.finish();
}

/// One switch with SSDs that have these CMBs; the nvme driver puts queues into every CMB that takes them.
fn with_cmbs(name: &str, cmbs: &[(&str, CmbOptions)]) -> Topology {
    let mut topology = Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .load_module("nvme use_cmb_sqes=1");
    for ((name, cmb), port) in cmbs.iter().zip(0..) {
        let ssd = Nvme::memory(GIB / 4).cmb_with(*cmb);
        topology = topology.nvme(*name, format!("sw0.{port}"), ssd);
    }
    topology.build().unwrap()
}

/// Register `name` of `ssd`, as the device model has it.
fn register(lab: &TestLab, ssd: &str, name: &str) -> u64 {
    let state = lab.devices().device(ssd).unwrap().function().dump();
    let text = state["endpoint"]["registers"][name].as_str().unwrap();
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

/// A CMB as of NVMe 1.3, without CMBMSC: Linux finds it, fetches commands from it, and copies through it from peer to
/// peer. It addresses the CMB by the addresses of the BAR, and a CMB of today by those that it has put into CMBMSC.
#[test]
fn a_cmb_of_the_older_scheme_works_alike() {
    let size = 64 * MIB;
    let old = CmbOptions::new(size).scheme(CmbScheme::V1_3);
    let topology = with_cmbs("older", &[("old", old), ("new", CmbOptions::new(size))]);
    let lab = TestLab::start("a_cmb_of_the_older_scheme", topology.clone());
    let guest = lab.guest().unwrap();
    let (old, new) = (guest.nvme("old").unwrap(), guest.nvme("new").unwrap());
    assert_eq!(register(&lab, "old", "VS"), 0x1_0300);
    // CRE and CMSE, and the base address.
    let bar =
        |name| lab.devices().device(name).unwrap().function().dump()["pcie"]["bars"][4].clone();
    assert_eq!(
        register(&lab, "new", "CMBMSC"),
        bar("new").as_u64().unwrap() | 3
    );
    assert_eq!(register(&lab, "old", "CMBMSC"), 0);
    // What Linux has read: BAR 4, of 4 units of 16 MiB (SZU 3), for everything.
    let read = |name| {
        guest
            .sh(&format!("cat /sys/class/nvme/{}/{name}", old.controller))
            .unwrap()
    };
    assert_eq!(
        (read("cmbloc").trim(), read("cmbsz").trim()),
        ("4", "17183")
    );

    for (from, to) in [(&old, &new), (&new, &old)] {
        let watch = Watch::begin(&lab, &topology).unwrap();
        let buffer = old.p2pmem.as_ref().unwrap();
        let (from, to) = (&from.block_device, &to.block_device);
        guest
            .sh(&format!(
                "p2pcopy --check --size 1MiB --chunk 64KiB --buffer {buffer} {from} {to}"
            ))
            .unwrap();
        let seen = watch.end();
        for name in ["old", "new"] {
            let io = || seen.trace(name).entries.iter().filter(|e| e.queue > 0);
            assert!(io().count() > 0 && io().all(|e| e.fetch.internal), "{name}");
        }
        // What the other SSD moved between its blocks and the CMB.
        let reads = seen
            .traffic
            .between("old", "new", TlpKind::CplD)
            .payload_bytes;
        let writes = seen
            .traffic
            .between("new", "old", TlpKind::MWr)
            .payload_bytes;
        assert_eq!(reads + writes, MIB);
    }
    lab.finish();
}

/// What Linux makes of a CMB that does not take everything: queues go where SQS says; without lists nothing is missing,
/// as Linux keeps these in host memory; and a CMB that lacks one direction of data is not offered to other drivers
/// (`published`). User space may have it nevertheless: its own SSD then refuses what it has said it cannot do, with the
/// status that the specification names, while peers reach it as they reach any memory.
#[test]
fn what_linux_makes_of_a_cmb_that_lacks_something() {
    let with = |change: fn(&mut CmbOptions)| {
        let mut cmb = CmbOptions::new(64 * MIB);
        change(&mut cmb);
        cmb
    };
    let cmbs = [
        ("no-queues", with(|cmb| cmb.submission_queues = false)),
        (
            "no-lists",
            with(|cmb| (cmb.lists, cmb.completion_queues) = (false, false)),
        ),
        ("no-reads", with(|cmb| cmb.read_data = false)),
        ("no-writes", with(|cmb| cmb.write_data = false)),
    ];
    let topology = with_cmbs("lacking", &cmbs);
    let lab = TestLab::start("a_cmb_that_lacks_something", topology.clone());
    let guest = lab.guest().unwrap();
    let ssds = cmbs.map(|(name, _)| guest.nvme(name).unwrap());
    let peers = ssds.iter().cycle().skip(1);
    let watch = Watch::begin(&lab, &topology).unwrap();
    for ssd in &ssds {
        let disk = &ssd.block_device;
        guest
            .sh(&format!(
                "p2pcopy --check --size 1MiB --destination-offset 8MiB {disk} {disk}"
            ))
            .unwrap();
    }
    let seen = watch.end();
    for ((name, cmb), (ssd, peer)) in cmbs.iter().zip(ssds.iter().zip(peers)) {
        let io = || seen.trace(name).entries.iter().filter(|e| e.queue > 0);
        assert!(
            io().count() > 0 && io().all(|e| e.fetch.internal == cmb.submission_queues),
            "{name}"
        );
        let buffer = ssd.p2pmem.as_ref().unwrap();
        let published = guest
            .sh(&format!("cat {}", buffer.replace("allocate", "published")))
            .unwrap();
        assert_eq!(
            published.trim() == "1",
            cmb.read_data && cmb.write_data,
            "{name}"
        );

        let passes = |options: &str, disk: &str| {
            let line = format!(
                "p2pcopy --size 256KiB --chunk 64KiB {options} --buffer {buffer} {disk} {disk}"
            );
            let output = guest.try_sh(&line).unwrap();
            let refused = output.error_text().contains("Input/output error");
            assert_eq!(
                output.status,
                Exit::Status(refused.into()),
                "{name}: {output:?}"
            );
            !refused
        };
        for (options, allowed) in [
            ("--skip-write", cmb.read_data),
            ("--skip-read", cmb.write_data),
        ] {
            assert_eq!(
                passes(options, &ssd.block_device),
                allowed,
                "{name}: {options}"
            );
            assert!(passes(options, &peer.block_device), "{name}: {options}");
        }
    }
    // Invalid Use of Controller Memory Buffer, one for each direction.
    let said = guest
        .sh("dmesg | grep -c 'I/O Error (sct 0x0 / sc 0x12)'")
        .unwrap();
    assert_eq!(said.trim(), "2");
    lab.finish();
}
