//! A real function in a fabric, served to crate vfio_user's client: what the client does reaches the
//! endpoint, and what the endpoint does reaches the client.

#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use p2plab_pcie::{
    BarBacking, BarDeclaration, BarMemory, CpuAccess, Declaration, Endpoint, Fabric, FabricBuilder,
    Function, Identity, MsixDeclaration, Port, ResetKind,
};
use p2plab_vfio_user::{Server, SocketAddress};
use vfio_user::Client;

const MEMORY_SIZE: u64 = 0x20_0000;

/// BAR 0: registers; a write to offset 0 stores its data at bus address 0x1000. BAR 2: mapped memory.
struct Toy {
    memory: Arc<BarMemory>,
    port: Mutex<Option<Port>>,
    resets: Mutex<Vec<ResetKind>>,
}

impl Endpoint for Toy {
    fn declaration(&self) -> Declaration {
        Declaration {
            identity: Identity {
                vendor_id: 0x1234,
                device_id: 0x11e8,
                subsystem_vendor_id: 0,
                subsystem_id: 0,
                revision_id: 0,
                class_code: 0xff_0000,
                serial_number: None,
            },
            bars: vec![
                BarDeclaration {
                    index: 0,
                    size: 0x4000,
                    is_64bit: false,
                    prefetchable: false,
                    cpu_access: CpuAccess::Trapped,
                    backing: BarBacking::Registers,
                },
                BarDeclaration {
                    index: 2,
                    size: MEMORY_SIZE,
                    is_64bit: true,
                    prefetchable: true,
                    cpu_access: CpuAccess::Mapped,
                    backing: BarBacking::Memory(self.memory.clone()),
                },
            ],
            msix: Some(MsixDeclaration {
                vectors: 4,
                bar: 0,
                table_offset: 0x2000,
                pba_offset: 0x3000,
            }),
            intx: false,
        }
    }

    fn attach(&self, port: Port) {
        *self.port.lock().unwrap() = Some(port);
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        if offset == 0 {
            let port = self.port.lock().unwrap().clone().unwrap();
            // Fails where the test means it to: then nothing is stored.
            let _ = port.write(0x1000, data);
        }
    }

    fn reset(&self, kind: ResetKind) {
        self.resets.lock().unwrap().push(kind);
    }

    fn detach(&self) {}

    fn dump(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

fn served() -> (Arc<Fabric>, Arc<Toy>, Arc<Function>, Server) {
    let mut builder = FabricBuilder::new();
    builder.root_port("rp").unwrap();
    let fabric = builder.build();
    let toy = Arc::new(Toy {
        memory: Arc::new(BarMemory::anonymous("toy", MEMORY_SIZE).unwrap()),
        port: Mutex::default(),
        resets: Mutex::default(),
    });
    let function = fabric.plug("rp", "toy", toy.clone()).unwrap();
    let server = Server::bind(SocketAddress::Unlinked, function.clone()).unwrap();
    (fabric, toy, function, server)
}

#[test]
fn mapped_memory_is_the_endpoints_own() {
    let (_fabric, toy, _function, server) = served();
    let client = Client::new(server.path().unwrap()).unwrap();
    let region = client.region(2).unwrap();
    assert_eq!((region.flags & 0xf, region.size), (0xf, MEMORY_SIZE));
    let areas: Vec<_> = region
        .sparse_areas
        .iter()
        .map(|area| (area.offset, area.size))
        .collect();
    assert_eq!(areas, [(0, MEMORY_SIZE)]);
    let file = region.file_offset.as_ref().unwrap();
    file.file()
        .write_all_at(b"from the guest", file.start() + 0x100)
        .unwrap();
    let mut seen = [0; 14];
    assert!(toy.memory.read(0x100, &mut seen));
    assert_eq!(&seen, b"from the guest");
}

#[test]
fn dma_goes_to_mapped_memory_while_bus_mastering_is_on() {
    let (_fabric, toy, _function, server) = served();
    let mut client = Client::new(server.path().unwrap()).unwrap();
    let ram = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    let ram = std::fs::File::from(ram);
    ram.set_len(0x4000).unwrap();
    client.dma_map(0, 0, 0x4000, ram.as_raw_fd()).unwrap();
    let stored = || {
        let mut bytes = [0; 4];
        ram.read_exact_at(&mut bytes, 0x1000).unwrap();
        u32::from_le_bytes(bytes)
    };
    client.region_write(0, 0, &1u32.to_le_bytes()).unwrap();
    assert_eq!(stored(), 0);
    // Command register: memory space, bus master.
    client.region_write(7, 4, &[6, 0]).unwrap();
    client.region_write(0, 0, &2u32.to_le_bytes()).unwrap();
    assert_eq!(stored(), 2);
    client.dma_unmap(0, 0x4000).unwrap();
    client.region_write(0, 0, &3u32.to_le_bytes()).unwrap();
    assert_eq!(stored(), 2);
    drop(client);
    server
        .wait_disconnected(Instant::now() + Duration::from_secs(10))
        .unwrap();
    assert_eq!(
        toy.resets.lock().unwrap().last(),
        Some(&ResetKind::ConnectionLost)
    );
}

#[test]
fn identity_and_registers_are_the_endpoints() {
    let (_fabric, _toy, _function, server) = served();
    let mut client = Client::new(server.path().unwrap()).unwrap();
    let mut id = [0; 4];
    client.region_read(7, 0, &mut id).unwrap();
    assert_eq!(id, [0x34, 0x12, 0xe8, 0x11]);
    // Memory decoding off, then on.
    client.region_read(0, 0x24, &mut id).unwrap();
    assert_eq!(id, [0xff; 4]);
    client.region_write(7, 4, &[2, 0]).unwrap();
    client.region_read(0, 0x24, &mut id).unwrap();
    assert_eq!(id, [0x24; 4]);
    assert_eq!(client.get_irq_info(0).unwrap().count, 0);
    assert_eq!(client.get_irq_info(2).unwrap().count, 4);
}

/// Unplugged from the fabric while its server goes on, as in a surprise removal: the client finds an empty slot, its
/// memory is left alone, and it may still map and unmap until it has noticed.
#[test]
fn an_unplugged_function_is_an_empty_slot() {
    let (fabric, toy, _function, server) = served();
    let mut client = Client::new(server.path().unwrap()).unwrap();
    let ram = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    let ram = std::fs::File::from(ram);
    ram.set_len(0x4000).unwrap();
    client.dma_map(0, 0, 0x4000, ram.as_raw_fd()).unwrap();
    client.region_write(7, 4, &[6, 0]).unwrap();
    let port = toy.port.lock().unwrap().clone().unwrap();
    port.write(0x1000, &[1]).unwrap();

    fabric.unplug("toy").unwrap();
    assert!(port.write(0x1000, &[2]).is_err());
    let mut byte = [0];
    ram.read_exact_at(&mut byte, 0x1000).unwrap();
    assert_eq!(byte, [1]);
    client.region_write(7, 4, &[6, 0]).unwrap();
    client.region_write(0, 0, &2u32.to_le_bytes()).unwrap();
    for region in [0, 7] {
        let mut data = [0; 4];
        client.region_read(region, 0, &mut data).unwrap();
        assert_eq!(data, [0xff; 4], "region {region}");
    }
    client.dma_unmap(0, 0x4000).unwrap();
    client.dma_map(0, 0, 0x4000, ram.as_raw_fd()).unwrap();
    assert!(port.write(0x1000, &[3]).is_err());
    ram.read_exact_at(&mut byte, 0x1000).unwrap();
    assert_eq!(byte, [1]);
    drop(client);
    server
        .wait_disconnected(Instant::now() + Duration::from_secs(10))
        .unwrap();
    let resets = toy.resets.lock().unwrap();
    assert_eq!(*resets, [ResetKind::ConnectionLost], "once");
}
