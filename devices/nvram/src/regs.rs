//! The registers: what they hold, what a write does, and what follows from faults and flushes.
//!
//! They decide nothing that takes time: a write that needs a flush leaves it to the card's thread, as [`Flush`].

use std::collections::BTreeSet;
use std::io;

use p2plab_pcie::Mistakes;
use p2plab_pcie::registers::{self, Register, Use, register};

use crate::spec::{Cap, Ctrl, Event, Health, ID, Pfail, Sts, VERSION, offset, outcome};

/// What can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The capacitor: there is no energy for a save.
    Capacitor,
    /// The flash: there is no place for a save.
    Flash,
    /// The host's file, or what is below it: flushes fail.
    Medium,
}

impl Fault {
    /// All of them, with the names that people give them.
    pub const ALL: [(&'static str, Self); 3] = [
        ("capacitor", Self::Capacitor),
        ("flash", Self::Flash),
        ("medium", Self::Medium),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        let named = Self::ALL.iter().find(|(_, fault)| *fault == self);
        named.map_or("", |(name, _)| name)
    }
}

/// Name of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Id,
    Vs,
    Size,
    Sn,
    Cap,
    Ctrl,
    Sts,
    Health,
    Pfail,
    Flush,
    Event,
    Inten,
    PowerCuts,
    Restores,
    Losses,
    Flushes,
    FlushErrors,
    Resets,
    Mistakes,
}

impl Name {
    /// As the register map has it: `POWER_CUTS`.
    pub(crate) fn in_map(self) -> String {
        let mut text = String::new();
        for (at, letter) in format!("{self:?}").chars().enumerate() {
            if at > 0 && letter.is_uppercase() {
                text.push('_');
            }
            text.extend(letter.to_uppercase());
        }
        text
    }
}

/// Every register, in order of offset. What is not here reads as zero.
pub(crate) const REGISTERS: &[Register<Name>] = &[
    register(Name::Id, offset::ID, 4, Use::ReadOnly),
    register(Name::Vs, offset::VS, 4, Use::ReadOnly),
    register(Name::Size, offset::SIZE, 8, Use::ReadOnly),
    register(Name::Sn, offset::SN, 8, Use::ReadOnly),
    register(Name::Cap, offset::CAP, 4, Use::ReadOnly),
    register(Name::Ctrl, offset::CTRL, 4, Use::ReadWrite),
    register(Name::Sts, offset::STS, 4, Use::ReadOnly),
    register(Name::Health, offset::HEALTH, 4, Use::ReadOnly),
    register(Name::Pfail, offset::PFAIL, 4, Use::ReadOnly),
    register(Name::Flush, offset::FLUSH, 4, Use::ReadWrite),
    register(Name::Event, offset::EVENT, 4, Use::ReadWrite),
    register(Name::Inten, offset::INTEN, 4, Use::ReadWrite),
    register(Name::PowerCuts, offset::POWER_CUTS, 8, Use::ReadOnly),
    register(Name::Restores, offset::RESTORES, 8, Use::ReadOnly),
    register(Name::Losses, offset::LOSSES, 8, Use::ReadOnly),
    register(Name::Flushes, offset::FLUSHES, 8, Use::ReadOnly),
    register(Name::FlushErrors, offset::FLUSH_ERRORS, 8, Use::ReadOnly),
    register(Name::Resets, offset::RESETS, 8, Use::ReadOnly),
    register(Name::Mistakes, offset::MISTAKES, 8, Use::ReadOnly),
];

/// What the card is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Constants {
    pub(crate) size: u64,
    pub(crate) serial_number: u64,
    pub(crate) is_file: bool,
    /// It is armed after power on.
    pub(crate) armed: bool,
}

/// A flush that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flush {
    /// The arming that waits for it.
    arming: Option<u64>,
}

/// What has happened since the card's process began.
#[derive(Clone, Copy, Debug, Default)]
struct Statistics {
    power_cuts: u64,
    restores: u64,
    losses: u64,
    flushes: u64,
    flush_errors: u64,
    resets: u64,
    mistakes: u64,
}

fn count(counter: &mut u64) {
    *counter = counter.saturating_add(1);
}

/// The state of the registers.
#[derive(Debug)]
pub(crate) struct Registers {
    constants: Constants,
    ctrl: Ctrl,
    /// Arming has come to its end.
    armed: bool,
    /// The arming that is under way.
    arming: Option<u64>,
    /// Armings so far: one that was taken back must not be taken for a later one.
    armings: u64,
    /// A flush is due.
    due: bool,
    /// A flush is under way.
    running: bool,
    faults: BTreeSet<Fault>,
    /// A flush has failed since power on.
    medium: bool,
    pfail: Pfail,
    event: Event,
    inten: Event,
    /// Events that became set and enabled since they were last asked for: each is a message with MSI-X.
    rising: u32,
    powered: bool,
    statistics: Statistics,
    mistakes: Mistakes,
    /// Flushes that failed, as far as the log is concerned.
    failures: Mistakes,
}

impl Registers {
    pub(crate) fn new(constants: Constants) -> Self {
        Self {
            constants,
            ctrl: Ctrl::new().with_arm(constants.armed),
            armed: constants.armed,
            arming: None,
            armings: 0,
            due: false,
            running: false,
            faults: BTreeSet::new(),
            medium: false,
            pfail: Pfail::new().with_outcome(outcome::NONE),
            event: Event::new(),
            inten: Event::new(),
            rising: 0,
            powered: true,
            statistics: Statistics::default(),
            mistakes: Mistakes::default(),
            failures: Mistakes::default(),
        }
    }

    fn health(&self) -> Health {
        Health::new()
            .with_cap(self.faults.contains(&Fault::Capacitor))
            .with_flash(self.faults.contains(&Fault::Flash))
            .with_medium(self.medium)
    }

    /// Whether the contents would survive a loss of power.
    pub(crate) fn is_armed(&self) -> bool {
        self.armed && !self.health().cap() && !self.health().flash()
    }

    pub(crate) fn value(&self, name: Name) -> u64 {
        match name {
            Name::Id => ID.into(),
            Name::Vs => VERSION.into(),
            Name::Size => self.constants.size,
            Name::Sn => self.constants.serial_number,
            Name::Cap => {
                let cap = Cap::new().with_file(self.constants.is_file);
                cap.into_bits().into()
            }
            Name::Ctrl => self.ctrl.into_bits().into(),
            Name::Sts => {
                let sts = Sts::new()
                    .with_armed(self.is_armed())
                    .with_arming(self.arming.is_some())
                    .with_flushing(self.due || self.running);
                sts.into_bits().into()
            }
            Name::Health => self.health().into_bits().into(),
            Name::Pfail => self.pfail.into_bits().into(),
            Name::Flush => 0,
            Name::Event => self.event.into_bits().into(),
            Name::Inten => self.inten.into_bits().into(),
            Name::PowerCuts => self.statistics.power_cuts,
            Name::Restores => self.statistics.restores,
            Name::Losses => self.statistics.losses,
            Name::Flushes => self.statistics.flushes,
            Name::FlushErrors => self.statistics.flush_errors,
            Name::Resets => self.statistics.resets,
            Name::Mistakes => self.statistics.mistakes,
        }
    }

    /// Fills `data` with the bytes at `at`. Without power nobody answers.
    pub(crate) fn read(&self, at: u64, data: &mut [u8]) {
        if self.powered {
            registers::read(REGISTERS, at, data, |name| self.value(name));
        } else {
            data.fill(0xff);
        }
    }

    /// Takes a write.
    pub(crate) fn write(&mut self, at: u64, data: &[u8]) {
        if !self.powered {
            return;
        }
        let Some(write) = registers::Write::parse(at, data) else {
            count(&mut self.statistics.mistakes);
            if self.mistakes.is_worth_a_line() {
                let length = data.len();
                tracing::warn!(offset = at, length, "register write of a bad shape");
            }
            return;
        };
        for register in REGISTERS {
            // Registers of 4 bytes are covered whole, and those of 8 are read-only.
            if let Some((value, _)) = write.part(register) {
                self.write_register(register.name, (value & 0xffff_ffff) as u32);
            }
        }
    }

    fn write_register(&mut self, name: Name, value: u32) {
        match name {
            Name::Ctrl => self.control(Ctrl::from_bits(value & 1)),
            Name::Flush if value & 1 != 0 => self.request_flush(),
            Name::Event => {
                let kept = self.event.into_bits() & !value;
                self.event = Event::from_bits(kept);
            }
            Name::Inten => {
                let new = value & Event::ALL;
                self.rising |= self.event.into_bits() & new & !self.inten.into_bits();
                self.inten = Event::from_bits(new);
            }
            _ => {}
        }
    }

    fn control(&mut self, new: Ctrl) {
        let old = std::mem::replace(&mut self.ctrl, new);
        match (old.arm(), new.arm()) {
            (false, true) => {
                self.armings = self.armings.wrapping_add(1);
                self.arming = Some(self.armings);
                self.request_flush();
            }
            (true, false) => {
                self.change(|registers| {
                    registers.armed = false;
                    registers.arming = None;
                });
                self.request_flush();
            }
            _ => {}
        }
    }

    /// Does `change`, and sets the events that follow.
    fn change(&mut self, change: impl FnOnce(&mut Self)) {
        let (armed, health) = (self.is_armed(), self.health());
        change(self);
        if armed != self.is_armed() {
            self.raise(Event::new().with_armed(true));
        }
        if health != self.health() {
            self.raise(Event::new().with_health(true));
        }
    }

    fn raise(&mut self, event: Event) {
        let new = event.into_bits() & !self.event.into_bits();
        self.rising |= new & self.inten.into_bits();
        self.event = Event::from_bits(self.event.into_bits() | event.into_bits());
    }

    pub(crate) fn set_fault(&mut self, fault: Fault, broken: bool) {
        self.change(|registers| {
            if broken {
                registers.faults.insert(fault);
            } else {
                registers.faults.remove(&fault);
            }
        });
    }

    pub(crate) fn faults(&self) -> Vec<Fault> {
        self.faults.iter().copied().collect()
    }

    /// All that has arrived is to be brought to the medium.
    pub(crate) fn request_flush(&mut self) {
        self.due = true;
    }

    /// Takes the flush that is due.
    pub(crate) fn begin_flush(&mut self) -> Option<Flush> {
        if !std::mem::take(&mut self.due) {
            return None;
        }
        self.running = true;
        Some(Flush {
            arming: self.arming,
        })
    }

    /// The flush that the card's thread did has ended.
    pub(crate) fn end_flush(&mut self, flush: Flush, result: &io::Result<()>) {
        self.running = false;
        self.note_flush(result);
        if flush.arming.is_some() && flush.arming == self.arming {
            self.change(|registers| {
                registers.arming = None;
                registers.armed = result.is_ok();
            });
        }
        // Who has asked again meanwhile is told when that has ended.
        if !self.due {
            self.raise(Event::new().with_flushed(true));
        }
    }

    /// Counts a flush, whoever did it.
    pub(crate) fn note_flush(&mut self, result: &io::Result<()>) {
        match result {
            Ok(()) => count(&mut self.statistics.flushes),
            Err(error) => {
                // A guest can ask again and again.
                if self.failures.is_worth_a_line() {
                    tracing::error!(%error, "the memory is not flushed");
                }
                count(&mut self.statistics.flush_errors);
                // What cannot be flushed cannot be saved either.
                self.change(|registers| {
                    registers.medium = true;
                    registers.armed = false;
                });
            }
        }
    }

    /// A reset by the bus: nothing interrupts any more. What protects the contents, and what there is to tell of them,
    /// stays.
    pub(crate) fn reset(&mut self) {
        count(&mut self.statistics.resets);
        self.inten = Event::new();
        self.rising = 0;
    }

    /// The power is gone. What becomes of the contents is the outcome.
    pub(crate) fn power_off(&mut self) -> u8 {
        self.powered = false;
        self.inten = Event::new();
        self.rising = 0;
        match (self.is_armed(), self.ctrl.arm()) {
            (true, _) => outcome::RESTORED,
            (false, true) => outcome::FAILED,
            (false, false) => outcome::DISARMED,
        }
    }

    /// The power is back: everything is as after power on, but for what there is to tell.
    pub(crate) fn power_on(&mut self, outcome: u8) {
        count(&mut self.statistics.power_cuts);
        match outcome {
            outcome::RESTORED => count(&mut self.statistics.restores),
            _ => count(&mut self.statistics.losses),
        }
        // A flush that is under way belongs to the time before, and arms nothing.
        self.ctrl = Ctrl::new().with_arm(self.constants.armed);
        (self.armed, self.arming) = (self.constants.armed, None);
        (self.medium, self.due) = (false, false);
        self.pfail = Pfail::new().with_outcome(outcome);
        self.event = Event::new().with_power(true);
        self.powered = true;
    }

    /// The level of INTx.
    pub(crate) fn interrupts(&self) -> bool {
        self.event.into_bits() & self.inten.into_bits() != 0
    }

    /// How many MSI-X messages are to be sent.
    pub(crate) fn take_messages(&mut self) -> u32 {
        std::mem::take(&mut self.rising).count_ones()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(armed: bool) -> Registers {
        Registers::new(Constants {
            size: 64 << 20,
            serial_number: 7,
            is_file: true,
            armed,
        })
    }

    fn write(registers: &mut Registers, at: u64, value: u32) {
        registers.write(at, &value.to_le_bytes());
    }

    fn status(registers: &Registers) -> Sts {
        Sts::from_bits(registers.value(Name::Sts) as u32)
    }

    #[test]
    fn the_table_is_in_order_and_does_not_overlap() {
        for pair in REGISTERS.windows(2) {
            assert!(pair[0].offset + pair[0].width <= pair[1].offset);
        }
    }

    #[test]
    fn the_card_is_armed_when_its_flush_has_ended() {
        let mut r = registers(false);
        write(&mut r, offset::CTRL, 1);
        let sts = status(&r);
        assert!(!sts.armed() && sts.arming() && sts.flushing());
        let flush = r.begin_flush().unwrap();
        assert_eq!(r.begin_flush(), None);
        assert!(!r.is_armed() && status(&r).flushing());
        r.end_flush(flush, &Ok(()));
        assert_eq!(status(&r), Sts::new().with_armed(true));
        // Arming an armed card is nothing new.
        write(&mut r, offset::CTRL, 1);
        assert_eq!(status(&r), Sts::new().with_armed(true));
        write(&mut r, offset::CTRL, 0);
        assert_eq!(status(&r), Sts::new().with_flushing(true));
    }

    #[test]
    fn a_flush_arms_only_what_waits_for_it() {
        let mut r = registers(false);
        write(&mut r, offset::CTRL, 1);
        let first = r.begin_flush().unwrap();
        // Taken back and asked for again: what was written between is not in the first flush.
        write(&mut r, offset::CTRL, 0);
        write(&mut r, offset::CTRL, 1);
        r.end_flush(first, &Ok(()));
        assert!(!r.is_armed() && status(&r).arming());
        let second = r.begin_flush().unwrap();
        // The power fails meanwhile.
        assert_eq!(r.power_off(), outcome::FAILED);
        r.power_on(outcome::FAILED);
        r.end_flush(second, &Ok(()));
        assert!(!r.is_armed());
    }

    #[test]
    fn a_failed_flush_does_not_arm() {
        let mut r = registers(false);
        write(&mut r, offset::CTRL, 1);
        let flush = r.begin_flush().unwrap();
        r.end_flush(flush, &Err(io::Error::other("broken")));
        assert_eq!(status(&r).into_bits(), 0);
        assert!(r.health().medium());
        assert_eq!(r.value(Name::FlushErrors), 1);
        assert!(r.event.health() && r.event.flushed() && !r.event.armed());
        for arm in [0, 1] {
            write(&mut r, offset::CTRL, arm);
        }
        let flush = r.begin_flush().unwrap();
        r.end_flush(flush, &Ok(()));
        assert!(r.is_armed() && r.health().medium());
        r.power_off();
        r.power_on(outcome::RESTORED);
        assert!(!r.health().medium());
    }

    #[test]
    fn faults_disarm_for_as_long_as_they_last() {
        for fault in [Fault::Capacitor, Fault::Flash] {
            let mut r = registers(true);
            r.set_fault(fault, true);
            assert!(!r.is_armed() && r.ctrl.arm());
            assert_eq!(
                r.event,
                Event::new().with_health(true).with_armed(true),
                "{fault:?}"
            );
            assert_eq!(r.power_off(), outcome::FAILED);
            r.power_on(outcome::FAILED);
            assert!(!r.is_armed());
            r.set_fault(fault, false);
            assert!(r.is_armed());
        }
    }

    #[test]
    fn each_event_that_becomes_enabled_is_one_message() {
        let mut r = registers(true);
        r.set_fault(Fault::Capacitor, true);
        assert_eq!((r.interrupts(), r.take_messages()), (false, 0));
        write(&mut r, offset::INTEN, u32::MAX);
        assert_eq!(r.inten.into_bits(), Event::ALL);
        assert_eq!((r.interrupts(), r.take_messages()), (true, 2));
        assert_eq!(r.take_messages(), 0);
        write(&mut r, offset::EVENT, 2);
        assert!(r.interrupts() && r.event == Event::new().with_armed(true));
        r.set_fault(Fault::Capacitor, false);
        // ARMED is still set; HEALTH is new.
        assert_eq!(r.take_messages(), 1);
        write(&mut r, offset::EVENT, u32::MAX);
        assert!(!r.interrupts());
        r.reset();
        assert_eq!(r.inten.into_bits(), 0);
    }

    #[test]
    fn without_power_nobody_answers() {
        let mut r = registers(true);
        r.power_off();
        let mut data = [0; 16];
        r.read(0, &mut data);
        assert_eq!(data, [0xff; 16]);
        write(&mut r, offset::CTRL, 0);
        r.power_on(outcome::RESTORED);
        assert!(r.is_armed());
        assert_eq!(r.event, Event::new().with_power(true));
    }
}
