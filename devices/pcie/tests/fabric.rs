//! Routing, accounting and refusal, with toy endpoints and no guest.
#![allow(missing_docs, clippy::unwrap_used)]

mod toy;

use p2plab_pcie::{
    Access, CpuAccess, DmaError, DmaRange, FabricBuilder, FabricError, ResetKind, TlpKind, Traffic,
};
use toy::{HOST, MIB, Toy, command, one_switch, plug};

fn moved(fabric: &p2plab_pcie::Fabric, action: impl FnOnce()) -> Traffic {
    let before = fabric.traffic();
    action();
    let traffic = fabric.traffic().since(&before);
    traffic.check().unwrap();
    traffic
}

fn out(traffic: &Traffic, port: &str) -> (u64, u64) {
    let total = traffic.port(port).unwrap().egress.total();
    (total.tlps, total.payload_bytes)
}

fn into(traffic: &Traffic, port: &str) -> (u64, u64) {
    let total = traffic.port(port).unwrap().ingress.total();
    (total.tlps, total.payload_bytes)
}

#[test]
fn a_write_to_a_peer_stays_below_the_switch() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    let traffic = moved(&fabric, || {
        a.toy.port().write(b.memory + 64, &[7; 4096]).unwrap();
    });
    let mut data = [0; 4096];
    assert!(b.toy.memory.read(64, &mut data));
    assert_eq!(data, [7; 4096]);
    // 4032 bytes to the page's end in 128-byte payloads, then 64.
    assert_eq!(into(&traffic, "sw.0"), (33, 4096));
    assert_eq!(out(&traffic, "sw.1"), (33, 4096));
    assert_eq!(out(&traffic, "sw"), (0, 0));
    assert_eq!(into(&traffic, "rp"), (0, 0));
    let header = traffic.between("a", "b", TlpKind::MWr).header_bytes;
    assert_eq!(header, 33 * 16);
}

#[test]
fn a_read_of_host_memory_goes_up_and_its_completions_come_down() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    a.toy.port().write(HOST + 100, b"hello").unwrap();
    let mut data = [0; 5];
    let traffic = moved(&fabric, || {
        a.toy.port().read(HOST + 100, &mut data).unwrap()
    });
    assert_eq!(&data, b"hello");
    assert_eq!(out(&traffic, "sw"), (1, 0));
    assert_eq!(into(&traffic, "sw"), (1, 5));
    assert_eq!(
        traffic.between("memory", "a", TlpKind::CplD).payload_bytes,
        5
    );
    assert_eq!(
        traffic.between("a", "memory", TlpKind::MRd).requested_bytes,
        5
    );
    // A 1 KiB read: two requests of 512, each four completions of 128.
    let mut data = [0; 1024];
    let traffic = moved(&fabric, || a.toy.port().read(HOST, &mut data).unwrap());
    assert_eq!(traffic.between("a", "memory", TlpKind::MRd).tlps, 2);
    assert_eq!(traffic.between("memory", "a", TlpKind::CplD).tlps, 8);
}

#[test]
fn different_root_ports_meet_in_the_root_complex() {
    let mut builder = FabricBuilder::new();
    for root in ["rp0", "rp1"] {
        builder.root_port(root).unwrap();
    }
    builder.switch("s", "rp0").unwrap();
    builder.downstream_port("s", "s.0").unwrap();
    let fabric = builder.build();
    let a = plug(&fabric, "s.0", "a", 0);
    let b = plug(&fabric, "rp1", "b", 1);
    let traffic = moved(&fabric, || a.toy.port().write(b.memory, &[1; 128]).unwrap());
    for port in ["s.0", "rp0"] {
        assert_eq!(into(&traffic, port), (1, 128), "{port}");
    }
    for port in ["s", "rp1"] {
        assert_eq!(out(&traffic, port), (1, 128), "{port}");
    }
    assert_eq!(traffic.upstream_payload_bytes(), 128);
}

#[test]
fn addresses_that_nothing_decodes_are_unsupported_requests() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let nowhere = 0x7000_0000_0000;
    let traffic = moved(&fabric, || {
        let error = a.toy.port().read(nowhere, &mut [0; 16]).unwrap_err();
        assert!(matches!(error, DmaError::UnsupportedRequest { address } if address == nowhere));
        assert!(a.toy.port().write(nowhere, &[0; 16]).is_err());
    });
    assert_eq!(traffic.port("rp").unwrap().unsupported_requests, 2);
    assert_eq!(traffic.between("a", "unclaimed", TlpKind::MRd).tlps, 1);
    assert_eq!(traffic.between("unclaimed", "a", TlpKind::Cpl).tlps, 1);
    assert_eq!(traffic.between("a", "unclaimed", TlpKind::MWr).tlps, 1);
    // A range that starts in host memory and leaves it moves nothing.
    let ranges = [DmaRange {
        address: HOST + MIB - 64,
        length: 128,
    }];
    let mut ran = false;
    let error = a.toy.port().write_ranges(&ranges, |_| {
        ran = true;
        Ok(())
    });
    assert!(
        matches!(error, Err(DmaError::UnsupportedRequest { address }) if address == HOST + MIB)
    );
    assert!(!ran);
    // The top of the address space.
    assert!(a.toy.port().write(u64::MAX - 3, &[0; 8]).is_err());
}

#[test]
fn a_peer_with_memory_space_off_answers_unsupported_request() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    command(&b.function, false, true);
    let traffic = moved(&fabric, || {
        assert!(a.toy.port().read(b.memory, &mut [0; 64]).is_err());
    });
    assert_eq!(traffic.port("b").unwrap().unsupported_requests, 1);
    assert_eq!(
        out(&traffic, "sw.1").0,
        1,
        "the request went down to the peer"
    );
    assert_eq!(out(&traffic, "sw").0, 0);
    command(&b.function, true, true);
    a.toy.port().read(b.memory, &mut [0; 64]).unwrap();
}

#[test]
fn without_bus_master_enable_nothing_leaves() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    command(&a.function, true, false);
    let traffic = moved(&fabric, || {
        let error = a.toy.port().write(HOST, &[0; 4]).unwrap_err();
        assert!(matches!(error, DmaError::BusMasterDisabled));
    });
    assert_eq!(traffic.port("a").unwrap().blocked_requests, 1);
    assert!(traffic.matrix.is_empty());
}

#[test]
fn registers_of_a_peer_are_reached_and_the_cpu_is_counted() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    let traffic = moved(&fabric, || {
        a.toy
            .port()
            .write(b.registers + 0x100, &[1, 2, 3, 4])
            .unwrap();
        let mut data = [0; 4];
        a.toy.port().read(b.registers + 0x10, &mut data).unwrap();
        assert_eq!(data, [0x10, 0x11, 0x12, 0x13]);
        b.function.bar_read(0, 8, &mut data).unwrap();
        b.function.bar_write(0, 0x1000, &data).unwrap();
    });
    let writes = b.toy.writes.lock().unwrap().clone();
    assert_eq!(
        writes,
        [(0x100, vec![1, 2, 3, 4]), (0x1000, vec![8, 9, 10, 11])]
    );
    assert_eq!(traffic.between("a", "b", TlpKind::MWr).payload_bytes, 4);
    assert_eq!(traffic.between("b", "a", TlpKind::CplD).payload_bytes, 4);
    assert_eq!(traffic.between("cpu", "b", TlpKind::MWr).payload_bytes, 4);
    assert_eq!(traffic.between("b", "cpu", TlpKind::CplD).payload_bytes, 4);
    assert!(b.function.bar_read(0, 0x3ffe, &mut [0; 4]).is_err());
    assert!(b.function.bar_read(5, 0, &mut [0; 4]).is_err());
}

#[test]
fn moves_go_from_range_to_range() {
    let fabric = one_switch(3);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    assert!(b.toy.memory.write(0, &[9; 300]));
    let traffic = moved(&fabric, || {
        let from = [DmaRange {
            address: b.memory,
            length: 300,
        }];
        let to = [
            DmaRange {
                address: HOST,
                length: 100,
            },
            DmaRange {
                address: HOST + 4096,
                length: 200,
            },
        ];
        a.toy.port().move_between(&from, &to).unwrap();
    });
    let mut data = [0; 200];
    a.toy.port().read(HOST + 4096, &mut data).unwrap();
    assert_eq!(data, [9; 200]);
    assert_eq!(traffic.between("b", "a", TlpKind::CplD).payload_bytes, 300);
    assert_eq!(
        traffic.between("a", "memory", TlpKind::MWr).payload_bytes,
        300
    );
}

#[test]
fn unmapping_takes_memory_away_and_a_lost_connection_takes_all() {
    let fabric = one_switch(1);
    let a = plug(&fabric, "sw.0", "a", 0);
    a.function.unmap_host_memory(HOST + 4096, 4096).unwrap();
    assert!(a.toy.port().write(HOST + 4096, &[0]).is_err());
    a.toy.port().write(HOST + 8192, &[0]).unwrap();
    a.function.disconnect();
    assert_eq!(*a.toy.resets.lock().unwrap(), [ResetKind::ConnectionLost]);
    assert!(matches!(
        a.toy.port().write(HOST, &[0]),
        Err(DmaError::LinkDown)
    ));
    // The next guest programs the function anew.
    a.function.connect();
    command(&a.function, true, true);
    let access = Access {
        read: true,
        write: true,
    };
    a.function
        .map_host_memory(HOST, MIB, access, Some(toy::memfd(MIB)), 0)
        .unwrap();
    a.toy.port().write(HOST, &[0]).unwrap();
}

#[test]
fn slots_are_taken_once_and_freed() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let again = |port, name| fabric.plug(port, name, Toy::new(CpuAccess::Mapped)).err();
    let occupied = FabricError::Occupied {
        port: "sw.0".into(),
        by: "a".into(),
    };
    assert_eq!(again("sw.0", "c"), Some(occupied));
    assert_eq!(
        again("sw.1", "a"),
        Some(FabricError::DuplicateName("a".into()))
    );
    assert!(again("sw", "c").is_some());
    assert_eq!(
        again("sw.9", "c"),
        Some(FabricError::UnknownPort("sw.9".into()))
    );
    fabric.unplug("a").unwrap();
    assert!(matches!(
        a.toy.port().write(HOST, &[0]),
        Err(DmaError::LinkDown)
    ));
    assert_eq!(again("sw.0", "c"), None);
    let traffic = fabric.traffic();
    assert!(!traffic.port("sw.0").unwrap().cpu_accesses_observed);
    assert!(!traffic.port("sw").unwrap().cpu_accesses_observed);
    assert!(traffic.port("sw.1").unwrap().cpu_accesses_observed);
    traffic.check().unwrap();
}

#[test]
fn a_snapshot_is_consistent_under_load() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    std::thread::scope(|scope| {
        for (from, to) in [(&a, &b), (&b, &a)] {
            scope.spawn(|| {
                for round in 0..2000 {
                    from.toy.port().write(to.memory + round, &[0; 300]).unwrap();
                    from.toy.port().read(HOST + round, &mut [0; 300]).unwrap();
                }
            });
        }
        for _ in 0..200 {
            fabric.traffic().check().unwrap();
        }
    });
    let traffic = fabric.traffic();
    traffic.check().unwrap();
    assert_eq!(
        traffic.between("a", "b", TlpKind::MWr).payload_bytes,
        2000 * 300
    );
    let json = serde_json::to_string(&traffic).unwrap();
    assert_eq!(serde_json::from_str::<Traffic>(&json).unwrap(), traffic);
}
