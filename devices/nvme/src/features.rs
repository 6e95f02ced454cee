//! Features: values that the host sets and gets (Base 5.27.1, NVM 4.1.3).
//!
//! [`Features`] is one set of values. A controller has two: the current one, and the saved one that a reset makes
//! current. The default values are [`Features::new`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::events;
use crate::health::WARNING_TEMPERATURE;
use crate::spec::command::feature;
use crate::spec::status::Status;

/// A feature that the controller has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Feature {
    pub(crate) fid: u8,
    pub(crate) saveable: bool,
    /// Each namespace has its own value.
    pub(crate) per_namespace: bool,
    /// Bytes of data that go with it, beside dword 11 and the completion's dword 0.
    pub(crate) data: u64,
}

const fn feature(fid: u8, saveable: bool) -> Feature {
    Feature {
        fid,
        saveable,
        per_namespace: false,
        data: 0,
    }
}

const FEATURES: &[Feature] = &[
    feature(feature::ARBITRATION, true),
    feature(feature::POWER_MANAGEMENT, false),
    feature(feature::TEMPERATURE_THRESHOLD, true),
    Feature {
        per_namespace: true,
        ..feature(feature::ERROR_RECOVERY, true)
    },
    feature(feature::VOLATILE_WRITE_CACHE, true),
    feature(feature::NUMBER_OF_QUEUES, false),
    feature(feature::INTERRUPT_COALESCING, true),
    feature(feature::INTERRUPT_VECTOR_CONFIG, true),
    feature(feature::WRITE_ATOMICITY, true),
    feature(feature::ASYNC_EVENT_CONFIG, true),
    Feature {
        data: 8,
        ..feature(feature::TIMESTAMP, false)
    },
    feature(feature::SANITIZE_CONFIG, true),
    feature(feature::SOFTWARE_PROGRESS_MARKER, true),
];

/// The feature `fid`, if the controller has it.
pub(crate) fn find(fid: u8) -> Option<&'static Feature> {
    FEATURES.iter().find(|feature| feature.fid == fid)
}

/// Feature Identifiers Supported and Effects (Base 5.16.1.18).
pub(crate) fn effects_page() -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const NAMESPACE: u32 = 1 << 20;
    const CONTROLLER: u32 = 1 << 21;
    let effects = |fid| match find(fid) {
        Some(feature) if feature.per_namespace => SUPPORTED | NAMESPACE,
        Some(_) => SUPPORTED | CONTROLLER,
        None => 0,
    };
    (0..=u8::MAX)
        .flat_map(|fid| effects(fid).to_le_bytes())
        .collect()
}

/// When completions of an interrupt vector are to be signalled (Base 5.27.1.6, 5.27.1.7): dword 11 of the feature, or 0
/// where it does not apply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Coalescing(pub(crate) u16);

impl Coalescing {
    /// Aggregation Time: longest that a completion waits for its interrupt. Zero: none waits.
    pub(crate) fn time(self) -> Duration {
        let [_, time] = self.0.to_le_bytes();
        Duration::from_micros(u64::from(time) * 100)
    }

    /// Aggregation Threshold: completions that make an interrupt without waiting, 1 to 256.
    pub(crate) fn threshold(self) -> u32 {
        let [threshold_z, _] = self.0.to_le_bytes();
        u32::from(threshold_z) + 1
    }
}

/// The controller's clock, as the host set it (Base 5.27.1.10).
#[derive(Clone, Copy, Debug)]
struct Timestamp {
    /// Milliseconds since 1970 when it was set; 0 at a reset.
    milliseconds: u64,
    at: Instant,
    /// Timestamp Origin: set by the host.
    set: bool,
}

impl Timestamp {
    const MASK: u64 = (1 << 48) - 1;

    fn at_reset() -> Self {
        Self {
            milliseconds: 0,
            at: Instant::now(),
            set: false,
        }
    }

    fn data(&self) -> [u8; 8] {
        let passed = u64::try_from(self.at.elapsed().as_millis()).unwrap_or(Self::MASK);
        let now = self.milliseconds.wrapping_add(passed) & Self::MASK;
        // Synch is clear: it counts without a stop. Origin is in bits 3:1 of byte 6.
        (now | u64::from(self.set) << 49).to_le_bytes()
    }
}

/// A set of values.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    arbitration: u32,
    over_temperature: u16,
    under_temperature: u16,
    /// By namespace; 0 where there is none.
    error_recovery: BTreeMap<u32, u32>,
    pub(crate) write_cache: bool,
    /// I/O submission and completion queues that the host may create.
    pub(crate) queues: (u16, u16),
    max_queues: u16,
    coalescing: u16,
    /// Coalescing Disable of each vector.
    coalescing_disabled: Vec<bool>,
    write_atomicity: u32,
    async_events: u32,
    timestamp: Timestamp,
    /// No-Deallocate Response Mode: Sanitize deallocates though it is asked not to, and says so.
    pub(crate) deallocates_anyway: bool,
    software_progress: u8,
}

/// What dword 11 addresses, taken apart once.
struct Selector {
    vector: usize,
    /// TMPSEL.
    sensor: u32,
    /// THSEL.
    threshold: u32,
}

impl Selector {
    fn new(cdw11: u32) -> Self {
        Self {
            vector: (cdw11 & 0xffff) as usize,
            sensor: (cdw11 >> 16) & 0xf,
            threshold: (cdw11 >> 20) & 3,
        }
    }
}

/// TMPSEL: the composite temperature, which has the only sensor.
const COMPOSITE: u32 = 0;
/// TMPSEL of Set Features: all sensors.
const ALL_SENSORS: u32 = 0xf;

impl Features {
    /// The default values.
    pub(crate) fn new(io_queues: u16) -> Self {
        Self {
            arbitration: 7,
            over_temperature: WARNING_TEMPERATURE,
            under_temperature: 0,
            error_recovery: BTreeMap::new(),
            write_cache: true,
            queues: (io_queues, io_queues),
            max_queues: io_queues,
            coalescing: 0,
            coalescing_disabled: vec![false; usize::from(io_queues) + 1],
            write_atomicity: 0,
            async_events: 0,
            timestamp: Timestamp::at_reset(),
            deallocates_anyway: false,
            software_progress: 0,
        }
    }

    /// These values as a reset makes them current: the clock starts again.
    pub(crate) fn after_reset(&self) -> Self {
        Self {
            timestamp: Timestamp::at_reset(),
            ..self.clone()
        }
    }

    /// Whether `temperature` is outside the host's thresholds.
    pub(crate) fn is_temperature_outside(&self, temperature: u16) -> bool {
        temperature >= self.over_temperature || temperature <= self.under_temperature
    }

    /// The Asynchronous Event Configuration.
    pub(crate) fn async_events(&self) -> u32 {
        self.async_events
    }

    /// How completions with interrupt vector `vector` are signalled. Those of the admin queue never wait.
    pub(crate) fn coalescing(&self, vector: u16) -> Coalescing {
        let disabled = self.coalescing_disabled.get(usize::from(vector));
        let applies = vector != 0 && disabled == Some(&false);
        Coalescing(if applies { self.coalescing } else { 0 })
    }

    /// The value of feature `fid`, as Get Features returns it in dword 0. `nsid` matters to a feature of
    /// namespaces.
    pub(crate) fn value(&self, fid: u8, cdw11: u32, nsid: u32) -> Result<u32, Status> {
        let selector = Selector::new(cdw11);
        Ok(match fid {
            feature::ARBITRATION => self.arbitration,
            // There is one power state.
            feature::POWER_MANAGEMENT => 0,
            feature::TEMPERATURE_THRESHOLD => match (selector.sensor, selector.threshold) {
                (COMPOSITE, 0) => self.over_temperature.into(),
                (COMPOSITE, 1) => self.under_temperature.into(),
                _ => return Err(Status::INVALID_FIELD),
            },
            feature::ERROR_RECOVERY => self.error_recovery.get(&nsid).copied().unwrap_or(0),
            feature::VOLATILE_WRITE_CACHE => self.write_cache.into(),
            feature::NUMBER_OF_QUEUES => {
                u32::from(self.queues.0 - 1) | u32::from(self.queues.1 - 1) << 16
            }
            feature::INTERRUPT_COALESCING => self.coalescing.into(),
            feature::INTERRUPT_VECTOR_CONFIG => {
                let disabled = self.coalescing_disabled.get(selector.vector);
                let disabled = *disabled.ok_or(Status::INVALID_FIELD)?;
                (cdw11 & 0xffff) | u32::from(disabled) << 16
            }
            feature::WRITE_ATOMICITY => self.write_atomicity,
            feature::ASYNC_EVENT_CONFIG => self.async_events,
            feature::TIMESTAMP => 0,
            feature::SANITIZE_CONFIG => self.deallocates_anyway.into(),
            feature::SOFTWARE_PROGRESS_MARKER => self.software_progress.into(),
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// The namespace `nsid` was deleted: one that is created in its place begins with the default values.
    pub(crate) fn forget_namespace(&mut self, nsid: u32) {
        self.error_recovery.remove(&nsid);
    }

    /// The data of a feature that has any.
    pub(crate) fn data(&self, fid: u8) -> Option<[u8; 8]> {
        (fid == feature::TIMESTAMP).then(|| self.timestamp.data())
    }

    /// Sets feature `fid`, for the namespaces `nsids` where it is one of namespaces.
    pub(crate) fn set(&mut self, fid: u8, cdw11: u32, nsids: &[u32]) -> Result<(), Status> {
        let selector = Selector::new(cdw11);
        let low = (cdw11 & 0xffff) as u16;
        match fid {
            feature::ARBITRATION => self.arbitration = cdw11,
            feature::POWER_MANAGEMENT if cdw11 & 0x1f == 0 => {}
            feature::TEMPERATURE_THRESHOLD => match (selector.sensor, selector.threshold) {
                (COMPOSITE | ALL_SENSORS, 0) => self.over_temperature = low,
                (COMPOSITE | ALL_SENSORS, 1) => self.under_temperature = low,
                _ => return Err(Status::INVALID_FIELD),
            },
            // DULBE (bit 16) needs a namespace that reports deallocated blocks.
            feature::ERROR_RECOVERY if cdw11 >> 16 == 0 => {
                self.error_recovery
                    .extend(nsids.iter().map(|nsid| (*nsid, cdw11)));
            }
            feature::VOLATILE_WRITE_CACHE => self.write_cache = cdw11 & 1 != 0,
            feature::INTERRUPT_COALESCING => self.coalescing = low,
            feature::INTERRUPT_VECTOR_CONFIG => {
                let disabled = self.coalescing_disabled.get_mut(selector.vector);
                *disabled.ok_or(Status::INVALID_FIELD)? = cdw11 & 1 << 16 != 0;
            }
            feature::WRITE_ATOMICITY => self.write_atomicity = cdw11 & 1,
            feature::ASYNC_EVENT_CONFIG if cdw11 & !events::CONFIGURABLE == 0 => {
                self.async_events = cdw11;
            }
            feature::SANITIZE_CONFIG => self.deallocates_anyway = cdw11 & 1 != 0,
            feature::SOFTWARE_PROGRESS_MARKER => self.software_progress = (cdw11 & 0xff) as u8,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(())
    }

    /// Sets the controller's clock.
    pub(crate) fn set_timestamp(&mut self, data: [u8; 8]) {
        self.timestamp = Timestamp {
            milliseconds: u64::from_le_bytes(data) & Timestamp::MASK,
            at: Instant::now(),
            set: true,
        };
    }

    /// Number of Queues, which is told how many there are in its completion. `exist`: I/O queues were created.
    pub(crate) fn set_queues(&mut self, cdw11: u32, exist: bool) -> Result<u32, Status> {
        let (sqs_z, cqs_z) = ((cdw11 & 0xffff) as u16, (cdw11 >> 16) as u16);
        if sqs_z == u16::MAX || cqs_z == u16::MAX {
            return Err(Status::INVALID_FIELD);
        }
        if exist {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        self.queues = (
            (sqs_z + 1).min(self.max_queues),
            (cqs_z + 1).min(self.max_queues),
        );
        self.value(feature::NUMBER_OF_QUEUES, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn queue_counts_are_negotiated_before_queues_exist() {
        let mut f = Features::new(8);
        assert_eq!(f.set_queues(0x0003_001f, false), Ok(0x0003_0007));
        assert_eq!(
            f.set_queues(0x0003_001f, true),
            Err(Status::COMMAND_SEQUENCE_ERROR)
        );
        assert_eq!(f.set_queues(0xffff, false), Err(Status::INVALID_FIELD));
    }

    #[test]
    fn coalescing_has_units_and_exceptions() {
        let mut f = Features::new(8);
        let of = |f: &Features, vector| {
            let c = f.coalescing(vector);
            (c.time().as_micros(), c.threshold())
        };
        assert_eq!(of(&f, 1), (0, 1));
        f.set(feature::INTERRUPT_COALESCING, 3 << 8 | 9, &[])
            .unwrap();
        f.set(feature::INTERRUPT_VECTOR_CONFIG, 1 << 16 | 2, &[])
            .unwrap();
        let times: Vec<_> = [0, 1, 2, 8, 9].map(|v| of(&f, v).0).into();
        assert_eq!(times, [0, 300, 0, 300, 0]);
        assert_eq!(of(&f, 1).1, 10);
    }

    #[test]
    fn the_clock_runs_from_where_it_was_set() {
        let mut f = Features::new(1);
        let read = |f: &Features| u64::from_le_bytes(f.data(feature::TIMESTAMP).unwrap());
        assert!(read(&f) < 60_000);
        f.set_timestamp((0xffff_1234_5678_9abcu64).to_le_bytes());
        let (origin, now) = (read(&f) >> 48, read(&f) & Timestamp::MASK);
        assert_eq!(origin, 0b10);
        assert!((0x1234_5678_9abc..0x1234_5678_9abc + 60_000).contains(&now));
        assert!(read(&f.after_reset()) < 60_000);
    }

    proptest! {
        /// What is set is what is got, or it is refused and nothing changes.
        #[test]
        fn any_value_is_kept_or_refused(fid in any::<u8>(), cdw11 in any::<u32>()) {
            let mut f = Features::new(4);
            let before = f.value(fid, cdw11, 1);
            let set = f.set(fid, cdw11, &[1]);
            let after = f.value(fid, cdw11, 1);
            if set.is_err() {
                prop_assert_eq!(before, after);
            } else {
                prop_assert!(find(fid).is_some());
                let mut again = f.clone();
                again.set(fid, cdw11, &[1]).unwrap();
                prop_assert_eq!(again.value(fid, cdw11, 1), after);
            }
        }
    }
}
