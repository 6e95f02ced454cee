use std::collections::HashSet;

use super::*;
use crate::topology::{GIB, Nvme, TopologyBuilder};

fn cascaded(prefix: &str) -> TopologyBuilder {
    let name = |name: &str| format!("{prefix}{name}");
    Topology::builder("t")
        .root_port(name("rp0"))
        .switch(name("sw0"), name("rp0"), 2)
        .switch(name("sw1"), name("sw0.0"), 2)
        .root_port(name("rp1"))
}

fn shape(builder: TopologyBuilder) -> MachineShape {
    builder.build().unwrap().shape()
}

#[test]
fn slots_are_the_ports_without_a_switch() {
    let slots = shape(cascaded("")).slots();
    let seen: Vec<_> = slots
        .iter()
        .map(|slot| (&*slot.port, &*slot.bus, slot.number))
        .collect();
    assert_eq!(
        seen,
        [
            ("sw1.0", "port-sw1.0", 3),
            ("sw1.1", "port-sw1.1", 4),
            ("sw0.1", "port-sw0.1", 5),
            ("rp1", "port-rp1", 6),
        ]
    );
    assert_eq!(slots[1].path, [(8, 0), (0, 0), (0, 0), (0, 0), (1, 0)]);
    assert_eq!(shape(cascaded("")).slot("sw0.0"), None);
}

#[test]
fn ids_and_places_are_unique() {
    let arguments = shape(cascaded("")).qemu_arguments();
    let devices: Vec<_> = arguments
        .iter()
        .filter(|argument| argument.contains(",id="))
        .collect();
    let part = |argument: &str, key: &str| {
        argument
            .split(',')
            .find_map(|part| part.strip_prefix(key).map(str::to_owned))
    };
    for key in ["id=", "slot="] {
        let all: Vec<_> = devices
            .iter()
            .filter_map(|device| part(device, key))
            .collect();
        assert_eq!(
            all.len(),
            all.iter().collect::<HashSet<_>>().len(),
            "{all:?}"
        );
    }
    assert!(
        arguments.contains(
            &"xio3130-downstream,id=port-sw1.1,bus=switch-sw1,addr=0x01.0,chassis=1,slot=4,port=2"
                .to_owned()
        )
    );
}

#[test]
fn endpoints_and_names_do_not_change_the_key_and_all_else_does() {
    let key = shape(cascaded("")).canonical();
    assert_eq!(
        shape(cascaded("").nvme("ssd", "rp1", Nvme::memory(GIB))).canonical(),
        key
    );
    assert_eq!(shape(cascaded("other-")).canonical(), key);
    for other in [
        cascaded("").guest_memory(GIB),
        cascaded("").guest_cpus(3),
        cascaded("").guest_cpu("EPYC"),
        cascaded("").window(2 * GIB),
        cascaded("").iommu(),
        cascaded("").root_port("rp2"),
        cascaded("").switch("sw2", "rp1", 1),
    ] {
        assert_ne!(shape(other).canonical(), key);
    }
}

/// QEMU puts behind an IOMMU only what comes after it.
#[test]
fn an_iommu_comes_before_all_ports() {
    let arguments = shape(cascaded("").iommu()).qemu_arguments();
    let at = |start: &str| arguments.iter().position(|a| a.starts_with(start));
    assert!(at("intel-iommu").unwrap() < at("pcie-root-port").unwrap());
    assert!(
        !shape(cascaded("")).canonical().contains("iommu"),
        "older images keep their keys"
    );
}

#[test]
fn a_cpu_model_with_address_bits_keeps_them() {
    let has = |model: &str, wanted: &str| {
        let arguments = shape(cascaded("").guest_cpu(model)).qemu_arguments();
        assert!(
            arguments.iter().any(|argument| argument == wanted),
            "{arguments:?}"
        );
    };
    has("EPYC,-avx2", "EPYC,-avx2,phys-bits=43");
    has("max,phys-bits=46", "max,phys-bits=46");
}

#[test]
fn an_unchecked_loop_ends() {
    let mut topology = cascaded("").build().unwrap();
    topology.switches[0].ports.push("rp0".to_owned());
    assert!(topology.shape().slots().len() < 64);
}

#[test]
fn devices_are_described_as_qemu_wants_them() {
    let slot = shape(cascaded("")).slot("rp1").unwrap();
    let json = endpoint_device_json(&slot, &endpoint_id("ssd0"), Path::new("/run/s"));
    assert_eq!(
        json,
        json!({
            "driver": "vfio-user-pci", "id": "endpoint-ssd0", "bus": "port-rp1",
            "socket": { "type": "unix", "path": "/run/s" }, "x-msg-timeout": 60_000, "rombar": 0,
        })
    );
}
