//! What the guest's lspci sees is what the topology says.

use p2plab::lab::{Device, Lab};
use p2plab::shape::MachineShape;
use p2plab::topology::{DeviceOptions, GIB, MIB, Nvme, PmrOptions, Topology};
use p2plab_tests::{TestLab, two_ssds};

/// The link of every endpoint here (devices/pcie/src/config/layout.rs).
const LINK: &str = "Speed 16GT/s, Width x4";
const ROOT_PORT: &str = "1b36:000c";
const UPSTREAM_PORT: &str = "104c:8232";
const DOWNSTREAM_PORT: &str = "104c:8233";

/// Two SSDs below one switch.
#[test]
fn lspci_shows_one_switch() {
    shows("lspci_shows_one_switch", two_ssds("one-switch"));
}

/// A switch below a switch, an SSD below each.
#[test]
fn lspci_shows_cascaded_switches() {
    let topology = Topology::builder("cascaded")
        .root_port("rp0")
        .switch("sw0", "rp0", 3)
        .switch("sw1", "sw0.0", 2)
        .nvme(
            "deep",
            "sw1.1",
            Nvme::memory(GIB / 4).cmb(64 * MIB).serial("DEEP-1"),
        )
        .nvme("shallow", "sw0.2", Nvme::memory(GIB / 4).io_queues(3))
        .build();
    shows("lspci_shows_cascaded_switches", topology.unwrap());
}

/// Two root ports, each with a switch.
#[test]
fn lspci_shows_two_root_ports() {
    let topology = Topology::builder("two-root-ports")
        .root_port("rp0")
        .root_port("rp1")
        .switch("sw0", "rp0", 2)
        .switch("sw1", "rp1", 2)
        .nvme("ssd0", "sw0.1", Nvme::memory(GIB / 4).cmb(2 * MIB))
        .nvme("ssd1", "sw1.0", Nvme::memory(GIB / 4))
        .build();
    shows("lspci_shows_two_root_ports", topology.unwrap());
}

/// Two root ports with an SSD plugged straight into each.
#[test]
fn lspci_shows_ssds_in_root_ports() {
    let topology = Topology::builder("direct")
        .root_port("rp0")
        .root_port("rp1")
        .nvme("ssd0", "rp0", Nvme::memory(GIB / 4).cmb(64 * MIB))
        .nvme("ssd1", "rp1", Nvme::memory(GIB / 4))
        .build();
    shows("lspci_shows_ssds_in_root_ports", topology.unwrap());
}

/// Persistent Memory Regions, alone and beside a Controller Memory Buffer.
#[test]
fn lspci_shows_regions() {
    let pmr = PmrOptions::memory;
    let topology = Topology::builder("regions")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("small", "sw0.0", Nvme::memory(GIB / 4).pmr(pmr(2 * MIB)))
        .nvme(
            "both",
            "sw0.1",
            Nvme::memory(GIB / 4).cmb(64 * MIB).pmr(pmr(512 * MIB)),
        )
        .nvme(
            "mapped",
            "sw0.2",
            Nvme::memory(GIB / 4)
                .cmb(512 * MIB)
                .pmr(pmr(16 * MIB).mapped()),
        )
        .build();
    shows("lspci_shows_regions", topology.unwrap());
}

fn shows(name: &str, topology: Topology) {
    let lab = TestLab::start(name, topology.clone());
    assert_lspci_shows(&lab, &topology);
    lab.finish();
}

/// Compares everything that lspci says of bridges and endpoints with `topology`.
pub fn assert_lspci_shows(lab: &Lab, topology: &Topology) {
    let guest = lab.guest().unwrap();
    for endpoint in &topology.endpoints {
        guest.nvme(&endpoint.name).unwrap();
    }
    let tree = guest.sh("lspci -nPP").unwrap();
    let functions: Vec<Line> = tree.lines().map(Line::parse).collect();
    assert_bridges(&functions, &topology.shape());
    let count = |class| functions.iter().filter(|f| f.class == class).count();
    assert_eq!(count("0108"), topology.endpoints.len(), "{tree}");
    for device in lab.devices().iter() {
        let address = guest.pci_address(device.name()).unwrap();
        let short = address.strip_prefix("0000:").unwrap();
        let line = functions.iter().find(|f| f.address() == short).unwrap();
        let mut path = topology.shape().slot(device.port()).unwrap().path;
        path.push((0, 0));
        assert_eq!(line.path(), path, "{}: {tree}", device.name());
        let details = guest.sh(&format!("lspci -nvvv -s {short}")).unwrap();
        assert_endpoint(device, line, &details, lab, topology);
    }
}

/// A line of `lspci -nPP`.
struct Line {
    /// `00:08.0`, `01:00.0`, ... from the root complex down.
    chain: Vec<String>,
    class: String,
    id: String,
}

impl Line {
    fn parse(line: &str) -> Self {
        let mut words = line.split_whitespace();
        let chain = words
            .next()
            .unwrap()
            .split('/')
            .map(str::to_owned)
            .collect();
        let class = words.next().unwrap().trim_end_matches(':').to_owned();
        let id = words.next().unwrap().to_owned();
        Self { chain, class, id }
    }

    fn address(&self) -> &str {
        self.chain.last().unwrap()
    }

    /// Device and function numbers, as `Slot::path` has them.
    fn path(&self) -> Vec<(u8, u8)> {
        let hex = |text: &str| u8::from_str_radix(text, 16).unwrap();
        let numbers = |address: &String| {
            let (device, function) = address.rsplit(':').next().unwrap().split_once('.').unwrap();
            (hex(device), hex(function))
        };
        self.chain.iter().map(numbers).collect()
    }
}

/// The guest has exactly the ports of the shape, each kind where it belongs.
fn assert_bridges(functions: &[Line], shape: &MachineShape) {
    let mut seen: Vec<(Vec<(u8, u8)>, &str)> = functions
        .iter()
        .filter(|function| function.class == "0604")
        .map(|function| (function.path(), function.id.as_str()))
        .collect();
    // A bridge on the way to some slot is a root port, or by turns an upstream and a downstream port.
    let mut expected = Vec::new();
    for slot in shape.slots() {
        for depth in 1..=slot.path.len() {
            let id = match depth {
                1 => ROOT_PORT,
                even if even % 2 == 0 => UPSTREAM_PORT,
                _ => DOWNSTREAM_PORT,
            };
            expected.push((slot.path[..depth].to_vec(), id));
        }
    }
    seen.sort();
    expected.sort();
    expected.dedup();
    assert_eq!(seen, expected);
}

fn assert_endpoint(device: &Device, line: &Line, text: &str, lab: &Lab, topology: &Topology) {
    let name = device.name();
    let declared = device.function().declaration();
    let identity = declared.identity;
    let ids = format!("{:04x}:{:04x}", identity.vendor_id, identity.device_id);
    assert_eq!(
        (line.id.as_str(), line.class.as_str()),
        (ids.as_str(), "0108"),
        "{name}"
    );
    let has = |what: &str| assert!(text.contains(what), "{name}: no `{what}` in\n{text}");
    has(&format!("Subsystem: {ids}"));
    has("Control: I/O- Mem+ BusMaster+");
    has("Power Management version 3");
    has("Express (v2) Endpoint");
    has("FLReset+");
    has("Advanced Error Reporting");
    has("Kernel driver in use: nvme");
    let link = |register| {
        let line = text.lines().find(|line| line.contains(register)).unwrap();
        assert!(line.contains(LINK), "{name}: {line}");
    };
    link("LnkCap:");
    link("LnkSta:");
    let options = topology.endpoints.iter().find(|e| e.name == name).unwrap();
    let DeviceOptions::Nvme(options) = &options.device else {
        panic!("{name} is no SSD")
    };
    // One vector for each queue, and the admin queue's.
    has(&format!(
        "MSI-X: Enable+ Count={} Masked-",
        options.io_queues + 1
    ));
    let serial = identity.serial_number.unwrap().to_be_bytes();
    let serial = serial.map(|byte| format!("{byte:02x}")).join("-");
    has(&format!("Device Serial Number {serial}"));
    let state = device.function().dump();
    let payload = &state["pcie"]["max_payload_size"];
    let request = &state["pcie"]["max_read_request_size"];
    has(&format!(
        "MaxPayload {payload} bytes, MaxReadReq {request} bytes"
    ));

    let mut expected = vec![Bar::new(&state, 0, declared.bars[0].size, false)];
    let pmr = options.pmr.as_ref();
    expected.extend(pmr.map(|pmr| Bar::new(&state, 2, pmr.size, true)));
    expected.extend(options.cmb.map(|cmb| Bar::new(&state, 4, cmb.size, true)));
    assert_eq!(Bar::parse_all(text), expected, "{name}: {text}");

    let guest = lab.guest().unwrap();
    let controller = guest.nvme(name).unwrap().controller;
    let read = guest.sh(&format!("cat /sys/class/nvme/{controller}/serial"));
    assert_eq!(
        read.unwrap().trim(),
        options.serial.as_deref().unwrap_or(name)
    );
}

#[derive(Debug, PartialEq, Eq)]
struct Bar {
    index: u64,
    address: u64,
    is_64bit: bool,
    prefetchable: bool,
    size: u64,
}

impl Bar {
    /// The 64-bit BAR `index` where the device model says that the guest has put it.
    fn new(state: &serde_json::Value, index: u64, size: u64, prefetchable: bool) -> Self {
        Self {
            index,
            address: state["pcie"]["bars"][index as usize].as_u64().unwrap(),
            is_64bit: true,
            prefetchable,
            size,
        }
    }

    /// `Region 0: Memory at fe400000 (64-bit, non-prefetchable) [size=16K]`
    fn parse_all(text: &str) -> Vec<Self> {
        let lines = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Region "));
        lines
            .map(|line| Self::parse(line).unwrap_or_else(|| panic!("`{line}`")))
            .collect()
    }

    fn parse(line: &str) -> Option<Self> {
        let (index, rest) = line.split_once(": Memory at ")?;
        let (address, rest) = rest.split_once(" (")?;
        let (kind, rest) = rest.split_once(") [size=")?;
        let (number, unit) = rest.strip_suffix(']')?.split_at(rest.len() - 2);
        let unit = match unit {
            "K" => 1 << 10,
            "M" => MIB,
            "G" => GIB,
            _ => return None,
        };
        let (width, prefetchable) = kind.split_once(", ")?;
        Some(Self {
            index: index.parse().ok()?,
            address: u64::from_str_radix(address, 16).ok()?,
            is_64bit: width == "64-bit",
            prefetchable: prefetchable == "prefetchable",
            size: number.parse::<u64>().ok()?.checked_mul(unit)?,
        })
    }
}
