mod nvram;

use std::path::Path;
use std::time::Duration;

use p2plab_nvme::spec::status::Status;
use proptest::prelude::*;

use super::*;

fn read(text: &str) -> Result<Topology, TopologyError> {
    Topology::from_toml_text(text, Path::new("lab.toml"))
}

fn complaint(text: &str) -> String {
    read(text).expect_err(text).to_string()
}

const GOOD: &str = r#"
name = "one"
[[root_port]]
name = "rp0"
[[switch]]
name = "sw0"
below = "rp0"
ports = ["sw0.0", "sw0.1"]
[[endpoint]]
name = "ssd0"
port = "sw0.0"
device = "nvme"
size = "1GiB"
cmb = { size = "64MiB", cpu = "mapped" }
"#;

#[test]
fn file_and_builder_say_the_same() {
    let built = Topology::builder("one")
        .root_port("rp0")
        .switch("sw0", "rp0", 2)
        .nvme(
            "ssd0",
            "sw0.0",
            Nvme::memory(GIB).cmb_with(CmbOptions::new(64 * MIB).mapped()),
        );
    assert_eq!(read(GOOD).unwrap(), built.build().unwrap());
}

#[test]
fn the_examples_are_good() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("topologies");
    let mut names = Vec::new();
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            let topology = Topology::from_toml(&path).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(Some(&*topology.name), path.file_stem().unwrap().to_str());
            names.push(topology.name);
        }
    }
    names.sort();
    assert_eq!(
        names,
        [
            "cascaded",
            "nvme-cmb-copy",
            "nvram",
            "one-switch",
            "pmr",
            "tools",
            "two-root-ports"
        ]
    );
}

/// Each mistake, made in the good file, with what must be said of it.
#[test]
fn mistakes_are_named_with_their_place_and_their_cure() {
    for (old, new, said) in [
        (
            "below",
            "belwo",
            "lab.toml:7:1: a switch has no field `belwo`; did you mean `below`?",
        ),
        (
            "\"nvme\"",
            "\"nvm\"",
            "lab.toml:12:10: `nvm` is not a value of `device`; did you mean `nvme`",
        ),
        ("\"mapped\"", "\"x\"", "valid are `trapped`, `mapped`"),
        (
            "size = \"1GiB\"\n",
            "",
            "lab.toml:9:1: an nvme endpoint needs the field `size`",
        ),
        (
            "\"1GiB\"",
            "\"1GB\"",
            "lab.toml:13:8: `size`: `1GB` is not a size",
        ),
        (
            "\"1GiB\"",
            "true",
            "`size` must be a size such as \"64MiB\" or a number of bytes, not boolean",
        ),
        (
            "\"64MiB\"",
            "\"65MiB\"",
            "`cmb` is 65MiB, it must be a power of two, such as 128MiB",
        ),
        (
            "\"64MiB\"",
            "\"1MiB\"",
            "`cmb` is 1MiB, it must be 2MiB to 256GiB",
        ),
        (
            "\"64MiB\"",
            "\"2GiB\"",
            "set `window = \"2GiB\"` under [guest]",
        ),
        (
            "port = \"sw0.0\"",
            "port = \"sw0.7\"",
            "port `sw0.7`, which does not exist; did you mean",
        ),
        (
            "port = \"sw0.0\"",
            "port = \"rp0\"",
            "lab.toml:11:8: port `rp0` holds `sw0` already",
        ),
        (
            "\"ssd0\"",
            "\"rp0\"",
            "lab.toml:10:8: the name `rp0` is taken by a root port",
        ),
        (
            "below = \"rp0\"",
            "below = \"sw0.1\"",
            "switch `sw0` hangs below itself",
        ),
        ("\"ssd0\"", "\"s d\"", "`s d` is not a name"),
        ("[[switch]]", "[switch]", "not the single table [switch]"),
        (
            "name = \"one\"",
            "name = one",
            "lab.toml:2:8: this is not TOML",
        ),
        ("name = \"one\"", "", "a topology needs the field `name`"),
        (
            "name = \"one\"",
            "name = \"one\"\nguest = { memory = \"1MiB\" }",
            "it must be 128MiB to 1TiB",
        ),
        (
            "name = \"one\"",
            "name = \"one\"\nguest = { cpus = 0 }",
            "lab.toml:3:18: `cpus` is 0, it must be 1 to 64",
        ),
        (
            "name = \"one\"",
            "name = \"one\"\nguest = { modules = \"x\" }",
            "`modules` needs `kernel`",
        ),
        (
            "size = \"1GiB\"",
            "size = \"1GiB\"\ncreate = true",
            "`create` needs `file`",
        ),
    ] {
        assert!(GOOD.contains(old), "{old}");
        let message = complaint(&GOOD.replacen(old, new, 1));
        assert!(message.contains(said), "{message}\nlacks\n{said}");
        assert!(!message.contains('\n'), "{message}");
    }
}

const FULL: &str = r#"
name = "full"
[[root_port]]
name = "rp0"
[[endpoint]]
name = "ssd0"
port = "rp0"
device = "nvme"
namespaces = [
    { size = "1GiB" },
    { size = "2GiB", file = "/disk", create = true, block_size = 4096, read_only = true },
    { size = "3GiB", null = true, metadata = "protection" },
]
unallocated = "4GiB"
write_cache = "32MiB"
write_cache_seed = 7
cmb = { size = "64MiB", offset = "2MiB", cqs = false, wds = false, cdpcils = false }
pmr = { size = "16MiB", file = "/pmr", create = true, cpu = "mapped", ready_after = "250ms", pmrebs = "64KiB", pmrswtp = "1GiB" }
faults = [
    { opcode = "write", lba = [0, 99], status = "write-fault", count = 3, after = 10 },
    { queue = "admin", opcode = "identify", delay = "2s" },
    { queue = 2, nsid = 2, opcode = 0x19, effect = "power-cut" },
    { status = 0x4002 },
]
"#;

#[test]
fn every_option_of_an_ssd_can_be_said_in_both_forms() {
    let mut cmb = CmbOptions::new(64 * MIB);
    (cmb.offset, cmb.completion_queues) = (2 * MIB, false);
    (cmb.write_data, cmb.independent_lists) = (false, false);
    let fault = |effect, change: fn(&mut Fault)| {
        let mut fault = Fault::new(effect);
        change(&mut fault);
        fault
    };
    let ssd = Nvme::memory(GIB)
        .namespace(NamespaceOptions::file("/disk", 2 * GIB))
        .create()
        .block_size(4096)
        .read_only()
        .namespace(NamespaceOptions::null(3 * GIB))
        .metadata(Metadata::Protection)
        .unallocated(4 * GIB)
        .write_cache_with(WriteCacheConfig {
            size: 32 * MIB,
            survivors: Some(7),
        })
        .cmb_with(cmb)
        .pmr(PmrOptions {
            elasticity_buffer: 64 * KIB,
            sustained_throughput: GIB,
            ..PmrOptions::file("/pmr", 16 * MIB)
                .mapped()
                .ready_after(Duration::from_millis(250))
        })
        .fault(fault(FaultEffect::Status(Status::WRITE_FAULT), |f| {
            (f.opcode, f.lba) = (Some(1), Some(0..=99));
            (f.count, f.after) = (Some(3), 10);
        }))
        .fault(fault(FaultEffect::Delay(Duration::from_secs(2)), |f| {
            (f.queue, f.opcode) = (Some(0), Some(6));
        }))
        .fault(fault(FaultEffect::PowerCut, |f| {
            (f.queue, f.nsid, f.opcode) = (Some(2), Some(2), Some(0x19));
        }))
        .fault(Fault::new(FaultEffect::Status(Status::INVALID_FIELD)));
    let built = Topology::builder("full")
        .root_port("rp0")
        .nvme("ssd0", "rp0", ssd)
        .build()
        .unwrap();
    assert_eq!(read(FULL).unwrap(), built);
    assert_eq!(read(&built.to_toml()).unwrap(), built);
}

/// Mistakes in the options of an SSD, as above.
#[test]
fn mistakes_in_an_ssd_are_named_with_their_place_and_their_cure() {
    for (old, new, said) in [
        (
            "device = \"nvme\"",
            "device = \"nvme\"\nsize = \"1GiB\"",
            "lab.toml:9:8: `size` and `namespaces` do not go together",
        ),
        (
            "read_only = true",
            "readonly = true",
            "lab.toml:11:72: a namespace has no field `readonly`; did you mean `read_only`?",
        ),
        (
            "block_size = 4096",
            "block_size = 1024",
            "`1024` is not a value of `block_size`; valid are 512 and 4096",
        ),
        (
            "\"1GiB\" },",
            "\"1KiB\" },",
            "`size` is 1KiB, it must be 1MiB to 1024TiB",
        ),
        (
            "\"4GiB\"",
            "\"1025TiB\"",
            "lab.toml:14:15: `unallocated` is 1025TiB, it must be 0 to 1024TiB",
        ),
        (
            "metadata = \"protection\"",
            "metadata = \"pi\"",
            "lab.toml:12:46: `pi` is not a value of `metadata`; valid are `none`, `plain`",
        ),
        (
            "null = true",
            "null = true, file = \"x\"",
            "lab.toml:12:29: `null` and `file` do not go together",
        ),
        (
            "\"32MiB\"",
            "\"4KiB\"",
            "lab.toml:15:15: `write_cache` is 4KiB, it must be 64KiB to 16GiB",
        ),
        (
            "write_cache = \"32MiB\"\n",
            "",
            "`write_cache_seed` needs `write_cache`",
        ),
        (
            "write_cache_seed = 7",
            "write_cache_seed = -7",
            "`write_cache_seed` must be a small whole number",
        ),
        (
            "\"64KiB\"",
            "\"1073741825\"",
            "`pmrebs` = `1073741825`: use fewer digits",
        ),
        (
            "pmrswtp = \"1GiB\"",
            "pmrswtp = \"1GiB/s\"",
            "`pmrswtp`: `1GiB/s` is not a size",
        ),
        (
            "file = \"/pmr\", create = true",
            "null = true",
            "a pmr has no field `null`",
        ),
        (
            "offset = \"2MiB\"",
            "offset = \"3MiB\"",
            "`offset` is 3MiB, it must be a multiple of 2MiB",
        ),
        (
            "cdpcils",
            "cdpcil",
            "a cmb has no field `cdpcil`; did you mean `cdpcils`",
        ),
        ("wds = false", "scheme = \"1.3\"", "NVMe 1.3 has no PMR"),
        (
            "wds = false",
            "scheme = \"1.2\"",
            "`1.2` is not a value of `scheme`; did you mean",
        ),
        (
            "size = \"16MiB\"",
            "size = \"17MiB\"",
            "`pmr` is 17MiB, it must be a power of two, such as 32MiB",
        ),
        (
            "size = \"16MiB\"",
            "size = \"1GiB\"",
            "set `window = \"2GiB\"` under [guest]",
        ),
        ("\"250ms\"", "\"250\"", "`ready_after`: `250` is not a time"),
        (
            "\"250ms\"",
            "\"121s\"",
            "`ready_after` is 121s, it must be 0s to 120s",
        ),
        (
            "\"write\"",
            "\"wite\"",
            "lab.toml:20:16: `wite` is not a value of `opcode`; did you mean `write`",
        ),
        (
            "\"write-fault\"",
            "\"write-fail\"",
            "`write-fail` is not a value of `status`; did you mean `write-fault`",
        ),
        (
            "\"power-cut\"",
            "\"cut\"",
            "valid are `media-error`, `drop-completion`",
        ),
        (
            "opcode = 0x19",
            "opcode = 0x119",
            "`opcode` must be one of its names or a valid code",
        ),
        (
            "0x4002",
            "0",
            "`status` must be one of its names or a valid code",
        ),
        (
            "status = 0x4002",
            "nsid = 1",
            "lab.toml:23:5: a fault needs the field `status`",
        ),
        (
            "status = 0x4002",
            "status = 1, delay = \"1s\"",
            "`delay` and `status` do not go together",
        ),
        (
            "[0, 99]",
            "[99]",
            "`lba` must be the first and the last block, as [0, 99]",
        ),
        (
            "[0, 99]",
            "[99, 0]",
            "`lba` = `[99, 0]`: the last block is before the first",
        ),
        (
            "\"admin\"",
            "\"io\"",
            "`queue` must be the number of an I/O queue or \"admin\"",
        ),
        (
            "queue = 2",
            "queue = 9",
            "lab.toml:19:10: `queue` is 9, it must be 0 to 8",
        ),
        ("nsid = 2", "nsid = 4", "`nsid` is 4, it must be 1 to 3"),
        (
            "opcode = \"identify\"",
            "lba = [0, 1]",
            "`lba` and `queue` do not go together",
        ),
        ("faults = [", "faults = 1 # [", "`faults` must be"),
    ] {
        assert!(FULL.contains(old), "{old}");
        let text = FULL.replacen(old, new, 1);
        let text = match text.split_once("1 # [") {
            Some((head, _)) => format!("{head}1\n"),
            None => text,
        };
        let message = complaint(&text);
        assert!(message.contains(said), "{message}\nlacks\n{said}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn limits_hold() {
    let builder = |ports| {
        Topology::builder("t")
            .root_port("rp0")
            .switch("sw0", "rp0", ports)
    };
    assert!(builder(32).build().is_ok());
    assert!(matches!(
        *builder(33).build().unwrap_err().fault,
        TopologyFault::BadCount { .. }
    ));
    assert!(matches!(
        *builder(0).build().unwrap_err().fault,
        TopologyFault::BadCount { .. }
    ));
    let wide = builder(32).window(64 * GIB).build().unwrap_err().fault;
    assert!(
        matches!(*wide, TopologyFault::WindowsTooLarge { .. }),
        "{wide}"
    );
    let mut deep = builder(1);
    for level in 1..=4 {
        deep = deep.switch(format!("sw{level}"), format!("sw{}.0", level - 1), 1);
    }
    let deep = deep.build().unwrap_err().fault;
    assert!(
        matches!(*deep, TopologyFault::TooDeep { depth: 5, .. }),
        "{deep}"
    );
    assert!(Topology::builder("t").build().is_err());
}

#[test]
fn modules_may_have_parameters() {
    let with = |module: &str| {
        Topology::builder("modules")
            .root_port("rp0")
            .load_module(module)
            .build()
    };
    let own = |module: &str| {
        let builder = Topology::builder("modules").root_port("rp0");
        builder.own_module(module).build()
    };
    with("nvmet").unwrap();
    let topology = with("nvme use_cmb_sqes=0 io_queue_depth=32").unwrap();
    assert_eq!(read(&topology.to_toml()).unwrap(), topology);
    let topology = own("nvme use_pmr=0").unwrap();
    assert_eq!(topology.guest.own_modules, ["nvme use_pmr=0"]);
    assert_eq!(read(&topology.to_toml()).unwrap(), topology);
    for bad in ["", " a=1", "../nvme", "nvme\na=1"] {
        assert!(with(bad).is_err() && own(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn packages_are_names_and_need_the_system_image() {
    let with = |name: &str| {
        let builder = Topology::builder("packages").root_port("rp0");
        builder.package(name).build()
    };
    let topology = with("libstdc++6").unwrap();
    assert!(topology.guest.system);
    assert_eq!(read(&topology.to_toml()).unwrap(), topology);
    for bad in [
        "", "a", "-o", "--help", "strace-", "a b", "fio=1", "fio/sid", "Fio", "a;b",
    ] {
        assert!(with(bad).is_err(), "{bad:?}");
    }
    let packages = "name = \"one\"\nguest = { packages = [\"gdb\"] }";
    assert_eq!(
        complaint(&GOOD.replacen("name = \"one\"", packages, 1)),
        "lab.toml:3:22: `packages` needs `system = true`, too"
    );
}

#[test]
fn paths_are_relative_to_the_file() {
    let text = GOOD.replace("size = \"1GiB\"", "size = \"1GiB\"\nfile = \"disk\"");
    let topology = Topology::from_toml_text(&text, Path::new("/labs/lab.toml")).unwrap();
    let DeviceOptions::Nvme(options) = &topology.endpoints[0].device else {
        panic!("{topology:?}");
    };
    let path = PathBuf::from("/labs/disk");
    assert_eq!(
        options.namespaces[0].backing,
        Backing::File {
            path,
            create: false
        }
    );
}

fn any_backing() -> impl Strategy<Value = Backing> {
    prop_oneof![
        Just(Backing::Memory),
        ("/[^/\0]{1,20}", any::<bool>()).prop_map(|(path, create)| Backing::File {
            path: path.into(),
            create
        }),
    ]
}

fn any_namespace() -> impl Strategy<Value = NamespaceOptions> {
    let block_size = prop_oneof![Just(512), Just(4096)];
    let metadata = prop_oneof![
        Just(Metadata::None),
        Just(Metadata::Plain),
        Just(Metadata::Protection)
    ];
    let backing = prop_oneof![any_backing(), Just(Backing::Null)];
    (
        256u64..1 << 20,
        backing,
        any::<bool>(),
        block_size,
        metadata,
    )
        .prop_map(
            |(blocks, backing, read_only, block_size, metadata)| NamespaceOptions {
                size: blocks * 4096,
                backing,
                read_only,
                block_size,
                metadata,
            },
        )
}

fn any_cmb() -> impl Strategy<Value = CmbOptions> {
    (21u32..28, 0u64..10, any::<[bool; 8]>()).prop_map(|(shift, offset, flags)| {
        let [mapped, sqs, cqs, lists, rds, wds, mixed, independent] = flags;
        let cmb = CmbOptions {
            offset: offset * 2 * MIB,
            submission_queues: sqs,
            completion_queues: cqs,
            lists,
            read_data: rds,
            write_data: wds,
            mixed_lists: mixed,
            independent_lists: independent,
            ..CmbOptions::new(1 << shift)
        };
        if mapped { cmb.mapped() } else { cmb }
    })
}

fn any_pmr() -> impl Strategy<Value = PmrOptions> {
    let time = (0u64..120_000_000_000).prop_map(Duration::from_nanos);
    let scaled = || (0u64..1 << 24, 0u32..=3).prop_map(|(value, unit)| value << (10 * unit));
    let claims = (scaled(), scaled());
    (21u32..28, any_backing(), any::<[bool; 3]>(), time, claims).prop_map(
        |(shift, backing, [mapped, rds, wds], time, (elasticity_buffer, sustained_throughput))| {
            let pmr = PmrOptions {
                backing,
                elasticity_buffer,
                sustained_throughput,
                read_data: rds,
                write_data: wds,
                ..PmrOptions::memory(1 << shift).ready_after(time)
            };
            if mapped { pmr.mapped() } else { pmr }
        },
    )
}

fn any_fault() -> impl Strategy<Value = Fault> {
    let effect = prop_oneof![
        (1u16..0x800, any::<bool>())
            .prop_map(|(code, dnr)| { FaultEffect::Status(Status(code | u16::from(dnr) << 14)) }),
        (0u64..3_600_000_000_000).prop_map(|time| FaultEffect::Delay(Duration::from_nanos(time))),
        Just(FaultEffect::MediaError),
        Just(FaultEffect::DropCompletion),
        Just(FaultEffect::LoseInterrupt),
        Just(FaultEffect::Fatal),
        Just(FaultEffect::ReadOnly),
        Just(FaultEffect::PowerCut),
    ];
    use proptest::option::of;
    let lba = (0u64..1 << 50, 0u64..1 << 50).prop_map(|(first, more)| first..=first + more);
    (
        of(0u16..2),
        of(any::<u8>()),
        of(Just(1u32)),
        of(lba),
        any::<u32>(),
        of(1u32..),
        effect,
    )
        .prop_map(|(queue, opcode, nsid, lba, after, count, effect)| Fault {
            queue,
            opcode,
            nsid,
            lba: lba.filter(|_| queue != Some(0)),
            after: after.into(),
            count: count.map(u64::from),
            effect,
        })
}

fn any_nvme() -> impl Strategy<Value = NvmeOptions> {
    use proptest::collection::vec;
    use proptest::option::of;
    (
        vec(any_namespace(), 1..4),
        (
            0..=1u64 << 50,
            of((64 * KIB..16 * GIB, of(0..i64::MAX as u64))),
        ),
        of(any_cmb()),
        of(any_pmr()),
        vec(any_fault(), 0..3),
        1u16..64,
        prop_oneof![Just(Interrupts::MsiX), Just(Interrupts::IntX)],
        of("[ -~]{1,20}"),
        any::<bool>(),
    )
        .prop_map(
            |(
                namespaces,
                (unallocated, write_cache),
                mut cmb,
                pmr,
                faults,
                io_queues,
                interrupts,
                serial,
                old,
            )| {
                if let Some(cmb) = cmb.as_mut().filter(|_| old && pmr.is_none()) {
                    cmb.scheme = CmbScheme::V1_3;
                }
                NvmeOptions {
                    namespaces,
                    unallocated,
                    write_cache: write_cache
                        .map(|(size, survivors)| WriteCacheConfig { size, survivors }),
                    cmb,
                    pmr,
                    faults,
                    io_queues,
                    interrupts,
                    serial,
                }
            },
        )
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        disks in proptest::collection::vec(any_nvme(), 0..4),
        arguments in proptest::collection::vec("[^\\pC]{1,20}", 0..3),
        memory in 64u64..512,
    ) {
        let mut builder = Topology::builder("t").root_port("rp0").root_port("rp1")
            .switch("sw0", "rp0", 4).switch_with_ports("sw1", "rp1", ["a"])
            .guest_memory(memory * 2 * MIB).kernel("/k/bzImage", "/k/modules").qemu("/q");
        if memory % 2 == 0 {
            builder = builder.iommu();
        }
        for argument in arguments {
            builder = builder.kernel_argument(argument);
        }
        for (index, disk) in disks.into_iter().enumerate() {
            builder = builder.nvme(format!("ssd{index}"), format!("sw0.{index}"), disk);
        }
        let topology = builder.build().unwrap();
        let text = topology.to_toml();
        prop_assert_eq!(read(&text).unwrap_or_else(|error| panic!("{error}\n{text}")), topology);
    }

    #[test]
    fn no_text_makes_it_panic(text in ".{0,200}") {
        let _ = read(&text);
    }

    /// Mistakes in a file that is nearly right go deeper into the reader than noise does.
    #[test]
    fn no_damage_makes_it_panic(
        full in any::<bool>(),
        at in 0..GOOD.len().max(FULL.len()),
        cut in 0usize..20,
        insert in "[\\[\\]{}=\"',.#\n0-9a-zé]{0,6}",
    ) {
        let good = if full { FULL } else { GOOD };
        let at = at.min(good.len());
        let end = (at + cut).min(good.len());
        let _ = read(&format!("{}{insert}{}", &good[..at], &good[end..]));
    }
}
