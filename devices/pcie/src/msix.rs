//! The MSI-X table and Pending Bit Array of a function (PCI Express Base 6.0, section 7.7.2), and the
//! triggers that carry its messages to the guest.
//!
//! A message is not written to the address in the table: the transport gives each vector an eventfd.
//! QEMU's vfio serves the table itself, does the masking itself, and its server never sees a write to it.
//! Yet every vector is masked after reset. So the per-vector mask counts only once the table has been
//! written through our BAR since the last reset; until then somebody else owns the table.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::config::{pba_length, table_length};
use crate::endpoint::MsixDeclaration;
use crate::function::OutOfBounds;
use crate::mistakes::Mistakes;

/// Length of a table entry in bytes: message address, upper address, data, vector control.
const ENTRY: usize = 16;
/// Byte of an entry that holds the mask bit, bit 0.
const VECTOR_CONTROL: usize = 12;

/// What became of an interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// Sent: one Memory Write of four bytes.
    Sent,
    /// The vector is masked or nobody takes it yet; it is sent once that changes.
    Pending,
    /// MSI-X is disabled, the function may not send, or there is no such vector: nothing happened.
    Disabled,
}

/// What config space says of MSI-X.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MsixControl {
    /// MSI-X Enable.
    pub enabled: bool,
    /// Function Mask.
    pub function_masked: bool,
    /// The function may issue memory requests, and somebody is there to take them.
    pub may_send: bool,
}

/// Which part of a BAR an offset lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Structure {
    /// The MSI-X table, at this offset in it.
    Table(usize),
    /// The Pending Bit Array, at this offset in it.
    Pba(usize),
    /// Neither: the device's own.
    Device,
}

/// MSI-X of one function.
#[derive(Debug)]
pub(crate) struct Msix {
    declaration: MsixDeclaration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    control: MsixControl,
    table: Vec<u8>,
    /// The table was written through our BAR since reset; see the module.
    table_written: bool,
    /// The Pending Bit Array, as the guest reads it.
    pending: Vec<u8>,
    triggers: Vec<Option<File>>,
    /// Eventfds that did not work.
    mistakes: Mistakes,
}

impl Msix {
    /// MSI-X after power-on. The declaration has been validated.
    pub(crate) fn new(declaration: MsixDeclaration) -> Self {
        let vectors = declaration.vectors;
        let mut state = State {
            control: MsixControl::default(),
            table: vec![0; usize::from(vectors) * ENTRY],
            table_written: false,
            pending: vec![0; usize::try_from(pba_length(vectors)).unwrap_or_default()],
            triggers: (0..vectors).map(|_| None).collect(),
            mistakes: Mistakes::default(),
        };
        state.reset();
        Self {
            declaration,
            state: Mutex::new(state),
        }
    }

    /// Number of vectors.
    pub(crate) fn vectors(&self) -> u16 {
        self.declaration.vectors
    }

    /// In which structure `offset` of BAR `bar` lies, and how many bytes from there, at most `length`, lie
    /// in the same one.
    pub(crate) fn locate(&self, bar: u8, offset: u64, length: usize) -> (Structure, usize) {
        if bar != self.declaration.bar {
            return (Structure::Device, length);
        }
        let vectors = self.declaration.vectors;
        let table = range(self.declaration.table_offset, table_length(vectors));
        let pba = range(self.declaration.pba_offset, pba_length(vectors));
        let until = |end: u64| {
            usize::try_from(end.saturating_sub(offset))
                .unwrap_or(usize::MAX)
                .min(length)
        };
        let within = |start: u64| usize::try_from(offset.saturating_sub(start)).unwrap_or_default();
        if table.contains(&offset) {
            (Structure::Table(within(table.start)), until(table.end))
        } else if pba.contains(&offset) {
            (Structure::Pba(within(pba.start)), until(pba.end))
        } else {
            let starts = [table.start, pba.start].into_iter();
            let next = starts
                .filter(|start| *start > offset)
                .min()
                .unwrap_or(u64::MAX);
            (Structure::Device, until(next))
        }
    }

    /// Reads the table from `offset` in it.
    pub(crate) fn read_table(&self, offset: usize, data: &mut [u8]) {
        read_bytes(&self.lock().table, offset, data);
    }

    /// Reads the Pending Bit Array from `offset` in it. A guest's writes to it are dropped.
    pub(crate) fn read_pba(&self, offset: usize, data: &mut [u8]) {
        read_bytes(&self.lock().pending, offset, data);
    }

    /// Writes to the table at `offset` in it. Returns how many messages that unmasked and sent.
    #[must_use]
    pub(crate) fn write_table(&self, offset: usize, data: &[u8]) -> usize {
        let mut state = self.lock();
        for (index, new) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(index) else {
                break;
            };
            let Some(byte) = state.table.get_mut(at) else {
                break;
            };
            *byte = (*byte & !writable_bits(at)) | (new & writable_bits(at));
            state.table_written = true;
        }
        state.deliver_pending()
    }

    /// Tells what config space says now. Disabling MSI-X forgets what is pending: by then the driver that
    /// would have wanted it is gone. Returns how many pending messages were sent.
    #[must_use]
    pub(crate) fn set_control(&self, control: MsixControl) -> usize {
        let mut state = self.lock();
        state.control = control;
        if !control.enabled {
            state.pending.fill(0);
        }
        state.deliver_pending()
    }

    /// Connects a vector to an eventfd, or disconnects it. A message that waited for one is sent; returns
    /// how many were.
    ///
    /// # Errors
    /// [`OutOfBounds`] where there is no such vector.
    pub(crate) fn set_trigger(
        &self,
        vector: u16,
        file: Option<File>,
    ) -> Result<usize, OutOfBounds> {
        let mut state = self.lock();
        *state
            .triggers
            .get_mut(usize::from(vector))
            .ok_or(OutOfBounds)? = file;
        Ok(state.deliver_pending())
    }

    /// Disconnects all vectors.
    pub(crate) fn drop_triggers(&self) {
        self.lock().triggers.fill_with(|| None);
    }

    /// Sends the message of `vector`, or remembers it.
    pub(crate) fn fire(&self, vector: u16) -> Delivery {
        self.lock().fire(usize::from(vector))
    }

    /// Restores the reset values of table and Pending Bit Array; the triggers are the transport's and stay.
    pub(crate) fn reset(&self) {
        self.lock().reset();
    }

    /// State for people and tests.
    pub(crate) fn dump(&self) -> serde_json::Value {
        let state = self.lock();
        let vectors = || 0..usize::from(self.declaration.vectors);
        let pending: Vec<_> = vectors()
            .filter(|vector| state.is_pending(*vector))
            .collect();
        let masked: Vec<_> = vectors()
            .filter(|vector| state.is_masked(*vector))
            .collect();
        let connected = state
            .triggers
            .iter()
            .filter(|trigger| trigger.is_some())
            .count();
        serde_json::json!({
            "vectors": self.declaration.vectors,
            "enabled": state.control.enabled,
            "function_masked": state.control.function_masked,
            "table_written": state.table_written,
            "connected": connected,
            "pending": pending,
            "masked": masked,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn reset(&mut self) {
        self.table.fill(0);
        for control in self.table.iter_mut().skip(VECTOR_CONTROL).step_by(ENTRY) {
            *control = 1;
        }
        self.table_written = false;
        self.pending.fill(0);
    }

    fn is_masked(&self, vector: usize) -> bool {
        let control = self
            .table
            .get(vector.saturating_mul(ENTRY).saturating_add(VECTOR_CONTROL));
        self.table_written && control.is_some_and(|control| control & 1 != 0)
    }

    fn is_pending(&self, vector: usize) -> bool {
        self.pending
            .get(vector / 8)
            .is_some_and(|byte| byte & 1 << (vector % 8) != 0)
    }

    fn set_pending(&mut self, vector: usize, pending: bool) {
        if let Some(byte) = self.pending.get_mut(vector / 8) {
            let bit = 1 << (vector % 8);
            *byte = if pending { *byte | bit } else { *byte & !bit };
        }
    }

    fn fire(&mut self, vector: usize) -> Delivery {
        let Some(trigger) = self.triggers.get(vector) else {
            return Delivery::Disabled;
        };
        if !self.control.enabled || !self.control.may_send {
            return Delivery::Disabled;
        }
        let blocked = self.control.function_masked || self.is_masked(vector);
        let signalled = |trigger| signal(trigger, &self.mistakes);
        let sent = !blocked && trigger.as_ref().is_some_and(signalled);
        self.set_pending(vector, !sent);
        if sent {
            Delivery::Sent
        } else {
            Delivery::Pending
        }
    }

    fn deliver_pending(&mut self) -> usize {
        if self.pending.iter().all(|byte| *byte == 0) {
            return 0;
        }
        let vectors = 0..self.triggers.len();
        let pending: Vec<_> = vectors.filter(|vector| self.is_pending(*vector)).collect();
        pending
            .into_iter()
            .filter(|vector| self.fire(*vector) == Delivery::Sent)
            .count()
    }
}

/// Adds one to an eventfd; `false` where nobody will see it. A full counter is an interrupt that is
/// already on its way.
pub(crate) fn signal(mut trigger: &File, mistakes: &Mistakes) -> bool {
    match trigger.write_all(&1u64.to_ne_bytes()) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::WouldBlock => true,
        Err(error) => {
            if mistakes.is_worth_a_line() {
                tracing::warn!(%error, "an interrupt's eventfd does not take it");
            }
            false
        }
    }
}

/// The bits of byte `at` of the table that a write changes: the address is aligned to four bytes, and of
/// vector control there is only the mask.
fn writable_bits(at: usize) -> u8 {
    match at % ENTRY {
        0 => 0xfc,
        VECTOR_CONTROL => 0x01,
        13..ENTRY => 0,
        _ => 0xff,
    }
}

fn range(offset: u32, length: u64) -> Range<u64> {
    let start = u64::from(offset);
    start..start.saturating_add(length)
}

/// Copies from `bytes` at `offset`; zero past their end.
fn read_bytes(bytes: &[u8], offset: usize, data: &mut [u8]) {
    let from = bytes.get(offset..).unwrap_or_default().iter().copied();
    for (out, byte) in data.iter_mut().zip(from.chain(std::iter::repeat(0))) {
        *out = byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::test_support::{count, eventfd};

    const ON: MsixControl = MsixControl {
        enabled: true,
        function_masked: false,
        may_send: true,
    };

    fn msix() -> Msix {
        Msix::new(MsixDeclaration {
            vectors: 70,
            bar: 0,
            table_offset: 0x2000,
            pba_offset: 0x3000,
        })
    }

    fn with_trigger(vector: u16) -> (Msix, File) {
        let (msix, (ours, theirs)) = (msix(), eventfd());
        assert_eq!(msix.set_trigger(vector, Some(theirs)), Ok(0));
        (msix, ours)
    }

    fn pending(msix: &Msix, vector: usize) -> bool {
        let mut bytes = [0; 16];
        msix.read_pba(0, &mut bytes);
        bytes[vector / 8] & 1 << (vector % 8) != 0
    }

    #[test]
    fn sends_only_when_enabled() {
        let (msix, fd) = with_trigger(3);
        assert_eq!(msix.fire(3), Delivery::Disabled);
        assert_eq!(
            msix.set_control(MsixControl {
                may_send: false,
                ..ON
            }),
            0
        );
        assert_eq!(msix.fire(3), Delivery::Disabled);
        assert_eq!(msix.set_control(ON), 0);
        assert_eq!(msix.fire(3), Delivery::Sent);
        assert_eq!(count(&fd), 1);
        assert_eq!(msix.fire(70), Delivery::Disabled);
        assert_eq!(msix.set_trigger(70, None), Err(OutOfBounds));
    }

    #[test]
    fn an_untouched_table_does_not_mask() {
        let (msix, fd) = with_trigger(0);
        let mut control = [0; 4];
        msix.read_table(12, &mut control);
        assert_eq!(control, [1, 0, 0, 0], "reads as the specification says");
        assert_eq!(msix.set_control(ON), 0);
        assert_eq!(msix.fire(0), Delivery::Sent);
        assert_eq!(count(&fd), 1);
    }

    #[test]
    fn a_masked_vector_is_pending_until_unmasked() {
        let (msix, fd) = with_trigger(69);
        assert_eq!(msix.set_control(ON), 0);
        assert_eq!(msix.write_table(0, &[0xff; 4]), 0);
        assert_eq!(msix.fire(69), Delivery::Pending);
        assert!(pending(&msix, 69));
        assert_eq!(count(&fd), 0);
        assert_eq!(msix.write_table(69 * 16 + 12, &[0]), 1);
        assert!(!pending(&msix, 69));
        assert_eq!(count(&fd), 1);
        msix.reset();
        assert_eq!(msix.fire(69), Delivery::Sent, "a reset table is untouched");
    }

    #[test]
    fn the_function_mask_holds_back_all() {
        let (msix, fd) = with_trigger(1);
        assert_eq!(
            msix.set_control(MsixControl {
                function_masked: true,
                ..ON
            }),
            0
        );
        assert_eq!(msix.fire(1), Delivery::Pending);
        assert_eq!(msix.fire(1), Delivery::Pending);
        assert_eq!(msix.set_control(ON), 1);
        assert_eq!(count(&fd), 1);
        assert_eq!(
            msix.set_control(MsixControl {
                function_masked: true,
                ..ON
            }),
            0
        );
        assert_eq!(msix.fire(1), Delivery::Pending);
        assert_eq!(msix.set_control(MsixControl::default()), 0);
        assert!(!pending(&msix, 1), "disabling forgets");
    }

    #[test]
    fn a_vector_waits_for_its_trigger() {
        let msix = msix();
        assert_eq!(msix.set_control(ON), 0);
        assert_eq!(msix.fire(5), Delivery::Pending);
        let (ours, theirs) = eventfd();
        assert_eq!(msix.set_trigger(5, Some(theirs)), Ok(1));
        assert_eq!(count(&ours), 1);
    }

    #[test]
    fn a_full_counter_is_not_an_error() {
        let (msix, fd) = with_trigger(0);
        (&fd).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert_eq!(msix.set_control(ON), 0);
        assert_eq!(msix.fire(0), Delivery::Sent);
    }

    #[test]
    fn reserved_bits_of_an_entry_stay_zero() {
        let msix = msix();
        assert_eq!(msix.write_table(7, &[0xff; 32]), 0);
        let mut entry = [0; 16];
        msix.read_table(16, &mut entry);
        assert_eq!(entry[..4], [0xfc, 0xff, 0xff, 0xff]);
        assert_eq!(entry[12..], [1, 0, 0, 0]);
        let mut past = [0xaa; 4];
        msix.read_table(70 * 16 - 2, &mut past);
        assert_eq!(past[2..], [0, 0]);
        assert_eq!(msix.write_table(usize::MAX, &[1, 2]), 0);
    }

    #[test]
    fn accesses_are_located() {
        let msix = msix();
        assert_eq!(msix.locate(1, 0x2000, 8), (Structure::Device, 8));
        assert_eq!(msix.locate(0, 0x1ffc, 8), (Structure::Device, 4));
        assert_eq!(msix.locate(0, 0x2004, 8), (Structure::Table(4), 8));
        assert_eq!(
            msix.locate(0, 0x2000 + 70 * 16 - 4, 8),
            (Structure::Table(70 * 16 - 4), 4)
        );
        assert_eq!(msix.locate(0, 0x300c, 8), (Structure::Pba(12), 4));
        assert_eq!(msix.locate(0, 0x3010, 8), (Structure::Device, 8));
    }
}
