//! The health that the controller reports: temperature, spare, power (Base 5.16.1.3).
//!
//! It is a model's: nothing here wears or warms up by itself. A test or a user sets temperature and spare, and
//! the controller reacts as it would to its sensors.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::controller::Shared;
use crate::locks::lock;
use crate::spec::log::critical_warning;
use crate::spec::registers::shst;

/// Composite temperature of a controller that nobody has heated, in kelvin.
const ROOM_TEMPERATURE: u16 = 298;
/// Warning Composite Temperature Threshold (WCTEMP), and the default of the Temperature Threshold feature.
pub(crate) const WARNING_TEMPERATURE: u16 = 343;
/// Critical Composite Temperature Threshold (CCTEMP).
pub(crate) const CRITICAL_TEMPERATURE: u16 = 353;
/// Available Spare Threshold, percent.
pub(crate) const SPARE_THRESHOLD: u8 = 10;

/// Time that adds up over several runs.
#[derive(Clone, Copy, Debug, Default)]
struct Stopwatch {
    total: Duration,
    since: Option<Instant>,
}

impl Stopwatch {
    fn set(&mut self, runs: bool, now: Instant) {
        match (self.since, runs) {
            (None, true) => self.since = Some(now),
            (Some(_), false) => {
                self.total = self.elapsed(now);
                self.since = None;
            }
            _ => {}
        }
    }

    fn elapsed(&self, now: Instant) -> Duration {
        let running = self.since.map(|since| now.saturating_duration_since(since));
        self.total.saturating_add(running.unwrap_or_default())
    }

    fn minutes(&self, now: Instant) -> u32 {
        u32::try_from(self.elapsed(now).as_secs() / 60).unwrap_or(u32::MAX)
    }
}

#[derive(Clone, Copy, Debug)]
struct State {
    temperature: u16,
    spare: u8,
    power_cycles: u64,
    unsafe_shutdowns: u64,
    power: Stopwatch,
    above_warning: Stopwatch,
    above_critical: Stopwatch,
}

/// What the SMART page says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vitals {
    /// Kelvin.
    pub(crate) temperature: u16,
    /// Percent.
    pub(crate) spare: u8,
    pub(crate) power_cycles: u64,
    pub(crate) power_on_hours: u64,
    pub(crate) unsafe_shutdowns: u64,
    pub(crate) warning_minutes: u32,
    pub(crate) critical_minutes: u32,
}

#[derive(Debug)]
pub(crate) struct Health(Mutex<State>);

impl Health {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State {
            temperature: ROOM_TEMPERATURE,
            spare: 100,
            power_cycles: 0,
            unsafe_shutdowns: 0,
            power: Stopwatch::default(),
            above_warning: Stopwatch::default(),
            above_critical: Stopwatch::default(),
        }))
    }

    /// There is power, if there was none.
    pub(crate) fn power_on(&self) {
        let mut state = lock(&self.0);
        if state.power.since.is_some() {
            return;
        }
        state.power_cycles = state.power_cycles.saturating_add(1);
        state.set_power(true, Instant::now());
    }

    /// `safe`: after a shutdown, or there was nothing to shut down.
    pub(crate) fn power_off(&self, safe: bool) {
        let mut state = lock(&self.0);
        if state.power.since.is_none() {
            return;
        }
        state.set_power(false, Instant::now());
        if !safe {
            state.unsafe_shutdowns = state.unsafe_shutdowns.saturating_add(1);
        }
    }

    pub(crate) fn set_temperature(&self, kelvin: u16) {
        let mut state = lock(&self.0);
        state.temperature = kelvin;
        let on = state.power.since.is_some();
        state.set_power(on, Instant::now());
    }

    pub(crate) fn set_spare(&self, percent: u8) {
        lock(&self.0).spare = percent.min(100);
    }

    pub(crate) fn vitals(&self) -> Vitals {
        lock(&self.0).vitals(Instant::now())
    }

    pub(crate) fn dump(&self) -> Value {
        let vitals = self.vitals();
        json!({
            "temperature": vitals.temperature,
            "available_spare": vitals.spare,
            "power_cycles": vitals.power_cycles,
            "power_on_hours": vitals.power_on_hours,
            "unsafe_shutdowns": vitals.unsafe_shutdowns,
        })
    }
}

impl State {
    fn set_power(&mut self, on: bool, now: Instant) {
        self.power.set(on, now);
        let warning = on && self.temperature >= WARNING_TEMPERATURE;
        self.above_warning.set(warning, now);
        let critical = on && self.temperature >= CRITICAL_TEMPERATURE;
        self.above_critical.set(critical, now);
    }

    fn vitals(&self, now: Instant) -> Vitals {
        Vitals {
            temperature: self.temperature,
            spare: self.spare,
            power_cycles: self.power_cycles,
            power_on_hours: self.power.elapsed(now).as_secs() / 3600,
            unsafe_shutdowns: self.unsafe_shutdowns,
            warning_minutes: self.above_warning.minutes(now),
            critical_minutes: self.above_critical.minutes(now),
        }
    }
}

impl Shared {
    /// Critical Warning of the SMART page.
    pub(crate) fn critical_warning(&self) -> u8 {
        let vitals = self.health.vitals();
        let outside = lock(&self.features).is_temperature_outside(vitals.temperature);
        let spare = vitals.spare < SPARE_THRESHOLD;
        u8::from(outside) * critical_warning::TEMPERATURE
            + u8::from(spare) * critical_warning::SPARE
            + u8::from(self.faults.read_only()) * critical_warning::READ_ONLY
    }

    /// What the critical warnings depend on has changed: tells the host if it wants to hear.
    pub(crate) fn check_health(&self) {
        let warning = self.critical_warning();
        lock(&self.events).health(warning);
        self.wake.notify();
    }

    /// Whether a loss of power now is one that the host was not prepared for.
    pub(crate) fn is_unsafe_to_lose_power(&self) -> bool {
        let registers = lock(&self.registers);
        registers.cc.en() && registers.csts.shst() != shst::COMPLETE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_adds_up_while_the_power_is_on() {
        let health = Health::new();
        let start = Instant::now();
        let after = |minutes: u64| start + Duration::from_secs(60 * minutes);
        let mut state = *lock(&health.0);
        state.set_power(true, start);
        state.temperature = WARNING_TEMPERATURE;
        state.set_power(true, after(60));
        state.temperature = CRITICAL_TEMPERATURE;
        state.set_power(true, after(90));
        let vitals = state.vitals(after(120));
        assert_eq!(
            (
                vitals.power_on_hours,
                vitals.warning_minutes,
                vitals.critical_minutes
            ),
            (2, 60, 30)
        );
        state.set_power(false, after(121));
        let vitals = state.vitals(after(10_000));
        assert_eq!((vitals.power_on_hours, vitals.critical_minutes), (2, 31));
    }

    #[test]
    fn a_power_cycle_is_counted_once() {
        let health = Health::new();
        health.power_on();
        health.power_off(false);
        health.power_off(false);
        health.power_on();
        health.power_off(true);
        let vitals = health.vitals();
        assert_eq!((vitals.power_cycles, vitals.unsafe_shutdowns), (2, 1));
    }
}
