//! Features: values that the host sets and gets (Base 5.27.1, NVM 4.1.3).

use crate::spec::command::{Command, GetFeaturesCdw10, SetFeaturesCdw10, feature};
use crate::spec::status::Status;

/// Composite temperature that the controller reports, in kelvin.
pub(crate) const TEMPERATURE: u16 = 298;
/// Warning Composite Temperature Threshold, and the default of the Temperature Threshold feature.
pub(crate) const WARNING_TEMPERATURE: u16 = 343;

/// Current values.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    arbitration: u32,
    over_temperature: u16,
    under_temperature: u16,
    error_recovery: u32,
    pub(crate) write_cache: bool,
    /// I/O submission and completion queues that the host may create.
    pub(crate) queues: (u16, u16),
    max_queues: u16,
    coalescing: u32,
    /// Coalescing Disable of each vector.
    coalescing_disabled: Vec<bool>,
    write_atomicity: u32,
    async_events: u32,
}

/// What a command addresses, taken apart once.
struct Selector {
    vector: usize,
    /// TMPSEL names a sensor that exists.
    sensor: bool,
    under: bool,
}

impl Selector {
    fn new(cdw11: u32) -> Self {
        Self {
            vector: (cdw11 & 0xffff) as usize,
            sensor: matches!((cdw11 >> 16) & 0xf, 0 | 0xf),
            under: (cdw11 >> 20) & 3 == 1,
        }
    }
}

impl Features {
    pub(crate) fn new(io_queues: u16) -> Self {
        Self {
            arbitration: 7,
            over_temperature: WARNING_TEMPERATURE,
            under_temperature: 0,
            error_recovery: 0,
            write_cache: true,
            queues: (io_queues, io_queues),
            max_queues: io_queues,
            coalescing: 0,
            coalescing_disabled: vec![false; usize::from(io_queues) + 1],
            write_atomicity: 0,
            async_events: 0,
        }
    }

    /// Whether the temperature is outside the host's thresholds (SMART critical warning, bit 1).
    pub(crate) fn temperature_warning(&self) -> bool {
        TEMPERATURE >= self.over_temperature || TEMPERATURE <= self.under_temperature
    }

    /// Get Features.
    pub(crate) fn get(&self, command: &Command) -> Result<u32, Status> {
        let cdw10 = GetFeaturesCdw10::from_bits(command.cdw10.get());
        let (fid, cdw11) = (cdw10.fid(), command.cdw11.get());
        match cdw10.sel() {
            0 => self.value(fid, cdw11),
            // Nothing is saved, so the saved values are the default ones.
            1 | 2 => Self::new(self.max_queues).value(fid, cdw11),
            3 => {
                self.value(fid, 0)?;
                let namespace_specific = u32::from(fid == feature::ERROR_RECOVERY) << 1;
                Ok(namespace_specific | 1 << 2)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn value(&self, fid: u8, cdw11: u32) -> Result<u32, Status> {
        let selector = Selector::new(cdw11);
        Ok(match fid {
            feature::ARBITRATION => self.arbitration,
            feature::POWER_MANAGEMENT => 0,
            feature::TEMPERATURE_THRESHOLD if selector.sensor && selector.under => {
                self.under_temperature.into()
            }
            feature::TEMPERATURE_THRESHOLD if selector.sensor => self.over_temperature.into(),
            feature::ERROR_RECOVERY => self.error_recovery,
            feature::VOLATILE_WRITE_CACHE => self.write_cache.into(),
            feature::NUMBER_OF_QUEUES => {
                u32::from(self.queues.0 - 1) | u32::from(self.queues.1 - 1) << 16
            }
            feature::INTERRUPT_COALESCING => self.coalescing,
            feature::INTERRUPT_VECTOR_CONFIG => {
                let disabled = self.coalescing_disabled.get(selector.vector);
                let disabled = *disabled.ok_or(Status::INVALID_FIELD)?;
                (cdw11 & 0xffff) | u32::from(disabled) << 16
            }
            feature::WRITE_ATOMICITY => self.write_atomicity,
            feature::ASYNC_EVENT_CONFIG => self.async_events,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// Set Features. `queues_exist` says that I/O queues have been created.
    pub(crate) fn set(&mut self, command: &Command, queues_exist: bool) -> Result<u32, Status> {
        let cdw10 = SetFeaturesCdw10::from_bits(command.cdw10.get());
        let cdw11 = command.cdw11.get();
        let selector = Selector::new(cdw11);
        if cdw10.sv() {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        match cdw10.fid() {
            feature::ARBITRATION => self.arbitration = cdw11,
            // There is one power state.
            feature::POWER_MANAGEMENT if cdw11 & 0x1f == 0 => {}
            feature::TEMPERATURE_THRESHOLD if selector.sensor && selector.under => {
                self.under_temperature = (cdw11 & 0xffff) as u16;
            }
            feature::TEMPERATURE_THRESHOLD if selector.sensor => {
                self.over_temperature = (cdw11 & 0xffff) as u16;
            }
            // DULBE (bit 16) needs a namespace that reports deallocated blocks.
            feature::ERROR_RECOVERY if cdw11 >> 16 == 0 => self.error_recovery = cdw11,
            feature::VOLATILE_WRITE_CACHE => self.write_cache = cdw11 & 1 != 0,
            feature::NUMBER_OF_QUEUES => return self.set_queues(cdw11, queues_exist),
            feature::INTERRUPT_COALESCING => self.coalescing = cdw11 & 0xffff,
            feature::INTERRUPT_VECTOR_CONFIG => {
                let disabled = self.coalescing_disabled.get_mut(selector.vector);
                *disabled.ok_or(Status::INVALID_FIELD)? = cdw11 & 1 << 16 != 0;
            }
            feature::WRITE_ATOMICITY => self.write_atomicity = cdw11 & 1,
            feature::ASYNC_EVENT_CONFIG => self.async_events = cdw11,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }

    fn set_queues(&mut self, cdw11: u32, queues_exist: bool) -> Result<u32, Status> {
        let (sqs_z, cqs_z) = ((cdw11 & 0xffff) as u16, (cdw11 >> 16) as u16);
        if sqs_z == u16::MAX || cqs_z == u16::MAX {
            return Err(Status::INVALID_FIELD);
        }
        if queues_exist {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        self.queues = (
            (sqs_z + 1).min(self.max_queues),
            (cqs_z + 1).min(self.max_queues),
        );
        self.value(feature::NUMBER_OF_QUEUES, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(cdw10: u32, cdw11: u32) -> Command {
        Command {
            cdw10: cdw10.into(),
            cdw11: cdw11.into(),
            ..Command::default()
        }
    }

    #[test]
    fn queue_counts_are_negotiated_before_queues_exist() {
        let mut f = Features::new(8);
        let set = command(u32::from(feature::NUMBER_OF_QUEUES), 0x0003_001f);
        assert_eq!(f.set(&set, false), Ok(0x0003_0007));
        assert_eq!(f.set(&set, true), Err(Status::COMMAND_SEQUENCE_ERROR));
        let bad = command(u32::from(feature::NUMBER_OF_QUEUES), 0x0000_ffff);
        assert_eq!(f.set(&bad, false), Err(Status::INVALID_FIELD));
    }

    #[test]
    fn current_default_and_capabilities_differ() {
        let mut f = Features::new(8);
        f.set(&command(0x06, 0), false).unwrap();
        assert_eq!(f.get(&command(0x06, 0)), Ok(0));
        assert_eq!(f.get(&command(0x06 | 1 << 8, 0)), Ok(1));
        assert_eq!(f.get(&command(0x06 | 3 << 8, 0)), Ok(4));
        assert_eq!(f.get(&command(0x7f, 0)), Err(Status::INVALID_FIELD));
        assert_eq!(
            f.set(&command(0x06 | 1 << 31, 0), false),
            Err(Status::FEATURE_NOT_SAVEABLE)
        );
    }
}
