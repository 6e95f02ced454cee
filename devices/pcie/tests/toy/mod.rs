//! A toy endpoint and a fabric to plug it into, for tests and benchmarks of this crate.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};

use p2plab_pcie::{
    Access, BarBacking, BarDeclaration, BarMemory, CpuAccess, Declaration, Endpoint, Fabric,
    FabricBuilder, Function, Identity, MsixDeclaration, Port, ResetKind,
};

pub const MIB: u64 = 1 << 20;
/// Host memory starts here.
pub const HOST: u64 = 0x1_0000_0000;

/// A register BAR 0 that records writes, and 2 MiB of memory in BAR 2.
pub struct Toy {
    pub memory: Arc<BarMemory>,
    pub port: OnceLock<Port>,
    pub writes: Mutex<Vec<(u64, Vec<u8>)>>,
    pub resets: Mutex<Vec<ResetKind>>,
    pub cpu_access: CpuAccess,
}

impl Toy {
    pub fn new(cpu_access: CpuAccess) -> Arc<Self> {
        Arc::new(Self {
            memory: Arc::new(BarMemory::anonymous("toy", 2 * MIB).unwrap()),
            port: OnceLock::new(),
            writes: Mutex::default(),
            resets: Mutex::default(),
            cpu_access,
        })
    }

    pub fn port(&self) -> &Port {
        self.port.get().unwrap()
    }
}

impl Endpoint for Toy {
    fn declaration(&self) -> Declaration {
        let bar = |index, size, backing, cpu_access| BarDeclaration {
            index,
            size,
            is_64bit: true,
            prefetchable: index == 2,
            cpu_access,
            backing,
        };
        Declaration {
            identity: Identity {
                vendor_id: 0x1234,
                device_id: 0x5678,
                subsystem_vendor_id: 0,
                subsystem_id: 0,
                revision_id: 1,
                class_code: 0xff_0000,
                serial_number: Some(1),
            },
            bars: vec![
                bar(0, 0x4000, BarBacking::Registers, CpuAccess::Trapped),
                bar(
                    2,
                    2 * MIB,
                    BarBacking::Memory(self.memory.clone()),
                    self.cpu_access,
                ),
            ],
            msix: Some(MsixDeclaration {
                vectors: 4,
                bar: 0,
                table_offset: 0x2000,
                pba_offset: 0x3000,
            }),
            intx: true,
        }
    }

    fn attach(&self, port: Port) {
        assert!(self.port.set(port).is_ok());
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = (offset as u8).wrapping_add(index as u8);
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        self.writes.lock().unwrap().push((offset, data.to_vec()));
    }

    fn reset(&self, kind: ResetKind) {
        self.resets.lock().unwrap().push(kind);
    }

    fn detach(&self) {}

    fn dump(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

/// A plugged toy with its BARs at `registers` and `memory`, bus mastering on, 1 MiB of host memory.
pub struct Plugged {
    pub toy: Arc<Toy>,
    pub function: Arc<Function>,
    pub registers: u64,
    pub memory: u64,
}

pub fn plug(fabric: &Arc<Fabric>, port: &str, name: &str, number: u64) -> Plugged {
    let toy = Toy::new(CpuAccess::Trapped);
    let function = fabric.plug(port, name, toy.clone()).unwrap();
    let (registers, memory) = (
        0xe000_0000 + number * 0x4000,
        0x80_0000_0000 + number * 2 * MIB,
    );
    function.connect();
    for (offset, address) in [(0x10, registers), (0x18, memory)] {
        function
            .config_write(offset, &(address as u32).to_le_bytes())
            .unwrap();
        function
            .config_write(offset + 4, &((address >> 32) as u32).to_le_bytes())
            .unwrap();
    }
    command(&function, true, true);
    let file = memfd(MIB);
    let access = Access {
        read: true,
        write: true,
    };
    function
        .map_host_memory(HOST, MIB, access, Some(file), 0)
        .unwrap();
    Plugged {
        toy,
        function,
        registers,
        memory,
    }
}

/// Writes the command register: memory space and bus master enable.
pub fn command(function: &Function, memory_space: bool, bus_master: bool) {
    let value = u16::from(memory_space) << 1 | u16::from(bus_master) << 2;
    function.config_write(4, &value.to_le_bytes()).unwrap();
}

pub fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("host", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(fd.as_fd(), size).unwrap();
    fd
}

/// One root port with a switch of `ports` downstream ports, `sw.0` and on.
pub fn one_switch(ports: usize) -> Arc<Fabric> {
    let mut builder = FabricBuilder::new();
    builder.root_port("rp").unwrap();
    builder.switch("sw", "rp").unwrap();
    for port in 0..ports {
        builder
            .downstream_port("sw", &format!("sw.{port}"))
            .unwrap();
    }
    builder.build()
}
