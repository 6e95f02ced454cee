//! A mini driver: what a host does with a card, in the test's own process and without a guest, and a peer that moves
//! bytes by DMA. Host memory is one memfd at bus address 0.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set up its rig has failed"
)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use p2plab_nvram::spec::{Event, Health, Pfail, Sts, offset};
use p2plab_nvram::{MIN_SIZE, NvramCard, NvramConfig};
use p2plab_pcie::{
    Access, BarMemory, Declaration, Endpoint, Fabric, FabricBuilder, Function, Identity, Port,
    ResetKind,
};

pub const SIZE: u64 = MIN_SIZE;
pub const HOST_MEMORY: u64 = 16 << 20;
const DEADLINE: Duration = Duration::from_secs(10);

/// Calls `condition` until it holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {DEADLINE:?} for {what}");
        std::thread::yield_now();
    }
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u8, length: usize) -> Vec<u8> {
    let byte = |i: usize| (i % 251) as u8 ^ (i / 251) as u8 ^ seed;
    (0..length).map(byte).collect()
}

/// A switch with four ports, and the host's memory.
pub struct Rig {
    pub fabric: Arc<Fabric>,
    pub memory: Arc<BarMemory>,
    plugged: u64,
}

impl Rig {
    pub fn new() -> Self {
        let mut builder = FabricBuilder::new();
        builder.root_port("rp0").unwrap();
        builder.switch("sw0", "rp0").unwrap();
        for port in 0..4 {
            builder
                .downstream_port("sw0", &format!("dp{port}"))
                .unwrap();
        }
        Self {
            fabric: builder.build(),
            memory: Arc::new(BarMemory::anonymous("host", HOST_MEMORY).unwrap()),
            plugged: 0,
        }
    }

    /// Plugs a card in and connects it; its BARs are programmed and decode.
    pub fn plug(&mut self, config: NvramConfig) -> Driver {
        self.plug_card(Arc::new(NvramCard::new(config).unwrap()))
    }

    /// The same for a card that is there, or was unplugged.
    pub fn plug_card(&mut self, card: Arc<NvramCard>) -> Driver {
        let name = format!("nvram{}", self.plugged);
        let function = self.connect(&name, card.clone());
        let registers = 0x10_0000_0000 + self.plugged * 0x1_0000;
        let memory = 0x20_0000_0000 + self.plugged * 0x2_0000_0000;
        let driver = Driver {
            card,
            function,
            name,
            registers,
            memory,
        };
        driver.set_up();
        driver
    }

    /// Plugs a bus master in.
    pub fn plug_mover(&mut self) -> (String, Arc<Mover>) {
        let mover = Arc::new(Mover::default());
        let name = format!("mover{}", self.plugged);
        let function = self.connect(&name, mover.clone());
        function.config_write(4, &6u16.to_le_bytes()).unwrap();
        (name, mover)
    }

    fn connect(&mut self, name: &str, endpoint: Arc<dyn Endpoint>) -> Arc<Function> {
        let port = format!("dp{}", self.plugged);
        self.plugged += 1;
        let function = self.fabric.plug(&port, name, endpoint).unwrap();
        function.connect();
        let file: OwnedFd = self.memory.file().try_clone().unwrap().into();
        let access = Access {
            read: true,
            write: true,
        };
        function
            .map_host_memory(0, HOST_MEMORY, access, Some(file), 0)
            .unwrap();
        function
    }
}

/// A host's view of a card.
pub struct Driver {
    pub card: Arc<NvramCard>,
    pub function: Arc<Function>,
    /// In the fabric.
    pub name: String,
    /// Bus address of BAR 0.
    pub registers: u64,
    /// Bus address of BAR 4.
    pub memory: u64,
}

impl Driver {
    /// What a host does with a function that was reset: BARs, Command register.
    pub fn set_up(&self) {
        for (at, address) in [(0x10, self.registers), (0x20, self.memory)] {
            self.function
                .config_write(at, &address.to_le_bytes())
                .unwrap();
        }
        self.function.config_write(4, &6u16.to_le_bytes()).unwrap();
    }

    pub fn read32(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.function.bar_read(0, at, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    pub fn read64(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(0, at, &mut data).unwrap();
        u64::from_le_bytes(data)
    }

    pub fn write32(&self, at: u64, value: u32) {
        self.function
            .bar_write(0, at, &value.to_le_bytes())
            .unwrap();
    }

    pub fn status(&self) -> Sts {
        Sts::from_bits(self.read32(offset::STS))
    }

    pub fn health(&self) -> Health {
        Health::from_bits(self.read32(offset::HEALTH))
    }

    pub fn event(&self) -> Event {
        Event::from_bits(self.read32(offset::EVENT))
    }

    pub fn outcome(&self) -> u8 {
        Pfail::from_bits(self.read32(offset::PFAIL)).outcome()
    }

    /// Arms the card, or disarms it, and waits until it is done with that.
    pub fn arm(&self, arm: bool) {
        self.write32(offset::CTRL, arm.into());
        self.wait_idle();
    }

    /// Flushes.
    pub fn flush(&self) {
        self.write32(offset::FLUSH, 1);
        self.wait_idle();
    }

    pub fn wait_idle(&self) {
        wait_until("STS.FLUSHING to clear", || {
            let sts = self.status();
            !sts.flushing() && !sts.arming()
        });
    }

    /// The CPU writes to the memory.
    pub fn store(&self, at: u64, data: &[u8]) {
        self.function.bar_write(4, at, data).unwrap();
    }

    /// The CPU reads the memory.
    pub fn load(&self, at: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.function.bar_read(4, at, &mut data).unwrap();
        data
    }

    /// Function Level Reset (Device Control, Initiate Function Level Reset), and the BARs again.
    pub fn function_level_reset(&self) {
        self.function.reset(ResetKind::FunctionLevel);
        self.set_up();
    }

    /// An eventfd as INTx' trigger.
    pub fn intx(&self) -> Signal {
        let signal = Signal::new();
        self.function.set_intx_trigger(Some(signal.trigger()));
        signal
    }

    /// Enables MSI-X with an eventfd behind vector 0.
    pub fn msix(&self) -> Signal {
        let signal = Signal::new();
        self.function
            .set_msix_trigger(0, Some(signal.trigger()))
            .unwrap();
        // Message Address, Data, and Vector Control: not masked.
        let entry = [0xfee0_0000u32, 0, 0x41, 0];
        for (at, word) in (0x2000..).step_by(4).zip(entry) {
            self.write32(at, word);
        }
        let capability = self.capability(0x11);
        let control = 0x8000u16;
        self.function
            .config_write(capability + 2, &control.to_le_bytes())
            .unwrap();
        signal
    }

    /// Offset of the capability `id` in config space.
    pub fn capability(&self, id: u8) -> u64 {
        let byte = |at: u64| {
            let mut data = [0];
            self.function.config_read(at, &mut data).unwrap();
            data[0]
        };
        let mut at = byte(0x34);
        while byte(at.into()) != id {
            at = byte(u64::from(at) + 1);
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at.into()
    }
}

/// What a transport hears of interrupts.
pub struct Signal(File);

impl Signal {
    fn new() -> Self {
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        Self(rustix::event::eventfd(0, flags).unwrap().into())
    }

    fn trigger(&self) -> File {
        self.0.try_clone().unwrap()
    }

    /// How often it was triggered since this was last asked.
    pub fn take(&self) -> u64 {
        let mut data = [0; 8];
        match rustix::io::read(&self.0, &mut data) {
            Ok(_) => u64::from_ne_bytes(data),
            Err(_) => 0,
        }
    }
}

/// An endpoint that is told what to move.
#[derive(Default)]
pub struct Mover {
    port: OnceLock<Port>,
}

impl Mover {
    pub fn port(&self) -> &Port {
        self.port.get().unwrap()
    }
}

impl Endpoint for Mover {
    fn declaration(&self) -> Declaration {
        Declaration {
            identity: Identity {
                vendor_id: 0x1234,
                device_id: 0x5678,
                subsystem_vendor_id: 0,
                subsystem_id: 0,
                revision_id: 1,
                class_code: 0xff_0000,
                serial_number: None,
            },
            bars: Vec::new(),
            msix: None,
            intx: false,
        }
    }

    fn attach(&self, port: Port) {
        assert!(self.port.set(port).is_ok());
    }

    fn bar_read(&self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self, _kind: ResetKind) {}

    fn detach(&self) {}

    fn dump(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}
