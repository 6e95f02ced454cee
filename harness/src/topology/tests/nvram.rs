//! NVRAM cards in both forms.

use p2plab_nvram::Fault;

use super::*;

const CARD: &str = r#"
name = "card"
[[root_port]]
name = "rp0"
[[endpoint]]
name = "nv0"
port = "rp0"
device = "nvram"
size = "128MiB"
file = "/nv0"
create = true
cpu = "mapped"
armed = false
interrupts = "msix"
faults = ["flash", "medium"]
"#;

#[test]
fn every_option_of_a_card_can_be_said_in_both_forms() {
    let card = Nvram::file("/nv0", 128 * MIB)
        .mapped()
        .disarmed()
        .msix()
        .fault(Fault::Flash)
        .fault(Fault::Medium);
    let built = Topology::builder("card")
        .root_port("rp0")
        .nvram("nv0", "rp0", card)
        .build()
        .unwrap();
    assert_eq!(read(CARD).unwrap(), built);
    assert_eq!(read(&built.to_toml()).unwrap(), built);
    let plain = "name = \"card\"\n[[root_port]]\nname = \"rp0\"\n[[endpoint]]\nname = \"nv0\"\nport = \"rp0\"\n\
                 device = \"nvram\"\nsize = \"64MiB\"";
    let built = Topology::builder("card")
        .root_port("rp0")
        .nvram("nv0", "rp0", Nvram::memory(64 * MIB))
        .build();
    assert_eq!(read(plain).unwrap(), built.unwrap());
}

#[test]
fn mistakes_in_a_card_are_named_with_their_place_and_their_cure() {
    for (old, new, said) in [
        (
            "\"nvram\"",
            "\"nvrm\"",
            "`nvrm` is not a value of `device`; did you mean `nvram`",
        ),
        (
            "armed",
            "armd",
            "lab.toml:13:1: an nvram endpoint has no field `armd`; did you mean `armed`?",
        ),
        (
            "cpu =",
            "cmb =",
            "lab.toml:12:1: an nvram endpoint has no field `cmb`",
        ),
        (
            "size = \"128MiB\"\n",
            "",
            "an nvram endpoint needs the field `size`, as in `size = \"1GiB\"`",
        ),
        (
            "128MiB",
            "63MiB",
            "lab.toml:9:8: `size` is 63MiB, it must be 64MiB to 8GiB",
        ),
        (
            "128MiB",
            "16GiB",
            "`size` is 16GiB, it must be 64MiB to 8GiB",
        ),
        (
            "128MiB",
            "65MiB",
            "`size` is 65MiB, it must be a power of two, such as 128MiB",
        ),
        (
            "128MiB",
            "2GiB",
            "lab.toml:9:8: the memory of `nv0` takes 2GiB and does not fit into a window of 1GiB; set `window = \
             \"2GiB\"` under [guest]",
        ),
        ("file = \"/nv0\"\n", "", "`create` needs `file`, too"),
        (
            "\"/nv0\"",
            "\"\"",
            "a path must be valid UTF-8 and not empty",
        ),
        ("\"mapped\"", "\"direct\"", "valid are `trapped`, `mapped`"),
        ("\"msix\"", "\"msi\"", "did you mean `msix`"),
        (
            "false",
            "\"no\"",
            "`armed` must be true or false, not string",
        ),
        (
            "\"flash\"",
            "\"flush\"",
            "`flush` is not a value of `faults`; did you mean `flash`",
        ),
        (
            "[\"flash\", \"medium\"]",
            "\"flash\"",
            "`faults` must be a list of texts",
        ),
    ] {
        assert!(CARD.contains(old), "{old}");
        let text = complaint(&CARD.replacen(old, new, 1));
        assert!(text.contains(said), "`{old}` -> `{new}`:\n{text}\n{said}");
    }
}

proptest! {
    #[test]
    fn cards_are_read_back_as_written(
        shift in 26u32..31,
        backing in any_backing(),
        flags in any::<[bool; 3]>(),
        faults in proptest::collection::vec(
            prop_oneof![Just(Fault::Capacitor), Just(Fault::Flash), Just(Fault::Medium)], 0..3),
    ) {
        let [mapped, armed, msix] = flags;
        let card = NvramOptions { backing, armed, faults, ..Nvram::memory(1 << shift) };
        let card = if mapped { card.mapped() } else { card };
        let card = if msix { card.msix() } else { card };
        let topology = Topology::builder("t").root_port("rp0").nvram("nv0", "rp0", card);
        let topology = topology.build().unwrap();
        let text = topology.to_toml();
        prop_assert_eq!(read(&text).unwrap_or_else(|error| panic!("{error}\n{text}")), topology);
    }

    #[test]
    fn no_damaged_card_makes_it_panic(
        at in 0..CARD.len(), cut in 0usize..20, insert in "[\\[\\]{}=\"',.#\n0-9a-zé]{0,6}",
    ) {
        let end = (at + cut).min(CARD.len());
        let _ = read(&format!("{}{insert}{}", &CARD[..at], &CARD[end..]));
    }
}
