//! Endpoints that come, go, move and misbehave: what the fabric remembers of them, and what it forgets.
#![allow(missing_docs, clippy::unwrap_used)]

mod toy;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use p2plab_pcie::{
    CpuAccess, Declaration, DmaError, Endpoint, Fabric, FabricBuilder, FabricError, Port, ResetKind,
};
use toy::{HOST, Toy, one_switch, plug};

/// A toy with a fault.
struct Faulty {
    toy: Arc<Toy>,
    bad_declaration: bool,
    detached: AtomicBool,
}

impl Faulty {
    fn new(bad_declaration: bool) -> Arc<Self> {
        Arc::new(Self {
            toy: Toy::new(CpuAccess::Trapped),
            bad_declaration,
            detached: AtomicBool::new(false),
        })
    }
}

impl Endpoint for Faulty {
    fn declaration(&self) -> Declaration {
        let mut declaration = self.toy.declaration();
        if self.bad_declaration {
            // A DMA to all of it would take a buffer as large.
            declaration.bars[0].size = 1 << 40;
        }
        declaration
    }
    fn attach(&self, port: Port) {
        self.toy.attach(port);
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.toy.bar_read(bar, offset, data);
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.toy.bar_write(bar, offset, data);
    }
    fn reset(&self, _: ResetKind) {}
    fn detach(&self) {
        self.detached.store(true, Ordering::SeqCst);
    }
    fn dump(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

#[test]
fn a_refused_endpoint_leaves_no_trace() {
    let fabric = one_switch(1);
    let before = fabric.traffic();
    let error = fabric.plug("sw.0", "bad", Faulty::new(true)).err().unwrap();
    assert!(matches!(error, FabricError::BadDeclaration { .. }));
    assert!(error.to_string().contains("must be memory"), "{error}");
    assert_eq!(fabric.traffic(), before);
    assert!(fabric.find("bad").is_none());
    fabric.plug("sw.0", "bad", Faulty::new(false)).unwrap();
}

/// Readings tell the two places apart, or neither differences nor laws could hold.
#[test]
fn an_endpoint_that_moves_keeps_its_name_and_gets_new_counters() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    a.toy.port().write(HOST, &[0; 64]).unwrap();
    fabric.unplug("a").unwrap();
    let before = fabric.traffic();
    let moved = plug(&fabric, "sw.1", "a", 0);
    assert!(fabric.find("a").is_some());
    moved.toy.port().write(HOST, &[0; 8]).unwrap();
    let traffic = fabric.traffic();
    traffic.check().unwrap();
    let since = traffic.since(&before);
    since.check().unwrap();
    let sent = |name: &str| since.port(name).unwrap().egress.posted.payload_bytes;
    assert_eq!((sent("a"), sent("a@sw.1")), (0, 8));
    fabric.unplug("a").unwrap();
    let back = plug(&fabric, "sw.0", "a", 0);
    back.toy.port().write(HOST, &[0; 4]).unwrap();
    let traffic = fabric.traffic();
    traffic.check().unwrap();
    assert_eq!(traffic.port("a").unwrap().egress.posted.payload_bytes, 68);
}

#[test]
fn the_port_of_an_unplugged_endpoint_is_not_its_successors() {
    let fabric = one_switch(2);
    let old = plug(&fabric, "sw.0", "a", 0);
    let peer = plug(&fabric, "sw.1", "b", 1);
    fabric.unplug("a").unwrap();
    let new = plug(&fabric, "sw.0", "a", 0);
    new.toy.port().write(peer.memory, &[1]).unwrap();
    let result = old.toy.port().write(peer.memory, &[2]);
    assert!(matches!(result, Err(DmaError::LinkDown)));
    // Nor does what the old function's transport still does count, or reach the endpoint.
    let before = fabric.traffic();
    old.function.bar_write(0, 0, &[1; 4]).unwrap();
    let mut data = [0; 4];
    old.function.bar_read(2, 0, &mut data).unwrap();
    assert_eq!(data, [0xff; 4]);
    assert_eq!(fabric.traffic(), before);
    assert!(old.toy.writes.lock().unwrap().is_empty());
}

#[test]
fn what_was_not_seen_stays_unseen() {
    let fabric = one_switch(2);
    fabric
        .plug("sw.0", "a", Toy::new(CpuAccess::Mapped))
        .unwrap();
    fabric.unplug("a").unwrap();
    let traffic = fabric.traffic();
    for port in ["a", "sw.0", "sw", "rp"] {
        assert!(!traffic.port(port).unwrap().cpu_accesses_observed, "{port}");
    }
    assert!(traffic.port("sw.1").unwrap().cpu_accesses_observed);
}

/// Two threads unplug one endpoint while its successor comes: whoever is not plugged in was detached.
#[test]
fn a_late_unplug_does_not_take_the_successor_away() {
    for _ in 0..300 {
        let fabric = one_switch(1);
        fabric.plug("sw.0", "a", Faulty::new(false)).unwrap();
        let start = Barrier::new(2);
        let next = Faulty::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                let _ = fabric.unplug("a");
                let _ = fabric.plug("sw.0", "a", next.clone());
            });
            start.wait();
            let _ = fabric.unplug("a");
        });
        let gone = fabric.find("a").is_none();
        let was_plugged = next.toy.port.get().is_some();
        assert!(!gone || !was_plugged || next.detached.load(Ordering::SeqCst));
    }
}

/// An endpoint whose reset waits for its own DMA, as it must.
struct Busy {
    toy: Arc<Toy>,
    idle: std::sync::Mutex<()>,
}

impl Endpoint for Busy {
    fn declaration(&self) -> Declaration {
        self.toy.declaration()
    }
    fn attach(&self, port: Port) {
        self.toy.attach(port);
    }
    fn bar_read(&self, _: u8, _: u64, _: &mut [u8]) {}
    fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
    fn reset(&self, _: ResetKind) {
        drop(self.idle.lock().unwrap());
    }
    fn detach(&self) {}
    fn dump(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

/// The last owner goes while an endpoint's thread is inside a DMA: the teardown must not run on that thread,
/// which it would wait for.
#[test]
fn a_fabric_may_be_dropped_while_dma_is_in_flight() {
    let mut builder = FabricBuilder::new();
    builder.root_port("rp").unwrap();
    let fabric: Arc<Fabric> = builder.build();
    let busy = Arc::new(Busy {
        toy: Toy::new(CpuAccess::Trapped),
        idle: std::sync::Mutex::default(),
    });
    let function = fabric.plug("rp", "busy", busy.clone()).unwrap();
    function.connect();
    toy::command(&function, true, true);
    let (inside, is_inside) = channel();
    let (release, released) = channel::<()>();
    let (done, is_done) = channel();
    std::thread::spawn(move || {
        let idle = busy.idle.lock().unwrap();
        let port = busy.toy.port();
        let _ = port.read_ranges(&[], |_| {
            inside.send(()).unwrap();
            released.recv().unwrap();
            Ok(())
        });
        drop(idle);
        done.send(()).unwrap();
    });
    is_inside.recv().unwrap();
    let gone = Arc::downgrade(&fabric);
    let dropping = std::thread::spawn(move || drop(fabric));
    while !dropping.is_finished() && gone.strong_count() > 0 {
        std::thread::yield_now();
    }
    release.send(()).unwrap();
    is_done
        .recv_timeout(Duration::from_secs(10))
        .expect("the DMA's thread to come back from the DMA");
    dropping.join().unwrap();
}
