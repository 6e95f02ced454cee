//! A function as its transport sees it.

use std::sync::{Arc, Mutex, Weak};

use super::test_support::{count, eventfd};
use super::*;
use crate::endpoint::{CpuAccess, Identity, MsixDeclaration};
use crate::memory::BarMemory;
use crate::port::Port;

/// All that happens around a function, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Reset(ResetKind),
    Detach,
    Read(u8, u64, usize),
    Write(u8, u64, Vec<u8>),
    Config(bool, usize),
    CpuRead(u64, usize),
    CpuWrite(u64, usize),
    /// Link up, decodes, may send.
    Decode(bool, bool, bool),
    /// Posted, length.
    CpuRefused(bool, usize),
    DelayedMsix(usize),
}

#[derive(Default)]
struct Recorder {
    events: Mutex<Vec<Event>>,
    /// An endpoint that is called with a lock of the function held would hang in here.
    function: Mutex<Weak<Function>>,
}

impl Recorder {
    fn push(&self, event: Event) {
        lock(&self.events).push(event);
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *lock(&self.events))
    }

    /// What an endpoint does to its function from inside a call.
    fn call_back(&self) {
        let function = lock(&self.function).upgrade();
        if let Some(function) = function {
            let level = lock(&function.intx).asserted;
            function.set_intx_level(!level);
            function.set_intx_level(level);
            lock(&function.config).set_interrupt_status(level);
            function.send_msix(u16::MAX);
            function.decode_state();
        }
    }
}

struct Device(Arc<Recorder>);

impl Endpoint for Device {
    fn declaration(&self) -> Declaration {
        declaration()
    }
    fn attach(&self, _: Port) {}
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
        self.0.push(Event::Read(bar, offset, data.len()));
        self.0.call_back();
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.0.push(Event::Write(bar, offset, data.to_vec()));
        self.0.call_back();
    }
    fn reset(&self, kind: ResetKind) {
        self.0.push(Event::Reset(kind));
        self.0.call_back();
    }
    fn detach(&self) {
        self.0.push(Event::Detach);
    }
    fn dump(&self) -> serde_json::Value {
        serde_json::json!({ "kind": "test" })
    }
}

impl FunctionLink for Recorder {
    fn count_config(&self, write: bool, length: usize) {
        self.push(Event::Config(write, length));
    }
    fn count_cpu_read(&self, address: u64, length: usize) {
        self.push(Event::CpuRead(address, length));
    }
    fn count_cpu_write(&self, address: u64, length: usize) {
        self.push(Event::CpuWrite(address, length));
    }
    fn decode_changed(&self, state: &DecodeState) {
        self.push(Event::Decode(
            state.link_up,
            state.decodes(),
            state.may_send(),
        ));
    }
    fn count_cpu_refused(&self, write: bool, _: u64, length: usize) {
        self.push(Event::CpuRefused(write, length));
    }
    fn count_delayed_msix(&self, messages: usize) {
        self.push(Event::DelayedMsix(messages));
    }
}

fn declaration() -> Declaration {
    let memory = BarMemory::anonymous("test", 0x1000).unwrap();
    let registers = BarDeclaration {
        index: 0,
        size: 0x4000,
        is_64bit: true,
        prefetchable: false,
        cpu_access: CpuAccess::Trapped,
        backing: BarBacking::Registers,
    };
    let memory = BarDeclaration {
        index: 2,
        size: 0x1000,
        backing: BarBacking::Memory(Arc::new(memory)),
        ..registers.clone()
    };
    Declaration {
        identity: Identity {
            vendor_id: 0x1b36,
            device_id: 0x10,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
            revision_id: 0,
            class_code: 0x01_0802,
            serial_number: None,
        },
        bars: vec![registers, memory],
        msix: Some(MsixDeclaration {
            vectors: 4,
            bar: 0,
            table_offset: 0x2000,
            pba_offset: 0x3000,
        }),
        intx: true,
    }
}

const COMMAND: u64 = 4;
const BAR_0: u64 = 0x10;
const BAR_2: u64 = 0x18;
const MSIX_CONTROL: u64 = 0x52;
const POWER: u64 = 0x44;
const DEVICE_CONTROL: u64 = 0x68;

/// A function after power-on.
fn powered_on() -> (Arc<Function>, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    let host = Arc::new(HostMemory::new());
    let device = Arc::new(Device(recorder.clone()));
    let function = Function::new(
        "ssd0".to_owned(),
        device,
        declaration(),
        host,
        recorder.clone(),
    )
    .unwrap();
    *lock(&recorder.function) = Arc::downgrade(&function);
    (function, recorder)
}

/// A function with BARs at 0x10000 and 0x20000, memory space and bus master on, MSI-X on if wanted.
fn running(msix: bool) -> (Arc<Function>, Arc<Recorder>) {
    let (function, recorder) = powered_on();
    function.connect();
    function
        .config_write(BAR_0, &0x1_0000u64.to_le_bytes())
        .unwrap();
    function
        .config_write(BAR_2, &0x2_0000u64.to_le_bytes())
        .unwrap();
    function.config_write(COMMAND, &[6, 0]).unwrap();
    if msix {
        function
            .config_write(MSIX_CONTROL, &0x8000u16.to_le_bytes())
            .unwrap();
    }
    recorder.take();
    (function, recorder)
}

fn interrupt_status(function: &Function) -> bool {
    let mut status = [0; 2];
    function.config_read(6, &mut status).unwrap();
    status[0] & 8 != 0
}

#[test]
fn accesses_are_served_and_counted() {
    let (function, recorder) = running(false);
    let mut data = [0; 4];
    function.bar_read(0, 0x1c, &mut data).unwrap();
    assert_eq!(data, [0x5a; 4]);
    function.bar_write(2, 0xffe, &[7, 8]).unwrap();
    function.bar_read(2, 0xffc, &mut data).unwrap();
    assert_eq!(data, [0, 0, 7, 8]);
    function.config_read(0, &mut data).unwrap();
    assert_eq!(
        recorder.take(),
        [
            Event::CpuRead(0x1_001c, 4),
            Event::Read(0, 0x1c, 4),
            Event::CpuWrite(0x2_0ffe, 2),
            Event::CpuRead(0x2_0ffc, 4),
            Event::Config(false, 4),
        ]
    );
}

#[test]
fn accesses_that_leave_their_region_are_refused() {
    let (function, recorder) = running(false);
    let mut data = [0; 8];
    for (bar, offset) in [(0, 0x3ffc), (0, u64::MAX), (1, 0), (3, 0), (6, 0), (255, 0)] {
        assert_eq!(function.bar_read(bar, offset, &mut data), Err(OutOfBounds));
        assert_eq!(function.bar_write(bar, offset, &data), Err(OutOfBounds));
        data.fill(0);
        function.peer_read(bar, offset, &mut data);
        assert_eq!(data, [0xff; 8]);
        function.peer_write(bar, offset, &data);
    }
    assert_eq!(function.config_read(4089, &mut data), Err(OutOfBounds));
    assert_eq!(function.config_write(u64::MAX, &data), Err(OutOfBounds));
    assert_eq!(function.bar_read(0, 0x4000, &mut []), Ok(()));
    assert_eq!(function.config_write(4096, &[]), Ok(()));
    assert_eq!(recorder.take(), []);
    assert_eq!(
        [0, 1, 2, 9].map(|bar| function.bar_size(bar)),
        [0x4000, 0, 0x1000, 0]
    );
}

#[test]
fn an_access_is_split_at_the_msix_structures() {
    let (function, recorder) = running(false);
    function.bar_write(0, 0x1ffc, &[0x11; 8]).unwrap();
    let mut data = [0; 8];
    function.bar_read(0, 0x1ffc, &mut data).unwrap();
    assert_eq!(data, [0x5a, 0x5a, 0x5a, 0x5a, 0x10, 0x11, 0x11, 0x11]);
    function.bar_write(0, 0x3004, &[0xff; 8]).unwrap();
    function.peer_read(0, 0x3004, &mut data);
    assert_eq!(data, [0, 0, 0, 0, 0x5a, 0x5a, 0x5a, 0x5a]);
    let device: Vec<_> = recorder.take();
    assert!(device.contains(&Event::Write(0, 0x1ffc, vec![0x11; 4])));
    assert!(device.contains(&Event::Read(0, 0x1ffc, 4)));
    assert!(device.contains(&Event::Write(0, 0x3008, vec![0xff; 4])));
    assert!(device.contains(&Event::Read(0, 0x3008, 4)));
}

#[test]
fn without_decoding_nothing_answers() {
    for off in [(COMMAND, [4, 0]), (POWER, [3, 0])] {
        let (function, recorder) = running(false);
        function.config_write(off.0, &off.1).unwrap();
        recorder.take();
        let mut data = [0; 4];
        function.bar_read(0, 0, &mut data).unwrap();
        assert_eq!(data, [0xff; 4]);
        function.bar_write(2, 0, &[1]).unwrap();
        assert_eq!(
            recorder.take(),
            [Event::CpuRefused(false, 4), Event::CpuRefused(true, 1)]
        );
        let mut status = [0; 2];
        function
            .config_read(DEVICE_CONTROL + 2, &mut status)
            .unwrap();
        assert_eq!(
            status[0], 0xb,
            "correctable, non-fatal, unsupported request"
        );
    }
}

#[test]
fn flr_resets_the_endpoint_and_then_config_space() {
    let (function, recorder) = running(true);
    let (ours, theirs) = eventfd();
    function.set_msix_trigger(1, Some(theirs)).unwrap();
    function.config_write(DEVICE_CONTROL + 1, &[0x80]).unwrap();
    assert_eq!(
        recorder.take(),
        [
            Event::Config(true, 1),
            // The write also cleared Max_Read_Request_Size.
            Event::Decode(true, true, true),
            // Before the endpoint is reset: no peer's access may follow.
            Event::Decode(true, false, true),
            Event::Reset(ResetKind::FunctionLevel),
            Event::Decode(true, false, false),
        ]
    );
    assert_eq!(function.decode_state().bar_address(0), Some(0));
    assert_eq!(function.send_msix(1), Delivery::Disabled);
    function.config_write(COMMAND, &[6]).unwrap();
    function.config_write(MSIX_CONTROL + 1, &[0x80]).unwrap();
    assert_eq!(
        function.send_msix(1),
        Delivery::Sent,
        "triggers are the transport's"
    );
    assert_eq!(count(&ours), 1);
}

#[test]
fn msix_needs_bus_master_and_a_link() {
    let (function, recorder) = running(true);
    let (ours, theirs) = eventfd();
    function.set_msix_trigger(3, Some(theirs)).unwrap();
    assert_eq!(function.set_msix_trigger(4, None), Err(OutOfBounds));
    assert_eq!(function.send_msix(3), Delivery::Sent);
    function.config_write(COMMAND, &[2]).unwrap();
    assert_eq!(function.send_msix(3), Delivery::Disabled);
    function.config_write(COMMAND, &[6]).unwrap();
    assert_eq!(count(&ours), 1);

    function
        .config_write(MSIX_CONTROL, &0xc000u16.to_le_bytes())
        .unwrap();
    assert_eq!(function.send_msix(3), Delivery::Pending);
    recorder.take();
    function
        .config_write(MSIX_CONTROL, &0x8000u16.to_le_bytes())
        .unwrap();
    assert!(recorder.take().contains(&Event::DelayedMsix(1)));
    assert_eq!(count(&ours), 1);

    // Vector 3 is masked by a driver that owns the table, and unmasked.
    function.bar_write(0, 0x203c, &[1, 0, 0, 0]).unwrap();
    assert_eq!(function.send_msix(3), Delivery::Pending);
    recorder.take();
    function.bar_write(0, 0x203c, &[0, 0, 0, 0]).unwrap();
    assert!(recorder.take().contains(&Event::DelayedMsix(1)));
    function.disconnect();
    assert_eq!(function.send_msix(3), Delivery::Disabled);
}

#[test]
fn intx_carries_a_level() {
    let (function, _) = running(false);
    let (ours, theirs) = eventfd();
    function.set_intx_level(true);
    function.set_intx_trigger(Some(theirs));
    assert_eq!(count(&ours), 1, "the level was there before the trigger");
    assert!(interrupt_status(&function));
    function.set_intx_level(true);
    assert_eq!(count(&ours), 0, "no change, no edge");
    function.mask_intx(true);
    function.set_intx_level(false);
    function.set_intx_level(true);
    assert_eq!(count(&ours), 0);
    function.mask_intx(false);
    assert_eq!(count(&ours), 1);
    function.mask_intx(false);
    assert_eq!(count(&ours), 1, "an unmask asks for the level again");
    function.set_intx_level(false);
    assert!(!interrupt_status(&function));
    function.mask_intx(false);
    assert_eq!(count(&ours), 0);
}

/// What QEMU does without KVM: a trigger raises the line; when the guest has touched the device, it lowers
/// the line and unmasks.
#[test]
fn intx_works_with_a_consumer_like_qemus() {
    let (function, _) = running(false);
    let (ours, theirs) = eventfd();
    function.set_intx_trigger(Some(theirs));
    function.set_intx_level(true);
    assert_eq!(count(&ours), 1);
    // The level bounces before the guest has looked: the line is up already.
    function.set_intx_level(false);
    function.set_intx_level(true);
    assert_eq!(count(&ours), 0, "masked by its own trigger");
    // Handled, but asserted for something else: the line goes up again.
    function.mask_intx(false);
    assert_eq!(count(&ours), 1);
    function.set_intx_level(false);
    function.mask_intx(false);
    assert_eq!(count(&ours), 0, "handled and silent");
    function.set_intx_level(true);
    assert_eq!(count(&ours), 1, "nothing is lost after an unmask");
    // Interrupts are switched off before the guest has looked, and on again: nothing stays masked.
    function.set_intx_trigger(None);
    let (ours, theirs) = eventfd();
    function.set_intx_trigger(Some(theirs));
    assert_eq!(count(&ours), 1);
    function.mask_intx(true);
    function.set_intx_trigger(None);
    let (ours, theirs) = eventfd();
    function.set_intx_trigger(Some(theirs));
    assert_eq!(count(&ours), 1);
}

#[test]
fn intx_respects_config_space() {
    let (function, _) = running(false);
    let (ours, theirs) = eventfd();
    function.set_intx_trigger(Some(theirs));
    function.config_write(COMMAND + 1, &[4]).unwrap();
    function.set_intx_level(true);
    assert_eq!(count(&ours), 0);
    assert!(
        interrupt_status(&function),
        "Interrupt Status ignores Interrupt Disable"
    );
    function.config_write(COMMAND + 1, &[0]).unwrap();
    assert_eq!(count(&ours), 1);
    function.config_write(MSIX_CONTROL + 1, &[0x80]).unwrap();
    function.mask_intx(false);
    assert_eq!(count(&ours), 0, "MSI-X takes the place of the pin");
    function.reset(ResetKind::Conventional);
    assert!(!interrupt_status(&function));
}

#[test]
fn disconnecting_goes_in_order_and_leaves_nothing() {
    let (function, recorder) = running(true);
    let (msix, theirs) = eventfd();
    function.set_msix_trigger(0, Some(theirs)).unwrap();
    let access = Access {
        read: true,
        write: true,
    };
    function
        .map_host_memory(0, 0x1000, access, None, 0)
        .unwrap();
    function.disconnect();
    assert_eq!(
        recorder.take(),
        [
            Event::Decode(false, true, true),
            // Before the endpoint is reset: no peer's access may follow.
            Event::Decode(false, false, true),
            Event::Reset(ResetKind::ConnectionLost),
            Event::Decode(false, false, false),
        ]
    );
    assert!(function.unmap_host_memory(0, 0x1000).is_err());

    function.connect();
    function.config_write(COMMAND, &[6]).unwrap();
    function.config_write(MSIX_CONTROL + 1, &[0x80]).unwrap();
    assert_eq!(
        function.send_msix(0),
        Delivery::Pending,
        "the old trigger is gone"
    );
    assert_eq!(count(&msix), 0);
}

#[test]
fn a_detached_function_stays_away() {
    let (function, recorder) = running(false);
    function.detach();
    function.detach();
    let events = recorder.take();
    assert_eq!(events.last(), Some(&Event::Detach));
    assert_eq!(
        events
            .iter()
            .filter(|event| **event == Event::Detach)
            .count(),
        1
    );
    function.connect();
    function.config_write(COMMAND, &[6]).unwrap();
    function.reset(ResetKind::Conventional);
    function.bar_write(0, 0, &[1]).unwrap();
    let mut data = [0; 4];
    function.bar_read(0, 0, &mut data).unwrap();
    assert_eq!(data, [0xff; 4]);
    function.config_read(0, &mut data).unwrap();
    assert_eq!(data, [0xff; 4]);
    assert_eq!(recorder.take(), [], "as in an empty slot");
}

#[test]
fn dumps_say_what_is_programmed() {
    let (function, _) = running(true);
    let dump = function.dump();
    assert_eq!(dump["name"], "ssd0");
    assert_eq!(dump["endpoint"]["kind"], "test");
    assert_eq!(dump["pcie"]["bars"][2], 0x2_0000);
    assert_eq!(dump["pcie"]["msix"]["enabled"], true);
    assert_eq!(function.msix_vectors(), 4);
}
