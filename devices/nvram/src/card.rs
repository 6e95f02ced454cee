//! The card as an [`Endpoint`]: what it declares, its interrupt, its resets, its thread, and the power cut.
//!
//! Lock order: `power`, then `interrupt`, then `registers`. Nothing is called with `registers` held.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{Builder, JoinHandle};

use p2plab_pcie::{
    BarDeclaration, BarMemory, Declaration, Endpoint, Identity, MsixDeclaration, Port, ResetKind,
    digest,
};
use serde_json::{Map, Value, json};

use crate::config::{NvramConfig, NvramError};
use crate::memory::Memory;
use crate::regs::{Constants, Fault, REGISTERS, Registers};
use crate::spec::{
    CLASS_CODE, DEVICE_ID, MSIX_PBA, MSIX_TABLE, REGISTERS_BAR, REGISTERS_SIZE, VENDOR_ID, outcome,
};

/// What the card's thread shares with everybody else.
struct Shared {
    config: NvramConfig,
    serial_number: u64,
    memory: Memory,
    state: Mutex<State>,
    /// A flush is due, or the thread is to end.
    wake: Condvar,
    port: RwLock<Option<Port>>,
    /// Level of INTx as last set. The lock keeps levels and messages in the order in which they were found.
    interrupt: Mutex<bool>,
}

struct State {
    registers: Registers,
    /// The thread is to end.
    exit: bool,
}

/// An NVRAM card.
pub struct NvramCard {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Held while the power is off.
    power: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A device answers its guest to the last, whoever panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn port(&self) -> Option<Port> {
        let port = self.port.read();
        port.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Does `change` to the registers, and what follows from it: flush, interrupt.
    fn change<T>(&self, change: impl FnOnce(&mut Registers) -> T) -> T {
        let mut interrupt = lock(&self.interrupt);
        let (done, wanted, messages) = {
            let mut state = lock(&self.state);
            let done = change(&mut state.registers);
            let messages = state.registers.take_messages();
            (done, state.registers.interrupts(), messages)
        };
        self.wake.notify_all();
        if let Some(port) = self.port() {
            self.interrupt(&port, &mut interrupt, wanted, messages);
        }
        done
    }

    fn interrupt(&self, port: &Port, level: &mut bool, wanted: bool, messages: u32) {
        let msix = port.msix_enabled();
        if msix {
            (0..messages).for_each(|_| port.msix(0));
        }
        let wanted = wanted && !msix;
        if wanted != *level {
            port.set_intx(wanted);
            *level = wanted;
        }
    }

    /// The card's thread: flushes that are due.
    fn run(&self) {
        let mut state = lock(&self.state);
        while !state.exit {
            let Some(flush) = state.registers.begin_flush() else {
                state = self
                    .wake
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let result = self.memory.flush();
            self.change(|registers| registers.end_flush(flush, &result));
            state = lock(&self.state);
        }
    }
}

impl NvramCard {
    /// Makes a card: opens its file, or takes its memory.
    ///
    /// # Errors
    /// [`NvramError`], whose text is for the user who wrote the configuration.
    pub fn new(config: NvramConfig) -> Result<Self, NvramError> {
        config.check()?;
        let memory = Memory::open(&config)?;
        // An EUI-64 with the local bit set: no registry gave it.
        let serial_number = digest(&config.name, 0x6e76_7261) & !(3 << 56) | 2 << 56;
        let registers = Registers::new(Constants {
            size: config.size,
            serial_number,
            is_file: memory.is_file,
            armed: config.armed,
        });
        let card = Self {
            shared: Arc::new(Shared {
                serial_number,
                memory,
                state: Mutex::new(State {
                    registers,
                    exit: false,
                }),
                wake: Condvar::new(),
                port: RwLock::new(None),
                interrupt: Mutex::new(false),
                config,
            }),
            thread: Mutex::new(None),
            power: Mutex::new(()),
        };
        for fault in &card.shared.config.faults {
            card.set_fault(*fault, true);
        }
        Ok(card)
    }

    /// The memory behind BAR 4, for a host that fills and compares it without the guest's help.
    pub fn memory(&self) -> &Arc<BarMemory> {
        &self.shared.memory.bar
    }

    /// Breaks something. HEALTH shows it, and the card is armed no more if it cannot save its contents.
    pub fn inject(&self, fault: Fault) {
        self.set_fault(fault, true);
    }

    /// Repairs it.
    pub fn repair(&self, fault: Fault) {
        self.set_fault(fault, false);
    }

    /// What is broken.
    pub fn faults(&self) -> Vec<Fault> {
        lock(&self.shared.state).registers.faults()
    }

    fn set_fault(&self, fault: Fault, broken: bool) {
        if fault == Fault::Medium {
            self.shared.memory.set_failing(broken);
        }
        self.shared
            .change(|registers| registers.set_fault(fault, broken));
    }

    /// Whether the contents would survive a power cut (STS.ARMED).
    pub fn is_armed(&self) -> bool {
        lock(&self.shared.state).registers.is_armed()
    }

    /// Brings all that has arrived to the file's medium, and returns when it is there.
    ///
    /// # Errors
    /// The host's; HEALTH.MEDIUM shows it, too.
    pub fn flush(&self) -> std::io::Result<()> {
        let result = self.shared.memory.flush();
        self.shared
            .change(|registers| registers.note_flush(&result));
        result
    }

    /// Cuts the power and brings it back, at any moment. When this returns, no DMA of the time before is in the memory,
    /// the contents are saved or lost, and the registers are as after power on; PFAIL tells. The function's config space
    /// is the bus's to reset (`Function::reset`): a whole machine that loses power does both.
    pub fn power_cut(&self) {
        let _off = lock(&self.power);
        let mut outcome = self.shared.change(Registers::power_off);
        let memory = &self.shared.memory;
        memory.close(self.shared.port().as_ref());
        if outcome == outcome::RESTORED {
            let saved = memory.flush();
            self.shared.change(|registers| registers.note_flush(&saved));
            if saved.is_err() {
                outcome = outcome::FAILED;
            }
        }
        if outcome != outcome::RESTORED
            && let Err(error) = memory.lose()
        {
            tracing::error!(%error, "the memory keeps a part of its contents over the power cut");
        }
        memory.open_again();
        tracing::debug!(
            function = self.shared.config.name,
            outcome,
            "the power was cut"
        );
        self.shared.change(|registers| registers.power_on(outcome));
    }

    /// Ends the thread, and flushes what it has not.
    fn stop(&self) {
        lock(&self.shared.state).exit = true;
        self.shared.wake.notify_all();
        let thread = lock(&self.thread).take();
        let port = self.shared.port.write();
        drop(port.unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = thread {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        // Also what a peer wrote, or a test, when nothing was attached.
        let _ = self.flush();
    }
}

impl Drop for NvramCard {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Endpoint for NvramCard {
    fn declaration(&self) -> Declaration {
        let registers = BarDeclaration::registers(REGISTERS_BAR, REGISTERS_SIZE);
        Declaration {
            identity: Identity {
                vendor_id: VENDOR_ID,
                device_id: DEVICE_ID,
                subsystem_vendor_id: VENDOR_ID,
                subsystem_id: DEVICE_ID,
                revision_id: 1,
                class_code: CLASS_CODE,
                serial_number: Some(self.shared.serial_number),
            },
            bars: vec![registers, self.shared.memory.declaration()],
            msix: self.shared.config.msix.then_some(MsixDeclaration {
                vectors: 1,
                bar: REGISTERS_BAR,
                table_offset: MSIX_TABLE,
                pba_offset: MSIX_PBA,
            }),
            intx: true,
        }
    }

    fn attach(&self, port: Port) {
        // Plugged in again after it was detached: `stop` left no thread.
        lock(&self.shared.state).exit = false;
        *self
            .shared
            .port
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(port);
        let shared = Arc::clone(&self.shared);
        let thread = Builder::new().name("nvram-flush".into());
        match thread.spawn(move || shared.run()) {
            Ok(thread) => *lock(&self.thread) = Some(thread),
            // The guest sees flushes that do not end, and a card that is never armed anew.
            Err(error) => tracing::error!(%error, "no thread to flush the memory"),
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar == REGISTERS_BAR {
            lock(&self.shared.state).registers.read(offset, data);
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == REGISTERS_BAR {
            self.shared
                .change(|registers| registers.write(offset, data));
        }
    }

    fn reset(&self, kind: ResetKind) {
        tracing::debug!(function = self.shared.config.name, ?kind, "reset");
        self.shared.change(|registers| {
            registers.reset();
            // The end of the guest's machine is the last that the card hears of it.
            if kind == ResetKind::ConnectionLost {
                registers.request_flush();
            }
        });
    }

    fn detach(&self) {
        self.stop();
    }

    fn dump(&self) -> Value {
        let state = lock(&self.shared.state);
        let registers: Map<String, Value> = REGISTERS
            .iter()
            .map(|register| {
                let value = state.registers.value(register.name);
                (register.name.in_map(), format!("{value:#x}").into())
            })
            .collect();
        let faults: Vec<&str> = state.registers.faults().iter().map(|f| f.name()).collect();
        json!({
            "name": self.shared.config.name,
            "place": self.shared.config.backing.to_string(),
            "registers": registers,
            "faults": faults,
        })
    }
}
