//! SMART / Health Information (Base 5.16.1.3).

use zerocopy::FromZeros;
use zerocopy::little_endian::{U16, U32, U64};

use crate::controller::Shared;
use crate::counters::get;
use crate::health::SPARE_THRESHOLD;
use crate::locks::lock;
use crate::spec::log::Smart;

pub(super) fn page(shared: &Shared) -> Smart {
    let counters = &shared.counters;
    let wide = |value| [U64::new(value), U64::new(0)];
    let units = |bytes| wide(get(bytes).div_ceil(512 * 1000));
    let vitals = shared.health.vitals();
    let mut smart = Smart::new_zeroed();
    smart.critical_warning = shared.critical_warning();
    smart.temperature = U16::new(vitals.temperature);
    smart.available_spare = vitals.spare;
    smart.available_spare_threshold = SPARE_THRESHOLD;
    smart.data_units_read = units(&counters.bytes_read);
    smart.data_units_written = units(&counters.bytes_written);
    smart.host_reads = wide(get(&counters.host_reads));
    smart.host_writes = wide(get(&counters.host_writes));
    smart.busy_time = wide(shared.gate.busy_time().as_secs() / 60);
    smart.power_cycles = wide(vitals.power_cycles);
    smart.power_on_hours = wide(vitals.power_on_hours);
    smart.unsafe_shutdowns = wide(vitals.unsafe_shutdowns);
    smart.media_errors = wide(get(&counters.media_errors));
    smart.error_entries = wide(lock(&shared.errors).count);
    smart.warning_temperature_time = U32::new(vitals.warning_minutes);
    smart.critical_temperature_time = U32::new(vitals.critical_minutes);
    smart
}
