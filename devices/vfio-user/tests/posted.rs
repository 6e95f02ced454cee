//! Writes that the CPU has posted to one function are done before a peer reads there what a later message to the peer
//! tells it to; and nobody waits for them forever.

#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use p2plab_pcie::{
    BarBacking, BarDeclaration, BarMemory, CpuAccess, Declaration, Endpoint, Fabric, FabricBuilder,
    Function, Identity, Port, ResetKind,
};
use p2plab_vfio_user::Server;

const SIZE: u64 = 0x1_0000;
const VERSION: u16 = 1;
const REGION_WRITE: u16 = 10;
const NO_REPLY: u32 = 0x10;
/// Longer than anything here may take.
const LONG: Duration = Duration::from_secs(10);

/// BAR 0: registers. A write to 0 lasts until the test lets it end; one to 8 reads the bus address that it has.
/// BAR 2: memory that the CPU reaches by messages.
struct Toy {
    memory: Arc<BarMemory>,
    port: Mutex<Option<Port>>,
    /// Says when it begins, and waits.
    gate: Mutex<Option<(Sender<()>, Receiver<()>)>>,
    seen: Mutex<Sender<u64>>,
}

impl Toy {
    fn look(&self, address: u64) -> u64 {
        let port = self.port.lock().unwrap().clone().unwrap();
        let mut word = [0; 8];
        port.read(address, &mut word).unwrap();
        u64::from_le_bytes(word)
    }
}

impl Endpoint for Toy {
    fn declaration(&self) -> Declaration {
        let bar = |index, size, backing| BarDeclaration {
            index,
            size,
            is_64bit: true,
            prefetchable: index == 2,
            cpu_access: CpuAccess::Trapped,
            backing,
        };
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
                bar(0, 0x1000, BarBacking::Registers),
                bar(2, SIZE, BarBacking::Memory(self.memory.clone())),
            ],
            msix: None,
            intx: false,
        }
    }

    fn attach(&self, port: Port) {
        *self.port.lock().unwrap() = Some(port);
    }

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        if offset == 8 {
            let address = u64::from_le_bytes(data.try_into().unwrap());
            self.seen.lock().unwrap().send(self.look(address)).unwrap();
        } else if let Some((begun, end)) = &*self.gate.lock().unwrap() {
            begun.send(()).unwrap();
            let _ = end.recv_timeout(LONG);
            // What the peer does now, it would do before this returns.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn reset(&self, _kind: ResetKind) {}

    fn detach(&self) {}

    fn dump(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

/// A function that a client is connected to, with its memory at bus address `at`.
struct Served {
    toy: Arc<Toy>,
    function: Arc<Function>,
    client: UnixStream,
    at: u64,
    seen: Receiver<u64>,
    begun: Receiver<()>,
    end: Sender<()>,
    _server: Server,
}

impl Served {
    fn new(fabric: &Arc<Fabric>, port: &str, at: u64) -> Self {
        let (seen, is_seen) = channel();
        let (begun, is_begun) = channel();
        let (end, may_end) = channel();
        let toy = Arc::new(Toy {
            memory: Arc::new(BarMemory::anonymous("toy", SIZE).unwrap()),
            port: Mutex::default(),
            gate: Mutex::new(Some((begun, may_end))),
            seen: Mutex::new(seen),
        });
        let name = format!("toy-{port}");
        let function = fabric.plug(port, &name, toy.clone()).unwrap();
        let (client, stream) = UnixStream::pair().unwrap();
        let server = Server::serve_stream(stream, function.clone()).unwrap();
        let mut served = Self {
            toy,
            function,
            client,
            at,
            seen: is_seen,
            begun: is_begun,
            end,
            _server: server,
        };
        served.send(VERSION, 0, &[0; 4]);
        let mut header = [0; 16];
        served.client.read_exact(&mut header).unwrap();
        let size = u32::from_le_bytes(header[4..8].try_into().unwrap());
        let mut rest = vec![0; size as usize - 16];
        served.client.read_exact(&mut rest).unwrap();
        let words = [(0x10, at + 0x10_0000), (0x14, 0), (0x18, at), (0x1c, 0)];
        for (offset, value) in words {
            let value = u32::try_from(value).unwrap().to_le_bytes();
            served.function.config_write(offset, &value).unwrap();
        }
        served.function.config_write(4, &[6, 0]).unwrap();
        served
    }

    fn message(command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend([0, 0]);
        bytes.extend(command.to_le_bytes());
        bytes.extend((16 + payload.len() as u32).to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    }

    fn write(region: u32, offset: u64, value: u64) -> Vec<u8> {
        let mut payload = offset.to_le_bytes().to_vec();
        payload.extend(region.to_le_bytes());
        payload.extend(8u32.to_le_bytes());
        payload.extend(value.to_le_bytes());
        Self::message(REGION_WRITE, NO_REPLY, &payload)
    }

    fn send(&mut self, command: u16, flags: u32, payload: &[u8]) {
        let message = Self::message(command, flags, payload);
        self.client.write_all(&message).unwrap();
    }
}

fn pair() -> (Arc<Fabric>, Served, Served) {
    let mut builder = FabricBuilder::new();
    builder.root_port("rp").unwrap();
    builder.switch("sw", "rp").unwrap();
    builder.downstream_port("sw", "a").unwrap();
    builder.downstream_port("sw", "b").unwrap();
    let fabric = builder.build();
    let a = Served::new(&fabric, "a", 0x1000_0000);
    let b = Served::new(&fabric, "b", 0x2000_0000);
    (fabric, a, b)
}

#[test]
fn a_peer_reads_what_was_posted_before() {
    let (_fabric, mut a, b) = pair();
    for value in 1..=20 {
        // Two messages: a register write that takes long, and behind it one to memory.
        let messages = [Served::write(0, 0, 0), Served::write(2, 0x100, value)];
        a.client.write_all(&messages.concat()).unwrap();
        a.begun.recv_timeout(LONG).unwrap();
        a.end.send(()).unwrap();
        assert_eq!(b.toy.look(a.at + 0x100), value);
    }
}

/// A register write that takes long, as a doorbell may, is not waited for where no write to memory follows it.
#[test]
fn nobody_waits_for_registers() {
    let (_fabric, mut a, b) = pair();
    a.client.write_all(&Served::write(0, 0, 0)).unwrap();
    a.begun.recv_timeout(LONG).unwrap();
    // It is at work until the gate opens: whoever waited for it would do so for as long as it has patience.
    let begun = Instant::now();
    let reads = 1000;
    (0..reads).for_each(|_| assert_eq!(b.toy.look(a.at), 0));
    assert!(begun.elapsed() < reads * Duration::from_millis(10));
    a.end.send(()).unwrap();
}

#[test]
fn patience_ends() {
    let (_fabric, mut a, b) = pair();
    let messages = [Served::write(0, 0, 0), Served::write(2, 0, 7)];
    a.client.write_all(&messages.concat()).unwrap();
    a.begun.recv_timeout(LONG).unwrap();
    assert_eq!(b.toy.look(a.at), 0);
    a.end.send(()).unwrap();
    // A client that stops inside a message, too.
    a.client.write_all(&[0; 5]).unwrap();
    let begun = Instant::now();
    b.toy.look(a.at);
    assert!(begun.elapsed() < LONG);
}

/// Two functions, each served by a thread that reads the other's memory while the other has a write on its way.
#[test]
fn two_that_read_each_other_go_on() {
    let (_fabric, mut a, mut b) = pair();
    let begun = Instant::now();
    for value in 1..=200 {
        let (to_a, to_b) = (a.at, b.at);
        let messages = |peer| [Served::write(0, 8, peer), Served::write(2, 0, value)].concat();
        a.client.write_all(&messages(to_b)).unwrap();
        b.client.write_all(&messages(to_a)).unwrap();
        for side in [&a, &b] {
            let seen = side.seen.recv_timeout(LONG).unwrap();
            assert!(
                seen == value || seen == value - 1,
                "{seen} in round {value}"
            );
        }
    }
    assert!(begun.elapsed() < LONG);
}
