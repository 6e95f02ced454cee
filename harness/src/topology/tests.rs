use std::path::Path;

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
            "one-switch",
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
            "lab.toml:12:10: `nvm` is not a value of `device`; did you mean `nvme`?",
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
    with("nvmet").unwrap();
    let topology = with("nvme use_cmb_sqes=0 io_queue_depth=32").unwrap();
    assert_eq!(read(&topology.to_toml()).unwrap(), topology);
    for bad in ["", " a=1", "../nvme", "nvme\na=1"] {
        assert!(with(bad).is_err(), "{bad:?}");
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
    let DeviceOptions::Nvme(options) = &topology.endpoints[0].device;
    let path = PathBuf::from("/labs/disk");
    assert_eq!(
        options.backing,
        Backing::File {
            path,
            create: false
        }
    );
}

fn any_nvme() -> impl Strategy<Value = NvmeOptions> {
    let backing = prop_oneof![
        Just(Backing::Memory),
        ("/[^/\0]{1,20}", any::<bool>()).prop_map(|(path, create)| Backing::File {
            path: path.into(),
            create
        }),
    ];
    let cmb = proptest::option::of((21u32..30, any::<bool>(), any::<bool>()).prop_map(
        |(shift, mapped, sqs)| {
            let cmb = CmbOptions {
                submission_queues: sqs,
                ..CmbOptions::new(1 << shift)
            };
            if mapped { cmb.mapped() } else { cmb }
        },
    ));
    let serial = proptest::option::of("[ -~]{1,20}");
    (
        256u64..1 << 20,
        backing,
        any::<bool>(),
        prop_oneof![Just(512), Just(4096)],
        cmb,
        1u16..64,
        prop_oneof![Just(Interrupts::MsiX), Just(Interrupts::IntX)],
        serial,
    )
        .prop_map(
            |(blocks, backing, read_only, block_size, cmb, io_queues, interrupts, serial)| {
                NvmeOptions {
                    size: blocks * 4096,
                    backing,
                    read_only,
                    block_size,
                    cmb,
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
        at in 0..GOOD.len(),
        cut in 0usize..20,
        insert in "[\\[\\]{}=\"',.#\n0-9a-zé]{0,6}",
    ) {
        let end = (at + cut).min(GOOD.len());
        let _ = read(&format!("{}{insert}{}", &GOOD[..at], &GOOD[end..]));
    }
}
